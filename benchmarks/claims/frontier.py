"""The frontier as a picture: what a trigger gives back against sparsity, against ‖Δ‖, and by where open gates sit.

`python -m benchmarks.readme` writes it from results/claims/demo.json. A dot is a model, mean over the seeds of one
behaviour; carriers are filled, dense and other controls are rings.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

COLOURS = {"fixed_response": "#2563eb", "refusal": "#d97706", "style": "#059669"}
CARRIERS = ("carrier", "carrier_90", "carrier_80", "carrier_50")
PLACES = ("random_gates", "early", "late", "attention", "mlp")
TOP, BOTTOM, SIZE, LEFT, GAP = 64, 320, 256, 56, 72
BEHAVIES = 0.9
"""Behaviour rate from which on there is something to be reversed."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A model of one behaviour, mean over seeds."""

    behavior: str
    model: str
    sparsity: float
    norm: float
    match: float
    low: float
    high: float

    @property
    def title(self) -> str:
        spread = f" ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else ""
        size = f"{self.sparsity:.3f} closed, ‖Δ‖ {self.norm:.2f}"
        return f"{self.behavior}, {self.model}: {self.match:.2f}{spread} at {size}"


def dots(record: Mapping[str, Any]) -> list[Dot]:
    """Of every model that shows its behaviour, the least and most of its seeds beside the mean."""

    def key(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["cell"].rpartition("-")[0], row["model"]

    shown = sorted((row for row in record["models"] if row["behavior_rate"] >= BEHAVIES), key=key)
    found = []
    for (behavior, model), rows in ((key, list(rows)) for key, rows in groupby(shown, key=key)):
        matches = [row["trigger"]["base_match"] for row in rows]
        found.append(Dot(
            behavior=behavior, model=model, sparsity=statistics.fmean(row["gate_sparsity"] for row in rows),
            norm=statistics.geometric_mean(row["delta_norm"] for row in rows), match=statistics.fmean(matches),
            low=min(matches), high=max(matches),
        ))  # fmt: skip
    return found


def draw(found: Sequence[Dot]) -> str:
    """Three panels side by side, as SVG."""
    width = 3 * SIZE + 2 * GAP + LEFT + 24
    norms = [math.log10(dot.norm) for dot in found]
    low, high = (min(norms) - 0.05, max(norms) + 0.05) if norms else (0.0, 1.0)
    ticks = [n for n in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= math.log10(n) <= high]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {BOTTOM + 84}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" '
        'aria-label="exact match to the base behind a trigger, against sparsity, norm and place of the open gates">',
        f'<rect width="{width}" height="{BOTTOM + 84}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#111827">Exact match to the base behind a trigger</text>',
        *_panel(0, "closed gates", [(s / 4, f"{s / 4:.0%}") for s in range(5)]),
        *_panel(1, "‖Δ‖", [((math.log10(n) - low) / (high - low), f"{n:g}") for n in ticks]),
        *_panel(2, "where as many gates are open", [
            (_place(name), "anywhere" if name == "random_gates" else name) for name in PLACES
        ]),
        *_dots(0, found, lambda dot: dot.sparsity),
        *_dots(1, found, lambda dot: (math.log10(dot.norm) - low) / (high - low)),
        *_dots(2, [dot for dot in found if dot.model in PLACES], lambda dot: _place(dot.model) + _aside(dot)),
        *_legend(),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _place(model: str) -> float:
    return (PLACES.index(model) + 0.5) / len(PLACES)


def _aside(dot: Dot) -> float:
    """Behaviours next to each other."""
    return 0.04 * (list(COLOURS).index(dot.behavior) - 1)


def _x(panel: int, share: float) -> float:
    return LEFT + panel * (SIZE + GAP) + share * SIZE


def _y(match: float) -> float:
    return BOTTOM - match * (BOTTOM - TOP)


def _panel(number: int, words: str, ticks: Sequence[tuple[float, str]]) -> list[str]:
    left, right = _x(number, 0), _x(number, 1)
    parts = [
        f'<line x1="{left}" x2="{right}" y1="{_y(tick / 4):.1f}" y2="{_y(tick / 4):.1f}" stroke="#e5e7eb"/>'
        f'<text x="{left - 8}" y="{_y(tick / 4) + 4:.1f}" text-anchor="end" fill="#4b5563">{tick / 4:g}</text>'
        for tick in range(5)
    ]
    parts += [
        f'<text x="{_x(number, share):.1f}" y="{BOTTOM + 18}" text-anchor="middle" fill="#4b5563">{escape(text)}</text>'
        for share, text in ticks
    ]
    middle = _x(number, 0.5)
    return [
        *parts,
        f'<text x="{middle:.1f}" y="{BOTTOM + 38}" text-anchor="middle" fill="#111827">{escape(words)}</text>',
    ]


def _dots(panel: int, found: Sequence[Dot], share: Callable[[Dot], float]) -> list[str]:
    parts = []
    for dot in found:
        x, colour = _x(panel, share(dot)), COLOURS[dot.behavior]
        filled = dot.model in CARRIERS or dot.model in PLACES
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(dot.low):.1f}" y2="{_y(dot.high):.1f}" stroke="{colour}" '
            f'stroke-opacity="0.35"/><circle cx="{x:.1f}" cy="{_y(dot.match):.1f}" r="{4.5 if filled else 4}" '
            f'fill="{colour if filled else "#ffffff"}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
    return parts


def _legend() -> list[str]:
    y, x = BOTTOM + 66, float(LEFT)
    parts = []
    for name, colour in COLOURS.items():
        parts.append(
            f'<circle cx="{x + 4:.0f}" cy="{y - 4}" r="4.5" fill="{colour}"/>'
            f'<text x="{x + 16:.0f}" y="{y}" fill="#111827">{name.replace("_", " ")}</text>'
        )
        x += 120
    words = "filled: gated; ring: dense, low-rank or sparsified; whisker: seeds"
    return [*parts, f'<text x="{x:.0f}" y="{y}" fill="#4b5563">{words}</text>']
