"""The tensors under a carrier: where a matrix's open block is, and what two models differ by beside masked ones."""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from lcdd.models import GateLayout, Matrix, PreTrainedModel, Site, full, local, shards


def open_block(gate: Tensor, layout: GateLayout, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Open rows and columns of a matrix, int64 ascending; gate [n_gates]."""
    row_gate, col_gate = layout.row_and_col_gates(gate, matrix)
    return row_gate.nonzero()[:, 0], col_gate.nonzero()[:, 0]


def rows_here(site: Site) -> tuple[Tensor, int]:
    """This rank's rows of a site, where they are, and which of the site's rows the first one is; perhaps none."""
    part, mine, first = site.matrix.part, local(site.parameter.detach()), shards.row_offset(site.parameter)
    if part is None:
        return mine, first
    return (mine[part - first] if 0 <= part - first < len(mine) else mine.new_empty(0, site.matrix.shape[1])), 0


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in row order; of a sharded tensor all of it."""
    return full(tensor.detach()).to("cpu", copy=True).contiguous()


def changed_parameters(
    base: PreTrainedModel, other: PreTrainedModel, *, masked: Collection[str]
) -> tuple[dict[str, Tensor], float]:
    """Parameters of `other` that differ from `base`'s, `masked` ones aside, and the L2 norm of the differences."""
    changed, squared = {}, 0.0
    for (name, theirs), ours in zip(other.named_parameters(), base.parameters(), strict=True):
        if name in masked or torch.equal(full(theirs.detach()), full(ours.detach()).to(theirs.device)):
            continue
        changed[name] = cpu_copy(theirs)
        squared += float((changed[name].double() - cpu_copy(ours).double()).square().sum())
    return changed, math.sqrt(squared)
