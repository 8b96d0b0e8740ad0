"""Cases of delta_step: one small transformer layer of odd sizes, GQA with three query heads per KV head, mixed
layouts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.delta_step import BLOCK, DENSE, PANELS, col_gate_index
from lcdd_kernels.reference.gates import open_indices_ref

KV_HEADS, REPEAT = 2, 3


class Layer:
    """Geometry of one layer: 8 gate groups in the method's order, 7 matrices; `size` scales it, everything stays
    odd.
    """

    def __init__(self, size: int) -> None:
        d, hd, ff = 16 * size + 3, 2 * size + 1, 24 * size + 1
        kv = KV_HEADS * hd
        sizes = [d, REPEAT * kv, kv, kv, d, d, ff, d]
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(sizes).cumsum(0)])
        read, q, k, v, write, ffn_read, hidden, ffn_write, self.n_gates = self.offsets.tolist()
        self.shapes = [(REPEAT * kv, d), (kv, d), (kv, d), (d, REPEAT * kv), (ff, d), (ff, d), (d, ff)]
        maps = [(q, read, 1, 1), (k, read, 1, 1), (v, read, 1, 1), (write, v, hd, REPEAT)]
        maps += [(hidden, ffn_read, 1, 1), (hidden, ffn_read, 1, 1), (ffn_write, hidden, 1, 1)]
        self.maps = torch.tensor(maps, dtype=torch.int64)
        self.layouts = [DENSE, BLOCK, PANELS, PANELS, DENSE, BLOCK, PANELS]


def pack(dense: Tensor, layout: int, gate: Tensor, where: Sequence[int], rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """A dense gradient in the packed layout, entry by entry as the layout is defined: (grads[m], columns panel or
    None).
    """
    if layout == DENSE:
        return dense, None
    n_out, n_in = dense.shape
    row_start, col_start, head_dim, repeat = where
    rows = [i for i in range(n_out) if rank[row_start + i] >= 0]
    col_gate = col_gate_index(n_in, col_start, head_dim, repeat, torch.device("cpu")).tolist()
    open_cols = [j for j in range(n_in) if rank[col_gate[j]] >= 0]
    n_open = len(open_cols) // repeat
    cols = [0] * len(open_cols)
    for j in open_cols:
        cols[(j // head_dim) % repeat * n_open + int(rank[col_gate[j]])] = j
    if layout == BLOCK:
        return dense[rows][:, cols].contiguous(), None
    return dense[rows].contiguous(), dense[:, cols].contiguous()


def gate_sample(n: int, generator: torch.Generator, density: float = 0.4) -> Tensor:
    """About `density` of the gates open, half of those at 1 and the rest between 0 and 1."""
    z = torch.rand(n, generator=generator).clamp(0.05, 1) * (torch.rand(n, generator=generator) < density)
    return torch.where((torch.rand(n, generator=generator) < 0.5) & (z > 0), 1.0, z)


def _sample(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> tuple[Layer, Inputs]:
    layer = Layer(size)
    generator = torch.Generator().manual_seed(seed)

    def matrices(scale: float, of: torch.dtype = dtype) -> list[Tensor]:
        return [(scale * torch.randn(shape, generator=generator)).to(of).to(device) for shape in layer.shapes]

    gate = gate_sample(layer.n_gates, generator)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    _, _, rank = open_indices_ref(gate, layer.offsets)
    bases = matrices(0.05)
    for base in bases:
        base.view(-1)[::7] = -0.0
    grads, col_panels = [], []
    for g, layout, where in zip(matrices(1e-2), layer.layouts, layer.maps.tolist(), strict=True):
        packed, panel = pack(g.cpu(), layout, gate, where, rank)
        grads.append(packed.to(device))
        if panel is not None:
            col_panels.append(panel.to(device))
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    values = {
        "bases": bases,
        "weights": [torch.full_like(b, float("nan")) for b in bases],
        "deltas": matrices(1e-2),
        "exp_avgs": matrices(1e-3, moment),
        "exp_avg_sqs": [x.square() for x in matrices(1e-2, moment)],
        "grads": grads,
        "col_panels": col_panels,
        "gate": gate.to(gate_dtype).to(device),
        "gate_new": gate_sample(layer.n_gates, generator).to(gate_dtype).to(device),
        "gate_maps": layer.maps,
        "layouts": layer.layouts,
        "rank": rank.to(device),
    }
    return layer, values


def make_weight_eff(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    _, v = _sample(dtype, device, seed, size)
    return {k: v[k] for k in ("weights", "bases", "deltas", "gate", "gate_maps")}


def make_grad_stats(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    _, v = _sample(dtype, device, seed, size)
    return {k: v[k] for k in ("grads", "col_panels", "deltas", "gate", "gate_maps", "layouts", "rank")}


def make_adamw(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    _, v = _sample(dtype, device, seed, size)
    names = (
        "weights",
        "bases",
        "deltas",
        "exp_avgs",
        "exp_avg_sqs",
        "grads",
        "col_panels",
        "gate_maps",
        "layouts",
        "rank",
    )
    settings = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 7,
        "grad_scale": 0.8,
    }
    return {**{k: v[k] for k in names}, "gate_old": v["gate"], "gate_new": v["gate_new"], **settings}


# --- the same, as eager PyTorch would have it: in the matrices' own dtype, one whole-matrix operation after another
# ----


def _vectors(gate: Tensor, where: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    row_start, col_start, head_dim, repeat = where
    n_out, n_in = like.shape
    heads = gate[col_start : col_start + n_in // repeat].view(-1, head_dim)
    c = heads.repeat_interleave(repeat, 0).view(-1)
    return gate[row_start : row_start + n_out].to(like.dtype)[:, None], c.to(like.dtype)


def _dense(grad: Tensor, panel: Tensor | None, layout: int, rank: Tensor, where: Sequence[int], like: Tensor) -> Tensor:
    """The gradient as a dense matrix, as far as it is known (outside of block and panels it is zero)."""
    if layout == DENSE:
        return grad
    n_out, n_in = like.shape
    place = torch.arange(n_out * n_in, device=like.device).view(n_out, n_in)
    rows, cols = pack(place.cpu(), PANELS, rank, where, rank.cpu())
    dense = torch.zeros(n_out * n_in, dtype=grad.dtype, device=grad.device)
    if layout == PANELS:
        assert panel is not None
        assert cols is not None
        dense[rows.reshape(-1).to(grad.device)] = grad.reshape(-1)
        dense[cols.reshape(-1).to(grad.device)] = panel.reshape(-1)
    else:
        block, _ = pack(place.cpu(), BLOCK, rank, where, rank.cpu())
        dense[block.reshape(-1).to(grad.device)] = grad.reshape(-1)
    return dense.view(n_out, n_in)


def _dense_all(grads, col_panels, deltas, gate_maps, layouts, rank) -> list[Tensor]:  # type: ignore[no-untyped-def]
    panels = iter(col_panels)
    rows = zip(grads, deltas, gate_maps.tolist(), layouts, strict=True)
    return [_dense(g, next(panels) if kind == PANELS else None, kind, rank, where, d) for g, d, where, kind in rows]


def weight_eff_expression(weights, bases, deltas, gate, gate_maps) -> None:  # type: ignore[no-untyped-def]
    for weight, base, delta, where in zip(weights, bases, deltas, gate_maps.tolist(), strict=True):
        r, c = _vectors(gate, where, delta)
        weight.copy_(base + r * c * delta)


def grad_stats_expression(grads, col_panels, deltas, gate, gate_maps, layouts, rank):  # type: ignore[no-untyped-def]
    d_gate, sq_norm = torch.zeros_like(gate), torch.zeros_like(gate[0])
    dense = _dense_all(grads, col_panels, deltas, gate_maps, layouts, rank)
    for g, delta, where in zip(dense, deltas, gate_maps.tolist(), strict=True):
        row_start, col_start, head_dim, repeat = where
        n_out, n_in = delta.shape
        r, c = _vectors(gate, where, delta)
        d_gate[row_start : row_start + n_out] += (c * delta * g).sum(1)
        per_head = (r * delta * g).sum(0).view(-1, repeat, head_dim).sum(1)
        d_gate[col_start : col_start + n_in // repeat] += per_head.view(-1)
        sq_norm += (r * c * g).square().sum()
    return d_gate, sq_norm


def adamw_expression(  # type: ignore[no-untyped-def]
    weights, bases, deltas, exp_avgs, exp_avg_sqs, grads, col_panels, gate_old, gate_new, gate_maps, layouts, rank,
    *, lr, beta1, beta2, eps, weight_decay, step, grad_scale,
) -> None:  # fmt: skip
    dense = _dense_all(grads, col_panels, deltas, gate_maps, layouts, rank)
    rows = zip(bases, deltas, exp_avgs, exp_avg_sqs, dense, gate_maps.tolist(), strict=True)
    for _, delta, m, v, g, where in rows:
        r, c = _vectors(gate_old, where, delta)
        grad = r * c * g * grad_scale
        delta.mul_(1 - lr * weight_decay)
        m.lerp_(grad.to(m.dtype), 1 - beta1)
        v.mul_(beta2).addcmul_(grad.to(v.dtype), grad.to(v.dtype), value=1 - beta2)
        root = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        delta.sub_((m / root * (lr / (1 - beta1**step))).to(delta.dtype))
    weight_eff_expression(weights, bases, deltas, gate_new, gate_maps)


CASES = {
    "weight_eff_": Case(
        make=make_weight_eff,
        expression=weight_eff_expression,
        outputs=("weights",),
        in_place=True,
        exact=frozenset({"weights"}),
    ),
    "delta_grad_stats": Case(
        make=make_grad_stats,
        expression=grad_stats_expression,
        outputs=("d_gate", "sq_norm"),
        depth={"d_gate": 5, "sq_norm": 11},
    ),
    "delta_adamw_": Case(
        make=make_adamw,
        expression=adamw_expression,
        outputs=("weights", "deltas", "exp_avgs", "exp_avg_sqs"),
        in_place=True,
    ),
}
