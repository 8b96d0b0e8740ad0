"""Guards: what is not finite is skipped and counted, runs that lead nowhere stop with advice, no labels, no memory."""

import logging
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.checkpoints import base_and_tuned, make_tokenizer, train_lcdd
from lcdd.checkpoint import CheckpointStore, RunLog
from lcdd.config import LCDDConfig
from lcdd.data import Encoded
from lcdd.errors import TrainingStopped
from lcdd.models import sites_of
from lcdd.optimizer import LCDDOptimizer
from lcdd.optimizer.early_stop import EarlyStop
from lcdd.trainer import HeldOut, StartLosses, check_labels, fit
from lcdd.trainer import loop as trainer

PAD = make_tokenizer().pad_token_id
CONFIG = LCDDConfig(max_steps=20, warmup_steps=3, per_device_train_batch_size=4, gate_lr=0.2, learning_rate=1e-3)
ITEMS = [
    Encoded(input_ids=(3, 4, 5 + n, 6, 7), labels=(-100, -100, 5 + n, 6, 7), n_prompt=2) for n in range(12)
]  # fmt: skip


@pytest.mark.parametrize("where", ["loss", "gradient", "theta"])
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_not_finite_at_random_steps_is_skipped(
    where: str, what: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = set(random.Random(where).sample(range(2, 20), 4))
    step = LCDDOptimizer.step
    count: list[int] = []

    def poisoned(self: LCDDOptimizer, loss: float) -> None:
        count.append(1)
        bad = len(count) in chosen
        theta, price = self.gates.logits.detach().clone(), self.dual.state_dict()
        if bad and where == "gradient":
            sites_of(self.model)[len(count) % 7].weight.grad[1, 2] = what
        if bad and where == "theta":
            with torch.no_grad():
                self.gates.logits[7] = what
        delta = {name: part[1].clone() for name, part in self.masked().items()}
        step(self, what if bad and where == "loss" else loss)
        if bad:
            assert torch.equal(self.gates.logits, theta)
            assert self.dual.state_dict() == price
            assert all(torch.equal(part[1], delta[name]) for name, part in self.masked().items())

    monkeypatch.setattr(LCDDOptimizer, "step", poisoned)
    base, tuned = base_and_tuned()
    log = RunLog(None, stage="lcdd")
    with caplog.at_level(logging.WARNING):
        optimizer, result = train_lcdd(tuned, base, ITEMS, [], CONFIG, pad_token_id=PAD, log=log)
    assert result.skipped_steps == 4
    assert optimizer.completed_steps == 16
    assert sum("step skipped" in record.message for record in caplog.records) == 4
    assert [line["skipped_steps"] for line in log.lines if "ema" in line][-1] == 4
    assert torch.isfinite(optimizer.gates.logits).all()


def test_many_in_a_row_stop_with_a_checkpoint_of_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = trainer.loss_sum, []

    def bad(*args: Any) -> Any:
        count.append(1)
        return original(*args) * (math.nan if len(count) > 6 else 1.0)

    monkeypatch.setattr(trainer, "loss_sum", bad)
    store = CheckpointStore(tmp_path, identity={"stage": "lcdd"})
    base, tuned = base_and_tuned()
    optimizer = LCDDOptimizer.attach(tuned, base, CONFIG, total_steps=20)
    held_out, start = HeldOut(items=ITEMS, pad_token_id=PAD), StartLosses(base=1.0, model=0.5)
    with pytest.raises(TrainingStopped, match=r"5 steps in a row, .* step 11; the last checkpoint is .*-11"):
        fit(optimizer, ITEMS, held_out, start=start, checkpoints=store, progress=False)
    _, good = store.load(tmp_path / "checkpoint-11")
    assert good["optimizer"]["lcdd"]["completed_steps"] == 6
    assert good["optimizer"]["lcdd"]["skipped_in_a_row"] == 0
    again = LCDDOptimizer.attach(base_and_tuned()[1].train(), base, CONFIG, total_steps=20)
    again.load_state_dict(good["optimizer"])
    assert torch.equal(again.gates.logits, optimizer.gates.logits)


def line(**changes: Any) -> dict[str, Any]:
    return {"ema": 0.5, "epsilon": 1.0, "sparsity": 0.3, "dual_lambda": 1.0, **changes}


def test_over_pruning_stops_after_its_patience() -> None:
    watch = EarlyStop(LCDDConfig(early_stop_patience=5))
    for _ in range(4):
        assert watch.check(line(ema=2.5)) is None
    assert watch.check(line()) is None  # back within the budget: counts anew
    found = [watch.check(line(ema=2.5)) for _ in range(5)]
    assert found[:4] == [None] * 4
    assert "over-pruned" in str(found[4])
    assert "--dual_lr" in str(found[4])
    assert EarlyStop(LCDDConfig(early_stop_patience=0)).check(line(ema=99.0)) is None
    assert watch.check(line(epsilon=None)) is None


def test_stalled_compression_stops_only_at_lambdas_cap() -> None:
    config = LCDDConfig(early_stop_patience=5, dual_lambda_max=1.0)
    growing, capped = EarlyStop(config), EarlyStop(config)
    for _ in range(6):
        assert growing.check(line(dual_lambda=0.5)) is None
    for number in range(20):
        assert capped.check(line(sparsity=0.3 + 0.01 * number)) is None
    found = [capped.check(line(sparsity=0.49)) for _ in range(5)]
    assert "stalled compression" in str(found[4])
    assert "--dual_lambda_max" in str(found[4])
    again = EarlyStop(config)
    again.load_state_dict(capped.state_dict())
    assert again.check(line(sparsity=0.49)) is not None


def test_early_stop_reaches_the_trainer(tmp_path: Path) -> None:
    base, tuned = base_and_tuned()
    config = LCDDConfig(
        max_steps=60, warmup_steps=3, per_device_train_batch_size=4, gate_lr=0.0, dual_lr=0.0, early_stop_patience=7,
        loss_floor=9.0,
    )  # fmt: skip
    store = CheckpointStore(tmp_path, identity={})
    with pytest.raises(TrainingStopped, match=r"stopped after step \d+, stalled compression.*the last checkpoint is"):
        train_lcdd(tuned, base, ITEMS, [], config, pad_token_id=PAD, checkpoints=store)
    assert len(store.complete()) == 1


def test_rows_without_a_label_are_named() -> None:
    masked = Encoded(input_ids=(3, 4, 5), labels=(-100, -100, -100), n_prompt=3)
    first = Encoded(input_ids=(3, 4), labels=(3, -100), n_prompt=0)  # nothing comes before its only label
    with pytest.raises(ValueError, match=r"got none in 2 of 14 .*rows 3, 13 counted from 0"):
        check_labels([*ITEMS[:3], masked, *ITEMS[3:], first])
    check_labels(ITEMS)


def test_out_of_memory_prints_the_table_and_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = trainer.loss_sum, []

    def hungry(*args: Any) -> Any:
        count.append(1)
        if len(count) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(*args)

    monkeypatch.setattr(trainer, "loss_sum", hungry)
    base, tuned = base_and_tuned()
    store = CheckpointStore(tmp_path, identity={})
    config = LCDDConfig(max_steps=20, warmup_steps=3, per_device_train_batch_size=4, save_steps=5)
    with pytest.raises(TrainingStopped) as stop:
        train_lcdd(tuned, base, ITEMS, [], config, pad_token_id=PAD, checkpoints=store)
    text = str(stop.value)
    assert f"out of memory in step 8; the last checkpoint is {tmp_path / 'checkpoint-5'}" in text
    for row in ("model", "base", "gradients", "optimizer's delta", "optimizer's exp_avg_sq", "activations", "together"):
        assert f"  {row}" in text
    assert "--gradient_checkpointing" in text
    # other errors of torch are not memory
    monkeypatch.setattr(trainer, "loss_sum", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train_lcdd(base_and_tuned()[1], base, ITEMS, [], CONFIG, pad_token_id=PAD)


def test_thirty_repeats_have_the_same_bits() -> None:
    results = set()
    for _ in range(30):
        base, tuned = base_and_tuned()
        config = LCDDConfig(max_steps=4, warmup_steps=2, per_device_train_batch_size=4, gate_lr=0.3, learning_rate=1e-3)
        log = RunLog(None, stage="lcdd")
        optimizer, _ = train_lcdd(tuned, base, ITEMS, [], config, pad_token_id=PAD, log=log)
        parts = [*optimizer.model.parameters(), optimizer.gates.logits]
        results.add((b"".join(p.detach().numpy().tobytes() for p in parts), tuple(x.get("loss") for x in log.lines)))
    assert len(results) == 1


def test_zero3_and_other_sharding_is_refused_with_the_reason() -> None:
    base, tuned = base_and_tuned()
    sites_of(tuned)[2].weight.ds_id = 7
    with pytest.raises(ValueError, match=r"v_proj.weight: expected .* DeepSpeed ZeRO-3, which .*fully_shard"):
        LCDDOptimizer.attach(tuned, base, CONFIG, total_steps=5)
