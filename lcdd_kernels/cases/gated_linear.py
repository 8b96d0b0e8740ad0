"""Cases of the forward route's pieces: an o_proj with three query heads per KV head, odd sizes, hard-concrete gates."""

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gated_linear import row_and_col_gates_ref
from lcdd_kernels.reference.gates import GateSpec

KV_HEADS, REPEAT = 2, 3


def _sample(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    head_dim, rows = 16 * size + 3, 24 * size + 5
    gates = KV_HEADS * head_dim
    cols = gates * REPEAT
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, of: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(of).to(device)

    logits_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "weight_base": normal(rows, cols, scale=0.05),
        "grad_weight": normal(rows, cols, scale=1e-2),
        "delta": normal(rows, cols, scale=1e-2),
        "row_logits": normal(rows, scale=2.0, of=logits_dtype),
        "col_logits": normal(gates, scale=2.0, of=logits_dtype),
        "spec": GateSpec(kind="hard_concrete", seed=(5 << 32) + 3, step=2),
        "where": GateMap(row_start=7, col_start=1000, head_dim=head_dim, repeat=REPEAT),
    }


def make_weight(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    del sample["grad_weight"]
    return sample


def make_grad(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    del sample["weight_base"]
    return {**sample, "need_delta": True, "need_gates": True}


def weight_expression(
    weight_base: Tensor, delta: Tensor, row_logits: Tensor, col_logits: Tensor, spec: GateSpec, where: GateMap
) -> Tensor:
    r, c = (gate.to(delta.dtype) for gate in row_and_col_gates_ref(row_logits, col_logits, spec, where))
    return weight_base + torch.outer(r, c) * delta


def grad_expression(
    grad_weight: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    need_delta: bool,
    need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What autograd does with `weight_expression`."""
    del need_delta, need_gates
    r, c = (gate.to(delta.dtype) for gate in row_and_col_gates_ref(row_logits, col_logits, spec, where))
    d_outer = grad_weight * delta
    d_col = (r @ d_outer).view(-1, where.repeat, where.head_dim).sum(dim=1).view(-1)
    return torch.outer(r, c) * grad_weight, (d_outer @ c).to(row_logits.dtype), d_col.to(col_logits.dtype)


CASES = {
    "gated_weight": Case(make=make_weight, expression=weight_expression, outputs=("weight",)),
    "gated_weight_grad": Case(
        make=make_grad,
        expression=grad_expression,
        outputs=("d_delta", "d_row_gate", "d_col_gate"),
        depth={"d_row_gate": 7, "d_col_gate": 7},
    ),
}
