"""The CUDA C++ kernels: they compile for sm_80 and sm_90a without spills (needs nvcc, not a GPU), and they compute what
the reference computes: on a GPU where the library was built, else in an emulation on the CPU.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdd_kernels import BackendUnavailable, backends, cases, cuda, registry, testing, use_backend
from lcdd_kernels.reference.delta_step import DENSE, GateMap, Gradients, Matrices

SOURCES = Path(cuda.__file__).parent / "csrc" / "cuda"
KERNELS = {"delta_step.cu": 4, "pack.cu": 4}  # entry functions, template versions counted
OPS = ("weight_eff_", "delta_grad_stats", "delta_adamw_", "pack_columns")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", KERNELS)
def test_compiles_without_spills(source: str, architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here: the CUDA sources are not compiled")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", "--fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings", "-gencode", target]
    command += ["-I", str(SOURCES.parent), "-c", str(SOURCES / source), "-o", str(tmp_path / "out.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert spills == [("0", "0", "0")] * KERNELS[source], run.stderr


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The sources as C++ for the CPU: `kernel<<<...>>>(` becomes a call of the emulation, see cuda_on_cpu.hpp."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here: the CUDA sources cannot be run on the CPU")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    for header in ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / header).write_text(f'#include "{Path(__file__).with_name("cuda_on_cpu.hpp")}"\n')
    sources = []
    for name in KERNELS:
        text = (SOURCES / name).read_text()
        text, launches = re.subn(r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\(\s*", r"emulation::Launch{\2}.run(\1, ", text)
        assert launches == text.count("emulation::Launch") > 0
        text = text.replace("extern __shared__ uint4 staged[];", "uint4* staged = emulation::dynamic_shared.data();")
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(text.replace(", {});", ", lcdd_adamw{});"))
    library = folder / "libemulated.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w"]
    include = ["-I", str(folder), "-I", str(SOURCES), "-I", str(SOURCES.parent)]
    run = subprocess.run(
        [compiler, *flags, *include, *map(str, sources), "-o", str(library)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture
def on_this_machine(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[str, Callable[[str], Callable[..., Any]]]:
    """(device, op -> implementation): the library on a GPU, or its emulation."""
    if torch.cuda.is_available() and cuda.LIBRARY.exists():
        return "cuda", lambda op: registry.implementation(op, "cuda")
    library = request.getfixturevalue("emulated_library")
    for name, arguments in cuda._SIGNATURES.items():
        getattr(library, name).argtypes = arguments

    def call(function: str, device: torch.device, *arguments: object) -> None:
        assert getattr(library, function)(*arguments, None) == 0

    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    monkeypatch.setattr(cuda, "_library", lambda: library)
    monkeypatch.setattr(cuda, "_call", call)
    monkeypatch.setattr(cuda, "_keep_for_stream", lambda *tables: None)
    return "cpu", lambda op: getattr(cuda, f"{op.rstrip('_')}_cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_matches_the_reference(op: str, dtype: torch.dtype, on_this_machine, poisoned: None) -> None:
    device, implementation = on_this_machine
    case = cases.case_of(op)
    if dtype not in case.dtypes:
        pytest.skip(f"{op} has no case in {dtype}")
    for size in (1, 4):
        inputs = testing.make_inputs(op, dtype, device, size=size)
        reference = registry.implementation(op, "reference")
        rows = testing.compare_runs(
            case,
            (op, "cuda", dtype),
            got=testing.run(case, implementation(op), inputs),
            expression=testing.run(case, case.expression, inputs),
            truth=testing.run(case, reference, testing.upcast(inputs)),
            same_dtype=testing.run(case, reference, testing.make_inputs(op, dtype, "cpu", size=size)),
        )
        testing.assert_calibrated(rows)


def test_several_tiles_in_both_directions(on_this_machine) -> None:
    """A matrix of several tiles whose rows start on 16 bytes (vector loads) beside one whose rows do not."""
    device, implementation = on_this_machine
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 2064), (131, 1029)]
    grads, deltas, bases = (
        [torch.randn(shape, generator=generator).to(torch.bfloat16).to(device) for shape in shapes] for _ in range(3)
    )
    gate = (torch.rand(2300, generator=generator) - 0.3).clamp(0, 1).to(device)
    maps = [GateMap(0, 80), GateMap(5, 140, 1029 // 3, 3)]
    gradients = Gradients(tensors=grads, col_panels=[None] * 2, layouts=[DENSE] * 2)
    results = []
    for run in (implementation, lambda op: registry.implementation(op, "reference")):
        weights = [torch.full_like(base, float("nan")) for base in bases]
        lists = {"weights": weights, "bases": bases, "deltas": deltas}
        matrices = Matrices(maps=maps, n_gates=gate.numel(), **lists)
        d_gate, norm = run("delta_grad_stats")(matrices, gradients, gate)
        run("weight_eff_")(matrices, gate)
        results.append((d_gate, norm, weights))
    (d_gate, norm, weights), (expected, expected_norm, expected_weights) = results
    torch.testing.assert_close(d_gate, expected, rtol=1e-5, atol=1e-3)  # sums of 2,000 terms of order one
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)
    for weight, expected_weight in zip(weights, expected_weights, strict=True):
        assert testing.bits_equal(weight, expected_weight)


def test_rows_too_long_for_shared_memory(on_this_machine) -> None:
    device, implementation = on_this_machine
    x = torch.arange(3 * 30000, dtype=torch.float32, device=device).view(3, 30000)
    cols = torch.tensor([29999, 0, 7, 15000], device=device)
    packed = implementation("pack_columns")(x, cols, 8)
    assert torch.equal(packed, torch.nn.functional.pad(x[:, cols], (0, 4)))


def test_ships_disabled() -> None:
    """Without a library that somebody built, an explicit request says why there is none."""
    if cuda.LIBRARY.exists():
        pytest.skip(f"{cuda.LIBRARY.name} was built here")
    with pytest.raises(BackendUnavailable, match="not enabled: not yet measured faster than Triton on a GPU"):
        registry.implementation("weight_eff_", "cuda")
    with use_backend("cuda"), pytest.raises(BackendUnavailable):
        backends.choose("weight_eff_", torch.zeros(1))
