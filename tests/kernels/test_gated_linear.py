"""gated_linear: against autograd through an unfused parametrization, in every dtype and backend, and its edges."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from unfused_gates import assert_as_close_as, double, run, sample, unfused_linear

import lcdd_kernels as K
from lcdd_kernels import GateMap, GateSpec, cases, testing, use_backend
from lcdd_kernels.functional.gated_linear import SMALL_BATCH_TOKENS
from lcdd_kernels.ops import gated_linear as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("hard_concrete", "heaviside_ste")
BACKENDS = ("reference", "triton")
DRAW = {"seed": (3 << 32) + 5, "step": 7}
HARD = GateSpec(kind="hard_concrete")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["block_gates", "gated_weights", "gated_weight_grad"])
def test_backend_matches_the_reference(op, backend, dtype, device_of, poisoned):
    if dtype not in cases.case_of(op).dtypes:
        pytest.skip(f"{op} does not take {dtype}")
    testing.assert_calibrated(testing.compare(op, backend, dtype, device=device_of(op, backend, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_effective_weight_has_the_bits_of_the_optimizer_route(backend, dtype, device_of):
    """Heaviside gates are exact on every backend, so nothing but the roundings of W_eff can differ."""
    device = device_of("gated_weights", backend, dtype)
    inputs = sample(1, 37, 300, dtype, device=device)
    spec = GateSpec(kind="heaviside_ste", **DRAW)
    base, delta, *logits = (inputs[name] for name in ("weight_base", "delta", "row_logits", "col_logits"))
    with testing.poisoned_memory(), use_backend(backend):
        got = ops.Block([base], [delta], logits, [0, 0], spec, [(0, 1)]).weights(dtype, 0)[0]
    gate = (torch.cat([inputs["row_logits"], inputs["col_logits"]]) > 0).float()
    weight = torch.full_like(inputs["delta"], math.nan)
    with use_backend("reference"):
        K.weight_eff_([weight], [inputs["weight_base"]], [inputs["delta"]], gate, [K.GateMap(0, 37)])
    assert testing.bits_equal(got, weight)


@pytest.mark.parametrize("small_batch", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_match_float64_autograd(backend, dtype, kind, training, small_batch, device_of):
    device = device_of("gated_weights", backend, dtype)
    settings = {"spec": GateSpec(kind=kind, training=training, **DRAW), "where": GateMap(11, 500, 5, 3)}
    inputs = sample(19, 37, 30, dtype, gates=10, device=device, bias=True)
    dy = torch.randn(19, 37, generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        got = run(K.gated_linear, inputs, dy, small_batch=small_batch, **settings)
    plain = run(unfused_linear, inputs, dy, **settings)
    truth = run(unfused_linear, double(inputs), dy.to(dtype).double(), **settings)
    assert_as_close_as(got, plain, truth)


@given(
    tokens=st.integers(1, 9),
    rows=st.sampled_from([1, 2, 13, 64, 67]),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from([1, 2, 7, 16, 67]),
    repeat=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    need=st.sampled_from([("delta",), ("row_logits",), ("col_logits",), ("x",), ("delta", "col_logits")]),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_shape_on_triton(tokens, rows, heads, head_dim, repeat, kind, need, contiguous, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gates = heads * head_dim
    inputs = sample(tokens, rows, gates * repeat, torch.float32, gates=gates, device=device)
    if not contiguous:
        inputs["x"] = inputs["x"].t().contiguous().t()
    settings = {"spec": GateSpec(kind=kind, seed=seed, step=2**40), "where": GateMap(0, 0, head_dim, repeat)}
    leaves = {name: value.clone().requires_grad_(name in need) for name, value in inputs.items()}
    if not contiguous:
        leaves["x"] = inputs["x"].clone(memory_format=torch.preserve_format).requires_grad_("x" in need)
    with use_backend("triton"):
        y = K.gated_linear(**leaves, **settings)
        y.sum().backward()
    truth = run(unfused_linear, double(inputs), torch.ones(tokens, rows), **settings)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y.detach().cpu(), truth["y"].float(), **close)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in need)
        if name in need:
            torch.testing.assert_close(leaf.grad.cpu(), truth[f"d_{name}"].float(), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_same_gradients_as_the_optimizer_route(kind):
    """Same seed, step and place in the flat vector: W_eff's bits, and what pass A computes from weight.grad."""
    inputs = sample(17, 12, 24, torch.float64, gates=8)
    logits = torch.cat([torch.zeros(3, dtype=torch.float64), inputs["row_logits"], inputs["col_logits"]])
    where = K.GateMap(row_start=3, col_start=15, head_dim=4, repeat=3)
    dy = torch.randn(17, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spec = GateSpec(kind=kind, **DRAW)
    got = run(K.gated_linear, inputs, dy, spec=spec, where=where)

    gate, _ = K.gate_values(logits, spec)
    weight = torch.full_like(inputs["delta"], float("nan"))
    K.weight_eff_([weight], [inputs["weight_base"]], [inputs["delta"]], gate, [where])
    torch.testing.assert_close(got["y"], inputs["x"] @ weight.T, rtol=0, atol=0)
    grad = dy.T @ inputs["x"]
    d_gate, sq_norm = K.delta_grad_stats([grad], [inputs["delta"]], gate, [where])
    d_logits = K.gate_logits_grad(logits, d_gate, spec)
    torch.testing.assert_close(got["d_row_logits"], d_logits[3:15], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got["d_col_logits"], d_logits[15:], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got["d_delta"].square().sum(), sq_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_where_hard_concrete_is_smooth(training):
    """Small logits: in evaluation every gate is strictly inside (0, 1); in training the fixed noise clamps a few."""
    inputs = sample(3, 4, 6, torch.float64, gates=3, bias=True)
    inputs |= {name: inputs[name] * 0.1 for name in ("row_logits", "col_logits")}
    base = inputs.pop("weight_base")
    leaves = [value.requires_grad_() for value in inputs.values()]

    def function(x: Tensor, delta: Tensor, row_logits: Tensor, col_logits: Tensor, bias: Tensor) -> Tensor:
        spec = GateSpec(kind="hard_concrete", training=training, **DRAW)
        return K.gated_linear(x, base, delta, row_logits, col_logits, spec, where=GateMap(0, 0, 3, 2), bias=bias)

    torch.autograd.gradcheck(function, leaves)


def test_opcheck():
    inputs = sample(5, 6, 8, torch.float32, bias=True)
    for name in ("x", "delta", "row_logits", "col_logits", "bias"):
        inputs[name].requires_grad_()
    settings = ("hard_concrete", 5, 2, True, [0, 6, 8, 1])
    torch.library.opcheck(ops.gated_linear, (*inputs.values(), *settings, False))
    *saved, _ = (value.detach() for value in inputs.values())
    for needs in ([True] * 5, [False, True, False, False, False], [True] + [False] * 4):
        torch.library.opcheck(ops.gated_linear_backward, (torch.randn(5, 6), *saved, needs, *settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_gates_closed_is_the_base_bit_for_bit(kind, backend, device_of):
    device = device_of("gated_weights", backend)
    inputs = sample(9, 13, 32, torch.float32, device=device)
    inputs["delta"][0, 0] = math.inf  # a closed gate hides whatever delta holds
    inputs["weight_base"][:2] = -0.0
    inputs["row_logits"].fill_(-50.0)
    with use_backend(backend):
        got = run(K.gated_linear, inputs, torch.ones(9, 13), spec=GateSpec(kind=kind, **DRAW))
    assert testing.bits_equal(got["y"], inputs["x"] @ inputs["weight_base"].T)
    assert torch.count_nonzero(got["d_delta"]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_gates_get_exactly_no_delta_gradient(backend, device_of):
    inputs = sample(9, 40, 300, torch.float32, device=device_of("gated_weights", backend))
    settings = {"spec": GateSpec(kind="heaviside_ste", **DRAW)}
    with use_backend(backend):
        got = run(K.gated_linear, inputs, torch.randn(9, 40), **settings)
    is_open = torch.outer(inputs["row_logits"] > 0, inputs["col_logits"] > 0)
    assert torch.equal(got["d_delta"] != 0, is_open)


def test_permuting_tokens_permutes_outputs():
    inputs = sample(12, 8, 16, torch.float64)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    dy = torch.randn(12, 8, dtype=torch.float64)
    straight = run(K.gated_linear, inputs, dy, spec=GateSpec(kind="hard_concrete", **DRAW))
    permuted = run(
        K.gated_linear, {**inputs, "x": inputs["x"][order]}, dy[order], spec=GateSpec(kind="hard_concrete", **DRAW)
    )
    for name, value in straight.items():
        value = value[order] if name in ("y", "d_x") else value
        torch.testing.assert_close(permuted[name], value, rtol=1e-12, atol=1e-13)


def test_what_is_frozen_costs_nothing(monkeypatch):
    called: list[str] = []
    choose = ops.choose
    monkeypatch.setattr(ops, "choose", lambda op, *tensors: called.append(op) or choose(op, *tensors))
    inputs = sample(20, 8, 16, torch.float32)
    inputs["x"].requires_grad_()
    K.gated_linear(**inputs, spec=HARD).sum().backward()
    assert called == ["block_gates", "gated_weights"] * 2  # W_eff forward and backward, and no gradient of it
    called.clear()
    inputs["x"] = inputs["x"].detach()
    inputs["delta"].requires_grad_()
    K.gated_linear(**inputs, spec=HARD).sum().backward()
    assert called == [
        "block_gates",
        "gated_weights",
        "block_gates",
        "gated_weight_grad",
    ]  # no dX, so no W_eff; no chain to the logits


def test_backward_keeps_inputs_only():
    inputs = sample(20, 8, 16, torch.float32)
    for name in ("x", "delta", "row_logits", "col_logits"):
        inputs[name].requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        K.gated_linear(**inputs, spec=HARD)
    assert sorted(saved) == sorted(value.data_ptr() for value in inputs.values())


def test_small_batches_write_no_weight(monkeypatch):
    called: list[str] = []
    choose = ops.choose
    monkeypatch.setattr(ops, "choose", lambda op, *tensors: called.append(op) or choose(op, *tensors))
    inputs = sample(SMALL_BATCH_TOKENS, 8, 16, torch.float32)
    few = K.gated_linear(**inputs, spec=GateSpec(kind="hard_concrete", training=False))
    assert "gated_weights" not in called
    whole = K.gated_linear(**inputs, spec=GateSpec(kind="hard_concrete", training=False), small_batch=False)
    assert "gated_weights" in called
    torch.testing.assert_close(few, whole, rtol=1e-5, atol=1e-6)
    called.clear()
    inputs["x"] = torch.cat([inputs["x"], inputs["x"][:1]])
    K.gated_linear(**inputs, spec=GateSpec(kind="hard_concrete", training=False))
    assert "gated_weights" in called


def test_leading_dimensions_and_an_empty_batch():
    inputs = sample(6, 8, 16, torch.float32)
    flat = K.gated_linear(**inputs, spec=HARD)
    shaped = K.gated_linear(**{**inputs, "x": inputs["x"].view(2, 3, 16)}, spec=HARD)
    assert torch.equal(shaped.view(6, 8), flat)
    empty = run(K.gated_linear, {**inputs, "x": inputs["x"][:0]}, torch.zeros(0, 8), spec=HARD)
    assert empty["y"].shape == (0, 8)
    assert torch.count_nonzero(empty["d_delta"]) == 0


def test_autocast_gives_its_dtype_as_for_a_linear():
    inputs = sample(20, 8, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = K.gated_linear(**inputs, spec=GateSpec(kind="hard_concrete", **DRAW))
        plain = unfused_linear(**inputs, spec=GateSpec(kind="hard_concrete", **DRAW))
    assert y.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain, rtol=2e-2, atol=2e-2)


def test_float32_deltas_on_half_precision_weights():
    inputs = sample(20, 8, 16, torch.bfloat16)
    inputs["delta"] = inputs["delta"].float()
    dy = torch.randn(20, 8)
    got = run(K.gated_linear, inputs, dy, spec=GateSpec(kind="hard_concrete", **DRAW))
    truth = run(unfused_linear, double(inputs), dy.bfloat16().double(), spec=GateSpec(kind="hard_concrete", **DRAW))
    assert got["d_delta"].dtype == torch.float32
    for name, value in got.items():
        scale = float(truth[name].abs().max())
        torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=0.02 * scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": GateSpec(kind="soft")}, "kind: expected one of"),
        ({"spec": GateSpec(kind="hard_concrete", seed=-1)}, "seed: expected an int"),
        ({"x": torch.zeros(4, 15)}, "x: expected shape"),
        ({"x": torch.zeros(4, 16, dtype=torch.int64)}, "x: expected dtype"),
        ({"weight_base": torch.zeros(8)}, "weight_base: expected shape"),
        ({"weight_base": torch.zeros(8, 16, requires_grad=True)}, "weight_base: expected a frozen tensor"),
        ({"delta": torch.zeros(8, 15)}, "delta: expected shape"),
        ({"delta": torch.zeros(16, 8).t()}, "delta: expected a contiguous tensor"),
        ({"row_logits": torch.zeros(7)}, "row_logits: expected shape"),
        ({"row_logits": torch.full((8,), math.nan)}, "row_logits: expected no NaN"),
        ({"col_logits": torch.zeros(16, dtype=torch.bfloat16)}, "col_logits: expected dtype"),
        ({"bias": torch.zeros(7)}, "bias: expected shape"),
        ({"where": GateMap(0, 0, 3, 2)}, r"where: expected repeat\*head_dim dividing 16 columns"),
        ({"where": GateMap(-1, 0)}, r"where\.row_start: expected an int"),
        ({"where": (0, 0)}, "where: expected a GateMap, got tuple"),
    ],
)
def test_bad_input_is_named(change, message):
    inputs = sample(4, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        K.gated_linear(**{**inputs, "spec": HARD, **change})
