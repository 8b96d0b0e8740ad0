"""The reversal table and the claims as text, for the terminal; the HTML page has its own."""

from collections.abc import Mapping
from typing import Any


def reversal_table(report: Mapping[str, Any]) -> str:
    """A line a state: behaviour rate and exact match to the base, each with its 95% interval, and ||delta||."""
    norms = report.get("delta_norm", {})
    rows = [["model", "behaviour", "95% interval", "base match", "95% interval", "||delta||"]]
    for name, row in report["models"].items():
        cells = [name]
        for key in ("behavior_rate", "base_match"):
            low, high = row[f"{key}_ci95"]
            cells += [f"{row[key]:.3f}", f"[{low:.3f}, {high:.3f}]"]
        rows.append([*cells, f"{norms[name]:.3f}" if name in norms else ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    n = next(iter(report["models"].values()))["n"]
    return "\n".join([f"Reversal table, {n} held-out prompts", lines[0], "-" * len(lines[0]), *lines[1:]])


def claims_table(audit: Mapping[str, Any]) -> str:
    """Each claim's verdict and, under it, every number that it rests on with its 95% interval."""
    lines = []
    for claim in audit["claims"]:
        lines.append(f"{claim['verdict'].upper()}: {claim['name']}. {claim['statement']}")
        for row in claim["evidence"]:
            if "value" not in row:
                lines.append(f"    {row['rule']}: not measured")
                continue
            low, high = row["ci95"]
            lines.append(f"    {row['rule']}: {row['value']:+.3f} [{low:+.3f}, {high:+.3f}], {row['verdict']}")
    return "\n".join(lines)
