"""The tensors under a carrier: where a matrix's open block is, and what two models differ by."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd.models import PreTrainedModel, full
from lcdd_kernels import GateMap


def open_block(gate: Tensor, gate_map: GateMap, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Open rows and columns of a matrix [out, in], int64 ascending."""
    row_gate, col_gate = expanded_gates(gate, gate_map, shape)
    return row_gate.nonzero()[:, 0], col_gate.nonzero()[:, 0]


def expanded_gates(gate: Tensor, gate_map: GateMap, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row gates [out] and column gates [in] of a matrix, each KV head's gates repeated for its query heads."""
    column = torch.arange(shape[1], device=gate.device)
    head = column // (gate_map.repeat * gate_map.head_dim)
    col_gate = gate[gate_map.col_start + head * gate_map.head_dim + column % gate_map.head_dim]
    return gate[gate_map.row_start : gate_map.row_start + shape[0]], col_gate


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in row order; of a sharded tensor all of it."""
    return full(tensor.detach()).to("cpu", copy=True).contiguous()


def changed_parameters(
    base: PreTrainedModel, other: PreTrainedModel, *, masked: set[str]
) -> tuple[dict[str, Tensor], float]:
    """Parameters of `other` that differ from `base`'s, `masked` ones aside, and the L2 norm of the differences."""
    changed, squared = {}, 0.0
    for (name, theirs), ours in zip(other.named_parameters(), base.parameters(), strict=True):
        if name in masked or torch.equal(full(theirs.detach()), full(ours.detach()).to(theirs.device)):
            continue
        changed[name] = cpu_copy(theirs)
        squared += float((changed[name].double() - cpu_copy(ours).double()).square().sum())
    return changed, math.sqrt(squared)
