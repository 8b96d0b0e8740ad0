"""PackedGradLinear is nn.Linear but for its weight gradient; PackPlan tells a whole model's projections what is
open."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen3Config

import lcdd.optimizer.packed
from lcdd.models import layout_of, sites_of
from lcdd.optimizer import BlockGrad, Gates, PackedGradLinear, PackPlan
from lcdd_kernels import PackCrossover

ROWS, COLS = torch.tensor([1, 2, 6], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)


def _pair(*, bias: bool = True, dtype: torch.dtype = torch.float64, n_in: int = 5, n_out: int = 7):
    """A plain linear layer, and a packed one with the same weights."""
    torch.manual_seed(0)
    plain, packed = nn.Linear(n_in, n_out, bias=bias, dtype=dtype), nn.Linear(n_in, n_out, bias=bias, dtype=dtype)
    packed.load_state_dict(plain.state_dict())
    return plain, PackedGradLinear.swap(packed)


def _parts(grad: torch.Tensor, layout: str, rows=ROWS, cols=COLS):
    if layout == "block":
        return (grad[rows.long()][:, cols.long()],)
    return grad[rows.long()], grad[:, cols.long()]


def _assert_packed(linear, grad, *, rows=ROWS, cols=COLS, rtol=1e-12, atol=1e-12):
    found = linear.weight.grad
    assert isinstance(found, BlockGrad)
    assert found.part is linear.part
    assert (found.shape, found.dtype) == (grad.shape, grad.dtype)
    for value, exact in zip(found.parts, _parts(grad, linear.layout, rows, cols), strict=True):
        assert value.dtype == linear.weight.dtype
        assert value.is_contiguous()
        torch.testing.assert_close(value, exact, rtol=rtol, atol=atol)


def _assert_close_on(found, exact, rows, cols):
    r, c = rows.long(), cols.long()
    whole = found.dense() if isinstance(found, BlockGrad) else found
    torch.testing.assert_close(whole[r][:, c], exact[r][:, c], rtol=1e-12, atol=1e-12)


def test_swapping_keeps_names_tensors_and_hooks_and_restore_leaves_nothing():
    linear = nn.Linear(5, 7)
    before, calls = dict(linear.__dict__), []
    state, parameters = linear.state_dict(), dict(linear.named_parameters())
    linear.register_forward_hook(lambda *_: calls.append(1))
    swapped = PackedGradLinear.swap(linear)
    assert swapped is linear
    assert linear.layout == "dense"
    linear.set_plan("block", ROWS, COLS)
    linear(torch.randn(2, 5)).sum().backward()
    assert calls == [1]
    assert list(linear.state_dict()) == list(state)
    assert all(linear.state_dict()[k].data_ptr() == v.data_ptr() for k, v in state.items())
    assert all(p is parameters[name] for name, p in linear.named_parameters())
    assert linear.restore() is linear
    assert type(linear) is nn.Linear
    assert linear.__dict__.keys() == before.keys()


@pytest.mark.parametrize("layout", ["block", "panels"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_only_the_weight_gradient_differs(layout, shape, bias):
    plain, packed = _pair(bias=bias)
    packed.set_plan(layout, ROWS, COLS)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, dy = plain(x), torch.randn(*shape[:-1], 7, dtype=torch.float64)
    y.backward(dy)
    dx, x.grad = x.grad, None
    out = packed(x)
    assert torch.equal(out, y)
    out.backward(dy)
    torch.testing.assert_close(x.grad, dx, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(packed.bias.grad, plain.bias.grad, rtol=1e-13, atol=1e-13)
    _assert_packed(packed, plain.weight.grad)


@given(
    n_in=st.integers(1, 33),
    n_out=st.integers(1, 33),
    tokens=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    layout=st.sampled_from(["block", "panels"]),
)
def test_every_shape_and_density_over_three_micro_batches(n_in, n_out, tokens, density, layout):
    plain, packed = _pair(n_in=n_in, n_out=n_out)
    rows = torch.nonzero(torch.rand(n_out) < density).view(-1).int()
    cols = torch.nonzero(torch.rand(n_in) < density).view(-1).int()
    packed.set_plan(layout, rows, cols)
    for _ in range(3):
        x, dy = torch.randn(tokens, n_in, dtype=torch.float64), torch.randn(tokens, n_out, dtype=torch.float64)
        plain(x).backward(dy)
        packed(x).backward(dy)
    _assert_packed(packed, plain.weight.grad, rows=rows, cols=cols)


def test_dense_layout_is_an_ordinary_linear():
    plain, packed = _pair()
    x = torch.randn(4, 5, dtype=torch.float64)
    plain(x).sum().backward()
    packed(x).sum().backward()
    assert type(packed.weight.grad) is torch.Tensor
    assert torch.equal(packed.weight.grad, plain.weight.grad)


def test_gradcheck_of_the_input_and_the_bias():
    _, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    packed.weight.requires_grad_(True)
    apply = lcdd.optimizer.packed._PackedLinear.apply
    weight, part = packed.weight, packed.part
    assert torch.autograd.gradcheck(lambda x, b: apply(x, weight, b, part, torch.float64), (x, packed.bias))


def test_nothing_is_added_when_this_weight_is_not_asked_for():
    _, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.grad(packed(x).sum(), x)
    packed(x).sum().backward(inputs=[x])
    with torch.no_grad():
        packed(x)
    packed.weight.requires_grad_(False)
    packed(x).sum().backward()
    assert packed.weight.grad is None
    packed.weight.requires_grad_(True)
    (grad,) = torch.autograd.grad(packed(x).sum(), [packed.weight])
    packed(x).sum().backward(inputs=[packed.weight])
    assert torch.equal(grad.dense(), packed.weight.grad.dense())


def test_a_gradient_that_is_differentiated_again_is_an_ordinary_one():
    plain, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    x, found = torch.randn(4, 5, dtype=torch.float64), []
    for linear in (plain, packed):
        first = torch.autograd.grad(linear(x).pow(3).sum(), list(linear.parameters()), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), list(linear.parameters()))])
    for ours, theirs in zip(found[1][:2], found[0][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    _assert_close_on(found[1][2], found[0][2], ROWS, COLS)


def test_a_second_backward_needs_retain_graph_and_adds_once_each():
    plain, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    x = torch.randn(4, 5, dtype=torch.float64)
    plain(x).sum().backward()
    loss = packed(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    _assert_packed(packed, plain.weight.grad)
    packed.weight.grad = None
    loss = packed(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    _assert_packed(packed, 2 * plain.weight.grad)


def test_a_weight_that_changed_since_the_forward_is_an_error_and_a_plan_holds_from_forward_to_backward():
    plain, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    x = torch.randn(4, 5, dtype=torch.float64)
    loss = packed(x).sum()
    packed.set_plan("block", ROWS[:1], COLS)
    loss.backward()
    plain(x).sum().backward()
    _assert_close_on(packed.weight.grad, plain.weight.grad, ROWS, COLS)
    packed(x).sum().backward()  # of another plan: the sum is dense
    assert packed.weight.grad.part is None
    _assert_close_on(packed.weight.grad, plain.weight.grad, ROWS[1:], COLS)
    _assert_close_on(packed.weight.grad, 2 * plain.weight.grad, ROWS[:1], COLS)
    packed.weight.grad = None
    loss = packed(torch.randn(4, 5, dtype=torch.float64)).sum()
    with torch.no_grad():
        packed.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert packed.weight.grad is None


@pytest.mark.parametrize("layout", ["block", "panels"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_a_plain_linear_and_keeps_the_weights_dtype(layout, weight_dtype):
    plain, packed = _pair(dtype=weight_dtype, n_in=64, n_out=96)
    packed.set_plan(layout, ROWS, COLS)
    for seed in range(2):
        x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(seed)).to(weight_dtype).requires_grad_()
        results = []
        for linear in (plain, packed):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = linear(x)
            assert y.dtype == torch.bfloat16
            y.float().square().sum().backward()
            results.append((y.detach(), x.grad))
            x.grad = None
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0.02, atol=0.02)
    scale = float(plain.weight.grad.abs().max())
    _assert_packed(packed, plain.weight.grad, rtol=0, atol=0.02 * scale)
    torch.testing.assert_close(packed.bias.grad, plain.bias.grad, rtol=0.02, atol=0.02 * scale)


class _Block(nn.Module):
    """Three projections of one input, as q, k, v, and one of their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(5, 7, dtype=torch.float64) for _ in range(3))
        self.o = nn.Linear(7, 5, dtype=torch.float64)

    def forward(self, x):
        x = x.tanh()
        return x + self.o(self.q(x).sin() * self.k(x).cos() + self.v(x))


def _gradients(mode: str, model: _Block, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    y = model(x) if mode == "plain" else checkpoint(model, x, use_reentrant=mode == "reentrant")
    y.square().sum().backward()
    return x.grad


@pytest.mark.parametrize("mode", ["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("layout", ["block", "panels"])
def test_shared_inputs_are_packed_once_also_under_checkpointing(mode, layout, monkeypatch):
    gathers = []
    original = lcdd.optimizer.packed.pack_columns
    monkeypatch.setattr(
        lcdd.optimizer.packed, "pack_columns", lambda x, *a, **k: gathers.append(x.shape) or original(x, *a, **k)
    )
    model, reference = _Block(), _Block()
    for name in "qkvo":
        cols = COLS if name != "o" else ROWS
        PackedGradLinear.swap(getattr(model, name)).set_plan(layout, ROWS if name != "o" else COLS, cols)
    for seed in range(3):
        x = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            _gradients(mode, model, x), _gradients("plain", reference, x), rtol=1e-12, atol=1e-12
        )
        gc.collect()
    for name in "qkv":
        _assert_packed(getattr(model, name), getattr(reference, name).weight.grad)
    _assert_packed(model.o, reference.o.weight.grad, rows=COLS, cols=ROWS)
    assert len(gathers) == 3 * 2  # x once for q, k and v, and o's own input; three micro-batches


def test_a_reused_address_is_not_taken_for_the_input_that_was_there():
    plain, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    memory = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        memory.normal_()  # the same address and shape, other values
        plain(memory).sum().backward()
        packed(memory).sum().backward()
    _assert_packed(packed, plain.weight.grad)
    plain.weight.grad = packed.weight.grad = None
    block = np.random.default_rng(0).normal(size=(4, 5))
    for _ in range(2):  # the same address, shape and version, of memory that was given back in between
        block *= -2
        x = torch.from_numpy(block)
        plain(x).sum().backward()
        packed(x).sum().backward()
        del x
    _assert_packed(packed, plain.weight.grad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sparse", ROWS, COLS), "layout: expected one of"),
        (("block", None, COLS), "rows: expected a tensor, got NoneType"),
        (("block", ROWS, torch.tensor([5])), r"cols: expected indices in \[0, 5\), got indices in \[5, 5\]"),
        (("block", torch.tensor([7]), COLS), r"rows: expected indices in \[0, 7\)"),
        (("panels", ROWS.float(), COLS), "rows: expected dtype int32 or int64"),
        (("dense", ROWS, COLS), "rows, cols: expected None"),
    ],
)
def test_a_bad_plan_is_named_and_leaves_the_old_one(arguments, message):
    _, packed = _pair()
    packed.set_plan("block", ROWS, COLS)
    with pytest.raises(ValueError, match=message):
        packed.set_plan(*arguments)
    assert packed.layout == "block"


def test_only_a_plain_linear_can_be_swapped_and_inputs_keep_the_weights_dtype():
    class Other(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"linear: expected an nn.Linear .not a subclass., got Other"):
        PackedGradLinear.swap(Other(2, 2))
    _, packed = _pair()
    with pytest.raises(ValueError, match="got PackedGradLinear"):
        PackedGradLinear.swap(packed)
    packed.set_plan("block", ROWS, COLS)
    with pytest.raises(ValueError, match=r"x: expected dtype torch\.float64"):
        packed(torch.randn(2, 5))


# ---------------------------------------------------------------- a whole model


def _model() -> nn.Module:
    config = Qwen3Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "layout"), [("hard_concrete", "block"), ("heaviside_ste", "panels")])
def test_plan_gives_every_projection_its_open_rows_and_columns(kind, layout):
    model, reference = _model(), _model()
    geometry = layout_of(model)
    logits = 2 * torch.randn(geometry.n_gates, dtype=torch.float64) - 1
    gates = Gates(geometry, kind=kind, seed=0, logits=logits)
    assert 0 < int((gates.values != 0).sum()) < geometry.n_gates
    always = PackCrossover(gather=0.0, crossover=10.0, min_elements=0, source="test")
    plan = PackPlan(sites_of(model), geometry, gate_kind=kind, crossover=always)
    plan.update(gates)
    assert set(plan.layouts()) == {layout}
    tokens = torch.randint(31, (2, 9))
    for m in (model, reference):
        m(tokens, labels=tokens).loss.backward()
    for site, other in zip(sites_of(model), sites_of(reference), strict=True):
        gate_map = site.gate_map
        rows = torch.nonzero(gates.values[gate_map.row_start :][: site.linear.out_features]).view(-1)
        j = torch.arange(site.linear.in_features)
        period = gate_map.repeat * gate_map.head_dim
        col_gate = gates.values[gate_map.col_start + j // period * gate_map.head_dim + j % gate_map.head_dim]
        # copy-major: columns in order of their copy, then of their position
        cols = sorted(
            torch.nonzero(col_gate).view(-1).tolist(), key=lambda c: (c // gate_map.head_dim % gate_map.repeat, c)
        )
        _assert_packed(site.linear, other.weight.grad, rows=rows, cols=torch.tensor(cols, dtype=torch.long), rtol=1e-9)
    plan.restore()
    assert all(type(site.linear) is nn.Linear for site in sites_of(model))


def test_plan_leaves_open_and_small_matrices_dense():
    model = _model()
    geometry = layout_of(model)
    gates = Gates(geometry, kind="hard_concrete", seed=0, logits=torch.full((geometry.n_gates,), 4.0))
    figures = {"gather": 0.0, "crossover": 0.8, "source": "test"}
    plan = PackPlan(
        sites_of(model), geometry, gate_kind="hard_concrete", crossover=PackCrossover(min_elements=0, **figures)
    )
    plan.update(gates)
    assert set(plan.layouts()) == {"dense"}
    with torch.no_grad():
        gates.logits.fill_(-4.0)
    gates.draw(step=1, training=False)
    plan.update(gates)
    assert set(plan.layouts()) == {"block"}
    plan.crossover = PackCrossover(min_elements=10**6, **figures)
    plan.update(gates)
    assert set(plan.layouts()) == {"dense"}
