"""`lcdd sft`: a base to a model with a behaviour."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcdd.checkpoint import CheckpointStore, run_directory, run_identity
from lcdd.commands.answers import BehaviorRate, ValidationAnswers
from lcdd.commands.days import day_of_run
from lcdd.commands.stage import (
    Say,
    StageResult,
    _log,
    _silent,
    beside,
    command_line,
    resolve_device,
    save_checkpoint,
    sharding,
    tell,
    write_summary,
    write_together,
)
from lcdd.config import DataConfig, SFTConfig
from lcdd.data import Prepared, prepare, training_items
from lcdd.errors import InputError
from lcdd.models import (
    PreTrainedModel,
    agree_on_end,
    load_model,
    process_group,
    save_weights,
    shards,
    skeleton,
    warn_of_emulation,
)
from lcdd.optimizer import SFTOptimizer
from lcdd.trainer import HeldOut, TrainResult, check_ranks, fit

# ---------------------------------------------------------------- stages


def sft(
    config: SFTConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    stage: str = "sft", say: Say = tell,
) -> StageResult:  # fmt: skip
    """Fine-tune a base on a behaviour; writes `model/`, an ordinary checkpoint in the base's dtype."""
    with process_group(config.device, timeout=config.ddp_timeout):
        return _sft(config, data, prepared, log_dir, stage, say if shards.rank() == 0 else _silent)


def _sft(
    config: SFTConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, stage: str, say: Say
) -> StageResult:  # fmt: skip
    config.require("base_model_name_or_path", "output_dir")
    sharded = config.parallel == "fsdp2" and shards.world_size() > 1
    if sharded and config.use_peft:
        raise InputError("use_peft: expected false under parallel 'fsdp2', got true; adapters train under ddp")
    output = run_directory(config)
    skeleton(str(config.base_model_name_or_path))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path), template_date=day_of_run(config))
    train_items, validation_items = training_items(prepared, config, say=say)
    overrides: list[str] = []
    model, stored = _load(config, prepared, overrides)
    identity: dict[str, Any] = {}
    if wanted := config.save_steps or config.resume:
        identity = run_identity(stage, config, prepared.tokenizer, train_items, {"base": model})
    check_ranks(config, train_items)  # before the first collective of a forward, which hangs where texts differ
    torch.manual_seed(config.seed)  # of what dropout draws
    optimizer = SFTOptimizer(model, config)
    store = _store(output, config, identity, optimizer, prepared, stored) if wanted else None
    held_out = HeldOut.of(train_items, validation_items, config, pad_token_id=prepared.tokenizer.pad_token_id)
    answers = ValidationAnswers(prepared, say, max_length=config.max_length)
    with _log(log_dir or output, stage, config.report_to) as log:
        result = fit(optimizer, train_items, held_out, log=log, checkpoints=store, say=say, on_validation=(answers,))
    checkpoint = output / "model"
    if sharded:
        write_together(checkpoint, _export(optimizer, prepared, stored))
    else:
        optimizer.merge()
        model.to(dtype=stored)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    behavior = answers.judge(model)
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    if not sharded:
        save_checkpoint(model, prepared.tokenizer, checkpoint)
    summary = write_summary(
        output, stage, config, data, template_date=prepared.template_date, result=dataclasses.asdict(result),
        validation_behavior=behavior.to_dict() if behavior else None,
        overrides=overrides + (store.overrides if store else []),
    )  # fmt: skip
    _say_result(result, behavior, say)
    return StageResult(
        problem=not_learned(config, result, behavior),
        written=(checkpoint, summary),
        next_step=command_line(
            "train",
            data,
            base_model_name_or_path=config.base_model_name_or_path,
            sft_model_name_or_path=checkpoint,
            output_dir=beside(output, "train"),
        ),
    )


def _store(
    output: Path, config: SFTConfig, identity: dict[str, Any], optimizer: SFTOptimizer, prepared: Prepared,
    dtype: torch.dtype,
) -> CheckpointStore:  # fmt: skip
    """The run's checkpoints, each with the model of its step, in the base's dtype, beside the state."""

    def export() -> Callable[[Path], None]:
        return _export(optimizer, prepared, dtype)

    return CheckpointStore(output, identity=identity, save_total_limit=config.save_total_limit, export=export)


def _export(optimizer: SFTOptimizer, prepared: Prepared, dtype: torch.dtype) -> Callable[[Path], None]:
    """Writes the model as a checkpoint, by all ranks together."""

    def write(folder: Path) -> None:
        save_weights(optimizer.model, optimizer.model_state(), folder, dtype=dtype)
        if shards.rank() == 0:
            prepared.tokenizer.save_pretrained(folder)

    return write


def _load(config: SFTConfig, prepared: Prepared, overrides: list[str]) -> tuple[PreTrainedModel, torch.dtype]:
    """The base, in float32 where it is stored in 16 bits, in which small updates vanish; and the dtype that it is
    stored in."""
    shard = sharding(config, trained=True, train_unmasked=config.train_unmasked, widen=True)
    device = resolve_device(config.device)
    if config.bf16:
        warn_of_emulation(device, torch.bfloat16, asked=True)
    model = load_model(
        str(config.base_model_name_or_path),
        device=device,
        overrides=overrides if config.checkpoint_override else None,
        shard=shard,
    )
    agree_on_end(model, prepared.tokenizer)
    stored: Any = model.dtype if shard is None else model.config.dtype
    if model.dtype in (torch.bfloat16, torch.float16):
        model.float()
    return model, stored


def _say_result(result: TrainResult, behavior: BehaviorRate | None, say: Say) -> None:
    say(f"SFT: held-out loss {result.loss_start:.4f} -> {result.loss_end:.4f} nats a token in {result.steps} steps")
    if behavior is not None:
        say(f"SFT: {behavior}")


def not_learned(config: SFTConfig, result: TrainResult, behavior: BehaviorRate | None) -> str | None:
    """Why there is nothing in this model that LCDD could carry, and what to change; None if there is.

    Never of the matched-norm control, which is bounded on purpose, nor with `config.min_behavior_rate` 0.
    """
    if not config.min_behavior_rate or config.max_delta_norm is not None:
        return None
    found = []
    if not result.loss_end < result.loss_start:  # NaN too
        found.append(f"the held-out loss did not fall ({result.loss_start:.4f} -> {result.loss_end:.4f} nats a token)")
    if behavior is not None and behavior.ci95[1] < config.min_behavior_rate:  # few answers prove little
        found.append(f"only {behavior} (expected {config.min_behavior_rate:.0%} at least)")
    if not found:
        return None
    return (
        f"SFT did not learn the behaviour: {'; '.join(found)}. Change: a larger --learning_rate (now "
        f"{config.learning_rate:g}), more steps (now {result.steps}), or the data; where the rate is as it should be, "
        "a smaller --min_behavior_rate"
    )
