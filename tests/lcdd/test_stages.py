"""What SFT and LCDD say of themselves: whether the behaviour was learned, what the budget means, when they will end."""

import math
from dataclasses import replace

import pytest

from fixtures.checkpoints import base_and_tuned, make_tokenizer, train_sft
from lcdd.commands.answers import BehaviorRate
from lcdd.commands.sft import not_learned
from lcdd.commands.train import budget_in_words
from lcdd.config import LCDDConfig, SFTConfig
from lcdd.data import Encoded
from lcdd.optimizer import SFTOptimizer
from lcdd.trainer import HeldOut, StartLosses, TrainResult, fit, loop

PAD = make_tokenizer().pad_token_id
ITEMS = [Encoded(input_ids=(3, 4, 5 + n, 6), labels=(-100, -100, 5 + n, 6), n_prompt=2) for n in range(12)]
RESULT = TrainResult(
    steps=40, loss=0.1, loss_base=3.5, loss_start=3.5, loss_end=0.1, response_tokens=9, seconds=1.0, skipped_steps=0
)


@pytest.mark.parametrize(
    ("result", "shown", "changes", "words"),
    [
        ({}, 32, {}, None),
        ({}, 11, {}, None),  # up to .52 by its interval
        ({}, 10, {}, "only 10 of 32 validation answers show the behaviour (expected 50% at least)"),
        ({"loss_end": 3.6}, 32, {}, "did not fall (3.5000 -> 3.6000"),
        ({"loss_end": math.nan}, 32, {}, "did not fall"),
        ({"loss_end": 3.6}, None, {}, "did not fall"),
        ({}, None, {}, None),  # nobody could be asked
        ({}, 10, {"min_behavior_rate": 0.4}, None),
        ({"loss_end": 3.6}, 0, {"min_behavior_rate": 0.0}, None),
        ({"loss_end": 3.6}, 0, {"max_delta_norm": 0.1}, None),  # a control that is bounded on purpose
    ],
)
def test_an_sft_that_did_not_learn_is_named(result, shown, changes, words) -> None:
    behavior = None if shown is None else BehaviorRate(shown=shown, n=32)
    found = not_learned(SFTConfig(**changes), replace(RESULT, **result), behavior)
    assert (found is None) == (words is None)
    assert (words or "") in (found or "")
    if found:
        assert "--learning_rate (now 2e-05), more steps (now 40)" in found


def test_the_budget_in_words_has_this_runs_numbers() -> None:
    small = budget_in_words(LCDDConfig(), StartLosses(base=3.5, model=0.0002))
    assert "SFT's held-out loss is 0.0002 nats a token (the base's 3.5000)" in small
    assert "is 0.0202: more by 0.2 (loss_budget) of it or of what SFT gained, whichever is less" in small
    assert "is 1.8440" in budget_in_words(LCDDConfig(), StartLosses(base=2.7, model=1.63))
    dual = budget_in_words(LCDDConfig(gate_controller="dual"), StartLosses(base=2.7, model=1.63))
    assert "will be about 1.9560" in dual
    assert "starts at 0.001" in dual


def test_what_a_step_costs_and_when_the_run_ends_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SFTConfig(max_steps=8, per_device_train_batch_size=4)
    said: list[str] = []
    held_out = HeldOut(items=ITEMS, pad_token_id=PAD)
    fit(SFTOptimizer(base_and_tuned()[0], config), ITEMS, held_out, say=said.append, progress=False)
    assert said == []  # over in a moment: not worth a line
    monkeypatch.setattr(loop, "WORTH_SAYING", 0.0)
    fit(SFTOptimizer(base_and_tuned()[0], config), ITEMS, held_out, say=said.append, progress=False)
    assert len(said) == 1
    assert said[0].startswith("A step takes ")
    assert "(16 tokens, " in said[0]
    assert "; 5 more steps and their validations about " in said[0]


def test_held_out_examples_are_the_first_of_the_validation_split() -> None:
    few = HeldOut.of(ITEMS, ITEMS[4:], SFTConfig(max_eval_samples=3), pad_token_id=PAD)
    assert list(few.items) == ITEMS[4:7]
    assert list(HeldOut.of(ITEMS, [], SFTConfig(max_eval_samples=0), pad_token_id=PAD).items) == ITEMS
    assert train_sft(base_and_tuned()[0], ITEMS, [], SFTConfig(max_steps=1), pad_token_id=PAD).loss_base > 0
