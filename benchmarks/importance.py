"""Which estimate of a gate's worth lets most gates close within the same budget: paced closing's own, and others.

    python -m benchmarks.importance --directory runs/importance --output benchmarks/results/cpu/importance.json

The demo's behaviours, SFT models and LCDD settings; controller, budget and steps are the same throughout, and only the
order in which gates close differs. With g = ∂L/∂z of a gate and E the moving average over steps:

    squared gradient  E[g²], the default (Fisher information's diagonal)
    absolute          E[|g|]
    Taylor            E[g]²: first order, of which Molchanov et al. take the square
    signed            -E[g]: what the loss is predicted to become by closing, at first order
    second order      -E[g] + E[g²] / 2, with Fisher's diagonal for the curvature
    random            an order drawn once

Finished runs are not repeated. Judged by `BOUND`, fixed before the runs, on sparsity over all cells.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.claims.cell import Cell
from benchmarks.claims.judge import mean_of
from benchmarks.claims.scales import demo_cell
from benchmarks.demos import BEHAVIORS, command, environment
from benchmarks.records import write_json
from lcdd.carrier import Carrier
from lcdd.optimizer.pacing import WORTH_BETA, PacedClosing

OURS = "squared gradient"
BOUND = 0.01
"""Sparsity by which another estimate has to be ahead of `OURS`, with an interval that excludes 0, to be better."""


class _Mean(PacedClosing):
    """A controller that also keeps E[g]."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.mean, self.squares = torch.zeros_like(self.worth), torch.zeros_like(self.worth)

    def _weigh(self, d_gate: Tensor) -> Tensor:
        seen = self.gates.values != 0
        mean = WORTH_BETA * self.mean + (1 - WORTH_BETA) * d_gate.to(self.mean.dtype)
        squares = WORTH_BETA * self.squares + (1 - WORTH_BETA) * d_gate.square().to(self.mean.dtype)
        self.mean, self.squares = torch.where(seen, mean, self.mean), torch.where(seen, squares, self.squares)
        return self._worth()

    def _worth(self) -> Tensor:
        raise NotImplementedError


class Taylor(_Mean):
    def _worth(self) -> Tensor:
        return self.mean.square()


class Signed(_Mean):
    def _worth(self) -> Tensor:
        return -self.mean


class SecondOrder(_Mean):
    def _worth(self) -> Tensor:
        return 0.5 * self.squares - self.mean


class Absolute(PacedClosing):
    def _weigh(self, d_gate: Tensor) -> Tensor:
        return WORTH_BETA * self.worth + (1 - WORTH_BETA) * d_gate.abs().to(self.worth.dtype)


class Random(PacedClosing):
    def _weigh(self, d_gate: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.rand(len(d_gate), generator=generator).to(self.worth)


ESTIMATES: Mapping[str, type[PacedClosing]] = {
    OURS: PacedClosing, "absolute": Absolute, "Taylor": Taylor, "signed": Signed, "second order": SecondOrder,
    "random": Random,
}  # fmt: skip


def compress(cell: Cell, estimate: str) -> Carrier:
    """LCDD of the cell with gates closed in the estimate's order; kept in the cell's directory."""
    path = cell.directory / "carriers" / estimate.replace(" ", "_")
    if not path.is_dir():
        with patch("lcdd.optimizer.lcdd.PacedClosing", ESTIMATES[estimate]):
            cell.lcdd(cell.lcdd_settings()).save_pretrained(path)
    return Carrier.from_pretrained(path)


def row(cell: Cell, estimate: str) -> dict[str, Any]:
    """What came of it; losses are of the validation split, in nats a token."""
    carrier = compress(cell, estimate)
    found = cell.read(carrier)
    return {
        "behavior": cell.behavior, "seed": cell.seed, "estimate": estimate, "sparsity": carrier.sparsity()["overall"],
        "open_gates": carrier.n_open, "held_out_loss": cell.loss(carrier), "sft_loss": cell.loss(cell.patch("sft")),
        "behavior_rate": found["behavior_rate"].count("1") / len(found["behavior_rate"]),
    }  # fmt: skip


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each estimate's mean sparsity, and by how much it is ahead of `OURS` in the same cell, with a 95% interval."""
    of: dict[str, dict[tuple[str, int], float]] = {}
    for found in rows:
        of.setdefault(found["estimate"], {})[found["behavior"], found["seed"]] = found["sparsity"]
    report = {}
    for estimate, cells in of.items():
        ahead = [sparsity - of[OURS][cell] for cell, sparsity in cells.items()]
        found = mean_of(ahead)
        report[estimate] = {
            "sparsity": round(mean_of(list(cells.values())).value, 4), "ahead": round(found.value, 4),
            "interval": [round(found.low, 4), round(found.high, 4)], "better": found.value >= BOUND and found.low > 0,
        }  # fmt: skip
    return report


def main(argv: list[str] | None = None, *, make: Callable[[str, int, Path], Cell] = demo_cell) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/importance"), help="where the runs go")
    parser.add_argument("--behaviors", nargs="+", choices=BEHAVIORS, default=list(BEHAVIORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--estimates", nargs="+", choices=tuple(ESTIMATES), default=list(ESTIMATES))
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    if OURS not in options.estimates:
        parser.error(f"--estimates: expected {OURS!r} among them, which the others are compared with")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for behavior in options.behaviors:
        for seed in options.seeds:
            cell = make(behavior, seed, options.directory / f"{behavior}-{seed}")
            rows += [row(cell, estimate) for estimate in options.estimates]
        write_json(options.output, {  # after each behaviour, so that what was cut is of use
            "what": "sparsity within the same budget, by the order in which gates close; the demo, validation split",
            "command": command("importance", sys.argv[1:] if argv is None else argv),
            "environment": environment(), "bound": BOUND, "estimates": judged(rows), "runs": rows,
        })  # fmt: skip
    for estimate, found in judged(rows).items():
        print(f"{estimate}: sparsity {found['sparsity']:.3f}, ahead by {found['ahead']:+.3f} {found['interval']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
