"""Whether a block's gates close the channels they are said to close, seen by moving weights.

A value or hidden channel is written by some rows and read by some columns, which share its gate. If those columns are
zero, nothing that is done to those rows may reach the block's output; if it does, the rows are other channels' than the
layout says. So the layout of heads, and the order of the rows of a fused weight, is found out without knowing any
architecture.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lcdd.models import shards
from lcdd.models.layout import GateLayout, Matrix
from lcdd.models.patterns import Block

SHARED = ("attn_v", "ffn_hidden")
"""Groups that gate rows of some matrices and columns of others."""
READERS = ("o", "down")
"""Kinds whose inputs those channels are."""
ROUNDS, MOST = 4, 64
"""Each part's channels are moved in that many goes, that many in one go at most."""
STEP, SMALL = 0.1, 1e-2
"""How far, in standard deviations of the weights (and a little): a norm over all channels then mixes them little."""
LEAK = 0.3
"""Share of the effect that may get past zeroed columns: 0 but for such norms, about 1 where the channels are others."""


@dataclass(frozen=True, kw_only=True)
class _Edge:
    """Some rows (dim 0) or columns (dim 1) of a matrix, which may be sharded.

    parameter: of which the matrix is all, or slice `part`.
    """

    parameter: Tensor
    part: int | None
    dim: int
    index: Tensor

    def get(self) -> Tensor:
        return self._matrix(shards.full(self.parameter)).index_select(self.dim, self.index)

    def set(self, values: Tensor) -> None:
        whole = shards.full(self.parameter)
        self._matrix(whole).index_copy_(self.dim, self.index, values)
        if shards.is_sharded(self.parameter):
            shards.copy_rows_(self.parameter, whole)

    def _matrix(self, whole: Tensor) -> Tensor:
        return whole if self.part is None else whole[self.part]


@torch.no_grad()
def leaking_group(module: nn.Module, block: Block, output: Callable[[], Tensor]) -> str | None:
    """The first group whose gates do not close the channels that the layout says; None where all do.

    module: the decoder block, whose weights are moved and put back. output: runs the model as far as the block's end
    and gives what comes out there.
    """
    layout = GateLayout.for_matrices(block.matrices)
    for group in SHARED:
        for go in range(ROUNDS):
            writers, readers = _edges(module, layout, block.matrices, _channels(layout, group, go))
            with _put_back([*writers, *readers]):
                _move(readers)  # weights that are zero read nothing
                effect = _effect(writers, output)
            with _put_back([*writers, *readers]):
                for edge in readers:
                    edge.set(torch.zeros_like(edge.get()))
                leak = _effect(writers, output)
            if not (effect > 0 and leak <= LEAK * effect):  # not: NaN fails too
                return group
    return None


def _effect(writers: Sequence["_Edge"], output: Callable[[], Tensor]) -> float:
    """How far the output goes when the writers are moved."""
    before = output()
    _move(writers)
    return float((output() - before).float().norm())


def _parameter_of(module: nn.Module, matrix: Matrix) -> Tensor:
    """What a matrix of a block is all, or a slice, of."""
    path, _, name = matrix.parameter.rpartition(".")
    parameter: Tensor = getattr(module.get_submodule(path), name).data
    return parameter


def _channels(layout: GateLayout, group: str, go: int) -> Tensor:
    """bool [n_gates]: the channels of every part of a group that are moved in a go."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.zeros(layout.n_gates, dtype=torch.bool)
    for (_, name, size), start in zip(layout.groups, layout.offsets.tolist(), strict=False):
        if name.partition(".")[0] == group:
            chosen[start + torch.randperm(size, generator=generator)[go::ROUNDS][:MOST]] = True
    return chosen


def _edges(
    module: nn.Module, layout: GateLayout, matrices: Sequence[Matrix], chosen: Tensor
) -> tuple[list[_Edge], list[_Edge]]:
    """What writes, and what reads, the chosen channels [n_gates]."""
    writers: list[_Edge] = []
    readers: list[_Edge] = []
    for matrix in matrices:
        for dim, gates in enumerate(layout.row_and_col_gates(chosen, matrix)):
            if bool(gates.any()):
                weight = _parameter_of(module, matrix)
                index = gates.nonzero()[:, 0].to(weight.device)
                edge = _Edge(parameter=weight, part=matrix.part, dim=dim, index=index)
                (readers if matrix.kind in READERS else writers).append(edge)
    return writers, readers


def _move(edges: Sequence[_Edge]) -> None:
    """Add noise of `STEP` standard deviations."""
    generator = torch.Generator().manual_seed(1)
    for edge in edges:
        values = edge.get()
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        edge.set((values + STEP * (values.float().std() + SMALL) * noise).to(values.dtype))


@contextmanager
def _put_back(edges: Sequence[_Edge]) -> Iterator[None]:
    saved = [edge.get() for edge in edges]
    try:
        yield
    finally:
        for edge, values in zip(edges, saved, strict=True):
            edge.set(values)
