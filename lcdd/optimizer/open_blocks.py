"""What is left to train of the masked weights once no gate moves any more: the open rows × open columns of each.

Where a gate is closed for good, W_eff is the base's, and Δ, its moments and its gradient serve nobody. `OpenBlocks`
keeps them for the open blocks alone, and steps those with the kernels that step whole matrices; the results go where
they belong in the weights.

Shapes: a site's [out, in]; R open rows, C open columns, in the order of packed gradients (of grouped queries' columns
copy by copy).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lcdd.models import GateLayout, Site
from lcdd.optimizer.gates import Gates
from lcdd_kernels import AdamWStep, DeltaStepPlan, GateMap, expand_columns

WORTH_IT = 0.5
"""Share of all entries that may be open: a block is also a copy of its weight and of the base's."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenBlock:
    """Where the open block [R, C] of a site is: rows int64 [R, 1], cols int64 [C]."""

    site: Site
    rows: Tensor
    cols: Tensor

    @classmethod
    def of(cls, site: Site, gates: Gates) -> "OpenBlock":
        """The block of the gates in force; asks the device for nothing that `Gates` has not told."""
        row_run, col_run = gates.layout.runs(site.matrix)
        cols = expand_columns(gates.open_in(col_run), head_dim=col_run.head_dim, repeat=col_run.repeat)
        return cls(site=site, rows=gates.open_in(row_run).long()[:, None], cols=cols)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.cols)

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.cols)

    def take(self, whole: Tensor) -> Tensor:
        """[out, in] -> [R, C], a copy."""
        return whole[self.rows, self.cols]

    def put(self, whole: Tensor, block: Tensor) -> None:
        """Write [R, C] into [out, in]."""
        whole[self.rows, self.cols] = block

    def grad(self, grad: Any, layout: str) -> Tensor:
        """The block of a gradient that came dense, packed as this block, or as panels."""
        if layout == "block":
            return grad
        return grad[0].index_select(1, self.cols) if layout == "panels" else self.take(grad)


def blocks_by_parameter(sites: Sequence[Site], gates: Gates) -> dict[Tensor, list[OpenBlock]]:
    """The blocks of every parameter's sites, in the order in which its state holds them."""
    found: dict[Tensor, list[OpenBlock]] = {}
    for site in sites:
        found.setdefault(site.parameter, []).append(OpenBlock.of(site, gates))
    return found


def split(flat: Tensor, blocks: Sequence[OpenBlock]) -> list[Tensor]:
    """Views [R, C] of a parameter's state, which holds its blocks one after the other."""
    sizes = [block.size for block in blocks]
    return [part.view(block.shape) for part, block in zip(flat.split(sizes), blocks, strict=True)]


def spread(flat: Tensor, blocks: Sequence[OpenBlock], parameter: Tensor) -> Tensor:
    """A whole state of the parameter's shape, zero outside its blocks, in `flat`'s dtype."""
    whole = torch.zeros(parameter.shape, dtype=flat.dtype, device=parameter.device)
    for part, block in zip(split(flat.to(parameter.device), blocks), blocks, strict=True):
        block.put(block.site.view(whole), part)
    return whole


class OpenBlocks:
    """Δ and its moments on the open blocks of gates that are fixed.

    Args:
        sites: all of the model, none sharded.
        bases: the base's tensor of each parameter.
        states: each parameter's, whole tensors, which are exchanged for flat ones of its blocks, one after the other.
        gates: fixed from now on, deterministic.

    Attributes:
        slots: the gates, as kernels get them.
        blocks: of each parameter.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        bases: Mapping[Tensor, Tensor],
        states: Mapping[Tensor, dict[str, Tensor]],
        gates: Gates,
    ) -> None:
        self.slots, self._layout, self._sites = gates.slots, gates.layout, sites
        self.blocks = blocks_by_parameter(sites, gates)
        for parameter, state in states.items():
            for key, whole in state.items():
                parts = [block.take(block.site.view(whole)).flatten() for block in self.blocks[parameter]]
                state[key] = torch.cat(parts)
        self._states = states
        self._places = torch.nonzero_static(gates.slots, size=sum(gates.counts))[:, 0]
        self._gate = gates.slots[self._places]
        # of the sites that have anything open; the other ones' gradients are not looked at
        self._open = [block for own in self.blocks.values() for block in own if block.size]
        self._weights = [block.take(block.site.weight.detach()) for block in self._open]
        self._plan = self._make_plan(bases, gates) if self._open else None

    @staticmethod
    def share(sites: Sequence[Site], gates: Gates) -> float:
        """Share of all entries that the blocks would have."""
        whole = sum(site.matrix.shape[0] * site.matrix.shape[1] for site in sites)
        runs = (gates.layout.runs(site.matrix) for site in sites)
        opened = (gates.counts[rows.number] * gates.counts[cols.number] * cols.repeat for rows, cols in runs)
        return sum(opened) / max(1, whole)

    def grads(self, of: Mapping[str, tuple[Any, str]]) -> list[Tensor]:
        """The blocks of gradients by site's name, each with its layout."""
        return [block.grad(*of[block.site.name]) for block in self._open]

    def grad_stats(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pass A: (dL/dz [n_slots], zero where closed; ‖dΔ‖² [])."""
        d_slots = torch.zeros_like(self.slots)
        if self._plan is None:
            return d_slots, self.slots.new_zeros(())
        d_open, sq_norm = self._plan.grad_stats(grads, self._gate)
        return d_slots.index_copy_(0, self._places, d_open), sq_norm

    def step(self, grads: Sequence[Tensor], adam: AdamWStep) -> None:
        """Pass B: Δ, its moments, and the open block of every weight."""
        if self._plan is not None:
            self._plan.step(grads, self._gate, self._gate, adam)
            self._put()

    def refresh(self) -> None:
        """The open block of every weight, of the Δ that is stored."""
        if self._plan is not None:
            self._plan.refresh(self._gate)
            self._put()

    def delta(self, site: Site) -> Tensor:
        """Δ [out, in] of a site, zero where it is closed; a new tensor."""
        own = self.blocks[site.parameter]
        place = next(number for number, block in enumerate(own) if block.site is site)
        part = split(self._states[site.parameter]["delta"], own)[place]
        whole = part.new_zeros(site.matrix.shape)
        own[place].put(whole, part)
        return whole

    def expand(self) -> None:
        """Put whole tensors in the states again, zero where they were closed."""
        for parameter, state in self._states.items():
            for key, flat in state.items():
                state[key] = spread(flat, self.blocks[parameter], parameter)

    def _put(self) -> None:
        for block, weight in zip(self._open, self._weights, strict=True):
            block.put(block.site.weight.detach(), weight)

    def _make_plan(self, bases: Mapping[Tensor, Tensor], gates: Gates) -> DeltaStepPlan:
        starts = [0, *accumulate(gates.counts)]
        return DeltaStepPlan(
            [_gate_map(block.site, self._layout, starts) for block in self._open],
            n_gates=len(self._gate),
            weights=self._weights,
            bases=[block.take(block.site.view(bases[block.site.parameter])) for block in self._open],
            deltas=self._state("delta"),
            exp_avgs=self._state("exp_avg"),
            exp_avg_sqs=self._state("exp_avg_sq"),
        )

    def _state(self, key: str) -> list[Tensor]:
        parts = [part for p, own in self.blocks.items() for part in split(self._states[p][key], own)]
        return [part for part in parts if part.numel()]


def _gate_map(site: Site, layout: GateLayout, starts: Sequence[int]) -> GateMap:
    """How a block finds its gates among the open ones, of which run number n has starts[n] to starts[n + 1]."""
    rows, cols = layout.runs(site.matrix)
    n_cols = starts[cols.number + 1] - starts[cols.number]
    # as many open columns as gates follow each other in every copy: one head of them
    return GateMap(
        row_start=starts[rows.number], col_start=starts[cols.number], head_dim=max(1, n_cols), repeat=cols.repeat
    )
