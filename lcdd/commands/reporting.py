"""What eval, audit, demo and run share: what lies beside carrier and trigger, and the report written and told."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcdd.carrier import dense_patch
from lcdd.checkpoint import read_log
from lcdd.commands.stage import Say, StageResult, command_line, from_anywhere, load_tuned
from lcdd.eraser import Trigger
from lcdd.errors import InputError
from lcdd.evaluate import PatchSource
from lcdd.models import PreTrainedModel, Sharding
from lcdd.report import claims_table, closeness_table, paragraph, reversal_table, write_report


def finished(output: Path, content: Mapping[str, Any], say: Say) -> StageResult:
    """Write report.json and report.html, and say the tables and what they mean."""
    report = write_report(output, content)
    if "models" in report:
        say(f"\n{reversal_table(report)}")
    if nearness := closeness_table(report):
        say(f"\n{nearness}")
    say("\nWhat this run shows")
    for sentence in report["explanation"]:
        say(paragraph(sentence, first="- "))
    if "audit" in report:
        say("\nWhich of the paper's claims held in this run")
        say(claims_table(report["audit"]))
    written = (output / "report.json", output / "report.html")
    use = report.get("use") or {}
    if use.get("carrier") and use.get("trigger"):
        return StageResult(written=written, next_step=command_line("chat", **use))
    return StageResult(written=written, next_step=open_page(output))


def open_page(output: Path) -> str:
    """The command that shows the report, on any system."""
    return f"python -m webbrowser -t {shlex.quote(str((output / 'report.html').resolve()))}"


def given_triggers(config: Any) -> dict[str, Trigger]:
    """The triggers that an evaluation or an audit is given, by the state that each is learned for."""
    paths = {
        "carrier+trigger": config.trigger,
        "sft+trigger": config.sft_trigger,
        "matched_norm+trigger": config.matched_norm_trigger,
    }
    return {name: Trigger.from_pretrained(path) for name, path in paths.items() if path}


def dense_patches(
    base: PreTrainedModel, config: Any, overrides: list[str], *, shard: Sharding | None = None
) -> dict[str, PatchSource]:
    """The SFT model's patch and the matched-norm one's, each made when it is needed: they do not fit side by side.

    overrides: gets what `config.checkpoint_override` lets pass then. shard: how `base` is sharded, if it is.
    """
    paths = {"sft": config.sft_model_name_or_path, "matched_norm": config.matched_norm_model_name_or_path}

    def source(path: str) -> PatchSource:
        return lambda: dense_patch(base, load_tuned(path, base, config, overrides, shard=shard))

    return {name: source(path) for name, path in paths.items() if path}


def used(config: Any) -> dict[str, str | None]:
    """What a reader needs to use carrier and trigger."""
    given = {name: getattr(config, name) for name in ("base_model_name_or_path", "carrier", "trigger")}
    return {name: from_anywhere(path) if path else None for name, path in given.items()}


def curves_of(config: Any) -> list[dict[str, Any]]:
    """The logs that lie beside what is evaluated (or, in a pipeline, in its directory)."""
    paths = (
        config.sft_model_name_or_path, config.carrier, config.trigger, config.sft_trigger, config.matched_norm_trigger
    )  # fmt: skip
    folders = [Path(str(config.output_dir)), *(Path(path).parent for path in paths if path)]
    logs = dict.fromkeys(folder / "log.jsonl" for folder in folders)
    return [line for log in logs if log.is_file() for line in read_log(log)]


def findings_of(carrier: str) -> list[dict[str, Any]]:
    """What `train` found wrong with the carrier, from the summary beside it."""
    path = Path(carrier).parent / "summary.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"carrier: expected a JSON object in {str(path)!r}, got {type(content).__name__}")
    return content.get("result", {}).get("findings", [])
