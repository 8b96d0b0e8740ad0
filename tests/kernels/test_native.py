"""The CPU library: every instruction set this machine has, thread counts, conversions, unaligned memory, bad input, and
an installation without it. (That it matches the reference op by op is also in test_gates.py and test_delta_step.py.)
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lcdd_kernels as k
from lcdd_kernels import BackendUnavailable, backends, cases, native, registry, testing, use_backend
from lcdd_kernels.cases.delta_step import gate_sample, pack
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, PANELS, AdamWStep, GateMap, Gradients, Matrices
from lcdd_kernels.reference.gates import open_indices_ref

ROOT = Path(__file__).parents[2]
OPS = {
    "gate_values": (torch.float32,),
    "gate_logits_grad": (torch.float32,),
    "open_indices": (torch.float32,),
    "weight_eff_": (torch.float32, torch.bfloat16, torch.float16),
    "delta_grad_stats": (torch.float32, torch.bfloat16, torch.float16),
    "delta_adamw_": (torch.float32, torch.bfloat16, torch.float16),
}
HALVES = (torch.bfloat16, torch.float16)


def library(level: str | None = None, threads: int | None = None) -> native.NativeLibrary:
    try:
        return native.NativeLibrary(level=level, threads=threads)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


def levels() -> list[native.NativeLibrary]:
    """The library at every level that this CPU runs, plain C++ first."""
    best = library().level
    return [library(level) for level in native.LEVELS[: native.LEVELS.index(best) + 1]]


def method(lib: native.NativeLibrary, op: str) -> Any:
    return getattr(lib, op.rstrip("_"))


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op, dtypes in OPS.items() for dtype in dtypes])
def test_every_level_is_as_exact_as_pytorch(op: str, dtype: torch.dtype, level: str, poisoned: None) -> None:
    case, lib = cases.case_of(op), library(level)
    inputs = testing.make_inputs(op, dtype, size=3)
    reference = registry.implementation(op, "reference")
    rows = testing.compare_runs(
        case,
        (op, f"native {level}", dtype),
        got=testing.run(case, method(lib, op), inputs),
        expression=testing.run(case, case.expression, inputs),
        truth=testing.run(case, reference, testing.upcast(inputs)),
        same_dtype=testing.run(case, reference, inputs),
    )
    testing.assert_calibrated(rows)


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_threads_and_levels_do_not_change_a_bit(op: str) -> None:
    """Sizes that three threads share: several tasks a matrix, several blocks of gates."""
    inputs = testing.make_inputs(op, torch.bfloat16 if len(OPS[op]) > 1 else torch.float32, size=40)
    case = cases.case_of(op)
    expected = testing.run(case, method(library("scalar", threads=1), op), inputs)
    for lib in levels():
        for threads in (1, 2, 3):
            got = testing.run(case, method(library(lib.level, threads), op), inputs)
            for name in case.outputs:
                assert testing.bits_equal(got[name], expected[name]), (lib.level, threads, name)


def test_work_is_cut_alike_for_many_matrices() -> None:
    """Pass A over a list whose column sums exceed one workspace (so that it runs in several rounds)."""
    shape, count = (300, 40000), 90  # 3 blocks of 40,000 column sums a matrix; 8 Mi of them fit at a time
    generator = torch.Generator().manual_seed(3)
    grad, delta = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    gate = torch.rand(sum(shape), generator=generator)

    def stats(times: int) -> tuple[Tensor, Tensor]:
        matrices = Matrices(maps=[GateMap(0, shape[0])] * times, n_gates=gate.numel(), deltas=[delta] * times)
        grads = Gradients(tensors=[grad] * times, col_panels=[None] * times, layouts=[DENSE] * times)
        return library().delta_grad_stats(matrices, grads, gate)

    (d_gate, sq_norm), (one_gate, one_norm) = stats(count), stats(1)
    torch.testing.assert_close(d_gate, one_gate * count, rtol=1e-6, atol=0)
    torch.testing.assert_close(sq_norm, one_norm * count, rtol=1e-6, atol=0)


# --- shapes, layouts, dtypes, alignment -------------------------------------------------------------------------------


def unaligned(value: Tensor) -> Tensor:
    """A contiguous copy that starts one element into its storage."""
    return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """One matrix of any shape, its gates anywhere in the vector, any layout, any mixture of dtypes, unaligned."""
    sizes = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 67, 127, 129])
    repeat = draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = draw(st.integers(1, 5)) if repeat > 1 else draw(sizes)
    n_out, n_in = draw(sizes), head_dim * repeat * draw(st.integers(1, 7))
    n_in = draw(st.sampled_from([n_in, 2049])) if repeat == 1 else n_in  # 2049: one column past a strip
    n_cols, gap = n_in // repeat, draw(st.integers(0, 3))
    offsets = torch.tensor([0, gap, gap + n_out, gap + n_out + n_cols])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.4, 1.0]))
    gate, gate_new = (gate_sample(int(offsets[-1]), generator, density) for _ in range(2))
    _, _, rank = open_indices_ref(gate, offsets)
    layout = draw(st.sampled_from([DENSE, BLOCK, PANELS]))
    where = GateMap(gap, gap + n_out, head_dim, repeat)

    def matrix(scale: float) -> Tensor:
        dtype = draw(st.sampled_from([torch.float32, *HALVES]))
        return unaligned((scale * torch.randn(n_out, n_in, generator=generator)).to(dtype))

    base = matrix(0.05)
    grad, panel = pack(matrix(0.1), layout, where, rank)
    matrices = Matrices(
        maps=[where],
        n_gates=gate.numel(),
        weights=[unaligned(torch.full_like(base, float("nan")))],
        bases=[base],
        deltas=[matrix(0.01)],
        exp_avgs=[matrix(0.01)],
        exp_avg_sqs=[matrix(0.03).square()],
    )
    panels = [None if panel is None else unaligned(panel)]
    grads = Gradients(tensors=[unaligned(grad)], col_panels=panels, layouts=[layout], rank=unaligned(rank))
    return {"matrices": matrices, "grads": grads, "gate_old": unaligned(gate), "gate_new": unaligned(gate_new)}


@given(problem=problems(), level=st.sampled_from(native.LEVELS))
def test_any_shape_layout_and_mixture_of_dtypes(problem: dict[str, Any], level: str) -> None:
    """Against the reference in fp32, from which the library may differ by the roundings of a sum or a quotient."""
    lib = library(level)
    adam = AdamWStep(lr=1e-3, beta2=0.99, weight_decay=0.1, step=2, grad_scale=0.5)
    for op in ("delta_grad_stats", "delta_adamw_"):
        case = cases.case_of(op)
        inputs = problem | {"adam": adam}
        if op == "delta_grad_stats":
            inputs = {"matrices": problem["matrices"], "grads": problem["grads"], "gate": problem["gate_old"]}
        reference = registry.implementation(op, "reference")
        plain = testing.run(case, reference, inputs)
        rows = testing.compare_runs(
            case,
            (op, f"native {level}", torch.float32),
            got=testing.run(case, method(lib, op), inputs),
            expression=plain,
            truth=testing.run(case, reference, testing.upcast(inputs)),
            same_dtype=plain,
        )
        testing.assert_calibrated(rows)
    functions = (lib.weight_eff, registry.implementation("weight_eff_", "reference"))
    inputs = {"matrices": problem["matrices"], "gate": problem["gate_old"]}
    first, second = (testing.run(cases.case_of("weight_eff_"), function, inputs) for function in functions)
    assert testing.bits_equal(first["matrices.weights"], second["matrices.weights"])


def refresh(lib: native.NativeLibrary, weight: Tensor, base: Tensor, delta: Tensor, gate: Tensor) -> None:
    """One matrix whose rows have the first gates, and its columns those that follow."""
    maps, lists = [GateMap(0, weight.shape[0])], {"weights": [weight], "bases": [base], "deltas": [delta]}
    lib.weight_eff(Matrices(maps=maps, n_gates=gate.numel(), **lists), gate)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_is_read_and_every_rounding_is_pytorchs(dtype: torch.dtype) -> None:
    """All 65,536 halves to fp32; and to halves: ties, subnormals, overflow, infinities, NaN, and fp32 neighbours."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    n = halves.numel()
    numbers = halves.float()[halves.isfinite()]
    between = (numbers + numbers.roll(1)) / 2
    spread = [x.view(torch.int32) + shift for x in (numbers, between) for shift in (-1, 0, 1)]
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 65519.9, 65520.0, 3.4e38, -3.4e38, 1e-45])
    wide = torch.cat([*(x.view(torch.float32) for x in spread), special]).view(1, -1)
    gates = torch.ones(1 + wide.numel())
    for lib in levels():
        read = torch.empty(1, n)
        refresh(lib, read, torch.zeros(1, n), halves, gates)
        torch.testing.assert_close(read, halves.float(), rtol=0, atol=0, equal_nan=True)
        written = torch.empty_like(wide, dtype=dtype)
        refresh(lib, written, torch.zeros_like(written), wide, gates)
        torch.testing.assert_close(written, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_closed_entries_are_the_base_bit_for_bit() -> None:
    """-0.0 stays, and an infinite delta behind a closed gate does not reach the weight, in full vectors and after."""
    for dtype in (torch.float32, *HALVES):
        base = torch.full((3, 21), -0.0, dtype=dtype)
        delta = torch.full((3, 21), float("inf"), dtype=dtype)
        gate = torch.cat([torch.tensor([0.0, 1.0, -0.0]), torch.tensor([1.0, 0.0, -0.0]).repeat(7)])
        for lib in levels():
            weight = torch.full_like(base, float("nan"))
            refresh(lib, weight, base, delta, gate)
            closed = torch.outer(gate[:3], gate[3:]) == 0
            assert testing.bits_equal(weight[closed], base[closed])
            assert weight[~closed].isinf().all()


def test_a_nan_gradient_behind_a_closed_gate_reaches_the_norm() -> None:
    grad = torch.zeros(2, 3)
    grad[0, 0] = float("nan")
    gate = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    for lib in levels():
        matrices = Matrices(maps=[GateMap(0, 2)], n_gates=5, deltas=[grad])
        _, norm = lib.delta_grad_stats(matrices, Gradients(tensors=[grad], col_panels=[None], layouts=[DENSE]), gate)
        assert norm.isnan()


# --- bad input --------------------------------------------------------------------------------------------------------


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    good = torch.zeros(4, 6)
    return {
        "dtype": ({"weights": [good.double()]}, r"weights\[0\]: expected a contiguous float32 or bfloat16 or float16"),
        "stride": ({"deltas": [torch.zeros(6, 4).t()]}, r"deltas\[0\]: expected a contiguous"),
        "size": ({"bases": [torch.zeros(4, 5)]}, r"bases\[0\]: .* 24 elements .* got .*\[4, 5\]"),
        "base's dtype": ({"bases": [good.half()]}, r"bases\[0\]: expected the weight's torch.float32"),
        "device": ({"weights": [good.to("meta")]}, r"weights\[0\]: .* on cpu, got .* on meta"),
        "gate's dtype": ({"gate": torch.zeros(10).half()}, "gate: expected a contiguous float32"),
        "row range": ({"maps": [GateMap(7, 0, 1, 1)]}, r"maps\[0\]: expected gates within \[0, 10\)"),
        "column range": ({"maps": [GateMap(0, 5, 1, 1)]}, r"maps\[0\]"),
        "repeat": ({"maps": [GateMap(0, 4, 1, 4)]}, r"maps\[0\]"),
        "negative": ({"maps": [GateMap(-1, 4, 1, 1)]}, r"maps\[0\]"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_matrices_are_refused_and_nothing_is_written(name: str) -> None:
    """The public functions check first (and more); these are the checks that keep the library inside its memory."""
    change, message = bad_calls()[name]
    arguments = {
        "weights": [torch.full((4, 6), 7.0)],
        "bases": [torch.zeros(4, 6)],
        "deltas": [torch.ones(4, 6)],
        "gate": torch.ones(10),
        "maps": [GateMap(0, 4)],
    } | change
    gate = arguments.pop("gate")
    with pytest.raises(ValueError, match=message):
        library().weight_eff(Matrices(n_gates=10, **arguments), gate)
    if "weights" not in change:
        assert (arguments["weights"][0] == 7.0).all()


@pytest.mark.parametrize("layout", [BLOCK, PANELS])
def test_packed_gradients_must_fit_the_open_gates(layout: int) -> None:
    gate = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])  # two rows (one open), three columns (two open)
    _, _, rank = open_indices_ref(gate, torch.tensor([0, 2, 5]))
    matrices = Matrices(maps=[GateMap(0, 2)], n_gates=5, deltas=[torch.ones(2, 3)])
    wrong = torch.ones(2, 2) if layout == BLOCK else torch.ones(2, 3)
    panels = [torch.ones(2, 2) if layout == PANELS else None]
    lib = library()
    grads = Gradients(tensors=[wrong], col_panels=panels, layouts=[layout], rank=rank)
    with pytest.raises(ValueError, match="grads: expected packed gradients of the open rows and columns"):
        lib.delta_grad_stats(matrices, grads, gate)
    grads = Gradients(tensors=[wrong[:1]], col_panels=panels, layouts=[layout])
    with pytest.raises(ValueError, match="rank: expected the rank of open_indices"):
        lib.delta_grad_stats(matrices, grads, gate)


def test_bad_offsets_and_levels() -> None:
    with pytest.raises(ValueError, match="offsets: expected ascending int64 from 0 to 3"):
        library().open_indices(torch.ones(3), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="level: expected one of"):
        native.NativeLibrary(level="sse9")


# --- with and without the library -------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    backends.reset()
    missing = native.NativeLibrary.__init__.__defaults__[0].with_name("missing.so")
    monkeypatch.setattr(native, "_shared", lambda: native.NativeLibrary(missing))
    yield
    monkeypatch.undo()
    backends.reset()


def test_without_the_library_the_reference_serves(no_library: None) -> None:
    for op in OPS:
        reason = k.available(op)["native"]
        assert reason is not None
        assert "missing.so was not built" in reason
    gate, _ = k.gate_values(torch.ones(3), k.GateSpec(kind="heaviside_ste", seed=0, step=1, training=True))
    assert gate.tolist() == [1.0, 1.0, 1.0]
    with use_backend("native"), pytest.raises(BackendUnavailable, match=r"missing\.so was not built"):
        k.gate_values(torch.ones(3), k.GateSpec(kind="heaviside_ste", seed=0, step=1, training=True))


def test_with_the_library_it_serves_the_cpu() -> None:
    library()
    backends.reset()
    for op in OPS:
        assert k.available(op)["native"] is None
        assert backends.choose(op, torch.zeros(1)) == getattr(native, f"{op.rstrip('_')}_native")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    with pytest.raises(BackendUnavailable, match="has ABI 1, this package 99"):
        native.NativeLibrary()
    monkeypatch.undo()
    native._load.cache_clear()
    assert native.NativeLibrary().level == library().level


def test_structures_are_those_of_the_header() -> None:
    """Field by field, in order: the table's layout is shared by Python, C++ and CUDA."""
    header = (ROOT / "lcdd_kernels/csrc/lcdd_native.h").read_text()
    for name, structure in (("lcdd_matrix", native.Matrix), ("lcdd_adamw", native.AdamW)):
        body = header.split(f"typedef struct {name} {{")[1].split("}")[0]
        code = " ".join(line.split("//")[0] for line in body.splitlines())
        declared = [word.strip(" *") for part in code.split(";") for word in part.split(",")]
        fields = [word.split()[-1].lstrip("*") for word in declared if word]
        assert fields == [field[0] for field in structure._fields_]
    assert ctypes.sizeof(native.Matrix) == 8 * len(native.Matrix._fields_)
