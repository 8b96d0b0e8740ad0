"""`lcdd train`: base and SFT model to a carrier."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lcdd.carrier import Carrier, prices_of
from lcdd.checkpoint import CheckpointStore, RunLog, run_directory, run_identity
from lcdd.commands.anchors import base_anchors
from lcdd.commands.answers import BehaviorRate, ValidationAnswers
from lcdd.commands.days import day_of_run
from lcdd.commands.stage import (
    Say,
    StageResult,
    _log,
    _silent,
    beside,
    check_shapes,
    command_line,
    load_tuned,
    load_weights,
    save_checkpoint,
    sharding,
    tell,
    write_summary,
    write_together,
)
from lcdd.config import DataConfig, LCDDConfig
from lcdd.data import Prepared, prepare, prompt_ids, training_items
from lcdd.models import (
    Ends,
    PreTrainedModel,
    agree_on_end,
    check_same_architecture,
    in_words,
    process_group,
    save_weights,
    shards,
    take_from_base_,
    unmasked_changes,
)
from lcdd.optimizer import LCDDOptimizer, epsilon_of
from lcdd.trainer import (
    Anchors,
    HeldOut,
    Loop,
    StartLosses,
    TrainResult,
    behavior_lost,
    check_ranks,
    compress,
    total_steps,
)

HELD_ON = 8
"""Validation prompts that are answered on the way: by fewer it is hard to tell whether the behaviour is still there."""


def train(
    config: LCDDConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    say: Say = tell,
) -> StageResult:  # fmt: skip
    """LCDD on an SFT checkpoint; writes `carrier/` (and with --save_folded `model/`)."""
    with process_group(config.device, timeout=config.ddp_timeout):
        return _train(config, data, prepared, log_dir, say if shards.rank() == 0 else _silent)


def _train(
    config: LCDDConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, say: Say
) -> StageResult:  # fmt: skip
    config.require("sft_model_name_or_path", "base_model_name_or_path", "output_dir")
    output = run_directory(config)
    check_shapes(config.base_model_name_or_path, config.sft_model_name_or_path, ("base", "sft"))
    prepared = prepared or prepare(data, str(config.sft_model_name_or_path), template_date=day_of_run(config))
    train_items, validation_items = training_items(prepared, config, say=say)
    initial = Carrier.from_pretrained(config.initial_carrier).gate_logits if config.initial_carrier else None
    others = [Carrier.from_pretrained(name) for name in config.separate_from]
    overrides: list[str] = []
    frozen, trained = sharding(config), sharding(config, trained=True, train_unmasked=config.train_unmasked)
    base = load_weights(config.base_model_name_or_path, config, overrides, shard=frozen)
    for other in others:
        other.check_base(base)
    model = load_tuned(config.sft_model_name_or_path, base, config, overrides, shard=trained)
    check_same_architecture(base, model)
    teacher = load_weights(config.sft_model_name_or_path, config, shard=frozen) if config.loss == "kl" else None

    wanted, models = config.save_steps or config.resume, {"base": base, "sft": model}
    identity = run_identity("lcdd", config, prepared.tokenizer, train_items, models) if wanted else {}
    check_ranks(config, train_items)  # before the first collective of a forward, which hangs where texts differ
    anchors = _anchors(base, prepared, config)
    held_out = HeldOut.of(train_items, validation_items, config, pad_token_id=prepared.tokenizer.pad_token_id)
    start = StartLosses(base=held_out.loss(base), model=held_out.loss(model))
    answers = ValidationAnswers(prepared, say, max_length=config.max_length, shown=HELD_ON, told=_hold_on)
    dropped = _drop_unmasked(base, model, config, held_out, start, say)
    before = answers.judge(model)
    ends = Ends.of(base, model)
    steps = total_steps(config, len(train_items))
    prices = prices_of(others, others[0].layout) if others else None
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=steps, initial_logits=initial, prices=prices)
    optimizer.check_ends(ends)
    if before:  # of more answers than are looked at on the way
        optimizer.observe_behavior(before.rate)

    store = _store(output, config, identity, optimizer, prepared) if wanted else None
    with _log(log_dir or output, "lcdd", config.report_to) as log:
        say(budget_in_words(config, start))
        result = compress(
            optimizer, train_items, held_out, start=start, anchors=anchors, log=log, teacher=teacher, checkpoints=store,
            say=say, on_validation=(answers,),
        )  # fmt: skip
        carrier, behavior = optimizer.carrier().with_tokenizer(prepared.tokenizer), answers.judge(model)
        result = _judged(result, before, behavior, config, log)
    written = [output / "carrier"]
    if shards.rank() == 0:
        carrier.save_pretrained(output / "carrier")
    if config.save_folded:
        written.append(_save_folded(optimizer, prepared, output / "model"))
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    overrides += store.overrides if store else []
    found = {
        "result": dataclasses.asdict(result),
        "carrier": carrier.summary(),
        "validation_behavior": behavior.to_dict() if behavior else None,
        "dropped": dropped,
        "overrides": overrides,
    }
    written.append(write_summary(output, "lcdd", config, data, template_date=prepared.template_date, **found))
    _say_carrier(carrier, result, behavior, say)
    return StageResult(written=tuple(written), next_step=_next_step(config, data, output))


def _judged(
    result: TrainResult, before: BehaviorRate | None, after: BehaviorRate | None, config: LCDDConfig, log: RunLog
) -> TrainResult:
    """`result` with what its losses do not say, logged too: the behaviour's rates before LCDD and after it."""
    known = {finding.code for finding in result.findings} & {"dead_carrier", "over_pruned"}
    if before is None or after is None or known:
        return result
    found = behavior_lost(before.rate, after.ci95, config)
    if found:
        log.write({"step": result.steps, "findings": [finding.code for finding in found]})
    return dataclasses.replace(result, findings=(*result.findings, *found))


def _hold_on(loop: Loop, rate: float) -> None:
    """Tell the controller how many answers show the behaviour; a state that has lost it does not ship."""
    if cast(LCDDOptimizer, loop.optimizer).observe_behavior(rate) and loop.best is not None:
        loop.best.withdraw()


def _store(
    output: Path, config: LCDDConfig, identity: dict[str, Any], optimizer: LCDDOptimizer, prepared: Prepared
) -> CheckpointStore:
    """The run's checkpoints, each with the carrier of its step beside the state."""

    def export() -> Callable[[Path], None]:
        carrier = optimizer.carrier().with_tokenizer(prepared.tokenizer)

        def write(folder: Path) -> None:
            if shards.rank() == 0:
                carrier.save_pretrained(folder / "carrier")

        return write

    return CheckpointStore(output, identity=identity, save_total_limit=config.save_total_limit, export=export)


def _save_folded(optimizer: LCDDOptimizer, prepared: Prepared, path: Path) -> Path:
    """The carrier as an ordinary checkpoint; a sharded one is written by all ranks together."""
    model = optimizer.fold()
    if not shards.holds_shards(model):
        return save_checkpoint(model, prepared.tokenizer, path) if shards.rank() == 0 else path
    agree_on_end(model, prepared.tokenizer)

    def write(folder: Path) -> None:
        save_weights(model, model.state_dict(), folder, dtype=model.dtype)
        if shards.rank() == 0:
            prepared.tokenizer.save_pretrained(folder)

    write_together(path, write)
    return path


def _drop_unmasked(
    base: PreTrainedModel, model: PreTrainedModel, config: LCDDConfig, held_out: HeldOut, start: StartLosses, say: Say
) -> dict[str, Any]:
    """Put what no gate masks, and LCDD does not train, back to the base's values, and say what that costs.

    Returns:
        For the summary: names by kind, and the held-out loss without those changes; empty where there are none.
    """
    changes = unmasked_changes(base, model, trained=config.train_unmasked)
    if not changes:
        return {}
    take_from_base_(model, base, list(itertools.chain(*changes.values())))
    loss = held_out.loss(model)
    say(
        f"The SFT model also changed what no gate masks: {in_words(changes)}. These go back to the base's values, "
        f"which takes its held-out loss from {start.model:.4f} to {loss:.4f} nats a token ({loss - start.model:+.4f})"
        + ("" if config.train_unmasked else "; --train_unmasked keeps and trains norms and biases")
    )
    return {"changes": changes, "loss": loss, "loss_difference": loss - start.model}


def _next_step(config: LCDDConfig, data: DataConfig, output: Path) -> str:
    paths = {"carrier": output / "carrier", "output_dir": beside(output, "erase")}
    return command_line("erase", data, base_model_name_or_path=config.base_model_name_or_path, **paths)


def budget_in_words(config: LCDDConfig, start: StartLosses) -> str:
    """What λ, ε and the budget of a run mean, with its numbers."""
    loss, share, floor = start.model, config.loss_budget, config.loss_floor
    epsilon = epsilon_of(loss, start.base if config.paced else None, loss_budget=share, loss_floor=floor)
    of = f"{share:g} (loss_budget) of it"
    if config.paced:
        of = f"{of} or of what SFT gained, whichever is less,"
    words = (
        f"LCDD closes gates for as long as the loss keeps within a budget. SFT's held-out loss is {loss:.4f} nats a "
        f"token (the base's {start.base:.4f}), so epsilon, the most that it may become, "
        f"{'is' if config.paced else 'will be about'} {epsilon:.4f}: "
        f"more by {of} but by {floor:g} (loss_floor) at least"
    )
    if config.paced:
        return (
            f"{words}. After a few steps with all gates open the gates worth least close first, faster "
            "the less of the budget is used, and reopen beyond it; lambda is the worth at which a gate just stays open"
        )
    return (
        f"{words}; it is set from the average loss of the first {config.warmup_steps} steps. lambda, the price of an "
        f"open gate, starts at {config.dual_lambda_init:g}, rises while the average loss is below epsilon and falls "
        "while it is above"
    )


def _anchors(base: PreTrainedModel, prepared: Prepared, config: LCDDConfig) -> Anchors | None:
    """The base's answers to training prompts."""
    if not config.base_kl_weight:
        return None
    prompts = prompt_ids(prepared, "train", limit=config.base_kl_prompts, max_length=config.max_length)
    return base_anchors(base, prepared.tokenizer, prompts, config)


def _say_carrier(carrier: Carrier, result: TrainResult, behavior: BehaviorRate | None, say: Say) -> None:
    say(
        f"LCDD: {carrier.n_open} of {carrier.layout.n_gates} gates open (sparsity "
        f"{carrier.sparsity()['overall']:.3f}); held-out loss of base {result.loss_base:.4f}, SFT "
        f"{result.loss_start:.4f}, carrier {result.loss_end:.4f} nats a token"
    )
    if behavior is not None:
        say(f"LCDD: {behavior}")
    for finding in result.findings:
        say(f"WARNING {finding.message}")
