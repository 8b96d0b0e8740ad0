"""The report's charts as inline SVG: where the models stand, lines over steps, interval bars and a heat map.

Here is the geometry; how it is drawn is in `templates/charts.html`. Colours are CSS variables.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lcdd.report.labels import MAIN, label
from lcdd.report.numbers import tick_text
from lcdd.report.rendering import macro

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 24
PALETTE = 8
LOG_SPAN = 50
"""A chart goes to a logarithmic axis where its largest value is more than this many times its smallest."""
MAP_WIDTH, MAP_HEIGHT = 640, 380
MAP_LEFT, MAP_RIGHT, MAP_TOP, MAP_BOTTOM = 58, 96, 26, 46
LABEL_GAP = 21
"""Least distance of two labels on the map, from base line to base line."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values from `low` to `high` along pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Pixels of a value, which stays inside."""
        if self.logarithmic:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / ((self.high - self.low) or 1)
        return round(self.start + min(max(part, 0.0), 1.0) * (self.end - self.start), 1)


# ---------------------------------------------------------------- lines over steps


def line_chart(series: Mapping[str, Points], *, label: str, mark: float | None = None, linear: bool = False) -> Markup:
    """A figure with one line a series over steps, in the order of the palette; series without points are left out.

    Args:
        series: name -> (x, y) points, x ascending; y that is not finite is left out.
        mark: a value that a rule is drawn at.
        linear: never a logarithmic axis.
    """
    drawn = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return macro("charts.html", "no_points")
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + ([mark] if mark is not None else [])
    logarithmic = not linear and min(ys) > 0 and max(ys) / min(ys) > LOG_SPAN
    ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min([*ys, 0.0]), max(ys))
    along = Axis(low=min(xs), high=max(max(xs), min(xs) + 1), start=LEFT, end=WIDTH - RIGHT)
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    up = Axis(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP, logarithmic=logarithmic)
    lines = [
        {
            "name": name,
            "colour": place % PALETTE,
            "path": " ".join(f"{along.at(x)},{up.at(y)}" for x, y in points) if len(points) > 1 else "",
            "end": (along.at(points[-1][0]), up.at(points[-1][1])),
            "last": points[-1],
        }
        for place, (name, points) in enumerate(drawn.items())
    ]
    return macro("charts.html", "line_chart", {
        "label": label, "logarithmic": logarithmic, "lines": lines, "width": WIDTH, "height": HEIGHT,
        "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM,
        "up": [(up.at(tick), tick_text(tick)) for tick in ticks],
        "along": [(along.at(t), tick_text(t)) for t in _ticks(min(xs), max(xs)) if along.low <= t <= along.high],
        "mark": None if mark is None else up.at(mark),
    })  # fmt: skip


def interval_bar(value: float, low: float, high: float, *, series: int, minimum: float = 0.0) -> Markup:
    """A dot on a track from `minimum` to 1 with its interval as a whisker."""
    width = 150
    along = Axis(low=minimum, high=1.0, start=6, end=width - 6)
    return macro("charts.html", "interval_bar", {
        "width": width, "colour": series, "value": along.at(value), "low": along.at(low), "high": along.at(high),
        "zero": along.at(0) if minimum < 0 else None,
    })  # fmt: skip


# ---------------------------------------------------------------- where the models stand


def reversal_map(models: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Behaviour rate across, base match up: the way base -> SFT -> carrier -> carrier behind its trigger, and controls.

    models: rows of the reversal table; those of `MAIN` that are there make the way, the others are grey marks with
    their intervals.
    """
    across = Axis(low=0, high=1, start=MAP_LEFT, end=MAP_WIDTH - MAP_RIGHT)
    up = Axis(low=0, high=1, start=MAP_HEIGHT - MAP_BOTTOM, end=MAP_TOP)

    def mark(name: str) -> dict[str, Any]:
        row = models[name]
        return {
            "name": label(name), "row": row, "state": name,
            "x": across.at(row["behavior_rate"]), "y": up.at(row["base_match"]),
            "across": [across.at(bound) for bound in row["behavior_rate_ci95"]],
            "up": [up.at(bound) for bound in row["base_match_ci95"]],
        }  # fmt: skip

    main = [mark(name) for name in MAIN if name in models]
    for place, point in enumerate(main):
        point["colour"] = ("s5", "s1", "s3", "s2")[MAIN.index(point["state"])]
        point["bend"] = _bend(main[place - 1], point) if place else None
    return macro("charts.html", "reversal_map", {
        "width": MAP_WIDTH, "height": MAP_HEIGHT, "left": MAP_LEFT, "right": MAP_WIDTH - MAP_RIGHT, "top": MAP_TOP,
        "bottom": MAP_HEIGHT - MAP_BOTTOM, "main": main, "labels": _placed_labels(main),
        "controls": [mark(name) for name in models if name not in MAIN],
        "ticks": [(across.at(value), up.at(value), f"{value:.0%}") for value in (0, 0.25, 0.5, 0.75, 1)],
    })  # fmt: skip


def _bend(start: Mapping[str, Any], end: Mapping[str, Any]) -> str | None:
    """The path of an arrow that bows to its left, short of both marks; none between marks that touch."""
    dx, dy = end["x"] - start["x"], end["y"] - start["y"]
    length = math.hypot(dx, dy)
    if length < 30:
        return None
    room, bow = 11 / length, 0.16
    middle = (start["x"] + dx / 2 + bow * dy, start["y"] + dy / 2 - bow * dx)
    first = (start["x"] + (middle[0] - start["x"]) * 2 * room, start["y"] + (middle[1] - start["y"]) * 2 * room)
    last = (end["x"] + (middle[0] - end["x"]) * 2 * room, end["y"] + (middle[1] - end["y"]) * 2 * room)
    return "M{:.1f},{:.1f} Q{:.1f},{:.1f} {:.1f},{:.1f}".format(*first, *middle, *last)


def _placed_labels(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A label to the right of each mark, no two in the same half of the map closer than `LABEL_GAP`."""
    placed = []
    for right in (False, True):
        bottom = -math.inf
        half = sorted((p for p in points if (p["x"] > MAP_WIDTH / 2) == right), key=lambda p: p["y"])
        over = max(0.0, LABEL_GAP * (len(half) - 1) - (MAP_HEIGHT - MAP_BOTTOM - half[0]["y"])) if half else 0.0
        for point in half:
            bottom = max(point["y"] + 5 - over, bottom + LABEL_GAP)
            placed.append({"point": point, "x": point["x"] + 14, "y": bottom})
    return placed


# ---------------------------------------------------------------- shares by layer


def heat_map(rows: Sequence[Mapping[str, float]], *, row_name: str, label: str) -> Markup:
    """A grid of shares in [0, 1]: one row a mapping, one column a key; the darkest cell is the largest share."""
    columns = list(rows[0])
    cell_h = 26 if len(rows) <= 12 else 17
    cell_w, left, top = 74, 62, 40
    largest = max((value for row in rows for value in row.values()), default=0.0) or 1.0
    cells = [
        {
            "x": left + x * cell_w, "y": top + y * cell_h, "row": y, "column": column, "value": row[column],
            "shade": row[column] / largest,
        }
        for y, row in enumerate(rows)
        for x, column in enumerate(columns)
    ]  # fmt: skip
    return macro("charts.html", "heat_map", {
        "label": label, "row_name": row_name, "cells": cells, "cell_w": cell_w, "cell_h": cell_h,
        "width": left + cell_w * len(columns), "height": top + cell_h * len(rows), "left": left, "top": top,
        "columns": [(left + (x + 0.5) * cell_w, column) for x, column in enumerate(columns)],
        "rows": [top + (y + 0.5) * cell_h + 4 for y in range(len(rows))],
    })  # fmt: skip


# ---------------------------------------------------------------- ticks


def _ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    return [10.0**power for power in range(first, last + 1, stride)]
