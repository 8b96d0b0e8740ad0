"""The pieces of the forward route in plain PyTorch: gates of a block, W_eff of its matrices, and their gradients.

Shapes: [out, in] one matrix, T tokens, N gates of a block. r[out] row gates, c[in] column gates, G = dY^T X.

    gate = every vector of logits, drawn with the noise of its place in the model, one after the other
    W_eff = base + (r x c) * delta                 (base's own bits where r_i c_j = 0)
    d_delta = (r x c) * G,   d_r_i = sum_j c_j delta_ij G_ij,   d_c_j = sum_i r_i delta_ij G_ij

A matrix finds r and c in `gate` by its `GateMap`. Arithmetic is float32, or float64 where any operand is. The library
does the products with X and dY.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec, gate_values_ref

# Elements that are widened to float32 at a time, 4 MiB: half-precision matrices never get a second, wider copy.
WIDENED_ELEMENTS = 1 << 20


def block_gates_ref(logits: Sequence[Tensor], offsets: Sequence[int], spec: GateSpec) -> Tensor:
    """gate [N] in the dtype of the logits; offsets: where each vector of logits is in the model's flat one."""
    drawn = [gate_values_ref(part, spec, offset=offset)[0] for part, offset in zip(logits, offsets, strict=True)]
    return torch.cat(drawn)


def row_and_col_gates(gate: Tensor, where: GateMap, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(r[out], c[in]) of a matrix [out, in] out of gate [N]; shared column gates are repeated."""
    rows, cols = shape
    r = gate[where.row_start : where.row_start + rows]
    c = gate[where.col_start : where.col_start + cols // where.repeat]
    return r, repeat_columns(c, where.head_dim, where.repeat)


def repeat_columns(gate: Tensor, head_dim: int, repeat: int) -> Tensor:
    """Gates [in / repeat] -> [in]: every group of `head_dim` is repeated `repeat` times."""
    if repeat == 1:
        return gate
    return gate.view(-1, 1, head_dim).expand(-1, repeat, -1).reshape(-1)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def gated_weights_ref(
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    gate: Tensor,
    maps: Sequence[GateMap],
    *,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """W_eff [out, in] of every matrix in `dtype` (None: the base's); the roundings, and so the bits, of
    `weight_eff_ref`.

    bases, deltas: [out, in] each, any float dtypes; gate: [N]; maps: where a matrix finds its gates in it.
    """
    return [_weight(*matrix, gate, dtype) for matrix in zip(bases, deltas, maps, strict=True)]


def _weight(base: Tensor, delta: Tensor, where: GateMap, gate: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or base.dtype
    wide = _wide(dtype, base.dtype, delta.dtype, gate.dtype)
    r, c = row_and_col_gates(gate.to(wide), where, base.shape)
    weight = torch.empty(base.shape, dtype=dtype, device=base.device)
    block = max(1, WIDENED_ELEMENTS // base.shape[1])
    for start in range(0, len(base), block):
        rows = slice(start, start + block)
        product = r[rows, None] * c
        moved = base[rows].to(wide) + product * delta[rows].to(wide)
        torch.where(product == 0, base[rows].to(dtype), moved.to(dtype), out=weight[rows])
    return weight


def gated_weight_grad_ref(
    grad_weight: Tensor,
    delta: Tensor,
    gate: Tensor,
    where: GateMap,
    *,
    need_delta: bool,
    need_gates: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_delta [out, in], d_row_gate [out], d_col_gate [in / repeat]) from G = `grad_weight` [out, in].

    What is not needed is None. Gate gradients are in the gate's dtype and not yet chained to logits. `grad_weight` is
    consumed: where it has delta's dtype, d_delta is written over it.
    """
    wide = _wide(grad_weight.dtype, delta.dtype, gate.dtype)
    r, c = row_and_col_gates(gate.to(wide), where, delta.shape)
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
    return d_delta, d_row.to(gate.dtype), d_col.to(gate.dtype)
