"""From records to what people read: the tables of README.md between its markers, and the masking tax as a picture.

    python -m benchmarks.plot        rewrites both from results/*/records.csv; no number is typed by hand

SVG written here, like the report's charts: nothing to install.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from benchmarks import markdown
from benchmarks.goals import GIB, GOALS, HEADLINES, Goal
from benchmarks.records import RESULTS, Record, load

README = Path(__file__).with_name("README.md")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 56, 150, 40, 48
COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#db2777", "#64748b")
Points = list[tuple[float, float, float, float]]  # sparsity, ratio: p20, p50, p80


# --- the picture ------------------------------------------------------------------------------------------------------


def tax_points(rows: Sequence[Record], model: str) -> dict[str, Points]:
    """Series name -> points of step time over the plain step against the share of closed gates, for one model."""
    series: dict[str, Points] = {}
    for row in rows:
        params = json.loads(row.params)
        if row.case != "optimizer step" or row.metric != "ratio" or params["model"] != model:
            continue
        if params["checkpointing"]:
            continue
        batches = params["micro_batches"]
        name = f"{row.provider}, {params['gates']}, {params['tokens']:,} tokens in {batches}"
        series.setdefault(name, []).append((1 - float(row.lane_value("density")), row.p20, row.p50, row.p80))
    return {name: sorted(points) for name, points in series.items()}


def tax_svg(series: Mapping[str, Points], *, title: str) -> str:
    """Lines with p20–p80 whiskers over sparsity, and the floor (the plain step, 1) as a dashed line."""
    highest = max([1.2, *(p[3] for points in series.values() for p in points)])
    lowest = min([0.8, *(p[1] for points in series.values() for p in points)])
    top, bottom = -(-highest // 0.1) * 0.1, lowest // 0.1 * 0.1
    right, base = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(sparsity: float) -> float:
        return LEFT + sparsity * (right - LEFT)

    def y(ratio: float) -> float:
        return base - (ratio - bottom) / (top - bottom) * (base - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + 18 * len(series)}" '
        f'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="{escape(title, quote=True)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT + 18 * len(series)}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#111827">{escape(title)}</text>',
    ]
    stride = 0.1 if top - bottom < 1.2 else 0.2 if top - bottom < 2.4 else 0.5
    ticks = [bottom + stride * i for i in range(int((top - bottom) / stride + 1.01))]
    for tick in ticks:
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e5e7eb"/>'
            f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#4b5563">{tick:.1f}</text>'
        )
    for tenth in range(0, 11, 2):
        parts.append(
            f'<text x="{x(tenth / 10):.1f}" y="{base + 18}" text-anchor="middle" fill="#4b5563">{tenth * 10}%</text>'
        )
    parts.append(f'<text x="{x(0.5):.1f}" y="{base + 36}" text-anchor="middle" fill="#4b5563">closed gates</text>')
    parts.append(
        f'<line x1="{LEFT}" x2="{right}" y1="{y(1):.1f}" y2="{y(1):.1f}" stroke="#111827" stroke-dasharray="6 4"/>'
        f'<text x="{right + 8}" y="{y(1) + 4:.1f}" fill="#111827">plain step: the floor</text>'
    )
    for place, (name, points) in enumerate(series.items()):
        colour = COLOURS[place % len(COLOURS)]
        path = " ".join(f"{x(s):.1f},{y(m):.1f}" for s, _, m, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for s, low, middle, high in points:
            parts.append(
                f'<line x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{colour}"/>'
                f'<circle cx="{x(s):.1f}" cy="{y(middle):.1f}" r="3.5" fill="{colour}">'
                f"<title>{escape(name)}: {middle:.3f} at {s:.0%} closed</title></circle>"
            )
        line = HEIGHT + 18 * place + 4
        parts.append(
            f'<circle cx="{LEFT + 4}" cy="{line - 4}" r="4" fill="{colour}"/>'
            f'<text x="{LEFT + 16}" y="{line}" fill="#111827">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


# --- the tables -------------------------------------------------------------------------------------------------------


def headlines(rows: Sequence[Record]) -> list[str]:
    """The five rows that matter first, in words."""
    shown = []
    for goal in HEADLINES:
        if values := goal.values(rows):
            ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
            shown.append([goal.text, f"**{' to '.join(ends)}**"])
    return markdown.table(["time of", "is times the other's"], shown)


def fold(title: str, lines: Sequence[str]) -> list[str]:
    """Lines behind a title that opens them."""
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def table(rows: Sequence[Record], pictures: Sequence[str] = ()) -> str:
    """One device's records: where and when, the headlines; folded away the goals, and a table a case."""
    first = rows[0]
    commits = ", ".join(sorted({row.commit for row in rows}))
    dates = sorted({row.date for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        *headlines(rows),
        "",
        *pictures,
        f"{first.device}; {first.threads} threads; torch {first.torch}, triton {first.triton}, Python {first.python}; "
        f"commit {commits}; {when}.",
        "",
        *fold("Goals, and which hold", _goals(rows)),
    ]
    for case, group in groupby(rows, key=lambda row: row.case):
        found: list[str] = []
        for params, of_params in groupby(list(group), key=lambda row: row.params):
            found += ["", f"**{_words(json.loads(params))}**", "", *_case(list(of_params))]
        lines += fold(case, found[1:])
    return "\n".join(lines)


def _case(rows: Sequence[Record]) -> list[str]:
    head = [
        "provider",
        "time, ms (p20–p80)",
        "over the floor",
        "also",
        "peak memory (a run's own)",
        "held for backward",
    ]
    lanes = groupby(rows, key=lambda row: (row.provider, row.lane))
    return markdown.table(head, [
        _cells(provider, json.loads(lane), {row.metric: row for row in of_lane}) for (provider, lane), of_lane in lanes
    ])  # fmt: skip


def _goals(rows: Sequence[Record]) -> list[str]:
    shown = []
    for goal in GOALS:
        if goal.device == _kind(rows):
            values = goal.values(rows)
            measured = ", ".join(map(_figure(goal), values)) if values else "not measured"
            verdict = ("yes" if all(map(goal.holds, values)) else "**no**") if values else "a goal"
            shown.append([goal.text, _limit(goal), measured, verdict])
    return markdown.table(["goal", "limit", "measured", "holds"], shown)


def unmeasured_goals(kinds: set[str]) -> str:
    """The goals of kinds of device that have no records here yet."""
    missing = [[goal.text, goal.device, _limit(goal)] for goal in GOALS if goal.device not in kinds]
    if not missing:
        return ""
    return "\n".join(fold("Not measured yet, goals only", markdown.table(["goal", "device", "limit"], missing)))


def _kind(rows: Sequence[Record]) -> str:
    """Of the device that these were measured on."""
    return "cpu" if "cores" in rows[0].device else "cuda"


def _cells(provider: str, lane: Mapping[str, object], metrics: Mapping[str, Record]) -> list[str]:
    def ratio(row: Record) -> str:
        return f"{row.p50:.3f} ({row.p20:.3f}–{row.p80:.3f})"

    time = metrics.get("time")
    shown = f"{1e3 * time.p50:.4g} ({1e3 * time.p20:.4g}–{1e3 * time.p80:.4g})" if time else "did not fit"
    also = []
    for metric, form in (
        ("bandwidth", "{:.3g} GB/s"), ("rate", "{:.3g} TFLOP/s"), ("roof", "{:.0%} of the roof"),
        ("tokens_per_second", "{:,.0f} tokens/s"), ("graph_time", "graph {:.4g} s"),
        ("open_gates", "{:,.0f} open gates"),
        ("loop_time", "loop {:.3g} s"), ("first_run", "first run {:.2g} s"),
    ):  # fmt: skip
        if metric in metrics and not (metric == "rate" and metrics[metric].p50 < 1e-3):
            also.append(form.format(metrics[metric].p50))
    cells = [
        " ".join([provider, _words(lane)]).strip(), shown, ratio(metrics["ratio"]) if "ratio" in metrics else "",
        "; ".join(also), _size(metrics.get("peak_memory")), _size(metrics.get("held_for_backward")),
    ]  # fmt: skip
    if "extra_memory" in metrics:
        cells[-2] += f" ({_size(metrics['extra_memory'])})"
    return cells


def _size(row: Record | None) -> str:
    return "" if row is None else _bytes(row.p50)


def _bytes(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= GIB / 4 else f"{value / 2**20:.0f} MiB"


def _figure(goal: Goal) -> Callable[[float], str]:
    """How values of a goal are written."""
    return _bytes if goal.metric.endswith("memory") else "{:.3g}".format


def _limit(goal: Goal) -> str:
    return f"{'≥' if goal.at_least else '≤'} {_figure(goal)(goal.limit)}"


def _words(entries: Mapping[str, object]) -> str:
    shown = {key: value for key, value in entries.items() if value is not False}
    return ", ".join(str(v) if isinstance(v, str) else f"{k.replace('_', ' ')} {v}" for k, v in shown.items())


def refresh(*, results: Path = RESULTS, readme: Path = README) -> list[Path]:
    """Rewrite the tables and the pictures from the records; returns the files written."""
    parts, written, kinds = [], [], set()
    for path in sorted(results.glob("*/records.csv")):
        rows = load(path)
        if not rows:
            continue
        kinds.add(_kind(rows))
        pictures: list[str] = []
        models = dict.fromkeys(json.loads(r.params)["model"] for r in rows if r.case == "optimizer step")
        for model in models:
            series = tax_points(rows, model)
            if sum(map(len, series.values())) < 4:
                continue
            picture = path.with_name(f"tax-{re.sub(r'[^a-z0-9]+', '-', model.lower()).strip('-')}.svg")
            picture.write_text(tax_svg(series, title=f"Step time over the plain step: {model}"), encoding="utf-8")
            written.append(picture)
            pictures += [f"![Masking tax of {model}](results/{path.parent.name}/{picture.name})", ""]
        parts += [f"### {rows[0].device}", "", table(rows, pictures), ""]
    parts.append(unmeasured_goals(kinds))
    block = "\n" + "\n".join(parts).strip() + "\n"
    readme.write_text(markdown.rewritten(readme.read_text(encoding="utf-8"), {"records": block}), encoding="utf-8")
    return [*written, readme]


if __name__ == "__main__":
    for file in refresh():
        print(f"wrote {file}")
