"""Cases of the gate ops: logits around the edges of the clamps, group sizes that include zero and one."""

from itertools import pairwise

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.gates import BETA, GAMMA, L0_SHIFT, ZETA, GateSpec, gate_noise_ref

_SETTINGS = {"spec": GateSpec(kind="hard_concrete", seed=(7 << 32) + 11, step=3), "offset": 5}


def _logits(n: int, seed: int, device: torch.device) -> Tensor:
    return (2.0 * torch.randn(n, generator=torch.Generator().manual_seed(seed))).to(device)


def make_values(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    return {"logits": _logits(701 * size, seed, device).to(dtype), **_SETTINGS}


def make_logits_grad(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    logits = _logits(701 * size, seed, device).to(dtype)
    return {"logits": logits, "d_gate": _logits(701 * size, seed + 1, device).to(dtype), **_SETTINGS, "l0_weight": 0.3}


def make_open_indices(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sizes = torch.tensor([5, 0, 1, 64 * size, 31, 0, 257 * size, 17])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    gate = _logits(int(sizes.sum()), seed, device).to(dtype).clamp(0, 1)
    gate[int(offsets[4]) : int(offsets[5])] = 0  # a group with nothing open
    return {"gate": gate, "offsets": offsets}


def _stretched(logits: Tensor, spec: GateSpec, offset: int) -> Tensor:
    if not spec.training:
        return torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA
    u = gate_noise_ref(logits.numel(), spec, offset=offset, dtype=logits.dtype, device=logits.device)
    return torch.sigmoid((torch.logit(u) + logits) / BETA) * (ZETA - GAMMA) + GAMMA


def values_expression(logits: Tensor, spec: GateSpec, *, offset: int) -> tuple[Tensor, Tensor]:
    if spec.kind == "heaviside_ste":
        return (logits > 0).to(logits.dtype), torch.sigmoid(logits).sum()
    return _stretched(logits, spec, offset).clamp(0, 1), torch.sigmoid(logits - L0_SHIFT).sum()


def logits_grad_expression(logits: Tensor, d_gate: Tensor, spec: GateSpec, *, l0_weight: float, offset: int) -> Tensor:
    """What autograd does with the forward expression (Heaviside: with sigmoid in its place)."""
    with torch.enable_grad():
        theta = logits.detach().requires_grad_()
        if spec.kind == "heaviside_ste":
            gate = penalty = torch.sigmoid(theta)
        else:
            gate, penalty = values_expression(theta, spec, offset=offset)
        objective = (gate * d_gate).sum() + l0_weight * penalty.sum()
        return torch.autograd.grad(objective, theta)[0]


def open_indices_expression(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group by group, with `nonzero`."""
    indices = torch.full(gate.shape, -1, dtype=torch.int32, device=gate.device)
    rank = indices.clone()
    counts = []
    bounds = offsets.tolist()
    for start, stop in pairwise(bounds):
        where = torch.nonzero(gate[start:stop]).view(-1)
        indices[start : start + where.numel()] = where.to(torch.int32)
        rank[start + where] = torch.arange(where.numel(), dtype=torch.int32, device=gate.device)
        counts.append(where.numel())
    return indices, torch.tensor(counts, dtype=torch.int32, device=gate.device), rank


CASES = {
    "gate_values": Case(
        make=make_values,
        expression=values_expression,
        outputs=("gate", "expected_l0"),
        depth={"gate": 4, "expected_l0": 10},
        dtypes=(torch.float32,),
    ),
    "gate_logits_grad": Case(
        make=make_logits_grad,
        expression=logits_grad_expression,
        outputs=("d_logits",),
        depth={"d_logits": 6},
        dtypes=(torch.float32,),
    ),
    "open_indices": Case(
        make=make_open_indices,
        expression=open_indices_expression,
        outputs=("indices", "counts", "rank"),
        exact=frozenset({"indices", "counts", "rank"}),
        dtypes=(torch.float32,),
    ),
}
