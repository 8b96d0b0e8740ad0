"""LCDD's optimizer step over every matrix of a model, in plain PyTorch: the signatures that all backends share.

M matrices `[out, in]`; N gates (method section 1). Row i and column j of a matrix find their gates r_i and c_j through
its `GateMap`; p_ij = r_i*c_j, "o" is elementwise:

    weight_eff_ref                   W_eff = W_base + p o Delta
    delta_grad_stats_ref  (pass A)   d_r_i = sum_j c_j Delta_ij G_ij, d_c_j = sum_i r_i Delta_ij G_ij, sum (p_ij G_ij)^2
    delta_adamw_ref       (pass B)   AdamW on Delta with the gradient grad_scale*p o G, then W_eff from the new gates

Arithmetic is in the gate's dtype: float32, or float64 (the reference alone). Matrices are float32, float16 or bfloat16
(float64 with float64 gates), and so are the moments, each tensor on its own.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    gates serve that many query heads; the expanded vector is never made. A row shard (FSDP2) has its own rows, and a
    row_start moved by its row offset.
    """

    row_start: int
    col_start: int
    head_dim: int = 1
    repeat: int = 1

    def col_gates(self, n_in: int, device: torch.device | str = "cpu") -> Tensor:
        """int64 [in]: the flat gate index of every column."""
        j = torch.arange(n_in, device=device)
        return self.col_start + (j // (self.repeat * self.head_dim)) * self.head_dim + j % self.head_dim


@dataclass(frozen=True, kw_only=True)
class AdamWStep:
    """The numbers of one AdamW step as `torch.optim.AdamW` has them, and a factor on its gradient (clipping).

    step: counts from 1. grad_scale: a number, or a tensor [] beside the gates and of their dtype, which a GPU is given
    before the host knows it; NaN there says that the step is not to be taken, and nothing is written.
    The factors that kernels multiply by are formed here, in float64.
    """

    lr: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_scale: float | Tensor = 1.0

    @property
    def decay(self) -> float:
        return 1 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def root_bias2(self) -> float:
        return math.sqrt(1 - self.beta2**self.step)

    def known(self) -> "AdamWStep | None":
        """The same with a number for grad_scale, which the host waits for; None: not to be taken."""
        scale = float(self.grad_scale)
        return replace(self, grad_scale=scale) if not math.isnan(scale) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrices:
    """The M matrices of a model, each list in their order; what an op does not name may be empty.

    maps: where each finds its gates. n_gates: of the model. tables: what a backend has built of all this, kept as long
    as it is.
    """

    maps: Sequence[GateMap]
    n_gates: int
    deltas: Sequence[Tensor]
    weights: Sequence[Tensor] = ()
    bases: Sequence[Tensor] = ()
    exp_avgs: Sequence[Tensor] = ()
    exp_avg_sqs: Sequence[Tensor] = ()
    tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(delta.shape[0], delta.shape[1]) for delta in self.deltas]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """G of every matrix, dense or packed.

    layouts[m], how it is packed; `rank` (of `open_indices`) says where, and may be None where nothing is:
        DENSE   tensors[m] is [out, in]
        BLOCK   tensors[m] is [nR, nC]: open rows x open columns. Closed gates get no gradient (hard_concrete has none)
        PANELS  tensors[m] is [nR, in], open rows and all columns, and col_panels[m] is [out, nC] (elsewhere None)
    tables: what a backend has built of them, kept as long as they are.
    Packed row i is at rank[row gate]. Packed column j is at copy*n_open + rank[col gate], with copy = (j // head_dim) %
    repeat and n_open = nC / repeat: copy-major, and simply the rank where repeat is 1. Packed layouts need whole
    matrices, not row shards.
    """

    tensors: Sequence[Tensor]
    col_panels: Sequence[Tensor | None]
    layouts: Sequence[int]
    rank: Tensor | None = None
    tables: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def pointers(self) -> tuple[int, ...]:
        """Addresses of `tensors`."""
        return tuple([tensor.data_ptr() for tensor in self.tensors])

    @functools.cached_property
    def panel_pointers(self) -> tuple[int, ...]:
        """Addresses of `col_panels`, 0 where there is none."""
        return tuple([0 if panel is None else panel.data_ptr() for panel in self.col_panels])

    @functools.cached_property
    def packed_columns(self) -> tuple[int, ...]:
        """Open columns of every matrix, 0 where its gradient is dense."""
        found = zip(self.tensors, self.col_panels, self.layouts, strict=True)
        return tuple([0 if code == DENSE else (g if panel is None else panel).shape[1] for g, panel, code in found])


def partial_sum_layout(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Where each matrix's sums start in the flat buffer of partial sums: its `out` row sums, then its `in` column sums.
    The last entry is the total; `gather_partial_sums` expects one more slot, holding zero, behind it."""
    starts = [0]
    for n_out, n_in in shapes:
        starts.append(starts[-1] + n_out + n_in)
    return starts


@functools.lru_cache(maxsize=16)
def _gather_index(
    maps: tuple[GateMap, ...], shapes: tuple[tuple[int, int], ...], n_gates: int, device: torch.device
) -> Tensor:
    """int32 [K, N]: the (at most K) places in the flat buffer of partial sums that belong to each gate, in the order
    of the matrices, padded with the zero slot. Built once per layout."""
    targets = []
    for where, (n_out, n_in) in zip(maps, shapes, strict=True):
        targets.append(torch.arange(where.row_start, where.row_start + n_out, device="cpu"))
        targets.append(where.col_gates(n_in))
    target = torch.cat(targets) if targets else torch.empty(0, dtype=torch.int64, device="cpu")
    order = torch.argsort(target, stable=True)
    per_gate = torch.bincount(target, minlength=n_gates)
    first = torch.cumsum(per_gate, 0) - per_gate
    gate_of = target[order]
    level = torch.arange(order.numel(), device="cpu") - first[gate_of]
    depth = int(per_gate.max()) if target.numel() else 1
    index = torch.full((max(depth, 1), n_gates), target.numel(), dtype=torch.int32, device="cpu")
    index[level, gate_of] = order.to(torch.int32)
    return index.to(device)


def gather_partial_sums(
    partials: Tensor, maps: Sequence[GateMap], shapes: Sequence[tuple[int, int]], n_gates: int
) -> Tensor:
    """d_gate[N] from the flat buffer of row and column sums (`partial_sum_layout`, plus one last slot that holds zero).

    One gather and one sum for the whole model, in a fixed order: deterministic, no atomics, no launch per matrix.
    """
    index = _gather_index(tuple(maps), tuple(shapes), n_gates, partials.device)
    return partials.index_select(0, index.view(-1)).view(index.shape).sum(0)


def _row_chunks(n_out: int, n_in: int) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(n_in, 1))
    for start in range(0, n_out, rows):
        yield slice(start, min(start + rows, n_out))


def _gates_of(gate: Tensor, where: GateMap, shape: torch.Size) -> tuple[Tensor, Tensor]:
    return gate[where.row_start : where.row_start + shape[0]], gate[where.col_gates(shape[1], gate.device)]


def _packed_positions(rank: Tensor, where: GateMap, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Open rows and open columns of a matrix in packed order (int64 each)."""
    open_rows = torch.nonzero(rank[where.row_start : where.row_start + shape[0]] >= 0).view(-1)
    place = rank[where.col_gates(shape[1], rank.device)].to(torch.int64)
    open_cols = torch.nonzero(place >= 0).view(-1)
    copy = (open_cols // where.head_dim) % where.repeat
    n_open = open_cols.numel() // where.repeat
    return open_rows, open_cols[torch.argsort(copy * n_open + place[open_cols])]


def _unpack(matrices: Matrices, grads: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
    """Per matrix, G `[out, in]` as known for column gates and as known for row gates; zero where it was not packed."""
    for m, (delta, where) in enumerate(zip(matrices.deltas, matrices.maps, strict=True)):
        grad, panel = grads.tensors[m], grads.col_panels[m]
        if grads.layouts[m] == DENSE:
            yield grad, grad
            continue
        assert grads.rank is not None  # validated by the caller
        rows, cols = _packed_positions(grads.rank, where, delta.shape)
        by_row = grad.new_zeros(delta.shape)
        if panel is None:
            by_row[rows[:, None], cols] = grad
            yield by_row, by_row
        else:
            by_row[rows] = grad
            by_col = torch.zeros_like(by_row)
            by_col[:, cols] = panel
            yield by_row, by_col


def _masked_sum(base: Tensor, delta: Tensor, p: Tensor) -> Tensor:
    """base + p o delta in p's dtype with every product and sum rounded on its own, then rounded to base's dtype."""
    moved = (base.to(p.dtype) + p * delta.to(p.dtype)).to(base.dtype)
    return torch.where(p == 0, base, moved)


def weight_eff_ref(matrices: Matrices, gate: Tensor) -> None:
    """weights[m] := bases[m] + (r x c) o deltas[m], in place. Bit-identical on every backend.

    p = r*c rounded, q = p*delta rounded, s = base + q rounded, then round-to-nearest-even to the weight's dtype; no
    fused multiply-add. Where p == 0 the base's bits are copied: a closed weight is the base, -0.0 included.
    """
    lists = (matrices.weights, matrices.bases, matrices.deltas, matrices.maps)
    for weight, base, delta, where in zip(*lists, strict=True):
        r, c = _gates_of(gate, where, weight.shape)
        for rows in _row_chunks(*weight.shape):
            weight[rows] = _masked_sum(base[rows], delta[rows], r[rows, None] * c)


def weight_differs_ref(matrices: Matrices, m: int, gate: Tensor) -> Tensor:
    """How many entries of weights[m] are not what `weight_eff_ref` would write, int64 []; a NaN is not."""
    weight, base, delta = (of_all[m] for of_all in (matrices.weights, matrices.bases, matrices.deltas))
    r, c = _gates_of(gate, matrices.maps[m], weight.shape)
    found = torch.zeros((), dtype=torch.int64, device=gate.device)
    for rows in _row_chunks(*weight.shape):
        found += (weight[rows] != _masked_sum(base[rows], delta[rows], r[rows, None] * c)).sum()
    return found


def delta_grad_stats_ref(matrices: Matrices, grads: Gradients, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Pass A: (d_gate[N], sq_norm[]), in the gate's dtype; deterministic.

    d_gate[n] sums the row and column formulas over every row and column, of any matrix, that uses gate n.
    sq_norm = sum over matrices of ||(r x c) o G||^2. Nothing is masked here, so a NaN anywhere in a dense G reaches
    sq_norm.
    """
    starts = partial_sum_layout(matrices.shapes)
    partials = gate.new_zeros(starts[-1] + 1)
    squares = [torch.zeros((), dtype=torch.float64, device=gate.device)]
    lists = (starts[:-1], matrices.deltas, matrices.maps, _unpack(matrices, grads))
    for start, delta, where, (by_row, by_col) in zip(*lists, strict=True):
        n_out, n_in = delta.shape
        r, c = _gates_of(gate, where, delta.shape)
        d_row = partials[start : start + n_out]
        d_col = partials[start + n_out : start + n_out + n_in]
        for rows in _row_chunks(n_out, n_in):
            g, d = by_row[rows].to(gate.dtype), delta[rows].to(gate.dtype)
            h = g * d
            d_col += (r[rows, None] * h).sum(0)
            d_row[rows] = ((h if by_col is by_row else by_col[rows].to(gate.dtype) * d) * c).sum(1)
            squares.append((r[rows, None] * c * g).square().sum().double())
    sq_norm = torch.stack(squares).sum().to(gate.dtype)
    return gather_partial_sums(partials, matrices.maps, matrices.shapes, gate.numel()), sq_norm


def delta_adamw_ref(matrices: Matrices, grads: Gradients, gate_old: Tensor, gate_new: Tensor, adam: AdamWStep) -> None:
    """Pass B, in place on weights, deltas, exp_avgs and exp_avg_sqs. Packed entries missing from G are 0.

        g     = (grad_scale * (r_old*c_old)) * G
        delta = delta * (1 - lr*weight_decay)
        m     = m + (g - m)*(1 - beta1)                    v = v*beta2 + (1 - beta2)*g*g
        delta = delta - lr/(1 - beta1^step) * m / (sqrt(v)/sqrt(1 - beta2^step) + eps)        (torch.optim.AdamW)
        W     = base + (r_new*c_new) * delta               as `weight_eff_ref`, from the *stored* delta

    The update uses m and v before they are rounded to their storage dtype.
    """
    if (known := adam.known()) is None:
        return
    adam = known
    lists = (matrices.weights, matrices.bases, matrices.deltas, matrices.exp_avgs, matrices.exp_avg_sqs, matrices.maps)
    for *tensors, where, (grad, _) in zip(*lists, _unpack(matrices, grads), strict=True):
        weight, base, delta, exp_avg, exp_avg_sq = tensors
        r_old, c_old = _gates_of(gate_old, where, weight.shape)
        r_new, c_new = _gates_of(gate_new, where, weight.shape)
        dtype = gate_old.dtype
        for rows in _row_chunks(*weight.shape):
            g = r_old[rows, None] * c_old * adam.grad_scale * grad[rows].to(dtype)
            m = exp_avg[rows].to(dtype)
            m = m + (g - m) * (1 - adam.beta1)
            v = exp_avg_sq[rows].to(dtype) * adam.beta2 + (1 - adam.beta2) * g * g
            d = delta[rows].to(dtype) * adam.decay
            delta[rows] = (d - adam.step_size * (m / (v.sqrt() / adam.root_bias2 + adam.eps))).to(delta.dtype)
            exp_avg[rows], exp_avg_sq[rows] = m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
            weight[rows] = _masked_sum(base[rows], delta[rows], r_new[rows, None] * c_new)
