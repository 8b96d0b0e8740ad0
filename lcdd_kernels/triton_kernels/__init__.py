"""Triton kernels: one module per op stem, and the convention that they all follow.

Importing this package does not import triton; importing one of its modules does (at first use, through `backends`).

The convention, for every module `triton_kernels/X.py`:

1. The docstring holds the formulas; kernels are `X_..._kernel`, launch configurations are frozen dataclasses derived
   from `LaunchConfig`, chosen by rules that do not look at the GPU (shape, dtype and layout only).
2. Every launch goes through `launch(kernel, grid, config, **arguments)`. Integers are named in `do_not_specialize` (no
   hidden variants: one AOT signature is one compiled kernel) and annotated with their type (`n: tl.int32`);
   divisibility is told by a constexpr and `tl.multiple_of` inside. `enable_fp_fusion` is always passed: Triton
   releases differ in its default.
3. `aot_signatures() -> Iterator[AotSignature]` yields every (kernel, configuration) that the launchers of the module
   can choose. `lcdd_kernels.aot` compiles them all for named GPUs without a GPU, and
   `tests/kernels/test_aot.py` records real launches (through the interpreter) and checks that each is in that list.

Adding a kernel: write it, launch it through `launch`, yield its signatures, add the module's stem to `MODULES`.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = [
    "MODULES",
    "AotSignature",
    "LaunchConfig",
    "aot_signatures",
    "launch",
    "observe_launches",
    "triton_dtype",
]

# Stems whose module exposes aot_signatures(); aot.py and the tests go through this list.
MODULES: tuple[str, ...] = (
    "gates",
    "delta_step",
    "gated_linear",
    "gate_sums",
    "swiglu",
    "packed_grad",
    "channel_match",
    "linear_loss",
)

_TRITON_DTYPES: Mapping[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def triton_dtype(dtype: torch.dtype) -> str:
    """Triton's name of a torch dtype ("fp32", "bf16", "i64", ...), as used in `AotSignature.signature`.

    Raises ValueError for a dtype that no kernel here handles (float64 is served by the reference).
    """
    if dtype not in _TRITON_DTYPES:
        raise ValueError(f"dtype: the triton kernels take {sorted(map(str, _TRITON_DTYPES))}, got {dtype}")
    return _TRITON_DTYPES[dtype]


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Compiler options of one launch. Modules derive from it and add their block sizes."""

    num_warps: int = 4
    num_stages: int = 1
    # True lets ptxas and LLVM contract a*b+c. Off wherever bits must agree with other backends: whatever writes W_eff.
    enable_fp_fusion: bool = True
    # A bound on registers a thread. ptxas by itself may spill a few bytes to stay at 64; a bound above says not to.
    # AMD's compiler needs no telling, and takes no such option.
    max_registers: int | None = None

    def options(self, backend: str) -> dict[str, Any]:
        """As Triton names them, for its backend "cuda" or "hip": for a launch, and for `triton.compile`."""
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
        }
        bounded = backend == "cuda" and self.max_registers is not None
        return {**options, "maxnreg": self.max_registers} if bounded else options


@dataclass(frozen=True, kw_only=True)
class AotSignature:
    """One kernel in one configuration, as the launcher would compile it.

    signature: every runtime (not constexpr) argument -> "*bf16" | "*fp32" | "*i64" | "i64" | "i32" | "fp32" ...
    constexprs: every constexpr argument -> value (a dtype is a `tl` dtype), and None for a pointer that is not passed.
    divisible_by_16: names of arguments (pointers, mostly) that the launcher guarantees to be divisible by 16.
    label: what distinguishes this configuration, for the table ("bf16 delta bf16 moments fp32 dense aligned").
    wgmma: tensor-core instructions of Hopper are expected on sm_90.
    loop_barriers: how many barriers its loops may hold.
    core: what LCDD chooses by itself; the rest is compiled by `aot --all`.
    """

    kernel: Any
    label: str
    config: LaunchConfig
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    wgmma: bool = False
    loop_barriers: int = 0
    core: bool = True


BACKEND = "hip" if torch.version.hip else "cuda"  # of the GPUs that this torch drives

_observers: list[Callable[[Any, Mapping[str, Any], LaunchConfig], None]] = []


@contextlib.contextmanager
def observe_launches(observer: Callable[[Any, Mapping[str, Any], LaunchConfig], None]) -> Iterator[None]:
    """Call `observer(kernel, arguments, config)` before every launch inside the context (tests, tracing)."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, /, **arguments: Any) -> None:
    """Launch `kernel[grid](**arguments)` with the options of `config`, on the device of its first tensor argument.

    A grid with a zero in it is no launch. Raises ValueError where a grid axis is beyond CUDA's limits.
    """
    if 0 in grid:
        return
    if grid[0] >= 2**31 or any(extent > 65535 for extent in grid[1:]):
        raise ValueError(f"grid: expected at most (2**31-1, 65535, 65535) programs, got {grid}")
    for observer in _observers:
        observer(kernel, arguments, config)
    device = next((a.device for a in arguments.values() if isinstance(a, torch.Tensor)), None)
    guard = torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](**arguments, **config.options(BACKEND))


def aot_signatures() -> Iterator[AotSignature]:
    """Every kernel of every module in every configuration that its launchers can choose."""
    for stem in MODULES:
        yield from importlib.import_module(f"{__name__}.{stem}").aot_signatures()
