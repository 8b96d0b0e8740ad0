"""`lcdd erase`: base and carrier to a trigger."""

from dataclasses import replace
from pathlib import Path

from lcdd.carrier import Carrier, dense_patch
from lcdd.checkpoint import run_directory, versions
from lcdd.commands.belonging import learned_on, load_base
from lcdd.commands.stage import Say, StageResult, _log, _silent, command_line, load_tuned, sharding, tell, write_summary
from lcdd.config import DataConfig, EraserConfig
from lcdd.data import DATE_KEY, Prepared, prepare, prompt_ids
from lcdd.eraser import SFTEraser
from lcdd.models import process_group, shards, skeleton


def erase(
    config: EraserConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    stage: str = "eraser", say: Say = tell,
) -> StageResult:  # fmt: skip
    """Learn the trigger that gives the base's answers back; writes `trigger/`, a PEFT prompt-tuning adapter."""
    with process_group(config.device, timeout=config.ddp_timeout):
        return _erase(config, data, prepared, log_dir, stage, say if shards.rank() == 0 else _silent)


def _erase(
    config: EraserConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, stage: str, say: Say
) -> StageResult:  # fmt: skip
    config.require("base_model_name_or_path", "carrier", "output_dir")
    output = run_directory(config)
    skeleton(str(config.base_model_name_or_path))
    carrier = Carrier.from_pretrained(str(config.carrier))
    prepared = prepared or prepare(
        data, str(config.base_model_name_or_path), template_date=carrier.tokenizer.get(DATE_KEY)
    )
    prompts, held_out = _eraser_prompts(prepared, config)
    shard = sharding(config)
    model, carrier, overrides = load_base(
        config.base_model_name_or_path, config, carrier, prepared.tokenizer, shard=shard
    )
    patch = carrier
    if (other := config.sft_model_name_or_path) is not None:
        patch = dense_patch(model, load_tuned(other, model, config, overrides, shard=shard))
    channels = carrier.channels(config.channel_kind, seed=config.seed)
    shards.check_agreement(settings=config.lasting(), data=[prompts, held_out], versions=versions(), patch=patch.gate)
    with _log(log_dir or output, stage, config.report_to) as log:
        eraser = SFTEraser(model, patch, prepared.tokenizer, config, channels)
        trigger = eraser.fit(prompts, held_out, log=log, progress=shards.rank() == 0, checkpoints=output)
    overrides += trigger.metadata["overrides"]
    trigger = learned_on(replace(trigger, metadata={**trigger.metadata, "overrides": overrides}), model, patch)
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    trigger.save_pretrained(output / "trigger")
    found = {"validation": eraser.history.validation, "overrides": overrides}
    summary = write_summary(output, stage, config, data, **found)
    losses = [line["loss"] for line in eraser.history.validation]
    say(f"Trigger ({stage}): held-out loss {losses[0]:.4f} -> {min(losses):.4f} in {len(eraser.history.steps)} steps")
    return StageResult(
        written=(output / "trigger", summary),
        next_step=command_line(
            "chat",
            base_model_name_or_path=config.base_model_name_or_path,
            carrier=config.carrier,
            trigger=output / "trigger",
        ),
    )


def _eraser_prompts(prepared: Prepared, config: EraserConfig) -> tuple[list[list[int]], list[list[int]]]:
    longest = config.max_prompt_length
    return (
        prompt_ids(prepared, "train", limit=config.train_prompts, max_length=longest),
        prompt_ids(prepared, "validation", limit=config.validation_prompts, max_length=longest),
    )
