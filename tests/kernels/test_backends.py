"""Choice of backend: lazy, explicit or automatic, self-tested at first use, never silent about a failure."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch

import lcdd_kernels
from lcdd_kernels import BackendUnavailable, GateSpec, backends, registry, testing, use_backend
from lcdd_kernels.cases import case_of
from lcdd_kernels.registry import implementation

OPS = list(registry.OPS)


@pytest.fixture(autouse=True)
def _fresh():
    backends.reset()
    yield
    backends.reset()


def test_import_is_light() -> None:
    """Importing the package imports neither Triton nor a native library, and touches no GPU."""
    code = """
import sys, torch, lcdd_kernels
heavy = ("triton", "lcdd", "transformers", "lcdd_kernels.native", "lcdd_kernels.cuda")
found = [m for m in sys.modules if m in heavy or m.startswith("lcdd_kernels.triton_kernels.")]
print(found, torch.cuda.is_initialized())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_a_case(op: str) -> None:
    assert callable(implementation(op, "reference"))
    case = case_of(op)
    inputs = testing.make_inputs(op, case.dtypes[0])
    inspect.signature(implementation(op, "reference")).bind(**inputs)
    testing.known_answer(op, "reference")


@pytest.mark.parametrize("op", OPS)
def test_signatures_agree(op: str) -> None:
    """Every implementation that can be imported has the reference's parameters: names, order and kinds."""

    def parameters(backend: str) -> list[tuple[str, object]]:
        signature = inspect.signature(implementation(op, backend))
        return [(p.name, p.kind) for p in signature.parameters.values()]

    expected = parameters("reference")
    for backend in registry.OPS[op].backends[1:]:
        if not isinstance(registry.load(op, backend), str):
            assert parameters(backend) == expected, backend


def test_every_kernel_passes_its_self_test(device_of) -> None:
    """No available implementation is disabled; a missing library is a reason, a wrong answer is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        rows = backends.report("cpu")
    assert {row.op for row in rows} == set(OPS)
    assert all(row.reason is None for row in rows if row.backend == "reference")
    assert sum(row.chosen for row in rows) == len(OPS)
    assert not [row for row in rows if row.reason is not None and "self-test" in row.reason]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of .*'reference'.*got 'fast'"), use_backend("fast"):
        pass
    with pytest.raises(ValueError, match="op: expected one of"):
        implementation("no_such_op", "reference")
    with pytest.raises(ValueError, match="op: expected one of"):
        testing.make_inputs("no_such_op")
    with pytest.raises(ValueError, match="op: expected one of"):
        backends.available("no_such_op")


def test_explicit_request_that_cannot_be_met_raises() -> None:
    logits = torch.zeros(3, dtype=torch.float64)
    spec = GateSpec(kind="hard_concrete", training=False)
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="float64 is computed by the reference only"):
        lcdd_kernels.gate_values(logits, spec)
    with use_backend("cuda"), pytest.raises(BackendUnavailable, match="computes on CUDA"):
        lcdd_kernels.gate_values(logits.float(), spec)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = backends.available("gate_values", "cpu")["triton"]
    assert reason is not None
    assert "TRITON_INTERPRET" in reason


def test_float64_is_served_by_the_reference() -> None:
    chosen = backends.choose("gate_values", torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert chosen is implementation("gate_values", "reference")


def test_use_backend_nests_and_unwinds() -> None:
    x = torch.zeros(1)
    default = backends.choose("gate_values", x)
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("cuda"):
            raise KeyError
        assert backends.choose("gate_values", x) is implementation("gate_values", "reference")
    assert backends.choose("gate_values", x) is default


def _wrong_gate_values(logits, spec, *, offset=0):
    gate, l0 = implementation("gate_values", "reference")(logits, spec, offset=offset)
    return gate * (1 + 1e-4), l0


def _crashing_gate_values(logits, spec, **settings):
    raise RuntimeError("no such device function")


def _without_a_compiler(logits, spec, *, offset=0):
    raise subprocess.CalledProcessError(1, ["gcc"])


@pytest.mark.parametrize("broken", [_wrong_gate_values, _crashing_gate_values, _without_a_compiler])
def test_a_failed_self_test_disables_the_kernel_by_name(monkeypatch, broken) -> None:
    """A kernel with a relative error of 1e-4, or one that crashes: a loud warning, once, and the reference serves."""
    monkeypatch.setitem(registry._loaded, ("gate_values", "native"), broken)
    logits = torch.randn(50)
    spec = GateSpec(kind="hard_concrete")
    with pytest.warns(RuntimeWarning, match="gate_values on backend 'native' is disabled on cpu"):
        gate, _ = lcdd_kernels.gate_values(logits, spec)
    with use_backend("reference"):
        assert torch.equal(gate, lcdd_kernels.gate_values(logits, spec)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcdd_kernels.gate_values(logits, spec)
    with use_backend("native"), pytest.raises(BackendUnavailable, match="self-test failed"):
        lcdd_kernels.gate_values(logits, spec)


def test_a_first_use_inside_a_cuda_graph_capture_is_an_error_and_disables_nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setitem(registry._loaded, ("gate_values", "triton"), _wrong_gate_values)
    with pytest.raises(RuntimeError, match="gate_values: its first use on cuda:0 is inside a CUDA graph capture"):
        backends._obstacle("gate_values", "triton", torch.device("cuda", 0), torch.float32)
    assert not backends._verdicts


def test_an_unwritten_output_fails_the_self_test(monkeypatch) -> None:
    """Memory is poisoned: an implementation that forgets the last entry is caught."""

    def forgets(logits, spec, *, offset=0):
        gate, l0 = implementation("gate_values", "reference")(logits, spec, offset=offset)
        out = torch.empty_like(gate)
        out[:-1] = gate[:-1]
        return out, l0

    monkeypatch.setitem(registry._loaded, ("gate_values", "native"), forgets)
    with pytest.raises(AssertionError, match="output gate"):
        testing.known_answer("gate_values", "native")


def test_a_missing_library_is_a_reason_not_an_error(monkeypatch) -> None:
    monkeypatch.setitem(registry._MODULES, "native", "lcdd_kernels.no_such_library")
    reason = backends.available("gate_values", "cpu")["native"]
    assert reason is not None
    assert "no_such_library" in reason
    assert backends.choose("gate_values", torch.zeros(1)) is implementation("gate_values", "reference")
    with pytest.raises(BackendUnavailable, match="cannot serve 'gate_values'"):
        implementation("gate_values", "native")


def test_comparison_sees_small_errors() -> None:
    """The judge itself: an error of three times the expression's fails, a flipped sign of zero fails an exact
    output.
    """
    case = case_of("weight_eff_")
    inputs = testing.make_inputs("weight_eff_")
    reference = implementation("weight_eff_", "reference")
    good = testing.run(case, reference, inputs)
    truth = testing.run(case, reference, testing.upcast(inputs))
    expression = testing.run(case, case.expression, inputs)

    def rows(got):
        return testing.compare_runs(
            case, ("weight_eff_", "x", torch.float32), got=got, expression=expression, truth=truth, same_dtype=good
        )

    testing.assert_calibrated(rows(good))
    zero = (good["matrices.weights"] == 0).nonzero()[0]
    flipped = good["matrices.weights"].clone()
    flipped[zero] = 0.0 if torch.signbit(flipped[zero]) else -0.0
    with pytest.raises(AssertionError, match="bit-equal where asked: False"):
        testing.assert_calibrated(rows({"matrices.weights": flipped}))
    with pytest.raises(AssertionError, match="inf"):
        testing.assert_calibrated(rows({"matrices.weights": torch.full_like(flipped, float("nan"))}))
