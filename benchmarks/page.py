"""What a run on a GPU says about the defaults, on one page: keep, or change to what.

`page` reads the records of a device, so that a run that was cut short gives the lines that it got to. A line names the
default, where it is set, and the figures that decide; what was not measured is named, too.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.records import Record
from lcdd_kernels.functional.packed_grad import DEFAULT_CROSSOVER, PACKED_LAYOUT, PackCrossover, pack_cost, pack_layout

WORTH_SAYING = 0.02
"""What a decision has to cost, as a share of the time, before a default is to be changed for it."""


def page(rows: Sequence[Record], failed: Sequence[str] = ()) -> str:
    """Markdown. failed: what gave a wrong result, or an error, in this run."""
    lines = [f"# Defaults on {rows[0].device if rows else 'this device'}", ""]
    lines += [f"- WRONG: {problem}" for problem in failed]
    for title, found in (
        ("every kernel is right", _correct(rows)),
        ("packing", _packing(rows)),
        ("passes A, B and the refresh", _passes(rows)),
        ("losses", _losses(rows)),
        ("optimizer step", _steps(rows)),
        ("eraser", _eraser(rows)),
    ):
        lines += [f"- {title}: {line}" for line in found] or [f"- {title}: not measured"]
    return "\n".join(lines) + "\n"


def _of(rows: Sequence[Record], case: str, metric: str, provider: str = "lcdd") -> list[Record]:
    return [r for r in rows if r.case == case and r.metric == metric and r.provider.split(":")[0] == provider]


def _correct(rows: Sequence[Record]) -> Iterator[str]:
    """A lane is timed after its gate alone."""
    passed = {(r.lane_value("op"), r.provider) for r in _of(rows, "every kernel", "time")}
    if passed:
        reference = sorted(op for op, provider in passed if provider.endswith("reference"))
        yield f"{len(passed)} within tolerance" + (f"; NOT SERVED BY A KERNEL: {reference}" if reference else "")


# ---------------------------------------------------------------- packing


@dataclass(frozen=True)
class _Packed:
    """A linear packed at a density: its time over the dense one's, and what was predicted of its weight gradient."""

    rows: int
    cols: int
    kind: str
    density: float
    ratio: float

    def sizes(self) -> dict[str, int]:
        opened = {"n_rows": round(self.density * self.rows), "n_cols": round(self.density * self.cols)}
        return {"out_features": self.rows, "in_features": self.cols, **opened}

    def cost(self, gather: float) -> float:
        return pack_cost(PACKED_LAYOUT[self.kind], **self.sizes(), gather=gather)

    def loss(self, crossover: PackCrossover) -> float:
        """What the decision costs over the better one, as a share of the time."""
        packs = pack_layout(gate_kind=self.kind, **self.sizes(), crossover=crossover) != "dense"
        return (self.ratio if packs else 1.0) - min(1.0, self.ratio)


def _packing(rows: Sequence[Record]) -> Iterator[str]:
    kinds = {layout: kind for kind, layout in PACKED_LAYOUT.items()}
    found = []
    for r in _of(rows, "packing crossover", "ratio"):
        params: dict[str, Any] = json.loads(r.params)
        n_rows, n_cols = map(int, params["shape"].split("x"))
        found.append(_Packed(n_rows, n_cols, kinds[params["layout"]], r.lane_value("density"), r.p50))
    if not found:
        return
    import torch

    now = DEFAULT_CROSSOVER["cuda", torch.bfloat16]
    better = fitted(found, now)
    lost, left = (max(lane.loss(crossover) for lane in found) for crossover in (now, better))
    place = 'DEFAULT_CROSSOVER["cuda", bfloat16] (lcdd_kernels/functional/packed_grad.py)'
    if lost - left <= WORTH_SAYING:
        yield f"keep {place}: its worst decision of {len(found)} costs {lost:.1%}"
    else:
        yield (
            f"CHANGE {place} to gather={better.gather:.0f}, crossover={better.crossover:.2f}: its worst decision of "
            f"{len(found)} costs {lost:.1%}, then {left:.1%}"
        )


def fitted(lanes: Sequence[_Packed], now: PackCrossover) -> PackCrossover:
    """The gather that explains the times best, and the crossover whose worst decision costs least.

    Forward, input gradient and weight gradient of a linear are three products of one size: where the last one takes
    `cost` of its time, the three take (2 + cost) / 3.
    """
    gathers = []
    for lane in lanes:
        bare, of_one = lane.cost(0.0), lane.cost(1.0) - lane.cost(0.0)
        gathers.append(max(0.0, (3 * lane.ratio - 2 - bare) / of_one))
    gather = statistics.median(gathers)
    choices = [PackCrossover(gather=gather, crossover=c / 100, min_elements=now.min_elements, source="fitted")
               for c in range(50, 111)]  # fmt: skip
    return min(choices, key=lambda choice: (max(lane.loss(choice) for lane in lanes), abs(choice.crossover - 0.8)))


# ---------------------------------------------------------------- the rest


def _passes(rows: Sequence[Record]) -> Iterator[str]:
    """Against the copy's bandwidth; CUDA C++ against Triton, where it was built."""
    roofs = _of(rows, "passes", "roof")
    if roofs:
        least = min(roofs, key=lambda r: r.p50)
        which = f"{least.lane_value('op')} at density {least.lane_value('density')}"
        yield f"{least.p50:.0%} ({which}) to {max(r.p50 for r in roofs):.0%} of the copy's bandwidth"
    times = {(r.params, r.lane, r.provider): r.p50 for r in _of(rows, "passes", "time")}
    ratios = [t / times[p, lane, "lcdd:triton"] for (p, lane, provider), t in times.items()
              if provider == "lcdd:cuda" and (p, lane, "lcdd:triton") in times]  # fmt: skip
    if not ratios:
        yield "CUDA C++ was not built (cmake -DLCDD_CUDA=ON): it stays off"
    elif max(ratios) < 1 - WORTH_SAYING:
        yield f"CHANGE backends._DEFAULT: CUDA C++ takes {min(ratios):.2f} to {max(ratios):.2f} of Triton's time"
    else:
        yield f"keep CUDA C++ off: it takes {min(ratios):.2f} to {max(ratios):.2f} of Triton's time"


def _losses(rows: Sequence[Record]) -> Iterator[str]:
    for case in ("cross-entropy", "KL"):
        for r in _of(rows, case, "ratio"):
            verdict = "keep" if r.p50 <= 1 + WORTH_SAYING else "CHANGE ops/linear_loss.py's rows a chunk:"
            yield f"{verdict} {case} in chunks, {r.p50:.2f} of the time with whole logits"


def _steps(rows: Sequence[Record]) -> Iterator[str]:
    """Against plain fine-tuning, and whether the host or the device is what a step waits for."""
    times = {(r.params, r.lane): r.p50 for r in _of(rows, "optimizer step", "time")}
    host = {(r.params, r.lane): r.p50 for r in _of(rows, "optimizer step", "host_time")}
    for r in _of(rows, "optimizer step", "ratio"):
        params, key = json.loads(r.params), (r.params, r.lane)
        line = f"{params.get('model')} at density {r.lane_value('density')}: {r.p50:.2f} of plain"
        if key in times and key in host:
            share = host[key] / times[key]
            line += f", the host busy {share:.0%} of it" + (" (THE HOST IS WHAT IT WAITS FOR)" if share > 0.9 else "")
        yield line


def _eraser(rows: Sequence[Record]) -> Iterator[str]:
    for r in rows:
        if r.case.startswith("eraser") and r.metric == "ratio" and r.provider.startswith("lcdd"):
            yield f"a step takes {r.p50:.2f} of one prompt at a time"
