"""LCDD as an optimizer against LCDD as its authors write it: the same curve, and the same open gates, every one.

`benchmarks/unfused.py` shares no code with the package; both start from the same models, θ, noise and batches.
"""

import copy
from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import lcdd_kernels.functional.packed_grad
from fixtures.unfused import Settings, UnfusedLCDD
from lcdd.config import LCDDConfig
from lcdd.models import sites_of
from lcdd.optimizer import LCDDOptimizer
from lcdd_kernels import GateSpec, PackCrossover, gate_values, use_backend

SEED = 11


def _models(dtype: torch.dtype):
    """A random Qwen3 of two layers with grouped-query attention, and its "fine-tuned" twin."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        attn_implementation="sdpa",
        initializer_range=0.2,
    )
    base = Qwen3ForCausalLM(config).to(dtype).train()
    for name, module in list(base.named_modules()):
        if type(module).__name__ == "Qwen3RMSNorm":  # it rounds to float32 inside, which would hide differences
            norm = nn.RMSNorm(module.weight.numel(), eps=module.variance_epsilon, dtype=dtype)
            base.set_submodule(name, norm)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.add_(0.1 * torch.randn_like(site.weight))
        tuned.model.norm.weight += 0.1  # not gated: both must take it back to the base
    return base, tuned


def _batch(step: int) -> torch.Tensor:
    """Four sequences a step that follow a rule, so that there is something to learn and to forget."""
    g = torch.Generator().manual_seed(step)
    first = torch.randint(23, (4, 1), generator=g)
    return (first * 3 ** torch.arange(8) + torch.arange(8)) % 23


def _noise(n_gates: int, dtype: torch.dtype, seed: int):
    """u of a step: the one thing of the package that both get; it has its own test against plain-Python Philox."""
    from lcdd_kernels.reference.gates import gate_noise_ref

    return lambda step: gate_noise_ref(n_gates, GateSpec(kind="hard_concrete", seed=seed, step=step), dtype=dtype)


@cache
def _run_unfused(settings: Settings, dtype: torch.dtype, mean: float, micro_batches: int):
    logits = _logits(dtype, mean)
    base, tuned = _models(dtype)
    lcdd = UnfusedLCDD(tuned, base, settings, logits=logits, noise=_noise(logits.numel(), dtype, SEED))
    losses, opened = [], []
    for step in range(settings.total_steps):
        opened.append(lcdd.values() != 0)
        losses.append(lcdd.step(_batch(step).chunk(micro_batches)))
    return losses, torch.stack([*opened, lcdd.values() != 0]), lcdd


def _run_fused(settings: Settings, dtype: torch.dtype, logits: torch.Tensor, micro_batches: int):
    base, tuned = _models(dtype)
    s = settings
    config = LCDDConfig(
        gate_kind=s.gate_kind,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        gate_optimizer=s.gate_optimizer,
        gate_lr=s.gate_lr,
        gate_momentum=s.gate_momentum,
        dual_lambda_init=s.lambda_init,
        dual_lr=s.dual_lr,
        dual_lr_shrink=s.dual_lr_shrink,
        dual_lambda_min=s.lambda_min,
        dual_lambda_max=s.lambda_max,
        violation_clip=s.violation_clip,
        loss_ema_beta=s.ema_beta,
        warmup_steps=s.warmup_steps,
        loss_budget=s.loss_budget,
        loss_floor=s.loss_floor,
        freeze_fraction=s.freeze_fraction,
        seed=SEED,
        reference_compat=s.penalty_every_micro_batch,
        gradient_accumulation_steps=micro_batches,
    )
    optimizer = LCDDOptimizer.attach(tuned, base, config, total_steps=s.total_steps, initial_logits=logits)
    losses, opened = [], []
    for step in range(s.total_steps):
        opened.append(optimizer.gates.values != 0)
        total = 0.0
        for tokens in _batch(step).chunk(micro_batches):
            output = tuned(input_ids=tokens).logits[:, :-1]
            loss = F.cross_entropy(output.flatten(0, 1), tokens[:, 1:].flatten()) / micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step(total)
        optimizer.zero_grad()
        losses.append(total)
    return losses, torch.stack([*opened, optimizer.gates.values != 0]), optimizer


def _logits(dtype: torch.dtype, mean: float) -> torch.Tensor:
    n_gates = 2 * (16 + 16 + 8 + 8 + 16 + 16 + 24 + 16)
    return (mean + torch.randn(n_gates, generator=torch.Generator().manual_seed(5))).to(dtype)


def _assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def _compare(settings: Settings, dtype: torch.dtype, *, mean: float, micro_batches: int, tolerance: float):
    logits = _logits(dtype, mean)
    expected, expected_open, unfused = _run_unfused(settings, dtype, mean, micro_batches)
    losses, opened, fused = _run_fused(settings, dtype, logits, micro_batches)
    # The run is one worth comparing: it learns, the constraint acts, gates open and close until they are frozen.
    assert min(expected) < 0.9 * expected[0]
    assert unfused.dual_lambda != settings.lambda_init
    changes = (expected_open[1:] != expected_open[:-1]).any(dim=1)
    assert changes[: int(0.7 * settings.total_steps)].sum() > 5
    assert 0 < int(expected_open[-1].sum()) < logits.numel()

    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    assert worst < tolerance, f"loss curves differ by {worst:.1e} relative"
    assert torch.equal(opened, expected_open), f"{int((opened != expected_open).sum())} gates differ over the run"
    assert fused.dual.dual_lambda == pytest.approx(unfused.dual_lambda, rel=10 * tolerance)
    state_tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    _assert_close(fused.gates.logits, unfused.gates.logits, state_tolerance)
    weights = dict(unfused.model.named_modules())
    for name in fused.names:
        _assert_close(fused.model.get_submodule(name).weight, weights[name].weight, state_tolerance)
    return fused


# hard_concrete opens with θ = 2.5 in the method; lower here, so that gates close within 200 steps
RUNS = {
    "hard_concrete-adam": ({"gate_kind": "hard_concrete", "gate_lr": 0.05}, 1.0),
    "hard_concrete-sgd": (
        {"gate_kind": "hard_concrete", "gate_optimizer": "sgd", "gate_lr": 2.0, "gate_momentum": 0.5},
        0.5,
    ),
    "heaviside_ste-sgd": (
        {
            "gate_kind": "heaviside_ste",
            "gate_optimizer": "sgd",
            "gate_lr": 2.0,
            "gate_momentum": 0.5,
            "weight_decay": 0.1,
        },
        0.5,
    ),
    "heaviside_ste-adam": ({"gate_kind": "heaviside_ste", "gate_lr": 0.01, "dual_lr_shrink": 0.2}, 0.5),
    "reference_compat": ({"gate_lr": 0.05, "penalty_every_micro_batch": True}, 1.0),
}


def _settings(run: str, steps: int) -> tuple[Settings, float]:
    changes, mean = RUNS[run]
    shared = {"total_steps": steps, "warmup_steps": 10, "learning_rate": 2e-3, "lambda_init": 1e-2, "dual_lr": 0.1}
    return Settings(**(shared | changes)), mean


@pytest.mark.parametrize(
    ("run", "micro_batches"),
    [
        ("hard_concrete-adam", 1),
        ("hard_concrete-adam", 4),
        ("hard_concrete-sgd", 1),
        ("heaviside_ste-sgd", 1),
        ("heaviside_ste-sgd", 4),
        ("heaviside_ste-adam", 1),
        ("reference_compat", 2),
    ],
)
def test_float64_run_of_200_steps_is_the_same(run, micro_batches):
    settings, mean = _settings(run, 200)
    _compare(settings, torch.float64, mean=mean, micro_batches=micro_batches, tolerance=1e-10)


@pytest.mark.parametrize(("run", "micro_batches"), [("hard_concrete-adam", 1), ("heaviside_ste-sgd", 4)])
def test_float64_run_with_packed_gradients_is_the_same(run, micro_batches, monkeypatch):
    """Every matrix is packed from the first step on, though most gates are open then."""
    always = PackCrossover(gather=0.0, crossover=10.0, min_elements=0, source="test")
    monkeypatch.setattr(lcdd_kernels.functional.packed_grad, "DEFAULT_CROSSOVER", {("cpu", torch.float32): always})
    settings, mean = _settings(run, 200)
    fused = _compare(settings, torch.float64, mean=mean, micro_batches=micro_batches, tolerance=1e-10)
    assert {type(site.linear).__name__ for site in sites_of(fused.model)} == {"PackedGradLinear"}
    assert "dense" not in fused._plan.layouts()


@pytest.mark.parametrize(
    ("run", "micro_batches", "backend"),
    [
        ("hard_concrete-adam", 4, None),
        ("hard_concrete-adam", 1, "reference"),
        ("heaviside_ste-sgd", 1, None),
        ("heaviside_ste-sgd", 1, "reference"),
    ],
)
def test_float32_run_of_200_steps_is_the_same(run, micro_batches, backend):
    """backend None: whatever serves this device, the native library where it is built."""
    settings, mean = _settings(run, 200)
    with use_backend(backend) if backend else nullcontext():
        _compare(settings, torch.float32, mean=mean, micro_batches=micro_batches, tolerance=1e-5)


def test_the_noise_given_to_both_is_what_the_gates_use():
    """Gates of the package at a step are those of the plain formula with `_noise`, so the comparison is of one
    problem."""
    logits = _logits(torch.float64, 0.0)
    z, _ = gate_values(logits, GateSpec(kind="hard_concrete", seed=SEED, step=3))
    u = _noise(logits.numel(), torch.float64, SEED)(3)
    plain = (torch.sigmoid((torch.logit(u) + logits) * 1.5) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(z, plain, rtol=1e-12, atol=1e-12)
