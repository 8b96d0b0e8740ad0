"""`lcdd sft`: a base to a model with a behaviour."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from lcdd.checkpoint import CheckpointStore, run_directory, run_identity
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
    tell,
    write_summary,
)
from lcdd.config import DataConfig, SFTConfig
from lcdd.data import Prepared, prepare, training_items
from lcdd.errors import InputError
from lcdd.models import (
    agree_on_end,
    load_model,
    process_group,
    shards,
    skeleton,
)
from lcdd.optimizer import SFTOptimizer
from lcdd.trainer import HeldOut, fit

# ---------------------------------------------------------------- stages


def sft(
    config: SFTConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    stage: str = "sft", say: Say = tell,
) -> StageResult:  # fmt: skip
    """Fine-tune a base on a behaviour; writes `model/`, an ordinary checkpoint in the base's dtype."""
    with process_group(config.device):
        return _sft(config, data, prepared, log_dir, stage, say if shards.rank() == 0 else _silent)


def _sft(
    config: SFTConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, stage: str, say: Say
) -> StageResult:  # fmt: skip
    config.require("base_model_name_or_path", "output_dir")
    if config.parallel == "fsdp2" and shards.world_size() > 1:
        raise InputError("parallel: expected ddp for sft (each rank holds the whole model), got 'fsdp2'")
    output = run_directory(config)
    skeleton(str(config.base_model_name_or_path))
    prepared = prepared or prepare(data, str(config.base_model_name_or_path), template_date=day_of_run(config))
    train_items, validation_items = training_items(prepared, config, say=say)
    overrides: list[str] = []
    model = load_model(
        str(config.base_model_name_or_path),
        device=resolve_device(config.device),
        overrides=overrides if config.checkpoint_override else None,
    )
    agree_on_end(model, prepared.tokenizer)
    stored = model.dtype
    if stored in (torch.bfloat16, torch.float16):
        model.float()  # small updates vanish in 16-bit weights

    def export() -> Callable[[Path], None]:
        weights = {name: value.to(stored) for name, value in model.state_dict().items()}

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            prepared.tokenizer.save_pretrained(folder)

        return write

    store = None
    if config.save_steps or config.resume:
        identity = run_identity(stage, config, prepared.tokenizer, train_items, {"base": model})
        store = CheckpointStore(output, identity=identity, save_total_limit=config.save_total_limit, export=export)
    held_out = HeldOut(
        items=validation_items or train_items,
        pad_token_id=prepared.tokenizer.pad_token_id,
        batch_size=config.per_device_eval_batch_size,
    )
    with _log(log_dir or output, stage, config.report_to) as log:
        result = fit(SFTOptimizer(model, config), train_items, held_out, log=log, checkpoints=store)
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    model.to(dtype=stored)  # type: ignore[call-arg]  # transformers wraps nn.Module.to
    checkpoint = save_checkpoint(model, prepared.tokenizer, output / "model")
    summary = write_summary(
        output, stage, config, data, template_date=prepared.template_date, result=dataclasses.asdict(result),
        overrides=overrides + (store.overrides if store else []),
    )  # fmt: skip
    say(f"SFT: held-out loss {result.loss_start:.4f} -> {result.loss_end:.4f} nats a token in {result.steps} steps")
    return StageResult(
        written=(checkpoint, summary),
        next_step=command_line(
            "train",
            data,
            base_model_name_or_path=config.base_model_name_or_path,
            sft_model_name_or_path=checkpoint,
            output_dir=beside(output, "train"),
        ),
    )
