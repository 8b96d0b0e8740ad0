"""Cases of the forward route's pieces: an o_proj with three query heads per KV head and a matrix that shares its row
gates, odd sizes, hard-concrete gates."""

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.cases.gates import values_expression
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gated_linear import row_and_col_gates
from lcdd_kernels.reference.gates import GateSpec

KV_HEADS, REPEAT = 2, 3


SPEC = GateSpec(kind="hard_concrete", seed=(5 << 32) + 3, step=2)


def _sample(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    head_dim, rows = 16 * size + 3, 24 * size + 5
    gates = KV_HEADS * head_dim
    cols = gates * REPEAT
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, of: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(of).to(device)

    shapes = [(rows, cols), (rows, gates)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    is_open = torch.rand(rows + gates, generator=generator).to(device) > 0.3
    return {
        "bases": [normal(*shape, scale=0.05) for shape in shapes],
        "deltas": [normal(*shape, scale=1e-2) for shape in shapes],
        "grad_weight": normal(rows, cols, scale=1e-2),
        "gate": normal(rows + gates, scale=1.0, of=wide).sigmoid() * is_open,
        "maps": [GateMap(0, rows, head_dim, REPEAT), GateMap(0, rows)],
    }


def make_gates(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes = (1000 * size + 3, 24, 1025)
    logits = [(2 * torch.randn(n, generator=generator)).to(wide).to(device) for n in sizes]
    return {"logits": logits, "offsets": [7, 2**33, 5000], "spec": SPEC}


def gates_expression(logits: list[Tensor], offsets: list[int], spec: GateSpec) -> Tensor:
    return torch.cat([values_expression(part, spec, offset=n)[0] for part, n in zip(logits, offsets, strict=True)])


def make_weights(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    del sample["grad_weight"]
    return sample


def make_grad(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    picked = {"grad_weight": sample["grad_weight"], "delta": sample["deltas"][0], "gate": sample["gate"]}
    return {**picked, "where": sample["maps"][0], "need_delta": True, "need_gates": True}


def weights_expression(bases: list[Tensor], deltas: list[Tensor], gate: Tensor, maps: list[GateMap]) -> list[Tensor]:
    found = []
    for base, delta, where in zip(bases, deltas, maps, strict=True):
        r, c = (part.to(delta.dtype) for part in row_and_col_gates(gate, where, delta.shape))
        found.append(base + torch.outer(r, c) * delta)
    return found


def grad_expression(
    grad_weight: Tensor, delta: Tensor, gate: Tensor, where: GateMap, *, need_delta: bool, need_gates: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd does with `weights_expression`."""
    del need_delta, need_gates
    r, c = (part.to(delta.dtype) for part in row_and_col_gates(gate, where, delta.shape))
    d_outer = grad_weight * delta
    d_col = (r @ d_outer).view(-1, where.repeat, where.head_dim).sum(dim=1).view(-1)
    return torch.outer(r, c) * grad_weight, (d_outer @ c).to(gate.dtype), d_col.to(gate.dtype)


CASES = {
    "block_gates": Case(
        make=make_gates, expression=gates_expression, outputs=("gate",), depth={"gate": 4}, dtypes=(torch.float32,)
    ),
    "gated_weights": Case(make=make_weights, expression=weights_expression, outputs=("weights",)),
    "gated_weight_grad": Case(
        make=make_grad,
        expression=grad_expression,
        outputs=("d_delta", "d_row_gate", "d_col_gate"),
        depth={"d_row_gate": 7, "d_col_gate": 7},
    ),
}
