"""Ahead-of-time compilation: what is launched is listed, what is listed compiles for every target without a spill."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdd_kernels import aot, cases, registry, testing
from lcdd_kernels.triton_kernels import (
    AotSignature,
    LaunchConfig,
    aot_signatures,
    observe_launches,
    triton_dtype,
)

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
TRITON_OPS = [op.name for op in registry.OPS.values() if "triton" in op.backends]


def run_compiling(*command: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Runs Python where Triton compiles: conftest sets the interpreter for this process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def variant(
    kernel: Any, types: Mapping[str, str], constexprs: Mapping[str, Any], config: LaunchConfig
) -> tuple[Any, ...]:
    """What a compiled kernel depends on, alignment of pointers apart."""
    fixed = tuple(sorted((name, str(value)) for name, value in constexprs.items()))
    return kernel.__name__, tuple(sorted(types.items())), fixed, tuple(sorted(config.options("cuda").items()))


def launched_variant(kernel: Any, arguments: Mapping[str, Any], config: LaunchConfig) -> tuple[Any, ...]:
    annotations = inspect.get_annotations(kernel.fn)
    types, constexprs = {}, {}
    for name, value in arguments.items():
        annotation = str(annotations.get(name, ""))
        if "constexpr" in annotation or value is None:
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + triton_dtype(value.dtype)
        else:
            assert annotation, f"{kernel.__name__}: {name} has no type, so its value would choose the variant"
            types[name] = annotation.replace("float", "fp").replace("int", "i")
    return variant(kernel, types, constexprs, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_what_is_launched_is_listed(op: str, dtype: torch.dtype) -> None:
    """Every launch of every op is one of the signatures that are compiled ahead of time."""
    if dtype not in cases.case_of(op).dtypes:
        pytest.skip(f"{op} does not take {dtype}")
    listed = {variant(s.kernel, s.signature, s.constexprs, s.config) for s in aot_signatures()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen: list[tuple[Any, ...]] = []
    with observe_launches(lambda *launch: seen.append(launched_variant(*launch))):
        registry.implementation(op, "triton")(**testing.make_inputs(op, dtype, device))
    assert seen, "no kernel was launched"
    for found in seen:
        assert found in listed, f"not in aot_signatures(): {found}"


def test_signatures_are_complete_and_distinct() -> None:
    """Every argument of every kernel has a type or a value, and no variant is compiled twice."""
    signatures: list[AotSignature] = list(aot_signatures())
    for entry in signatures:
        given = [*entry.signature, *entry.constexprs]
        assert sorted(given) == sorted(entry.kernel.arg_names), f"{entry.kernel.__name__} [{entry.label}]"
        assert set(entry.divisible_by_16) <= set(entry.signature)
    variants = [variant(s.kernel, s.signature, s.constexprs, s.config) + s.divisible_by_16 for s in signatures]
    assert len(set(variants)) == len(variants)
    labels = [(s.kernel.__name__, s.label) for s in signatures]
    assert len(set(labels)) == len(labels)


def test_every_kernel_compiles_without_a_spill_or_a_barrier_in_its_loops() -> None:
    """One configuration of each for every target; the rest by command, `lcdd kernels --aot`."""
    done = run_compiling("-m", "lcdd_kernels.aot", "--first", "--jobs", "1")
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert " 0 problems" in done.stdout
    for kernel in {entry.kernel.__name__ for entry in aot_signatures()}:
        assert f"\n{kernel} " in done.stdout
    labels = [target.label for target in aot.TARGETS.values()]
    assert done.stdout.splitlines()[0].split()[-len(labels) :] == labels


def test_every_kernel_has_a_core_configuration() -> None:
    """What is compiled by `lcdd kernels --aot` leaves no kernel out."""
    kernels = {entry.kernel.__name__ for entry in aot_signatures()}
    assert {entry.kernel.__name__ for entry in aot_signatures() if entry.core} == kernels


def test_amd_takes_no_bound_on_registers() -> None:
    config = LaunchConfig(max_registers=80)
    assert config.options("cuda")["maxnreg"] == 80
    assert "maxnreg" not in config.options("hip")
    assert "maxnreg" not in LaunchConfig().options("cuda")


BAD_KERNELS = """
import sys, types
import triton, triton.language as tl
from lcdd_kernels import aot
from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig

@triton.jit
def copy_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x_ptr + i)
    tl.debug_barrier()
    tl.store(x_ptr + BLOCK + i, values)

@triton.jit
def barrier_kernel(x_ptr, n, BLOCK: tl.constexpr):
    total = 0.0
    for i in range(n):
        total += tl.sum(tl.load(x_ptr + i * BLOCK + tl.arange(0, BLOCK)))
    tl.store(x_ptr, total)

@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined_name)

def entry(kernel, block, registers=None, warps=1, types=(), **more):
    config = LaunchConfig(num_warps=warps, max_registers=registers)
    return AotSignature(kernel=kernel, label=str(block), config=config, signature={"x_ptr": "*fp32", **dict(types)},
                        constexprs={"BLOCK": block}, **more)

module = types.ModuleType("lcdd_kernels.triton_kernels.bad")
module.aot_signatures = lambda: [
    entry(copy_kernel, 64), entry(copy_kernel, 2048, 24), entry(wrong_kernel, 64), entry(copy_kernel, 64, wgmma=True),
    AotSignature(kernel=copy_kernel, label="lacking", config=LaunchConfig(), signature={"y_ptr": "*fp32"}),
    entry(barrier_kernel, 256, warps=4, types=[("n", "i32")]),
    entry(barrier_kernel, 256, warps=4, types=[("n", "i32")], loop_barriers=9),
]
sys.modules[module.__name__] = module
aot.TARGETS["120"] = aot.Target("cuda", 120, 32, -1)
for index, target in ((0, 90), (1, 90), (2, 90), (3, 90), (3, 80), (4, 90), (0, 120), (5, 90), (5, "gfx942"), (6, 90)):
    print(aot.compile_signature("bad", index, str(target)).problem)
"""


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """A spill, too much shared memory, an error of the compiler, missing tensor-core code, a wrong signature, and
    barriers in a loop."""
    script = tmp_path / "bad_kernels.py"  # Triton reads a kernel's source from its file
    script.write_text(BAD_KERNELS)
    done = run_compiling(str(script))
    assert done.returncode == 0, done.stderr
    good, spill, error, wgmma, not_hopper, lacking, shared, *barriers = done.stdout.splitlines()
    assert good == not_hopper == "None"
    assert spill.startswith("spills: ")
    assert error.startswith("does not compile: ")
    assert "undefined_name" in error
    assert wgmma == "uses no wgmma"
    assert lacking == "its signature names ['y_ptr'] in vain and lacks ['x_ptr', 'BLOCK']"
    assert shared.startswith("needs ")
    assert all(re.fullmatch(r"waits at [1-9] barriers in its loops, at most 0 expected", line) for line in barriers[:2])
    assert barriers[2:] == ["None"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--targets", "90,75"], "targets: expected some of"), (["--modules", "gate"], "modules: expected some of")],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        aot.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_are_written_without_fusing_panels_in_vectors_and_gathers_one_by_one() -> None:
    """Bit-identity of W_eff between backends: no fused multiply-add in their PTX, on any target."""
    code = """
from lcdd_kernels import aot
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lcdd_kernels.triton_kernels import delta_step
for entry in delta_step.aot_signatures():
    if "dense aligned" in entry.label and entry.core:
        names = entry.kernel.arg_names
        signature = {name: entry.signature.get(name, "constexpr") for name in names}
        source = ASTSource(entry.kernel, signature, constexprs=dict(entry.constexprs))
        for target in (80, 90):
            options = entry.config.options("cuda")
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            print(entry.kernel.__name__, compiled.asm["ptx"].count("fma.rn"))
from lcdd_kernels.triton_kernels import packed_grad
pack = next(entry for entry in packed_grad.aot_signatures() if entry.label == "i16 elements aligned")
ptx = aot._compile(pack, aot.TARGETS["90"]).asm["ptx"]
print("pack", ptx.count("st.global") - ptx.count("st.global.v4.b32"))
gather = next(entry for entry in delta_step.aot_signatures() if entry.label == "D fp32 G bf16 block aligned")
ptx = aot._compile(gather, aot.TARGETS["90"]).asm["ptx"]
tile = gather.constexprs["BLOCK_M"] * gather.constexprs["BLOCK_N"] // (32 * gather.config.num_warps)
print("gather", ptx.count("ld.global.b16") - tile)
"""
    done = run_compiling("-c", code)
    assert done.returncode == 0, done.stderr
    fused = [line.split() for line in done.stdout.splitlines()]
    for kernel in ("weight_eff_fwd_kernel", "delta_adamw_kernel"):
        counts = [int(count) for name, count in fused if name == kernel]
        assert counts
        assert not any(counts), f"{kernel}: fused multiply-adds {counts}"
    # While a compiler is at hand: a panel is stored 16 bytes at a time.
    assert ["pack", "0"] in fused
    # A packed gradient, the only 16 bits here, one element at a time, although `_GATHERED` promises neighbours.
    assert ["gather", "0"] in fused
    # The search does find them where they are allowed.
    assert any(int(count) for name, count in fused if name == "delta_grad_stats_kernel")
