"""The CPU library (`csrc/`, a C ABI) behind ctypes: `X_native` with the parameters of `X_ref`.

One call for a whole model; fp32 arithmetic, storage fp32, bf16 or fp16. The instruction set is chosen at run time
(AVX-512, AVX2 or plain C++); all three, and every thread count, give the same bits. Importing this module loads
nothing: `require` does, at first use, and raises `BackendUnavailable` where the library was not built, is of another
version, or does not load.
"""

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcdd_kernels.checks import fail
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, LAYOUTS, PANELS
from lcdd_kernels.reference.gates import KINDS
from lcdd_kernels.registry import BackendUnavailable

ABI_VERSION = 1
LIBRARY = Path(__file__).with_name("liblcdd_native.so")
LEVELS = ("scalar", "avx2", "avx512")  # position = code in lcdd_native.h

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATUS = {1: "out of memory", 3: "this CPU cannot run that instruction set"}
_PACKED_MISMATCH = 2

_int, _i64, _u64, _float, _ptr = ctypes.c_int, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`lcdd_matrix` of lcdd_native.h."""

    _fields_ = (
        *((name, _ptr) for name in ("weight", "base", "delta", "exp_avg", "exp_avg_sq", "grad", "grad_cols")),
        *((name, _i64) for name in ("rows", "cols", "row_start", "col_start", "head_dim", "repeat")),
        *((name, _i64) for name in ("open_rows", "open_cols", "weight_dtype", "delta_dtype")),
        *((name, _i64) for name in ("exp_avg_dtype", "exp_avg_sq_dtype", "grad_dtype", "layout")),
    )


class AdamW(ctypes.Structure):
    """`lcdd_adamw` of lcdd_native.h."""

    _fields_ = tuple(
        (name, _float)
        for name in (
            "grad_scale", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "inverse_bias2_sqrt",
            "eps",
        )
    )  # fmt: skip


def adamw_numbers(
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, grad_scale: float
) -> AdamW:
    """The factors that pass B multiplies by, formed in float64."""
    return AdamW(
        grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), eps,
    )  # fmt: skip


def pointer(name: str, value: Tensor, numel: int, device: str, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> int:
    """The tensor's address, after the checks without which the library would read or write out of bounds."""
    if value.device.type != device or value.dtype not in dtypes or not value.is_contiguous() or value.numel() != numel:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(
            name,
            f"a contiguous {expected} tensor of {numel} elements on {device}",
            f"{value.dtype} of shape {list(value.shape)}, strides {value.stride()}, on {value.device}",
        )
    return value.data_ptr()


def matrix_table(
    matrices: dict[str, Sequence[Tensor]],
    gate_maps: Tensor,
    n_gates: int,
    device: str,
    *,
    grads: Sequence[Tensor] = (),
    col_panels: Sequence[Tensor] = (),
    layouts: Sequence[int] = (),
) -> ctypes.Array[Matrix]:
    """The pointer table of the C functions. `matrices`: Matrix field -> one tensor `[out, in]` per matrix, "delta"
    among them. The tensors must outlive the call that takes the table.
    """
    table = (Matrix * len(gate_maps))()
    panels = iter(col_panels)
    for m, (entry, delta, where) in enumerate(zip(table, matrices["delta"], gate_maps.tolist(), strict=True)):
        n_out, n_in = delta.shape
        entry.rows, entry.cols = n_out, n_in
        entry.row_start, entry.col_start, entry.head_dim, entry.repeat = where
        row_start, col_start, head_dim, repeat = where
        last = max(row_start + n_out, col_start + -(-n_in // repeat))
        if min(row_start, col_start) < 0 or min(head_dim, repeat) < 1 or last > n_gates or n_in % repeat:
            raise fail(f"gate_maps[{m}]", f"gates within [0, {n_gates}) for a matrix {n_out}x{n_in}", where)
        for field, tensors in matrices.items():
            value = tensors[m]
            setattr(entry, field, pointer(f"{field}[{m}]", value, n_out * n_in, device, tuple(_DTYPES)))
            if field != "base":
                setattr(entry, f"{field}_dtype", _DTYPES[value.dtype])
            elif value.dtype != matrices["weight"][m].dtype:
                raise fail(f"base[{m}]", f"the weight's {matrices['weight'][m].dtype}", value.dtype)
        if grads:
            _set_grad(entry, m, grads[m], panels, layouts[m], device)
    return table


def _set_grad(entry: Matrix, m: int, grad: Tensor, panels: Iterator[Tensor], layout: int, device: str) -> None:
    entry.layout = layout
    entry.grad_dtype = _DTYPES.get(grad.dtype, 0)
    rows, cols = entry.rows, entry.cols
    if layout != DENSE:
        entry.open_rows = rows = grad.shape[0]
    if layout == BLOCK:
        entry.open_cols = cols = grad.shape[1]
    entry.grad = pointer(f"grads[{m}]", grad, rows * cols, device, tuple(_DTYPES))
    if layout == PANELS:
        panel = next(panels)
        entry.open_cols = panel.shape[1]
        entry.grad_cols = pointer(
            f"col_panels of grads[{m}]", panel, entry.rows * entry.open_cols, device, (grad.dtype,)
        )


class NativeLibrary:
    """The library at one dispatch level. `threads`: as torch has it at the time of the call, unless given."""

    def __init__(self, path: Path = LIBRARY, level: str | None = None, threads: int | None = None) -> None:
        if level is not None and level not in LEVELS:
            raise fail("level", f"one of {LEVELS}", repr(level))
        self._c = _load(path)
        best = self._c.lcdd_best_level()
        self._level = best if level is None else LEVELS.index(level)
        self.level = LEVELS[self._level]
        self._threads = threads
        if self._level > best:
            raise BackendUnavailable(f"this CPU runs {LEVELS[: best + 1]}, not {level!r}")

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self._threads is None else self._threads

    def gate_values(
        self, logits: Tensor, *, kind: str, seed: int, step: int, training: bool, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        n = logits.numel()
        gate, expected_l0 = torch.empty_like(logits), logits.new_empty(())
        self._call(
            "lcdd_gate_values", pointer("logits", logits, n, "cpu"), n, KINDS.index(kind), seed, step, training, offset,
            gate.data_ptr(), expected_l0.data_ptr(), self.threads,
        )  # fmt: skip
        return gate, expected_l0

    def gate_logits_grad(
        self, logits: Tensor, d_gate: Tensor, *, kind: str, seed: int, step: int, training: bool, l0_weight: float,
        offset: int = 0,
    ) -> Tensor:  # fmt: skip
        n = logits.numel()
        d_logits = torch.empty_like(logits)
        self._call(
            "lcdd_gate_logits_grad", pointer("logits", logits, n, "cpu"), pointer("d_gate", d_gate, n, "cpu"), n,
            KINDS.index(kind), seed, step, training, offset, l0_weight, d_logits.data_ptr(), self.threads,
        )  # fmt: skip
        return d_logits

    def open_indices(self, gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, groups = gate.numel(), offsets.numel() - 1
        where = pointer("offsets", offsets, groups + 1, "cpu", (torch.int64,))
        if groups < 0 or offsets[0] != 0 or offsets[-1] != n or bool((offsets.diff() < 0).any()):
            raise fail("offsets", f"ascending int64 from 0 to {n}", offsets.tolist())
        indices, rank = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
        counts = torch.empty(groups, dtype=torch.int32)
        self._call(
            "lcdd_open_indices", pointer("gate", gate, n, "cpu"), where, groups, indices.data_ptr(), counts.data_ptr(),
            rank.data_ptr(),
        )  # fmt: skip
        return indices, counts, rank

    def weight_eff(
        self,
        weights: Sequence[Tensor],
        bases: Sequence[Tensor],
        deltas: Sequence[Tensor],
        gate: Tensor,
        gate_maps: Tensor,
    ) -> None:
        n = gate.numel()
        table = matrix_table({"weight": weights, "base": bases, "delta": deltas}, gate_maps, n, "cpu")
        self._call("lcdd_weight_eff", table, len(table), pointer("gate", gate, n, "cpu"), self._level, self.threads)

    def delta_grad_stats(
        self,
        grads: Sequence[Tensor],
        col_panels: Sequence[Tensor],
        deltas: Sequence[Tensor],
        gate: Tensor,
        gate_maps: Tensor,
        layouts: Sequence[int],
        rank: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n = gate.numel()
        table = matrix_table(
            {"delta": deltas}, gate_maps, n, "cpu", grads=grads, col_panels=col_panels, layouts=layouts
        )
        d_gate, sq_norm = torch.empty_like(gate), gate.new_empty(())
        self._call(
            "lcdd_grad_stats", table, len(table), pointer("gate", gate, n, "cpu"),
            rank_pointer(rank, layouts, n, "cpu"), n, d_gate.data_ptr(), sq_norm.data_ptr(), self._level, self.threads,
        )  # fmt: skip
        return d_gate, sq_norm

    def delta_adamw(
        self,
        weights: Sequence[Tensor],
        bases: Sequence[Tensor],
        deltas: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        grads: Sequence[Tensor],
        col_panels: Sequence[Tensor],
        gate_old: Tensor,
        gate_new: Tensor,
        gate_maps: Tensor,
        layouts: Sequence[int],
        rank: Tensor | None,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float,
    ) -> None:
        n = gate_old.numel()
        fields = {"weight": weights, "base": bases, "delta": deltas, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
        table = matrix_table(fields, gate_maps, n, "cpu", grads=grads, col_panels=col_panels, layouts=layouts)
        hyper = adamw_numbers(
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, grad_scale=grad_scale
        )
        self._call(
            "lcdd_delta_adamw", table, len(table), pointer("gate_old", gate_old, n, "cpu"),
            pointer("gate_new", gate_new, n, "cpu"), rank_pointer(rank, layouts, n, "cpu"), ctypes.byref(hyper),
            self._level, self.threads,
        )  # fmt: skip

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._c, function)(*arguments)
        if status == _PACKED_MISMATCH:
            raise fail("grads", "packed gradients of the open rows and columns that rank describes", "another shape")
        if status != 0:
            raise RuntimeError(f"{function}: {_STATUS.get(status, f'status {status}')}")


def rank_pointer(rank: Tensor | None, layouts: Sequence[int], n: int, device: str) -> int | None:
    if rank is not None:
        return pointer("rank", rank, n, device, (torch.int32,))
    if any(layout != DENSE for layout in layouts):
        raise fail("rank", f"the rank of open_indices (layouts other than {LAYOUTS[DENSE]!r})", None)
    return None


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "lcdd_gate_values": (_ptr, _i64, _int, _u64, _u64, _int, _u64, _ptr, _ptr, _int),
    "lcdd_gate_logits_grad": (_ptr, _ptr, _i64, _int, _u64, _u64, _int, _u64, _float, _ptr, _int),
    "lcdd_open_indices": (_ptr, _ptr, _i64, _ptr, _ptr, _ptr),
    "lcdd_weight_eff": (_ptr, _i64, _ptr, _int, _int),
    "lcdd_grad_stats": (_ptr, _i64, _ptr, _ptr, _i64, _ptr, _ptr, _int, _int),
    "lcdd_delta_adamw": (_ptr, _i64, _ptr, _ptr, _ptr, _ptr, _int, _int),
    "lcdd_best_level": (),
    "lcdd_abi_version": (),
}


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise BackendUnavailable(
            f"{path.name} was not built (the install log says why; it needs CMake and a C++ compiler)"
        )
    library = ctypes.CDLL(str(path))
    version = library.lcdd_abi_version()
    if version != ABI_VERSION:
        raise BackendUnavailable(f"{path.name} has ABI {version}, this package {ABI_VERSION}: install lcdd again")
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


@functools.cache
def _shared() -> NativeLibrary:
    return NativeLibrary()


def require(op: str) -> None:
    """Loads the library. Raises `BackendUnavailable` or `OSError` with the reason where it cannot serve `op`."""
    _shared()


def __getattr__(name: str) -> object:
    """`X_native` is method X of the shared library object: same parameters as `X_ref`, written down once."""
    method = name.removesuffix("_native")
    if method == name or not hasattr(NativeLibrary, method):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_shared(), method)
