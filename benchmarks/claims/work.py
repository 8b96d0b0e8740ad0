"""The parts of a run, in the order of their worth, and what one process makes of them.

Here and not in `__main__`, which a spawned process does not import.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.claims.cell import Cell, Values
from benchmarks.claims.experiments import EXPERIMENTS
from benchmarks.claims.models import MODELS, compared
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
        return list(FAMILY_PARTS if self.behavior is None else TIERS[self.tier])

    def run(self) -> float:
        """Make the parts that are not there yet, until the time is up; returns the seconds they took."""
        made = scale(self.scale, self.prepared)
        directory, seconds = self.runs / self.name, 0.0
        subject: Cell | Family
        if self.behavior is None:
            subject = made.family(self.seed, directory)
            keeper = subject.cells[0].at(directory)
        else:
            subject = keeper = made.cell(self.behavior, self.seed, directory)
        for name in self.part_names:
            if time.time() > self.until:
                break
            seconds += keeper.part(name, partial(PARTS[name], subject))
        return seconds


FAMILY_PARTS: dict[str, Callable[[Family], Values]] = {
    **{f"topic-{n}": partial(train_topic, topic=n) for n in range(len(RESPONSES["demo"]))},
    "composed": composed,
    "met": met,
    "separated": separated,
    **{f"switched-{kind}": partial(switched, kind=kind) for kind in KINDS},
}
PARTS: dict[str, Callable[..., Values]] = {
    **FAMILY_PARTS,
    **{name: partial(compared, name=name) for name in MODELS},
    **EXPERIMENTS,
}
"""name -> what makes it of a family, or of a cell."""


def one_thread() -> None:
    """What a process begins with: a model this small only loses by more."""
    torch.set_num_threads(1)
