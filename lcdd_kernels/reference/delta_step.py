"""LCDD's optimizer step over every matrix of a model, in plain PyTorch: the signatures that all backends share.

M matrices `[out, in]`; N gates (method section 1). Row i and column j of a matrix find their gates r_i and c_j through
`gate_maps`; p_ij = r_i*c_j, "o" is elementwise:

    weight_eff_ref                   W_eff = W_base + p o Delta
    delta_grad_stats_ref  (pass A)   d_r_i = sum_j c_j Delta_ij G_ij, d_c_j = sum_i r_i Delta_ij G_ij, sum (p_ij G_ij)^2
    delta_adamw_ref       (pass B)   AdamW on Delta with the gradient grad_scale*p o G, then W_eff from the new gates

Arithmetic is in the gate's dtype: float32, or float64 (the reference alone). Matrices are float32, float16 or bfloat16
(float64 with float64 gates), and so are the moments, each tensor on its own.

gate_maps: int64 CPU tensor [M, 4], rows (row_start, col_start, head_dim, repeat); see `GateMap`.
A row shard (FSDP2) passes its own rows, and a row_start moved by its row offset.

layouts: one int per matrix, how its gradient is packed; `rank` (of `open_indices`) says where, else it may be None:
    DENSE   grads[m] is [out, in]
    BLOCK   grads[m] is [nR, nC]: open rows x open columns. Closed gates then get no gradient (hard_concrete has none)
    PANELS  grads[m] is [nR, in]: open rows, all columns. The matrix's [out, nC] (all rows, open columns) is the next
            entry of `col_panels`, which has one entry per PANELS matrix, in the order of the matrices
Packed row i is at rank[row gate]. Packed column j is at copy*n_open + rank[col gate], copy = (j // head_dim) % repeat
and n_open = nC / repeat: copy-major, and simply the rank where repeat is 1. Packed layouts need whole matrices, not row
shards.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DENSE, BLOCK, PANELS = 0, 1, 2
LAYOUTS = ("dense", "block", "panels")  # position = code

_CHUNK = 1 << 20  # elements of a matrix handled at a time: temporaries stay in the cache and peak memory stays flat


@dataclass(frozen=True)
class GateMap:
    """Where a matrix `[out, in]` finds its gates in the model's flat vector.

    row i:  gate[row_start + i]
    col j:  gate[col_start + (j // (repeat*head_dim))*head_dim + j % head_dim]
    With repeat = 1 that is gate[col_start + j]. GQA's o_proj has repeat = query heads per KV head, as each KV head's
    gates serve that many query heads; the expanded vector is never made.
    """

    row_start: int
    col_start: int
    head_dim: int = 1
    repeat: int = 1


def col_gate_index(n_in: int, col_start: int, head_dim: int, repeat: int, device: torch.device) -> Tensor:
    """int64 [in]: the flat gate index of every column."""
    j = torch.arange(n_in, device=device)
    return col_start + (j // (repeat * head_dim)) * head_dim + j % head_dim


def partial_sum_layout(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Where each matrix's sums start in the flat buffer of partial sums: its `out` row sums, then its `in` column sums.
    The last entry is the total; `gather_partial_sums` expects one more slot, holding zero, behind it."""
    starts = [0]
    for n_out, n_in in shapes:
        starts.append(starts[-1] + n_out + n_in)
    return starts


@functools.lru_cache(maxsize=16)
def _gather_index(
    maps: tuple[tuple[int, ...], ...], shapes: tuple[tuple[int, int], ...], n_gates: int, device: torch.device
) -> Tensor:
    """int32 [K, N]: the (at most K) places in the flat buffer of partial sums that belong to each gate, in the order
    of the matrices, padded with the zero slot. Built once per layout."""
    targets = []
    for (row_start, col_start, head_dim, repeat), (n_out, n_in) in zip(maps, shapes, strict=True):
        targets.append(torch.arange(row_start, row_start + n_out))
        targets.append(col_gate_index(n_in, col_start, head_dim, repeat, torch.device("cpu")))
    target = torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64)
    order = torch.argsort(target, stable=True)
    per_gate = torch.bincount(target, minlength=n_gates)
    first = torch.cumsum(per_gate, 0) - per_gate
    gate_of = target[order]
    level = torch.arange(order.numel()) - first[gate_of]
    depth = int(per_gate.max()) if target.numel() else 1
    index = torch.full((max(depth, 1), n_gates), target.numel(), dtype=torch.int32)
    index[level, gate_of] = order.to(torch.int32)
    return index.to(device)


def gather_partial_sums(partials: Tensor, gate_maps: Tensor, shapes: Sequence[tuple[int, int]], n_gates: int) -> Tensor:
    """d_gate[N] from the flat buffer of row and column sums (`partial_sum_layout`, plus one last slot that holds zero).

    One gather and one sum for the whole model, in a fixed order: deterministic, no atomics, no launch per matrix.
    """
    maps = tuple(map(tuple, gate_maps.tolist()))
    index = _gather_index(maps, tuple((int(a), int(b)) for a, b in shapes), n_gates, partials.device)
    return partials.index_select(0, index.view(-1)).view(index.shape).sum(0)


def _row_chunks(n_out: int, n_in: int) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(n_in, 1))
    for start in range(0, n_out, rows):
        yield slice(start, min(start + rows, n_out))


def _gates_of(gate: Tensor, row: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
    row_start, col_start, head_dim, repeat = row
    cols = col_gate_index(shape[1], col_start, head_dim, repeat, gate.device)
    return gate[row_start : row_start + shape[0]], gate[cols]


def _packed_positions(rank: Tensor, row: Sequence[int], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Open rows and open columns of a matrix in packed order (int64 each)."""
    row_start, col_start, head_dim, repeat = row
    open_rows = torch.nonzero(rank[row_start : row_start + shape[0]] >= 0).view(-1)
    j = torch.arange(shape[1], device=rank.device)
    place = rank[col_gate_index(shape[1], col_start, head_dim, repeat, rank.device)].to(torch.int64)
    open_cols = j[place >= 0]
    copy = (open_cols // head_dim) % repeat
    n_open = open_cols.numel() // repeat
    return open_rows, open_cols[torch.argsort(copy * n_open + place[open_cols])]


def _unpack(
    grads: Sequence[Tensor], col_panels: Sequence[Tensor], deltas: Sequence[Tensor], gate_maps: Tensor,
    layouts: Sequence[int], rank: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Per matrix, G `[out, in]` as known for column gates and as known for row gates; zero where it was not packed."""
    panels = iter(col_panels)
    for grad, delta, row, layout in zip(grads, deltas, gate_maps.tolist(), layouts, strict=True):
        if layout == DENSE:
            yield grad, grad
            continue
        assert rank is not None  # validated by the caller
        rows, cols = _packed_positions(rank, row, delta.shape)
        by_row = grad.new_zeros(delta.shape)
        if layout == BLOCK:
            by_row[rows[:, None], cols] = grad
            yield by_row, by_row
        else:
            by_row[rows] = grad
            by_col = torch.zeros_like(by_row)
            by_col[:, cols] = next(panels)
            yield by_row, by_col


def _masked_sum(base: Tensor, delta: Tensor, p: Tensor) -> Tensor:
    """base + p o delta in p's dtype with every product and sum rounded on its own, then rounded to base's dtype."""
    moved = (base.to(p.dtype) + p * delta.to(p.dtype)).to(base.dtype)
    return torch.where(p == 0, base, moved)


def weight_eff_ref(
    weights: Sequence[Tensor], bases: Sequence[Tensor], deltas: Sequence[Tensor], gate: Tensor, gate_maps: Tensor
) -> None:
    """weights[m] := bases[m] + (r x c) o deltas[m], in place. Bit-identical on every backend.

    p = r*c rounded, q = p*delta rounded, s = base + q rounded, then round-to-nearest-even to the weight's dtype; no
    fused multiply-add. Where p == 0 the base's bits are copied: a closed weight is the base, -0.0 included.
    """
    for weight, base, delta, row in zip(weights, bases, deltas, gate_maps.tolist(), strict=True):
        r, c = _gates_of(gate, row, weight.shape)
        for rows in _row_chunks(*weight.shape):
            weight[rows] = _masked_sum(base[rows], delta[rows], r[rows, None] * c)


def delta_grad_stats_ref(
    grads: Sequence[Tensor],
    col_panels: Sequence[Tensor],
    deltas: Sequence[Tensor],
    gate: Tensor,
    gate_maps: Tensor,
    layouts: Sequence[int],
    rank: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Pass A: (d_gate[N], sq_norm[]), in the gate's dtype; deterministic.

    d_gate[n] sums the row and column formulas over every row and column, of any matrix, that uses gate n.
    sq_norm = sum over matrices of ||(r x c) o G||^2. Nothing is masked here, so a NaN anywhere in a dense G reaches
    sq_norm.
    """
    shapes = [(d.shape[0], d.shape[1]) for d in deltas]
    starts = partial_sum_layout(shapes)
    partials = gate.new_zeros(starts[-1] + 1)
    squares = [torch.zeros((), dtype=torch.float64, device=gate.device)]
    unpacked = _unpack(grads, col_panels, deltas, gate_maps, layouts, rank)
    for start, delta, row, (by_row, by_col) in zip(starts[:-1], deltas, gate_maps.tolist(), unpacked, strict=True):
        n_out, n_in = delta.shape
        r, c = _gates_of(gate, row, delta.shape)
        d_row = partials[start : start + n_out]
        d_col = partials[start + n_out : start + n_out + n_in]
        for rows in _row_chunks(n_out, n_in):
            g, d = by_row[rows].to(gate.dtype), delta[rows].to(gate.dtype)
            h = g * d
            d_col += (r[rows, None] * h).sum(0)
            d_row[rows] = ((h if by_col is by_row else by_col[rows].to(gate.dtype) * d) * c).sum(1)
            squares.append((r[rows, None] * c * g).square().sum().double())
    sq_norm = torch.stack(squares).sum().to(gate.dtype)
    return gather_partial_sums(partials, gate_maps, shapes, gate.numel()), sq_norm


def delta_adamw_ref(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    col_panels: Sequence[Tensor],
    gate_old: Tensor,
    gate_new: Tensor,
    gate_maps: Tensor,
    layouts: Sequence[int],
    rank: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """Pass B, in place on weights, deltas, exp_avgs and exp_avg_sqs; `step` counts from 1. Packed entries missing
    from G are 0.

        g     = (grad_scale * (r_old*c_old)) * G
        delta = delta * (1 - lr*weight_decay)
        m     = m + (g - m)*(1 - beta1)                    v = v*beta2 + (1 - beta2)*g*g
        delta = delta - lr/(1 - beta1^step) * m / (sqrt(v)/sqrt(1 - beta2^step) + eps)        (torch.optim.AdamW)
        W     = base + (r_new*c_new) * delta               as `weight_eff_ref`, from the *stored* delta

    The update uses m and v before they are rounded to their storage dtype; factors of the scalars alone are formed in
    float64.
    """
    step_size = lr / (1 - beta1**step)
    v_scale = math.sqrt(1 - beta2**step)
    unpacked = _unpack(grads, col_panels, deltas, gate_maps, layouts, rank)
    matrices = zip(weights, bases, deltas, exp_avgs, exp_avg_sqs, gate_maps.tolist(), unpacked, strict=True)
    for weight, base, delta, exp_avg, exp_avg_sq, row, (grad, _) in matrices:
        r_old, c_old = _gates_of(gate_old, row, weight.shape)
        r_new, c_new = _gates_of(gate_new, row, weight.shape)
        dtype = gate_old.dtype
        for rows in _row_chunks(*weight.shape):
            g = r_old[rows, None] * c_old * grad_scale * grad[rows].to(dtype)
            m = exp_avg[rows].to(dtype)
            m = m + (g - m) * (1 - beta1)
            v = exp_avg_sq[rows].to(dtype) * beta2 + (1 - beta2) * g * g
            d = delta[rows].to(dtype) * (1 - lr * weight_decay)
            delta[rows] = (d - step_size * (m / (v.sqrt() / v_scale + eps))).to(delta.dtype)
            exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
            weight[rows] = _masked_sum(base[rows], delta[rows], r_new[rows, None] * c_new)
