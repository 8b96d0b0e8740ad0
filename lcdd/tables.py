"""The reversal table as text, for the terminal; the HTML page has its own."""

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
