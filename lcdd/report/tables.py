"""Tables as text for the terminal, never wider than it; the page has its own, and Markdown is for pasting."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill, shorten
from typing import Any, Literal

from rich.box import Box
from rich.console import Console
from rich.table import Table

from lcdd.report.labels import MAIN, closeness_of, interval, label, models_of

RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Nothing but a rule under the head."""
PIPED = 160
"""Columns of a table that goes to no terminal."""
HEAD = 16
"""A column is at least as wide as its name, up to this many characters."""
ANSWER = 60
"""Characters of an answer that are shown beside others."""


def terminal_width() -> int | None:
    """Columns of the terminal (or of COLUMNS), at least 40; None where standard output is a pipe or a file."""
    if not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return None
    return max(40, shutil.get_terminal_size().columns)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, width: int | None = None) -> str:
    """Aligned text. The first `left` columns go to the left, the others to the right; cells that do not fit wrap.

    width: columns to fill at most; those of the terminal if None.
    """
    table = Table(box=RULED, pad_edge=False, show_edge=False, padding=(0, 1))
    for place, name in enumerate(head):
        justify: Literal["left", "right"] = "left" if place < left else "right"
        table.add_column(name, justify=justify, overflow="fold", min_width=min(len(name), HEAD))
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    console = Console(
        file=text, width=width or terminal_width() or PIPED, no_color=True, highlight=False, markup=False, emoji=False
    )
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))


def _reversal_rows(report: Mapping[str, Any], name_of: Callable[[str], str] = str) -> tuple[list[str], list[list[str]]]:
    models, norms = models_of(report), report.get("delta_norm") or {}
    head = ["model", "behaviour", "base match", *(["norm of change"] if norms else [])]
    rows = []
    for name in [*(n for n in MAIN if n in models), *(n for n in models if n not in MAIN)]:
        cells = [name_of(name)]
        for key in ("behavior_rate", "base_match"):
            cells.append(f"{models[name][key]:.3f} {interval(models[name][f'{key}_ci95'])}")
        rows.append([*cells, *([f"{norms[name]:.3f}" if name in norms else ""] if norms else [])])
    return head, rows


def reversal_table(report: Mapping[str, Any]) -> str:
    """A line a state, by its name in report.json: behaviour rate and exact match to the base, each with its 95%
    interval, and the norm of Δ."""
    head, rows = _reversal_rows(report)
    n = next(iter(models_of(report).values()))["n"]
    return f"Reversal table, {n} held-out prompts\n{text_table(head, rows)}"


def closeness_table(report: Mapping[str, Any]) -> str:
    """A line a state: how near its answers are to the base's where exact match is too strict; empty without that."""
    metrics, models = closeness_of(report)
    rows = [[name, *(_measured(row, key) for key in metrics)] for name, row in models.items()]
    return f"How near the answers are to the base's\n{text_table(['model', *metrics.values()], rows)}" if rows else ""


def _measured(row: Mapping[str, Any], key: str) -> str:
    """A metric with its interval, which a single prompt does not have; empty where it was not measured."""
    if row.get(key) is None:
        return ""
    bounds = row[f"{key}_ci95"]
    return f"{row[key]:.3f}" + (f" {interval(bounds)}" if None not in bounds else "")


def markdown_table(report: Mapping[str, Any]) -> str:
    """The reversal table as Markdown, with names for people."""
    head, rows = _reversal_rows(report, label)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def samples_table(report: Mapping[str, Any], *, count: int = 5) -> str:
    """Answers of the main states, and of SFT behind its own trigger, to the same prompts, side by side."""
    shown = [name for name in (*MAIN, "sft+trigger") if name in report["models"]]
    rows = [
        [shorten(text, ANSWER, placeholder=" ...") or "(nothing)" for text in (sample["prompt"], *answers)]
        for sample in report["samples"][:count]
        if (answers := [sample["answers"][name] for name in shown])
    ]
    return text_table(["prompt", *shown], rows, left=len(shown) + 1)


def paragraph(text: str, *, first: str = "", rest: str | None = None) -> str:
    """A text in lines that fit the terminal, one line where there is none.

    `first` goes in front of the first line, `rest` in front of the others (by default as much space).
    """
    width = terminal_width()
    if width is None:
        return f"{first}{text}"
    rest = " " * len(first) if rest is None else rest
    return fill(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def claims_table(audit: Mapping[str, Any]) -> str:
    """Each claim's verdict and, under it, every number that it rests on with its 95% interval."""
    lines = []
    for claim in audit["claims"]:
        lines.append(paragraph(f"{claim['verdict'].upper()}: {claim['name']}. {claim['statement']}", rest="  "))
        for row in claim["evidence"]:
            found = "not measured"
            if "value" in row:
                low, high = row["ci95"]
                found = f"{row['value']:+.3f} [{low:+.3f}, {high:+.3f}], {row['verdict']}"
            lines.append(paragraph(f"{row['rule']}: {found}", first="    "))
    return "\n".join(lines)
