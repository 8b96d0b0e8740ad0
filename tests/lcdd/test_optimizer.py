"""LCDDOptimizer's promises on a small real model: invariants, modes, state, guards."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from lcdd.config import LCDDConfig
from lcdd.models import sites_of
from lcdd.optimizer import LCDDOptimizer
from lcdd_kernels import PackCrossover

TOKENS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(9))


def models(dtype=torch.float32, *, tied=False):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    base = Qwen3ForCausalLM(config).to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for site in sites_of(tuned):
            site.weight.add_(0.02 * torch.randn_like(site.weight))
    return base, tuned.train()


def config(**changes) -> LCDDConfig:
    quick = {"learning_rate": 1e-3, "warmup_steps": 3, "gate_init_mean": 1.0, "gate_init_std": 1.0}
    return LCDDConfig(**(quick | changes))


def attach(model, base, total_steps=20, initial_logits=None, **changes) -> LCDDOptimizer:
    return LCDDOptimizer.attach(model, base, config(**changes), total_steps=total_steps, initial_logits=initial_logits)


def loss_of(model, tokens=TOKENS):
    logits = model(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(model, optimizer, steps, micro_batches=1):
    losses = []
    for _ in range(steps):
        total = 0.0
        for part in TOKENS.chunk(micro_batches):
            loss = loss_of(model, part) / micro_batches
            loss.backward()
            total += loss.item()
        optimizer.step(total)
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
def test_all_gates_closed_is_the_base_bit_for_bit(kind, tied):
    base, tuned = models(tied=tied)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.5)  # outside the gates: goes back to the base
    n = sum(1 for _ in tuned.parameters())
    optimizer = attach(tuned, base, gate_kind=kind, initial_logits=torch.full((2 * 200,), -9.0))
    assert n == sum(1 for _ in tuned.parameters())
    optimizer.eval()
    tuned.eval()
    with torch.no_grad():
        assert torch.equal(tuned(TOKENS).logits, base(TOKENS).logits)


def test_closed_gates_leave_their_delta_alone():
    base, tuned = models()
    logits = torch.full((2 * 200,), -9.0)
    optimizer = attach(tuned, base, initial_logits=logits, gate_lr=0.0)
    before = {name: delta.clone() for name, (_, delta, _) in optimizer.masked().items()}
    train(tuned, optimizer, 3)
    for name, (_, delta, _) in optimizer.masked().items():
        assert torch.equal(delta, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_model_equals_the_trained_one_and_detaches(dtype):
    base, tuned = models(dtype)
    optimizer = attach(tuned, base)
    train(tuned, optimizer, 5)
    optimizer.eval()
    tuned.eval()
    with torch.no_grad():
        before = tuned(TOKENS).logits
        folded = optimizer.fold()
        assert torch.equal(folded(TOKENS).logits, before)
    assert set(folded.state_dict()) == set(base.state_dict())


def test_eval_and_train_go_back_bit_for_bit():
    base, tuned = models()
    optimizer = attach(tuned, base)
    train(tuned, optimizer, 4)
    sampled = [site.weight.detach().clone() for site in sites_of(tuned)]
    optimizer.eval()
    assert any(not torch.equal(a, s.weight) for a, s in zip(sampled, sites_of(tuned), strict=True))
    optimizer.train()
    assert all(torch.equal(a, s.weight) for a, s in zip(sampled, sites_of(tuned), strict=True))


def test_a_forgotten_eval_is_caught():
    base, tuned = models()
    optimizer = attach(tuned, base)
    tuned.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer\.eval\(\) first"):
        tuned(TOKENS)
    with pytest.raises(RuntimeError, match=r"call optimizer\.eval\(\) before saving"):
        tuned.state_dict()
    optimizer.eval()
    tuned(TOKENS)
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) first"):
        optimizer.step(1.0)


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
def test_the_gate_penalty_does_not_grow_with_accumulation(kind):
    results = []
    for micro_batches in (1, 2, 4):
        base, tuned = models(torch.float64)
        # plain SGD on θ: Adam would blow the rounding of gradients near zero up to whole steps
        optimizer = attach(tuned, base, gate_kind=kind, gate_optimizer="sgd", gate_momentum=0.9)
        train(tuned, optimizer, 8, micro_batches)
        results.append(optimizer)
    for other in results[1:]:
        # transformers computes norms and softmax in float32 whatever the model's dtype
        torch.testing.assert_close(other.gates.logits, results[0].gates.logits, rtol=1e-6, atol=1e-7)
        assert other.dual.dual_lambda == pytest.approx(results[0].dual.dual_lambda, rel=1e-6)


def test_gradient_checkpointing_changes_nothing():
    losses = []
    for checkpointing in (False, True):
        base, tuned = models()
        if checkpointing:
            tuned.gradient_checkpointing_enable()
            tuned.enable_input_require_grads()
        losses.append(train(tuned, attach(tuned, base), 4))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
def test_packed_gradients_train_exactly_as_dense_ones_do(kind, monkeypatch):
    everything_packs = PackCrossover(gather=0.0, crossover=1.1, min_elements=0, source="test")
    monkeypatch.setattr("lcdd.optimizer.packed.default_crossover", lambda *_: everything_packs)
    runs = {}
    for pack in ("never", "auto"):
        base, tuned = models(torch.float64)
        logits = torch.randn(2 * 200, generator=torch.Generator().manual_seed(3)) - 0.5
        optimizer = attach(tuned, base, pack=pack, gate_kind=kind, gate_optimizer="sgd", initial_logits=logits)
        runs[pack] = (train(tuned, optimizer, 6, micro_batches=2), optimizer)
    assert {"block", "panels"} & set(runs["auto"][1]._plan.layouts())
    assert runs["auto"][0] == pytest.approx(runs["never"][0], rel=1e-7)
    torch.testing.assert_close(runs["auto"][1].gates.logits, runs["never"][1].gates.logits, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
def test_the_forward_route_trains_as_the_optimizer_route_does(kind):
    runs = {}
    for gating in ("optimizer", "forward"):
        base, tuned = models(torch.float64)
        optimizer = attach(tuned, base, gating=gating, gate_kind=kind, gate_optimizer="sgd", total_steps=8)
        losses = train(tuned, optimizer, 8, micro_batches=2)  # the last steps are frozen ones
        folded = optimizer.fold().eval()
        with torch.no_grad():
            runs[gating] = (losses, optimizer.gates.logits.detach(), folded(TOKENS).logits)
    assert runs["forward"][0] == pytest.approx(runs["optimizer"][0], rel=1e-7)
    torch.testing.assert_close(runs["forward"][1], runs["optimizer"][1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(runs["forward"][2], runs["optimizer"][2], rtol=1e-5, atol=1e-5)


def test_the_forward_route_trains_masks_alone():
    base, tuned = models()
    optimizer = attach(tuned, base, gating="forward", train_delta=False)
    logits = optimizer.gates.logits.detach().clone()
    train(tuned, optimizer, 2)
    assert not torch.equal(optimizer.gates.logits, logits)


@pytest.mark.parametrize("unmasked", [False, True])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(unmasked):
    settings = {"train_unmasked": unmasked, "gate_optimizer": "sgd", "gate_momentum": 0.9, "moment_dtype": "float32"}
    base, whole = models(torch.bfloat16)
    reference = attach(whole, base, **settings)
    train(whole, reference, 4)
    saved = copy.deepcopy(reference.state_dict())
    expected = train(whole, reference, 4)

    base, fresh = models(torch.bfloat16)
    resumed = attach(fresh, base, **settings)
    resumed.load_state_dict(saved)
    assert train(fresh, resumed, 4) == expected
    assert torch.equal(resumed.gates.logits, reference.gates.logits)
    for a, b in zip(sites_of(whole), sites_of(fresh), strict=True):
        assert torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(where):
    base, tuned = models()
    optimizer = attach(tuned, base)
    train(tuned, optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    loss_of(tuned).backward()
    if where == "gradient":
        sites_of(tuned)[3].weight.grad[0, 0] = math.inf
    optimizer.step(math.nan if where == "loss" else 1.0)
    optimizer.zero_grad()
    assert optimizer.skipped_in_a_row == 1
    after = optimizer.state_dict()
    assert after["lcdd"]["dual"] == saved["lcdd"]["dual"]
    assert torch.equal(after["lcdd"]["gate_logits"], saved["lcdd"]["gate_logits"])
    for index, state in saved["state"].items():
        assert all(torch.equal(after["state"][index][k], v) for k, v in state.items())
    train(tuned, optimizer, 1)
    assert optimizer.skipped_in_a_row == 0
    assert optimizer.skipped_steps == 1


def test_the_last_fraction_freezes_the_gates_and_trains_delta_on_what_ships():
    base, tuned = models()
    optimizer = attach(tuned, base, total_steps=10, freeze_fraction=0.4)
    train(tuned, optimizer, 6)
    assert optimizer.gates_frozen
    assert not optimizer.gates.sampled
    logits, price = optimizer.gates.logits.clone(), optimizer.dual.dual_lambda
    name = optimizer.names[0]
    delta = optimizer.masked()[name][1].clone()
    train(tuned, optimizer, 4)
    assert torch.equal(optimizer.gates.logits, logits)
    assert optimizer.dual.dual_lambda == price
    assert not torch.equal(optimizer.masked()[name][1], delta)


def test_mask_only_trains_gates_and_no_weight():
    base, tuned = models()
    optimizer = attach(tuned, base, train_delta=False)
    before = {name: delta.clone() for name, (_, delta, _) in optimizer.masked().items()}
    logits = optimizer.gates.logits.clone()
    train(tuned, optimizer, 3)
    assert not torch.equal(optimizer.gates.logits, logits)
    assert all(torch.equal(delta, before[name]) for name, (_, delta, _) in optimizer.masked().items())


def test_observe_serves_trainers_that_call_step_themselves():
    base, tuned = models()
    optimizer = attach(tuned, base)
    loss_of(tuned).backward()
    with pytest.raises(ValueError, match="loss: expected the step's mean loss"):
        optimizer.step()
    optimizer.observe(1.25)
    optimizer.step()
    assert optimizer.stats()["loss"] == 1.25


def test_bad_input_is_refused_by_name():
    base, tuned = models()
    with pytest.raises(ValueError, match="base: expected its own copy"):
        attach(base, base)
    with pytest.raises(ValueError, match="total_steps: expected at least 1"):
        attach(tuned, base, total_steps=0)
    with pytest.raises(ValueError, match=r"base: expected .*torch.float32.*torch.float64"):
        attach(tuned, models(torch.float64)[0])
    with pytest.raises(ValueError, match="prices: expected None under the dual descent"):
        LCDDOptimizer.attach(tuned, base, config(gate_controller="dual"), total_steps=9, prices=torch.ones(1))
    paced = LCDDConfig(gate_controller="paced")
    with pytest.raises(ValueError, match=r"prices: expected shape \(\d+,\), one for each gate, got \(1,\)"):
        LCDDOptimizer.attach(tuned, base, paced, total_steps=9, prices=torch.ones(1))
    optimizer = attach(tuned, base)
    with pytest.raises(ValueError, match=r"q_proj\.weight: expected a gradient"):
        optimizer.step(1.0)


@pytest.mark.parametrize("kind", ["hard_concrete", "heaviside_ste"])
def test_somebody_elses_default_device_changes_nothing(kind):
    """As while a model is built on the meta device, or after torch.set_default_device("cuda")."""
    found = []
    for place in ("cpu", "meta"):
        base, tuned = models()
        optimizer = attach(tuned, base, gate_kind=kind)
        for _ in range(3):
            loss = loss_of(tuned)
            loss.backward()
            with torch.device(place):
                optimizer.step(loss)
                optimizer.zero_grad()
        with torch.device(place):
            optimizer.carrier()
            del optimizer  # the collector comes by
        found.append([weight.detach().clone() for weight in tuned.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
