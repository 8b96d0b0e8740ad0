"""Inline SVG for the report: line charts, interval bars and a heat map. Colours are CSS variables."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 10, 24
PALETTE = 8
LOG_SPAN = 50
"""A chart goes to a logarithmic axis where its largest value is more than this many times its smallest."""

Points = Sequence[tuple[float, float]]


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: thousands grouped, small ones in scientific notation, "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def line_chart(series: Mapping[str, Points], *, label: str) -> str:
    """A figure with one line a series over steps, in the order of the palette; series without points are left out.

    series: name -> (x, y) points, finite, x ascending.
    """
    drawn = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return '<p class="missing">No points to draw.</p>'
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    logarithmic = min(ys) > 0 and max(ys) / min(ys) > LOG_SPAN
    ticks = _log_ticks(min(ys), max(ys)) if logarithmic else _ticks(min([*ys, 0.0]), max(ys))
    low, high = min(ticks[0], min(ys)), max(ticks[-1], max(ys))
    x_ticks = _ticks(min(xs), max(xs), count=5)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / ((high - low) or 1)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(tick)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            at = f'x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}"'
            parts.append(f'<text class="tick" {at} text-anchor="middle">{_tick_text(tick)}</text>')
    for index, (name, points) in enumerate(drawn.items()):
        place = index % PALETTE
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
        last = points[-1]
        if len(points) > 1:
            parts.append(f'<polyline class="line s{place}" points="{path}"/>')
        parts.append(
            f'<circle class="dot s{place}" cx="{at_x(last[0]):.1f}" cy="{at_y(last[1]):.1f}" r="3.5">'
            f"<title>{escape(name)}: {number(last[1], 4)} at {number(last[0])}</title></circle>"
        )
    keys = "".join(
        f'<span class="key"><i class="swatch s{place % PALETTE}"></i>{escape(name)} '
        f"<b>{number(points[-1][1], 4)}</b></span>"
        for place, (name, points) in enumerate(drawn.items())
    )
    return (
        f"<figure><figcaption>{escape(label)}{', logarithmic' if logarithmic else ''}"
        f'<span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def interval_bar(value: float, low: float, high: float, *, series: int, minimum: float = 0.0) -> str:
    """A dot on a track from `minimum` to 1 with its interval as a whisker."""
    width, middle = 150, 9

    def at(x: float) -> float:
        return 6 + (min(max(x, minimum), 1.0) - minimum) / (1 - minimum) * (width - 12)

    zero = f'<line class="axis" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="2" y2="16"/>' if minimum < 0 else ""
    return (
        f'<svg class="bar" viewBox="0 0 {width} 18" aria-hidden="true">'
        f'<line class="track" x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}"/>{zero}'
        f'<line class="whisker s{series}" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot s{series}" cx="{at(value):.1f}" cy="{middle}" r="4.5"/></svg>'
    )


def heat_map(rows: Sequence[Mapping[str, float]], *, row_name: str, label: str) -> str:
    """A grid of shares in [0, 1]: one row a mapping, one column a key; the darkest cell is the largest share."""
    columns = list(rows[0])
    cell_w, cell_h, left, top = 74, 26, 62, 40
    width, height = left + cell_w * len(columns), top + cell_h * len(rows)
    largest = max((value for row in rows for value in row.values()), default=0.0) or 1.0
    parts = []
    for place, column in enumerate(columns):
        x = left + (place + 0.5) * cell_w
        parts.append(f'<text class="tick" x="{x}" y="{top - 12}" text-anchor="middle">{escape(column)}</text>')
    for y, row in enumerate(rows):
        middle = top + (y + 0.5) * cell_h + 4
        parts.append(f'<text class="tick" x="{left - 10}" y="{middle}" text-anchor="end">{escape(row_name)} {y}</text>')
        for x, column in enumerate(columns):
            share = row[column]
            shade = share / largest
            parts.append(
                f"<g><title>{escape(row_name)} {y}, {escape(column)}: {share:.2%} open, sparsity {1 - share:.4f}"
                f"</title>"
                f'<rect class="cell" x="{left + x * cell_w + 1}" y="{top + y * cell_h + 1}" width="{cell_w - 2}" '
                f'height="{cell_h - 2}" rx="3" fill-opacity="{0.06 + 0.94 * shade:.3f}"/>'
                f'<text class="{"cell-on" if shade > 0.5 else "cell-off"}" x="{left + (x + 0.5) * cell_w}" '
                f'y="{middle}" text-anchor="middle">{share:.1%}</text></g>'
            )
    return (
        f'<figure><figcaption>{escape(label)}</figcaption><div class="scroll"><svg class="heat" '
        f'viewBox="0 0 {width} {height}" style="min-width:{min(width, 560)}px" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(parts)}</svg></div></figure>'
    )


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


def _tick_text(tick: float) -> str:
    if tick == 0:
        return "0"
    if abs(tick) < 1e-3 or abs(tick) >= 1e5:
        return f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{tick:g}"
