"""What the trials found, as a record, and the tables that docs/models.md and the README have of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.records import RESULTS, Environment

RECORD = RESULTS / "cpu" / "families.json"
COMMAND = "python -m benchmarks.families --write"
FAILED = "FAILED"


def record_of(families: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of one run.

    families: label, model_type, sites, found (check -> what it found, up to the first that failed), passed.
    refused: label, model_type, reason (None: it was not refused).
    """
    environment = asdict(Environment.here(torch.device("cpu")))
    versions = {name: version(name) for name in ("transformers", "peft")}
    return {
        "command": COMMAND,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "environment": environment | versions,
        "passed": sum(row["passed"] for row in families),
        "refused": sum(bool(row["reason"]) for row in refused),
        "families": list(families),
        "refusals": list(refused),
    }


def write(record: Mapping[str, Any]) -> None:
    """Put a run on record."""
    RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read() -> dict[str, Any]:
    """The run on record."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def table(record: Mapping[str, Any]) -> str:
    """A row a family, and the refusals under it."""
    checks = list(record["families"][0]["found"])
    heads = ["family", "sites", *checks]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in record["families"]:
        cells = [_cell(row["found"].get(check)) for check in checks]
        lines.append("| " + " | ".join([row["label"], row["sites"], *cells]) + " |")
    lines += ["", "Refused, from the config alone:", "", "| family | reason |", "|---|---|"]
    lines += [f"| {row['label']} | {row['reason'] or 'NOT REFUSED'} |" for row in record["refusals"]]
    return "\n".join(lines)


def short_table(record: Mapping[str, Any]) -> str:
    """A row a kind of sites: its families, and how many pass."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in record["families"]:
        kinds.setdefault(row["sites"], []).append(row)
    lines = ["| sites | families | pass |", "|---|---|---|"]
    for sites, members in kinds.items():
        labels, green = "; ".join(row["label"] for row in members), sum(row["passed"] for row in members)
        lines.append(f"| {sites} | {labels} | {green} of {len(members)} |")
    reasons: dict[str, list[str]] = {}
    for row in record["refusals"]:
        reasons.setdefault((row["reason"] or "NOT REFUSED").split(", got ")[0], []).append(row["label"])
    lines += [f"| *refused* | {'; '.join(labels)}: {reason} | |" for reason, labels in reasons.items()]
    return "\n".join(lines)


def _cell(found: str | None) -> str:
    if found is None or found.startswith(FAILED):
        return found or ""
    return f"yes ({found})" if found else "yes"
