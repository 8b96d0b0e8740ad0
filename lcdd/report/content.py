"""report.json: put together from whatever was run, written with the page that shows it, and read again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcdd.checkpoint import finite_or_null, read_log, versions, write_json
from lcdd.errors import InputError
from lcdd.report.page import render
from lcdd.report.words import explain

REPORT_JSON, REPORT_HTML, LOG = "report.json", "report.html", "log.jsonl"
CURVE_LINES = 250
"""Log lines kept of each stage; more cannot be told apart in a chart."""
CURVE_KEYS = {
    *("stage", "step", "loss", "validation_loss", "held_out_loss"),
    *("ema", "epsilon", "dual_lambda", "sparsity"),
    *("match", "tail_kl", "answer_kl"),
}
"""What a log line keeps in report.json; the rest stays in log.jsonl."""


def assemble(
    carrier: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    behavior: str,
    seed: int,
    split: str,
    config: Mapping[str, Any],
    timings: Mapping[str, float],
    findings: Sequence[Mapping[str, str]] = (),
    overrides: Sequence[str] = (),
    curves: Sequence[Mapping[str, Any]] = (),
    use: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """report.json of whatever was run: a demo, a pipeline, an evaluation, an audit.

    Args:
        carrier: what there is to say about the carrier (`lcdd.evaluate.describe`).
        found: what was measured: the reversal table and what belongs to it, `perplexity`, `utility`, `audit`.
        config: settings of every stage, by name.
        timings: seconds of every stage.
        findings: what LCDD found wrong with the carrier, `code` and `message`.
        overrides: differences that the user allowed.
        curves: log lines.
        use: `base_model_name_or_path`, `carrier` and `trigger`, for the commands that use them.
    """
    report = {
        "behavior": behavior, "seed": seed, "split": split, "config": config, "versions": versions(),
        "overrides": list(overrides), "findings": list(findings), "timings": dict(timings), **carrier,
        "curves": list(curves), "use": dict(use or {}), **found,
    }  # fmt: skip
    return finite_or_null({**report, "explanation": explain(report)})


def write_report(directory: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json (its curves thinned to what a chart can show) and report.html; returns what was written."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content = finite_or_null({**report, "curves": thin(report.get("curves") or [])})
    (folder / REPORT_HTML).write_text(render(content), encoding="utf-8")
    write_json(folder / REPORT_JSON, content)  # last: a run that has it is finished
    return content


def read_report(directory: str | Path) -> dict[str, Any]:
    """report.json of a run directory; curves that it lacks are taken from the log.jsonl beside it.

    Raises:
        InputError: there is no report.json, or it is not a JSON object.
    """
    path = Path(directory) / REPORT_JSON
    if not path.is_file():
        raise InputError(f"output_dir: expected {REPORT_JSON} in {str(directory)!r}, found none")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"output_dir: expected JSON in {str(path)!r}, got {error}") from None
    if not isinstance(report, dict):
        raise InputError(f"output_dir: expected a JSON object in {str(path)!r}, got {type(report).__name__}")
    log = Path(directory) / LOG
    if not report.get("curves") and log.is_file():
        report["curves"] = thin(read_log(log))
    return report


def thin(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Log lines, at most about `CURVE_LINES` of each stage; the last and those with held-out losses always stay."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        stages.setdefault(str(line.get("stage", "")), []).append(line)
    kept: list[Mapping[str, Any]] = []
    for of_stage in stages.values():
        stride = -(-len(of_stage) // CURVE_LINES)
        last = len(of_stage) - 1
        kept += [
            {key: value for key, value in line.items() if key in CURVE_KEYS}
            for place, line in enumerate(of_stage)
            if place % stride == 0 or place == last or "validation_loss" in line or "held_out_loss" in line
        ]
    return kept
