"""The forward route on whole models: the gradients of the optimizer route, with every fusion, and a clean way back."""

import copy

import pytest
import torch
from torch import nn

from fixtures.checkpoints import make_model
from lcdd.config import LCDDConfig
from lcdd.models import layout_of, sites_of
from lcdd.optimizer import ForwardGates, GatedLinear, GatedMLP, Gates, LCDDOptimizer
from lcdd_kernels import GateSpec, delta_grad_stats, gate_logits_grad

ARCHITECTURES = ("qwen3", "llama", "mistral")
KINDS = ("hard_concrete", "heaviside_ste")


def models(architecture="qwen3", dtype=torch.float64, *, spread=0.05):
    """base, and a copy whose masked linears have moved."""
    base = make_model(architecture).to(dtype).eval()
    tuned = copy.deepcopy(base)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for site in sites_of(tuned):
            noise = torch.randn(site.weight.shape, generator=g, dtype=torch.float64)
            site.weight.add_((spread * noise).to(dtype))
    return base, tuned


def theta(model, *, mean=0.5):
    layout = layout_of(model)
    return Gates.initial(layout, mean=mean, std=2.0, seed=7).to(sites_of(model)[0].weight.dtype)


def batch():
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_loss_and_gradients_as_the_optimizer_route(architecture, kind, fuse):
    base, tuned = models(architecture)
    logits = theta(tuned)
    by_optimizer = copy.deepcopy(tuned).train()
    config = LCDDConfig(gate_kind=kind, seed=5, pack="never", delta_dtype=None, freeze_fraction=0.0)
    optimizer = LCDDOptimizer.attach(by_optimizer, base, config, total_steps=10, initial_logits=logits)
    loss = by_optimizer(**batch()).loss
    loss.backward()
    masked = optimizer.masked()
    weights = [site.weight for site in sites_of(by_optimizer)]
    maps = [gate_map for _, _, gate_map in masked.values()]
    deltas = [delta for _, delta, _ in masked.values()]
    d_gate, _ = delta_grad_stats([w.grad for w in weights], deltas, optimizer.gates.values, maps)
    d_logits = gate_logits_grad(logits, d_gate, GateSpec(kind=kind, seed=5, step=1))

    gates = ForwardGates.attach(
        tuned.train(), base, kind=kind, seed=5, logits=logits, deltas=_leaves(masked), fuse=fuse
    )
    gates.draw(step=1)
    assert isinstance(tuned.model.layers[0].mlp, GatedMLP) == fuse
    other = tuned(**batch()).loss
    other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gates.logits.grad, d_logits, rtol=1e-9, atol=1e-12)
    gate = optimizer.gates.values
    for weight, where, delta in zip(weights, maps, gates.deltas.values(), strict=True):
        rows = gate[where.row_start : where.row_start + weight.shape[0]]
        cols = torch.arange(weight.shape[1])
        cols = gate[
            where.col_start + (cols // (where.repeat * where.head_dim)) * where.head_dim + cols % where.head_dim
        ]
        torch.testing.assert_close(delta.grad, torch.outer(rows, cols) * weight.grad, rtol=1e-9, atol=1e-12)


def _leaves(masked):
    return {name: delta.detach().clone().requires_grad_() for name, (_, delta, _) in masked.items()}


def test_every_draw_is_a_function_of_its_step_alone():
    base, tuned = models()
    gates = ForwardGates.attach(tuned.train(), base, kind="hard_concrete", logits=theta(tuned))
    values = []
    for step in (1, 2, 1):
        gates.draw(step=step)
        values.append(float(tuned(**batch()).loss.detach()))
    assert values[0] == values[2] != values[1]
    tuned.eval()  # deterministic: no noise, whatever the step
    first = float(tuned(**batch()).loss.detach())
    gates.draw(step=9)
    assert float(tuned(**batch()).loss.detach()) == first
    gates.draw(step=1, training=True)
    assert float(tuned(**batch()).loss.detach()) == values[0]


def test_gradient_checkpointing_changes_nothing():
    base, tuned = models()
    gates = ForwardGates.attach(tuned.train(), base, kind="hard_concrete", logits=theta(tuned))
    grads = []
    for enabled in (False, True):
        if enabled:
            tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned(**batch()).loss.backward()
        grads.append([p.grad.clone() for p in gates.parameters()])
        for parameter in gates.parameters():
            parameter.grad = None
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-14)


def test_what_is_frozen_gets_no_gradient():
    base, tuned = models(dtype=torch.float32)
    names = [site.name for site in sites_of(tuned)]
    given = {
        n: s.weight.detach() - b.weight.detach() for n, s, b in zip(names, sites_of(tuned), sites_of(base), strict=True)
    }
    gates = ForwardGates.attach(tuned.train(), base, kind="hard_concrete", logits=theta(tuned), deltas=given)
    tuned(**batch()).loss.backward()
    assert gates.logits.grad.count_nonzero() > 0
    assert all(delta.grad is None for delta in gates.deltas.values())
    assert all(site.weight.grad is None for site in sites_of(tuned))


def test_restore_and_state_dict_are_those_of_the_ordinary_model():
    base, tuned = models(dtype=torch.float32)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    classes = [type(module) for module in tuned.modules()]
    trained = [p.requires_grad for p in tuned.parameters()]
    gates = ForwardGates.attach(tuned, base, kind="hard_concrete", logits=theta(tuned))
    assert sum(isinstance(module, GatedLinear) for module in tuned.modules()) == len(sites_of(tuned))
    assert list(tuned.state_dict()) == list(before)
    with pytest.raises(ValueError, match="model: expected ordinary linears"):
        ForwardGates.attach(tuned, base, kind="hard_concrete", logits=theta(tuned))
    gates.restore()
    assert [type(module) for module in tuned.modules()] == classes
    assert [p.requires_grad for p in tuned.parameters()] == trained
    for name, value in tuned.state_dict().items():
        assert torch.equal(value, before[name])


def test_fold_gives_an_ordinary_model_with_the_same_outputs():
    base, tuned = models()
    gates = ForwardGates.attach(tuned.eval(), base, kind="hard_concrete", logits=theta(tuned))
    with torch.no_grad():
        gated = tuned(**batch()).logits
        gates.fold()
        assert not any(isinstance(module, GatedLinear | GatedMLP) for module in tuned.modules())
        torch.testing.assert_close(tuned(**batch()).logits, gated, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fuse", [True, False])
def test_all_gates_closed_is_the_base(fuse):
    base, tuned = models(dtype=torch.float32)
    gates = ForwardGates.attach(
        tuned.eval(), base, kind="hard_concrete", logits=torch.full_like(theta(tuned), -50.0), fuse=fuse
    )
    for value in gates.deltas.values():
        value.data.fill_(3.0)
    with torch.no_grad():
        expected, got = base(**batch()).logits, tuned(**batch()).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if not fuse:
        assert torch.equal(got, expected)


def test_generation_by_small_batches_matches_the_folded_model():
    base, tuned = models()
    gates = ForwardGates.attach(tuned.eval(), base, kind="hard_concrete", logits=theta(tuned))
    prompt = batch()["input_ids"][:1, :4]
    settings = {"max_new_tokens": 6, "do_sample": False}
    gated = tuned.generate(prompt, **settings)
    gates.fold()
    assert torch.equal(tuned.generate(prompt, **settings), gated)


def test_projections_called_alone_or_in_another_order():
    """k and v wait for the very tensor that q was called with; anything else is computed by itself."""
    base, tuned = models()
    attention = tuned.model.layers[0].self_attn
    plain = copy.deepcopy(tuned)
    fused = ForwardGates.attach(tuned, base, kind="heaviside_ste", logits=theta(tuned))
    alone = ForwardGates.attach(plain, base, kind="heaviside_ste", logits=theta(plain), fuse=False)
    assert fused.kind == alone.kind
    other = plain.model.layers[0].self_attn
    x, z = torch.randn(2, 2, 5, 32, dtype=torch.float64)
    for order in ("qkv", "vqk", "kvq", "qqv"):
        for kind, value in zip(order, (x, x, z), strict=True):
            name = f"{kind}_proj"
            torch.testing.assert_close(getattr(attention, name)(value), getattr(other, name)(value))
    attention.q_proj(x)
    attention.k_proj(x)
    attention.v_proj(x)
    assert attention.q_proj._fused._input is None  # nothing is kept once all three were collected


def test_biased_projections_are_gated_one_by_one():
    base, tuned = models()
    for model in (base, tuned):
        for site in sites_of(model):
            if site.kind in "qkv" or site.kind == "gate":
                site.linear.bias = nn.Parameter(torch.full((site.linear.out_features,), 0.3, dtype=torch.float64))
    expected = copy.deepcopy(tuned)
    ForwardGates.attach(expected, base, kind="hard_concrete", logits=theta(tuned)).fold()
    gates = ForwardGates.attach(tuned, base, kind="hard_concrete", logits=theta(tuned))
    assert not isinstance(tuned.model.layers[0].mlp, GatedMLP)
    assert tuned.model.layers[0].self_attn.q_proj._fused is None
    torch.testing.assert_close(tuned(**batch()).logits, expected(**batch()).logits)
    assert len(gates.parameters()) == 1 + len(sites_of(tuned))


def test_bad_input_is_named():
    base, tuned = models()
    with pytest.raises(ValueError, match="logits: expected shape"):
        ForwardGates.attach(tuned, base, kind="hard_concrete", logits=torch.zeros(3))
    with pytest.raises(ValueError, match="deltas: expected one for each site"):
        ForwardGates.attach(tuned, base, kind="hard_concrete", logits=theta(tuned), deltas={})
    with pytest.raises(ValueError, match="kind: expected one of"):
        ForwardGates.attach(tuned, base, kind="soft", logits=theta(tuned))
    assert not any(isinstance(module, GatedLinear) for module in tuned.modules())  # nothing was swapped
