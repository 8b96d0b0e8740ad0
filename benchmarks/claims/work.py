"""The parts of a run, in the order of their worth, and what one process makes of them.

Here and not in `__main__`, which a spawned process does not import.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.claims.cell import Cell, Values
from benchmarks.claims.experiments import EXPERIMENTS
from benchmarks.claims.models import compared
from benchmarks.claims.scales import RESPONSES, scale
from benchmarks.claims.together import KINDS, Family, composed, met, separated, switched, train_topic

TOGETHER = "together"
# What is asked first is worth most; a later part may need what earlier ones have made.
TIERS: tuple[tuple[str, ...], ...] = (
    ("sft", "carrier", "matched_norm", "sft_scaled"),
    (TOGETHER,),
    ("smallest", "dense_alike", "sft_stopped", "necessity", "relearning"),
    ("dense_with_term", "other_term", "lora_1", "random_gates", "dare", "largest_entries"),
    ("switch", "base_to_behavior", "carrier_to_third"),
    ("carrier_80", "carrier_90", "early", "late", "attention", "mlp", "carrier_50"),
)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What one process works on: a tier's parts of a behaviour and seed; of a family of behaviours without a name."""

    scale: str
    prepared: Path
    runs: Path
    behavior: str | None
    seed: int
    tier: int
    until: float

    @property
    def name(self) -> str:
        return f"{self.behavior or TOGETHER}-{self.seed}"

    @property
    def part_names(self) -> list[str]:
        """The parts it makes, in order."""
        return FAMILY_PARTS if self.behavior is None else list(TIERS[self.tier])

    def run(self) -> float:
        """Make the parts that are not there yet, until the time is up; returns the seconds they took."""
        made = scale(self.scale, self.prepared)
        directory, seconds = self.runs / self.name, 0.0
        if self.behavior is None:
            family = made.family(self.seed, directory)
            keeper, parts = family.cells[0].at(directory), family_parts(family)
        else:
            keeper = made.cell(self.behavior, self.seed, directory)
            parts = cell_parts(keeper, TIERS[self.tier])
        for name, make in parts:
            if time.time() > self.until:
                break
            seconds += keeper.part(name, make)
        return seconds


def cell_parts(cell: Cell, names: Sequence[str]) -> Iterator[tuple[str, Callable[[], Values]]]:
    for name in names:
        yield name, partial(EXPERIMENTS[name], cell) if name in EXPERIMENTS else partial(compared, cell, name)


FAMILY_PARTS = [
    *(f"topic-{n}" for n in range(len(RESPONSES["demo"]))),
    "composed",
    "met",
    "separated",
    *(f"switched-{kind}" for kind in KINDS),
]


def family_parts(family: Family) -> Iterator[tuple[str, Callable[[], Values]]]:
    for topic in range(len(family.cells)):
        yield f"topic-{topic}", partial(train_topic, family, topic)
    yield "composed", partial(composed, family)
    yield "met", partial(met, family)
    yield "separated", partial(separated, family)
    for kind in KINDS:
        yield f"switched-{kind}", partial(switched, family, kind)


def one_thread() -> None:
    """What a process begins with: a model this small only loses by more."""
    torch.set_num_threads(1)
