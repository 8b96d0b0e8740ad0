"""What the benchmarks are to show, as data: each goal names the record that decides it. Until that record exists on a
device of its kind, a goal is a goal and nothing more."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.records import Record

GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`text` holds where the median of `metric` is at most (least) `limit`, in all records that match.

    model: how the record's model begins. params, lane: entries that it must have. over: the lane's time over that of
    another lane (provider, lane entries) of the same case, in place of `metric`.
    """

    text: str
    device: str  # "cpu" or "cuda"
    case: str
    provider: str
    limit: float = math.inf  # what is told has none: it is what was measured
    at_least: bool = False
    metric: str = "ratio"
    model: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    lane: Mapping[str, Any] = field(default_factory=dict)
    over: tuple[str, Mapping[str, Any]] | None = None

    def values(self, rows: Sequence[Record]) -> list[float]:
        """The decisive values among the rows of a device; empty where it was not measured."""
        metric = "time" if self.over else self.metric
        found = []
        for row in rows:
            if self._matches(row, self.provider, self.lane) and row.metric == metric:
                value = row.p50
                if self.over:
                    others = [
                        r.p50 for r in rows
                        if r.params == row.params and r.metric == metric and self._matches(r, *self.over)
                    ]  # fmt: skip
                    if not others:
                        continue
                    value /= others[0]
                found.append(value)
        return found

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def _matches(self, row: Record, provider: str, lane: Mapping[str, Any]) -> bool:
        params, entries = json.loads(row.params), json.loads(row.lane)
        return (
            row.case == self.case
            and row.provider.split(":")[0] == provider
            and str(params.get("model", "")).startswith(self.model)
            and all(params.get(key) == value for key, value in self.params.items())
            and all(entries.get(key) == value for key, value in lane.items())
        )


_CPU: dict[str, Any] = {
    "device": "cpu", "case": "optimizer step", "model": "qwen3-0.6b, ÷2, 4 layers", "params": {"micro_batches": 4}
}  # fmt: skip
_FIXED: dict[str, Any] = {**_CPU, "case": "optimizer step, gates fixed"}
_HARD, _HEAVISIDE = {"gates": "hard_concrete"}, {"gates": "heaviside_ste"}
_MATRIX: dict[str, Any] = {"device": "cpu", "case": "masked matrix step", "provider": "lcdd"}
_ALONE: dict[str, Any] = {**_MATRIX, "case": "masked matrix step over forward and backward alone"}
_SMALL: dict[str, Any] = {"device": "cuda", "case": "optimizer step", "model": "qwen3-0.6b", "provider": "lcdd"}
_LARGE: dict[str, Any] = {**_SMALL, "model": "llama-3-8b, 4 layers"}
_CLOSED, _DENSE = {"density": 0.2}, {"density": 1.0}

HEADLINES: tuple[Goal, ...] = (
    Goal(
        text="an LCDD step with every gate open, over a plain fine-tuning step", provider="lcdd", lane=_DENSE, **_CPU,
    ),
    Goal(text="the same with 80% of the gates closed", provider="lcdd", lane=_CLOSED, **_CPU),
    Goal(text="the authors' parametrization with every gate open, over the plain step", provider="unfused", **_CPU),
    Goal(
        text="a step of the trigger's learning, over one prompt at a time as its authors do it", device="cpu",
        case="eraser step", provider="lcdd",
    ),
    Goal(
        text="`lcdd train` from start to end, over the same with the authors' parametrization", device="cpu",
        case="lcdd train, whole process", provider="lcdd",
    ),
)  # fmt: skip
"""What a reader wants to know first: times over the floor that each row names, in all records that match."""

GOALS: tuple[Goal, ...] = (
    Goal(text="tax of open gates, 4 micro-batches", provider="lcdd", lane=_DENSE, limit=1.15, **_CPU),
    Goal(
        text="tax at 80% closed, hard-concrete, 4 micro-batches", provider="lcdd", lane=_CLOSED, limit=0.95,
        **{**_CPU, "params": {**_CPU["params"], **_HARD}},
    ),
    Goal(text="fixed gates, 99% closed", provider="lcdd", lane={"density": 0.01}, limit=0.72, **_FIXED),
    Goal(
        text="fixed gates, 99% closed: the optimizer's memory over plain AdamW's", provider="lcdd",
        lane={"density": 0.01}, metric="optimizer_memory", limit=0.05, **_FIXED,
    ),
    Goal(
        text="the unfused reference's own tax, 256 tokens in 4 micro-batches", provider="unfused", limit=1.3,
        at_least=True, **{**_CPU, "params": {**_CPU["params"], "tokens": 256}},
    ),
    Goal(
        text="a matrix's whole step over the unfused forward, backward and AdamW, moments in bfloat16 as theirs",
        limit=1 / 6, lane={"moments": "bfloat16"}, **_MATRIX,
    ),
    Goal(
        text="the same, moments in float32 as is our default", limit=1 / 6, lane={"moments": "float32"}, **_MATRIX,
    ),
    Goal(
        text="the same over torch.compile of theirs, moments in bfloat16", limit=1 / 1.4, over=("compiled", {}),
        lane={"moments": "bfloat16"}, **_MATRIX,
    ),
    Goal(
        text="our whole step and a refresh on top over their forward and backward alone", limit=1 / 6, **_ALONE,
    ),
    Goal(
        text="the same over torch.compile of those", limit=1 / 1.4, over=("compiled", {}), **_ALONE,
    ),
    Goal(
        text="the same: peak extra memory, 4 bytes a parameter", metric="extra_memory", limit=4 * 4096 * 14336,
        **_ALONE,
    ),
    Goal(
        text="one linear, 80% closed, block gradient", device="cpu", case="linear fwd+bwd", provider="lcdd",
        params={"layout": "block", "dtype": "float32"}, lane=_CLOSED, limit=0.85,
    ),
    Goal(
        text="eraser step over one prompt at a time, authors' settings (20 trigger tokens)", device="cpu",
        case="eraser step", provider="lcdd", params={"trigger": 20}, limit=1 / 3,
    ),
    Goal(text="tax of open gates, 0.6B", lane=_DENSE, limit=1.03, **_SMALL),
    Goal(text="tax of open gates, 8B layers", lane=_DENSE, limit=1.03, **_LARGE),
    Goal(text="tax at 80% closed, Heaviside, 8B layers", lane=_CLOSED, limit=0.92, params=_HEAVISIDE, **_LARGE),
    Goal(text="tax at 80% closed, Heaviside, 0.6B", lane=_CLOSED, limit=1.0, params=_HEAVISIDE, **_SMALL),
    Goal(text="tax at 80% closed, hard-concrete, 8B layers", lane=_CLOSED, limit=0.84, params=_HARD, **_LARGE),
    Goal(text="tax at 80% closed, hard-concrete, 0.6B", lane=_CLOSED, limit=0.93, params=_HARD, **_SMALL),
    Goal(
        text="the unfused step's time over ours, 80% closed, hard-concrete, 0.6B", limit=1 / 2.2, lane=_CLOSED,
        params=_HARD, over=("unfused", {}), **_SMALL,
    ),
    Goal(
        text="all of Llama-3-8B, 4,096 tokens, no checkpointing: peak memory, bytes", metric="peak_memory",
        limit=139 * GIB, lane=_CLOSED, **{**_SMALL, "model": "llama-3-8b"},
        params={"model": "llama-3-8b", "tokens": 4096},
    ),
    Goal(
        text="eraser step over one prompt at a time, 0.6B", device="cuda", case="eraser step", provider="lcdd",
        model="qwen3-0.6b", limit=1 / 16,
    ),
    Goal(
        text="eraser step over one prompt at a time, 8B", device="cuda", case="eraser step", provider="lcdd",
        model="llama-3-8b", limit=1 / 2,
    ),
)  # fmt: skip
