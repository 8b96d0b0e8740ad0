"""The pieces of the forward route in plain PyTorch: W_eff from gate logits, and its gradients.

Shapes: [out, in] one matrix, T tokens. r[out] row gates, c[in] column gates, G = dY^T X.

    W_eff = base + (r x c) * delta                 (base's own bits where r_i c_j = 0)
    d_delta = (r x c) * G,   d_r_i = sum_j c_j delta_ij G_ij,   d_c_j = sum_i r_i delta_ij G_ij

Arithmetic is float32, or float64 where any operand is. The library does the products with X and dY.
"""

import torch
from torch import Tensor

from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec, gate_values_ref

# Elements that are widened to float32 at a time, 4 MiB: half-precision matrices never get a second, wider copy.
WIDENED_ELEMENTS = 1 << 20


def row_and_col_gates_ref(
    row_logits: Tensor, col_logits: Tensor, spec: GateSpec, where: GateMap
) -> tuple[Tensor, Tensor]:
    """(r[out], c[in]) in the dtype of the logits, with the noise of their place in the model's flat vector; shared
    column gates are repeated."""
    r, _ = gate_values_ref(row_logits, spec, offset=where.row_start)
    c, _ = gate_values_ref(col_logits, spec, offset=where.col_start)
    return r, repeat_columns(c, where.head_dim, where.repeat)


def repeat_columns(gate: Tensor, head_dim: int, repeat: int) -> Tensor:
    """Gates [in / repeat] -> [in]: every group of `head_dim` is repeated `repeat` times."""
    if repeat == 1:
        return gate
    return gate.view(-1, 1, head_dim).expand(-1, repeat, -1).reshape(-1)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gated_weight_ref(
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W_eff [out, in] in `dtype` (None: the base's); the roundings, and so the bits, of `weight_eff_ref`.

    weight_base, delta: [out, in], any float dtypes; row_logits: [out]; col_logits: [in / repeat].
    """
    dtype = dtype or weight_base.dtype
    r, c = row_and_col_gates_ref(row_logits, col_logits, spec, where)
    wide = _wide(dtype, weight_base.dtype, delta.dtype, r.dtype)
    r, c = r.to(wide), c.to(wide)
    rows, cols = weight_base.shape
    weight = torch.empty(rows, cols, dtype=dtype, device=weight_base.device)
    block = max(1, WIDENED_ELEMENTS // cols)
    for start in range(0, rows, block):
        rows_now = slice(start, start + block)
        product = r[rows_now, None] * c
        base = weight_base[rows_now]
        moved = base.to(wide) + product * delta[rows_now].to(wide)
        torch.where(product == 0, base.to(dtype), moved.to(dtype), out=weight[rows_now])
    return weight


def gated_weight_grad_ref(
    grad_weight: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    need_delta: bool,
    need_gates: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_delta [out, in], d_row_gate [out], d_col_gate [in / repeat]) from G = `grad_weight` [out, in].

    What is not needed is None. Gate gradients are in the dtype of the logits and not yet chained to them.
    `grad_weight` is consumed: where it has delta's dtype, d_delta is written over it.
    """
    r, c = row_and_col_gates_ref(row_logits, col_logits, spec, where)
    wide = _wide(grad_weight.dtype, delta.dtype, r.dtype)
    r, c = r.to(wide), c.to(wide)
    rows, cols = grad_weight.shape
    same = grad_weight.dtype == delta.dtype
    d_delta = None if not need_delta else grad_weight if same else torch.empty_like(delta)
    d_row = r.new_zeros(rows)
    d_col = c.new_zeros(cols)
    block = max(1, WIDENED_ELEMENTS // cols)
    for start in range(0, rows, block):
        rows_now = slice(start, start + block)
        grad = grad_weight[rows_now].to(wide)
        if need_gates:
            moved = delta[rows_now].to(wide) * grad
            d_row[rows_now] = moved @ c
            d_col += r[rows_now] @ moved
        if d_delta is not None:
            product = r[rows_now, None] * c
            d_delta[rows_now] = torch.where(product == 0, 0, product * grad)
    if not need_gates:
        return d_delta, None, None
    d_col = d_col.view(-1, where.repeat, where.head_dim).sum(dim=1).view(-1)
    return d_delta, d_row.to(row_logits.dtype), d_col.to(col_logits.dtype)
