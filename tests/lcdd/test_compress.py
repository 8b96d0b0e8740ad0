"""An LCDD run ends with the sparsest carrier that kept its budget, and holds on to the base if it is told to."""

import copy
from dataclasses import replace

import pytest
import torch

from fixtures.checkpoints import make_model
from lcdd.config import LCDDConfig
from lcdd.data import IGNORE, Encoded
from lcdd.errors import InputError
from lcdd.optimizer import LCDDOptimizer
from lcdd.trainer import Anchors, HeldOut, StartLosses, compress, response_tokens, total_steps
from lcdd.trainer.anchors import without_first_token
from lcdd.trainer.compress import BestCarrier

PAD = 0


def example(seed: int) -> Encoded:
    ids = torch.randint(5, 40, (6,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(input_ids=(*ids, 41, 42, 43), labels=(*[IGNORE] * 6, 41, 42, 43), n_prompt=6)


ITEMS = [example(seed) for seed in range(24)]
CONFIG = LCDDConfig(
    max_steps=120, per_device_train_batch_size=8, warmup_steps=3, eval_steps=5, loss_floor=0.3, learning_rate=5e-3
)


@pytest.fixture(scope="module")
def models():
    """A base, and the same model with a difference that the items' completions like better."""
    base = make_model("qwen3", seed=0)
    tuned = copy.deepcopy(base).train()
    adam = torch.optim.Adam([p for n, p in tuned.named_parameters() if "proj" in n], lr=2e-3)
    ids, labels = (torch.tensor([getattr(item, name) for item in ITEMS]) for name in ("input_ids", "labels"))
    for _ in range(60):
        adam.zero_grad()
        tuned(input_ids=ids, labels=labels).loss.backward()
        adam.step()
    return base.eval(), tuned.eval()


def attached(models, config: LCDDConfig = CONFIG) -> tuple[LCDDOptimizer, StartLosses, HeldOut]:
    base, tuned = (copy.deepcopy(model) for model in models)
    held_out = HeldOut(items=ITEMS, pad_token_id=PAD)
    start = StartLosses(base=held_out.loss(base), model=held_out.loss(tuned))
    return LCDDOptimizer.attach(tuned, base, config, total_steps=total_steps(config, len(ITEMS))), start, held_out


def test_the_result_keeps_the_budget_on_held_out_text_and_closes_gates(models) -> None:
    optimizer, start, held_out = attached(models)
    result = compress(optimizer, ITEMS, held_out, start=start, progress=False)
    epsilon = start.model + max(0.3, 0.2 * min(start.model, start.base - start.model))
    assert optimizer.dual.epsilon == pytest.approx(epsilon)  # the held-out loss before any gate closed is the baseline
    assert result.loss_end <= epsilon
    assert held_out.loss(optimizer.model) == pytest.approx(result.loss_end)
    assert optimizer.carrier().sparsity()["overall"] > 0.5


def test_a_better_carrier_on_the_way_ships_bit_for_bit(models) -> None:
    optimizer, start, held_out = attached(models)
    optimizer.observe_held_out(start.model)
    best = BestCarrier(optimizer, base_loss=start.base)
    for step in range(1, 121):
        batch = ITEMS[:8]
        ids, labels = (torch.tensor([getattr(item, name) for item in batch]) for name in ("input_ids", "labels"))
        loss = optimizer.model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step(loss)
        if step == 90:
            optimizer.eval()
            best.observe(0.0)
            kept, loss_then = copy.deepcopy(best.carrier), held_out.loss(optimizer.model)
            optimizer.train()
    assert kept is not None
    found = best.better_than(1e9)
    assert found is not None
    optimizer.load_carrier(found)
    assert held_out.loss(optimizer.model) == loss_then
    again = optimizer.carrier()
    assert torch.equal(again.gate, kept.gate)
    assert all(torch.equal(again.deltas[name], kept.deltas[name]) for name in kept.deltas)
    assert best.better_than(0.0) is None or kept.n_open < optimizer.n_open
    optimizer.eval()
    best.observe(0.0)
    assert optimizer.observe_behavior(1.0) is False
    assert optimizer.observe_behavior(0.5) is True
    best.withdraw()  # the behaviour is gone there: the one before ships, whatever this one's loss
    assert best.better_than(0.0) is found


def test_a_loss_over_the_budget_and_a_mostly_open_carrier_are_not_kept(models) -> None:
    optimizer, start, _ = attached(models)
    best = BestCarrier(optimizer, base_loss=start.base)
    best.observe(start.model)
    assert best.carrier is None  # warm-up; and every gate is open
    assert best.state_dict() is None


def test_the_bases_answers_are_held_on_to(models) -> None:
    """The KL term lowers KL(base || carrier) on the base's answers, at a budget that is kept all the same."""
    base, _ = models
    found = {}
    anchored = [replace(item, input_ids=(*item.input_ids[:6], 7, 8, 9), labels=(*item.labels[:6], 7, 8, 9))
                for item in ITEMS]  # fmt: skip
    for weight in (0.0, 5.0):
        config = replace(CONFIG, base_kl_weight=weight, target_sparsity=0.6, shrink_delta=False)
        optimizer, start, held_out = attached(models, config)
        anchors = Anchors(items=anchored, base=base, weight=weight or 1.0, batch_size=8, pad_token_id=PAD)
        compress(optimizer, ITEMS, held_out, start=start, anchors=anchors if weight else None, progress=False)
        model = optimizer.model.requires_grad_(True)
        measure = Anchors(items=anchored, base=base, weight=0.0, batch_size=64, pad_token_id=PAD)
        found[weight] = measure.backward(model, 1, whole=True, autocast=False)
        assert held_out.loss(model) <= optimizer.dual.epsilon
    assert found[5.0] < 0.7 * found[0.0]


def test_the_kl_weight_needs_answers(models) -> None:
    optimizer, start, held_out = attached(models, replace(CONFIG, base_kl_weight=1.0))
    with pytest.raises(InputError, match="anchors: expected the base's answers"):
        compress(optimizer, ITEMS, held_out, start=start, progress=False)


def test_anchors_leave_the_first_token_out_while_gates_close(models) -> None:
    item = ITEMS[0]
    assert without_first_token(item).labels == (*[IGNORE] * 7, 42, 43)
    assert response_tokens([without_first_token(item)]) == 2
    anchors = Anchors(items=ITEMS, base=models[0], weight=1.0, batch_size=5, pad_token_id=PAD, seed=3)
    assert anchors.batch(4, whole=True) == anchors.batch(4, whole=True)
    assert anchors.batch(4, whole=True) != anchors.batch(5, whole=True)
    assert [without_first_token(i) for i in anchors.batch(4, whole=True)] == anchors.batch(4, whole=False)


@pytest.mark.parametrize(
    ("settings", "paced"),
    [
        ({}, True),
        ({"target_sparsity": 0.9}, True),
        ({"gate_lr": 0.2}, False),
        ({"dual_lr": 0.1}, False),
        ({"gating": "forward"}, False),
        ({"reference_compat": True}, False),
        ({"gate_controller": "dual"}, False),
        ({"gate_controller": "paced"}, True),
    ],
)
def test_which_controller_a_config_asks_for(models, settings, paced) -> None:
    assert LCDDConfig(**settings).paced == paced


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_controller": "paced", "gate_lr": 0.2}, "gate_lr: expected its default under gate_controller 'paced'"),
        ({"gate_controller": "dual", "target_sparsity": 0.5}, "target_sparsity: expected its default under the dual"),
        ({"gate_controller": "dual", "base_kl_weight": 1.0}, "base_kl_weight: expected its default under the dual"),
        ({"gate_controller": "paced", "gating": "forward"}, "gate_controller: expected dual with gating 'forward'"),
    ],
)
def test_settings_of_the_other_controller_are_refused(settings, message) -> None:
    with pytest.raises(InputError, match=message):
        LCDDConfig(**settings)


def test_given_logits_ask_for_the_dual_descent_unless_pacing_is_asked_for(models) -> None:
    base, tuned = models
    logits = torch.ones(attached(models)[0].gates.layout.n_gates)
    logits[::2] = -1.0
    for config, n_open in ((LCDDConfig(), None), (LCDDConfig(gate_controller="paced"), len(logits) // 2)):
        optimizer = LCDDOptimizer.attach(
            copy.deepcopy(tuned), copy.deepcopy(base), config, total_steps=10, initial_logits=logits
        )
        if n_open is None:
            assert torch.equal(optimizer.gates.logits, logits)
            assert not optimizer.config.paced
        else:
            assert optimizer.n_open == n_open
