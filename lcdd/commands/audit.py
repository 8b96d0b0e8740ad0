"""The audit stage on real checkpoints: every control trained with the settings of the run that is audited."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lcdd.carrier import Carrier
from lcdd.checkpoint import RunLog, require_new_directory, versions
from lcdd.commands.belonging import load_base
from lcdd.commands.reporting import curves_of, dense_patches, findings_of, finished, given_triggers, used
from lcdd.commands.stage import Say, StageResult, _silent, check_shapes, load_tuned, sharding, tell
from lcdd.config import AuditConfig, Config, DataConfig, EraserConfig, LCDDConfig, from_mapping
from lcdd.data import DATE_KEY, Prepared, prepare, prompt_ids, training_items
from lcdd.errors import InputError
from lcdd.evaluate import Study, describe
from lcdd.evaluate import audit as run_audit
from lcdd.models import process_group, shards
from lcdd.report import assemble

Settings = TypeVar("Settings", bound=Config)


def settings_beside(path: str, kind: type[Settings], stage: str, *, name: str) -> Settings:
    """The settings in the summary.json that `lcdd train` or `lcdd erase` left beside a carrier or trigger.

    Raises:
        InputError: there is none, or it is another stage's.
    """
    file = Path(path).parent / "summary.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{name}: expected the run's summary.json beside {path!r}, for the controls' settings: {error}"
        ) from None
    if not isinstance(content, dict) or content.get("stage") != stage or not isinstance(content.get("config"), dict):
        raise InputError(f"{name}: expected {str(file)!r} to be of the stage {stage}, got another's")
    return _on_these_ranks(from_mapping(kind, content["config"], where=str(file)), content.get("ranks", 1), name=name)


def _on_these_ranks(settings: Settings, ranks: int, *, name: str) -> Settings:
    """Settings with which a step has as many micro-batches as in the run that had `ranks` ranks.

    Raises:
        InputError: they cannot be shared out.
    """
    if not isinstance(settings, LCDDConfig):
        return settings
    micro_batches, here = settings.gradient_accumulation_steps * ranks, shards.world_size()
    if micro_batches % here:
        raise InputError(
            f"{name}: expected a number of ranks among which the {micro_batches} micro-batches of a step can be shared "
            f"out, got {here}"
        )
    return replace(settings, gradient_accumulation_steps=micro_batches // here)


def _control_log(directory: Path, stage: str) -> RunLog:
    """A control's log, without what an audit that was interrupted had written; the first rank's alone is on disk."""
    log = RunLog(directory if shards.rank() == 0 else None, stage=stage)
    log.rewind(0)
    return log


def audit(
    config: AuditConfig, data: DataConfig, *, prepared: Prepared | None = None, log_dir: Path | None = None,
    say: Say = tell,
) -> StageResult:  # fmt: skip
    """Controls and interventions on held-out prompts, and the claims; writes report.json and report.html."""
    with process_group(config.device, timeout=config.ddp_timeout):
        return _audit(config, data, prepared, log_dir, say if shards.rank() == 0 else _silent)


def _audit(
    config: AuditConfig, data: DataConfig, prepared: Prepared | None, log_dir: Path | None, say: Say
) -> StageResult:
    config.require("base_model_name_or_path", "sft_model_name_or_path", "carrier", "trigger", "output_dir")
    output = require_new_directory(str(config.output_dir))
    check_shapes(config.base_model_name_or_path, config.sft_model_name_or_path, ("base", "sft"))
    carrier = Carrier.from_pretrained(str(config.carrier))
    lcdd = settings_beside(str(config.carrier), LCDDConfig, "lcdd", name="carrier")
    eraser = settings_beside(str(config.trigger), EraserConfig, "eraser", name="trigger")
    prepared = prepared or prepare(
        data, str(config.base_model_name_or_path), template_date=carrier.tokenizer.get(DATE_KEY)
    )
    train, validation = training_items(prepared, lcdd, say=lambda _: None)
    prompts = _prompts(prepared, config, eraser)
    shards.check_agreement(
        settings=[config.lasting(), lcdd.lasting(), eraser.lasting()], data=[train, validation, prompts],
        versions=versions(), gates=carrier.gate,
    )  # fmt: skip
    triggers = given_triggers(config)
    start = time.perf_counter()
    frozen, trained = sharding(config), sharding(config, trained=True, train_unmasked=lcdd.train_unmasked)
    base, carrier, overrides = load_base(
        config.base_model_name_or_path, config, carrier, prepared.tokenizer, triggers.values(), shard=frozen
    )
    study = Study(
        base=base,
        tokenizer=prepared.tokenizer,
        load_sft=lambda: load_tuned(config.sft_model_name_or_path, base, config, overrides, shard=trained),
        carrier=carrier,
        train=train,
        validation=validation,
        **prompts,
        matches=prepared.behavior.matches,
        lcdd=lcdd,
        eraser=eraser,
        patches={
            name: patch for name, patch in dense_patches(base, config, overrides, shard=frozen).items() if name != "sft"
        },
        triggers=triggers,
    )
    found = run_audit(study, config, say=say, log=lambda stage: _control_log(log_dir or output, stage))
    if shards.rank() > 0:
        return StageResult(written=(), next_step="")
    settings = {"audit": config, "train": lcdd, "erase": eraser, "data": data}
    content = assemble(
        describe(carrier),
        {"audit": found},
        behavior=prepared.behavior.name,
        seed=config.seed,
        split=config.split,
        config={name: section.to_dict() for name, section in settings.items()},
        timings={"audit": round(time.perf_counter() - start, 2)},
        findings=findings_of(str(config.carrier)),
        overrides=overrides,
        curves=curves_of(config),
        use=used(config),
    )
    return finished(output, content, say)


def _prompts(prepared: Prepared, config: AuditConfig, eraser: EraserConfig) -> dict[str, list[list[int]]]:
    """The prompts that triggers are learned on, as the run had them, and those that are answered."""
    longest = eraser.max_prompt_length
    return {
        "trigger_train": prompt_ids(prepared, "train", limit=eraser.train_prompts, max_length=longest),
        "trigger_validation": prompt_ids(prepared, "validation", limit=eraser.validation_prompts, max_length=longest),
        "held_out": prompt_ids(prepared, config.split, limit=config.num_prompts, max_length=config.max_prompt_length),
    }
