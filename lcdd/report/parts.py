"""Pieces of the report's HTML: tables, cards, folds, and the line that says what is missing."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lcdd.report.charts import interval_bar, number


def rate_cell(row: Mapping[str, Any], key: str, series: int) -> str:
    value, interval = row.get(key), row.get(f"{key}_ci95")
    if value is None or not interval:
        return '<td class="num">–</td>'
    low, high = interval
    return (
        f'<td class="rate"><span>{value:.3f}</span> <small>[{low:.3f}, {high:.3f}]</small>'
        f"{interval_bar(value, low, high, series=series)}</td>"
    )


def html_table(head: str, rows: list[str]) -> str:
    header = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{header}<tbody>{"".join(rows)}</tbody></table></div>'


def html_cards(values: Mapping[str, str]) -> str:
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="cards">{items}</dl>'


def html_details(title: str, content: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{content}</details>"


def say_missing(what: str) -> str:
    return f'<p class="missing">Missing: report.json has no {escape(what)}.</p>'


def breakable(name: str) -> str:
    """A state's name, escaped, that may break after its joints."""
    return escape(name).replace("+", "+<wbr>").replace("_", "_<wbr>")


def plain_words(name: Any) -> str:
    return str(name).replace("_", " ")


def shown_value(value: Any) -> str:
    return number(value, 2) if isinstance(value, int | float) else str(value)
