"""`reference_compat`: the penalty grows with accumulation, bf16 weights swallow small updates; without it, neither."""

import pytest
import torch

from lcdd.config import LCDDConfig
from lcdd.models import shards, sites_of
from lcdd.optimizer import LCDDOptimizer

TOKENS = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(9))


def attach(make_models, dtype, *, initial_logits=None, **settings) -> LCDDOptimizer:
    base, tuned = make_models(dtype=dtype)
    config = LCDDConfig(**settings)
    return LCDDOptimizer.attach(tuned.train(), base, config, total_steps=20, initial_logits=initial_logits)


def penalty_step(make_models, accumulation: int, *, compat: bool) -> torch.Tensor:
    """What the penalty alone does to θ in one SGD step: the loss's gradients are zero."""
    settings = {"gate_optimizer": "sgd", "gate_lr": 1.0, "gradient_accumulation_steps": accumulation}
    optimizer = attach(make_models, torch.float64, reference_compat=compat, **settings)
    before = optimizer.gates.logits.detach().clone()
    for site in sites_of(optimizer.model):
        site.weight.grad = torch.zeros_like(site.weight)
    optimizer.step(1.0)
    return before - optimizer.gates.logits.detach()


def test_the_penalty_grows_with_accumulation_in_compat_alone(make_models):
    once = penalty_step(make_models, 1, compat=False)
    assert once.min() > 0
    for accumulation in (1, 4, 8):
        torch.testing.assert_close(penalty_step(make_models, accumulation, compat=False), once, rtol=0, atol=0)
        torch.testing.assert_close(
            penalty_step(make_models, accumulation, compat=True), accumulation * once, rtol=1e-8, atol=0
        )


def one_bf16_step(make_models, learning_rate: float, *, compat: bool, **changes):
    """(W before, G, W after, Δ before, Δ after) of every linear, in float32; all gates are open: W is W_ft."""
    still = {"gate_kind": "heaviside_ste", "gate_lr": 0.0, "initial_logits": torch.full((2 * 200,), 9.0)}
    settings = {"learning_rate": learning_rate, "max_grad_norm": 0.0, "reference_compat": compat}
    optimizer = attach(make_models, torch.bfloat16, **still, **settings, **changes)
    weights = [site.weight for site in sites_of(optimizer.model)]
    loss = optimizer.model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    grads = [weight.grad.float() for weight in weights]

    def now():
        deltas = [delta.float().clone() for _, delta, _ in optimizer.masked().values()]
        return [weight.detach().float() for weight in weights], deltas

    before, delta_before = now()
    optimizer.step(loss.item())
    after, delta_after = now()
    return [torch.cat([t.flatten() for t in part]) for part in (before, grads, after, delta_before, delta_after)]


def test_updates_below_a_bf16_weights_rounding_vanish_in_compat_alone(make_models):
    weight, _, after, delta, delta_after = one_bf16_step(make_models, 1e-6, compat=True)
    large = weight.abs() > 1e-3  # half the way to the next bf16 number is at least 2^-9 of it: over 1e-6
    assert large.float().mean() > 0.99
    assert torch.equal(after[large], weight[large])
    assert torch.equal(delta_after[large], delta[large])
    _, grad, _, delta, delta_after = one_bf16_step(make_models, 1e-6, compat=False, delta_dtype="float32")
    moved = (delta_after != delta)[grad != 0]
    assert moved.float().mean() > 0.99


def test_compat_steps_as_adamw_on_bf16_weights_does(make_models):
    """After one step from zero moments AdamW has moved by lr·g/(|g| + eps); W_ft is that, rounded to bfloat16."""
    weight, grad, after, _, _ = one_bf16_step(make_models, 1e-3, compat=True)
    expected = (weight - 1e-3 * grad / (grad.abs() + 1e-8)).bfloat16().float()
    assert (after != weight).float().mean() > 0.1
    assert (after == expected).float().mean() > 0.999  # a sum on the edge between two numbers may round to the other


def test_compat_is_refused_where_it_is_not_the_authors(make_models, monkeypatch):
    with pytest.raises(ValueError, match="reference_compat: expected gating 'optimizer' beside it, got 'forward'"):
        LCDDConfig(reference_compat=True, gating="forward")
    with pytest.raises(ValueError, match=r"reference_compat: expected a delta_dtype that holds .*, got 'bfloat16'"):
        LCDDConfig(reference_compat=True, delta_dtype="bfloat16")
    monkeypatch.setattr(shards, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="reference_compat: expected one rank, got 2"):
        attach(make_models, torch.float32, reference_compat=True)
