"""What the trials found, as a record, and the tables that docs/models.md and the README have of it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks import markdown
from benchmarks.records import RESULTS, cpu_environment, timestamp

RECORD = RESULTS / "cpu" / "families.json"
COMMAND = "python -m benchmarks.families --write"
FAILED = "FAILED"


def record_of(families: Sequence[Mapping[str, Any]], refused: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record of one run.

    families: label, model_type, sites, found (check -> what it found, up to the first that failed), passed.
    refused: label, model_type, reason (None: it was not refused).
    """
    versions = {name: version(name) for name in ("transformers", "peft")}
    return {
        "command": COMMAND,
        "date": timestamp(),
        "environment": cpu_environment() | versions,
        "passed": sum(row["passed"] for row in families),
        "refused": sum(bool(row["reason"]) for row in refused),
        "families": list(families),
        "refusals": list(refused),
    }


def table(record: Mapping[str, Any]) -> str:
    """A row a family, and the refusals under it."""
    checks = list(record["families"][0]["found"])
    rows = [
        [row["label"], row["sites"], *(_cell(row["found"].get(check)) for check in checks)]
        for row in record["families"]
    ]
    refused = [[row["label"], row["reason"] or "NOT REFUSED"] for row in record["refusals"]]
    return "\n".join([
        *markdown.table(["family", "sites", *checks], rows), "", "Refused, from the config alone:", "",
        *markdown.table(["family", "reason"], refused),
    ])  # fmt: skip


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
