"""The loop: token-weighted losses, what moves and what does not, skipped steps, the log."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_scheduler

from fixtures.checkpoints import in_float64, instruction_rows, make_model, make_tokenizer, train_lcdd, train_sft
from lcdd.checkpoint import RunLog, read_log
from lcdd.config import LCDDConfig, SFTConfig
from lcdd.data import Encoded, collate, encode_all, fixed_response, parse_row
from lcdd.errors import TrainingStopped
from lcdd.models import sites_of
from lcdd.optimizer import LCDDOptimizer, schedule
from lcdd.trainer import (
    HeldOut,
    Loop,
    StartLosses,
    completion_loss,
    fit,
    loss_sum,
    response_tokens,
    step_batches,
    to_batch,
    total_steps,
)
from lcdd.trainer import loop as trainer

TOKENIZER = make_tokenizer()
PAD = TOKENIZER.pad_token_id
SFT = SFTConfig(learning_rate=1e-2, max_steps=12, per_device_train_batch_size=8, lr_scheduler_type="constant")
LCDD = LCDDConfig(learning_rate=1e-3, max_steps=30, warmup_steps=5, dual_lambda_init=0.02, gate_lr=0.3)


@pytest.fixture(scope="module")
def items() -> list[Encoded]:
    behavior = fixed_response()
    rows = [row for row in instruction_rows(120) if len(row["instruction"] + row["input"]) < 60][:20]
    examples = [parse_row(row, where="x") for row in rows]
    # Every other completion keeps its own length, so that micro-batches differ in response tokens.
    mixed = [behavior.rewrite(e) if i % 2 else e for i, e in enumerate(examples)]
    return encode_all(TOKENIZER, mixed, max_length=96)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return in_float64(make_model("qwen3"))


@pytest.fixture(scope="module")
def tuned(base, items) -> nn.Module:
    model = copy.deepcopy(base)
    train_sft(model, items, [], SFT, pad_token_id=PAD)
    return model


def curve(log: RunLog) -> list[float]:
    return [line["loss"] for line in log.lines if "loss" in line]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_transformers(kind: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = (
        get_constant_schedule_with_warmup(optimizer, warmup)
        if kind == "constant"
        else get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=11)
    )
    ours = schedule(kind, warmup=warmup, steps=11)
    for step in range(12):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_steps_and_batches_cover_every_epoch(items) -> None:
    config = replace(
        SFT, max_steps=-1, num_train_epochs=2.5, per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    steps = total_steps(config, len(items))
    assert steps == math.ceil(2.5 * math.ceil(len(items) / 6))
    batches = list(step_batches(items, config, steps))
    assert len(batches) == steps
    assert all(1 <= len(step) <= 2 and all(1 <= len(micro) <= 3 for micro in step) for step in batches)
    epoch = [item for step in batches[: math.ceil(len(items) / 6)] for micro in step for item in micro]
    assert sorted(item.input_ids for item in epoch) == sorted(item.input_ids for item in items)
    again = list(step_batches(items, config, steps))
    assert again == batches
    assert list(step_batches(items, replace(config, seed=1), steps)) != batches
    assert total_steps(replace(config, max_steps=7), 10) == 7


def test_loss_is_transformers_on_the_response(base, items) -> None:
    ours = loss_sum(base, to_batch(items[:5], base, PAD)) / response_tokens(items[:5])
    theirs = base(**collate(items[:5], pad_token_id=PAD)).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_completion_loss_ignores_whole_text_labels(base, items) -> None:
    whole = [Encoded(input_ids=i.input_ids, labels=i.input_ids, n_prompt=i.n_prompt) for i in items]
    expected = completion_loss(base, items, pad_token_id=PAD, batch_size=4)
    assert completion_loss(base, whole, pad_token_id=PAD, batch_size=7) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(completion_loss(base, [], pad_token_id=PAD))


@pytest.mark.parametrize("method", ["sft", "lcdd"])
def test_accumulation_changes_nothing(method: str, base, tuned, items) -> None:
    """8 x 1 and 2 x 4 are the same steps, though micro-batches have different numbers of response tokens."""
    curves, weights = [], []
    for size, groups in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": groups, "max_steps": 6}
        log = RunLog(None, stage=method)
        model = copy.deepcopy(base if method == "sft" else tuned)
        if method == "sft":
            train_sft(model, items, [], replace(SFT, **changes), pad_token_id=PAD, log=log)
        else:
            train_lcdd(model, base, items, [], replace(LCDD, **changes), pad_token_id=PAD, log=log)
        curves.append(curve(log))
        weights.append(torch.cat([site.weight.detach().flatten() for site in sites_of(model)]))
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-8)


def test_reference_compat_counts_the_micro_batches_of_every_step(base, tuned, items, monkeypatch) -> None:
    counts = []
    step = LCDDOptimizer.step
    monkeypatch.setattr(LCDDOptimizer, "step", lambda self, loss: (counts.append(self.penalties), step(self, loss)))
    for compat in (True, False):  # 3 micro-batches of 2 examples in an epoch, 2 of them in a step
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
        config = replace(LCDD, reference_compat=compat, **sizes)
        train_lcdd(copy.deepcopy(tuned), base, items[:6], [], config, pad_token_id=PAD)
    assert counts == [2, 1, 2, 1, 1, 1]


def test_gradient_checkpointing_changes_nothing(base, items) -> None:
    curves = []
    for checkpointing in (False, True):
        log = RunLog(None, stage="sft")
        config = replace(SFT, max_steps=3, gradient_checkpointing=checkpointing)
        model = copy.deepcopy(base)
        train_sft(model, items, [], config, pad_token_id=PAD, log=log)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        curves.append(curve(log))
    assert curves[0] == pytest.approx(curves[1], rel=1e-12)


@pytest.mark.parametrize("unmasked", [False, True])
def test_sft_moves_the_layers_alone(base, items, unmasked: bool) -> None:
    model = copy.deepcopy(base)
    config = replace(SFT, train_unmasked=unmasked)
    result = train_sft(model, items, items[:4], config, pad_token_id=PAD)
    masked = {f"{site.name}.weight" for site in sites_of(model)}
    moved = {
        name
        for (name, ours), theirs in zip(model.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(ours, theirs)
    }
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert moved == masked | (norms if unmasked else set())
    assert result.loss_end < result.loss_start - 0.3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == moved


def test_max_delta_norm_is_reached_and_kept(base, items) -> None:
    model = copy.deepcopy(base)
    train_sft(model, items, [], replace(SFT, max_delta_norm=0.5), pad_token_id=PAD)
    squares = [
        (ours.weight - theirs.weight).square().sum()
        for ours, theirs in zip(sites_of(model), sites_of(base), strict=True)
    ]
    assert math.sqrt(float(sum(squares).detach())) == pytest.approx(0.5, rel=1e-9)


def test_bf16_keeps_float32_weights(items) -> None:
    model = make_model("llama")
    result = train_sft(model, items, [], replace(SFT, bf16=True), pad_token_id=PAD)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.loss_end < result.loss_start


def test_lcdd_log_and_result(base, tuned, items, tmp_path: Path) -> None:
    with RunLog(tmp_path, stage="lcdd", report_to="tensorboard") as log:
        optimizer, result = train_lcdd(copy.deepcopy(tuned), base, items, items[:6], LCDD, pad_token_id=PAD, log=log)
    lines = read_log(tmp_path / "log.jsonl")
    steps = [line for line in lines if "ema" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    expected = {"loss", "ema", "epsilon", "dual_lambda", "open", "tokens_per_second", "peak_memory_bytes", "sparsity"}
    assert expected <= set(steps[-1])
    assert len(steps[-1]["open"]) == 8
    assert steps[-1]["sparsity"] > 0
    assert list((tmp_path / "tensorboard").iterdir())
    # what comes back is what ships: deterministic gates, and the loss measured on them
    again = completion_loss(optimizer.model, items[:6], pad_token_id=PAD)
    assert again == pytest.approx(result.loss_end, rel=1e-12)
    assert lines[-2]["held_out_loss"] == pytest.approx(result.loss_end)
    kept = optimizer.gates.evaluation_values() != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert 0.0 <= result.auc_initial_theta <= 1.0


def test_mask_only_with_kl_to_the_sft_model(base, tuned, items) -> None:
    config = replace(LCDD, train_delta=False, loss="kl", max_steps=4, weight_decay=0.1)
    with pytest.raises(ValueError, match="teacher: expected the SFT model for loss 'kl'"):
        train_lcdd(copy.deepcopy(tuned), base, items, [], config, pad_token_id=PAD)
    log = RunLog(None, stage="lcdd")
    optimizer, _ = train_lcdd(copy.deepcopy(tuned), base, items, [], config, pad_token_id=PAD, log=log, teacher=tuned)
    assert 0 < curve(log)[0] < 0.5  # gates are nearly all open: the model is still close to its teacher
    sites = zip(sites_of(tuned), sites_of(base), strict=True)
    for (_, (_, delta, _)), (ours, theirs) in zip(optimizer.masked().items(), sites, strict=True):
        assert torch.equal(delta, ours.weight - theirs.weight)


@pytest.mark.parametrize("method", ["sft", "lcdd"])
def test_one_bad_loss_is_skipped_and_many_stop(method: str, base, tuned, items, monkeypatch) -> None:
    bad: set[int] = {3}
    calls: list[int] = []
    original = trainer.loss_sum

    def sometimes_nan(model, batch, teacher=None):
        calls.append(len(calls) + 1)
        return original(model, batch, teacher) * (math.nan if calls[-1] in bad else 1.0)

    monkeypatch.setattr(trainer, "loss_sum", sometimes_nan)

    def fit(**changes) -> tuple[nn.Module, int]:
        model = copy.deepcopy(base if method == "sft" else tuned)
        if method == "sft":
            result = train_sft(model, items, [], replace(SFT, **changes), pad_token_id=PAD)
        else:
            config = replace(LCDD, **changes)
            _, result = train_lcdd(model, base, items, [], config, pad_token_id=PAD)
        return model, result.skipped_steps

    model, skipped = fit(max_steps=5)
    assert skipped == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    calls.clear()
    bad.update(range(1, 100))
    with pytest.raises(
        TrainingStopped, match=r"not finite in 3 steps in a row, the last of them step 3.*--learning_rate"
    ):
        fit(max_steps=20, max_nonfinite_steps=3)


def test_held_out_losses_on_the_way_change_nothing_and_are_of_the_gates_that_ship(base, tuned, items) -> None:
    """Every 10 steps, on deterministic gates; the run itself keeps its bits, and `state` is enough to come back."""
    held_out = HeldOut(items=items[:6], pad_token_id=PAD)
    start = StartLosses(base=1.0, model=0.5)
    seen: list[tuple[int, float]] = []
    kept = {}

    def note(loop: Loop, loss: float) -> None:
        seen.append((loop.step, loss))
        kept.update(copy.deepcopy(loop.state()))

    optimizers = []
    for every, hooks in ((0, ()), (10, (note,))):
        config = replace(LCDD, eval_steps=every)
        optimizers.append(LCDDOptimizer.attach(copy.deepcopy(tuned), base, config, total_steps=30))
        log = RunLog(None, stage="lcdd")
        fit(optimizers[-1], items, held_out, start=start, log=log, progress=False, on_validation=hooks)
    assert [step for step, _ in seen] == [0, 10, 20]
    assert [line["held_out_loss"] for line in log.lines if "held_out_loss" in line][:-1] == [loss for _, loss in seen]
    assert torch.equal(optimizers[0].gates.logits, optimizers[1].gates.logits)
    for ours, theirs in zip(optimizers[0].model.parameters(), optimizers[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    again = LCDDOptimizer.attach(copy.deepcopy(tuned), base, LCDD, total_steps=30)
    again.load_state_dict(kept["optimizer"])
    again.eval()
    assert held_out.loss(again.model) == seen[-1][1]


def test_gates_attached_without_a_measurement_before_are_refused(base, tuned, items) -> None:
    optimizer = LCDDOptimizer.attach(copy.deepcopy(tuned), base, LCDD, total_steps=30)
    with pytest.raises(ValueError, match="start: expected the losses measured before gates were attached"):
        fit(optimizer, items, HeldOut(items=items, pad_token_id=PAD), progress=False)


def test_no_data_is_an_error(base) -> None:
    with pytest.raises(ValueError, match="train: expected at least one example, got none"):
        train_sft(copy.deepcopy(base), [], [], SFT, pad_token_id=PAD)


def test_log_has_no_nan_and_survives_a_torn_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, stage="x") as log:
        log.write({"step": 1, "loss": math.nan, "open": {"q": math.inf}, "list": [1.0, math.nan]})
    with open(tmp_path / "log.jsonl", "a") as stream:
        stream.write('{"step": 2, "lo')
    lines = read_log(tmp_path / "log.jsonl")
    assert len(lines) == 1
    assert (lines[0]["loss"], lines[0]["open"], lines[0]["list"]) == (None, {"q": None}, [1.0, None])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["stage"] == "x"
