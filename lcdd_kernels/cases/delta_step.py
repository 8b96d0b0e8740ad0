"""Cases of delta_step: one small transformer layer of odd sizes, GQA with three query heads per KV head, mixed
layouts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs
from lcdd_kernels.reference.delta_step import (
    BLOCK,
    DENSE,
    PANELS,
    AdamWStep,
    GateMap,
    Gradients,
    Matrices,
    weight_eff_ref,
)
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
        self.maps = [GateMap(q, read), GateMap(k, read), GateMap(v, read), GateMap(write, v, hd, REPEAT)]
        self.maps += [GateMap(hidden, ffn_read), GateMap(hidden, ffn_read), GateMap(ffn_write, hidden)]
        self.layouts = [DENSE, BLOCK, PANELS, PANELS, DENSE, BLOCK, PANELS]


def pack(dense: Tensor, layout: int, where: GateMap, rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """A dense gradient in the packed layout, entry by entry as the layout is defined: (tensor, columns panel or None).

    dense, rank: on the CPU.
    """
    if layout == DENSE:
        return dense, None
    n_out, n_in = dense.shape
    rows = [i for i in range(n_out) if rank[where.row_start + i] >= 0]
    col_gate = where.col_gates(n_in).tolist()
    open_cols = [j for j in range(n_in) if rank[col_gate[j]] >= 0]
    n_open = len(open_cols) // where.repeat
    cols = [0] * len(open_cols)
    for j in open_cols:
        cols[(j // where.head_dim) % where.repeat * n_open + int(rank[col_gate[j]])] = j
    if layout == BLOCK:
        return dense[rows][:, cols].contiguous(), None
    return dense[rows].contiguous(), dense[:, cols].contiguous()


def gate_sample(n: int, generator: torch.Generator, density: float = 0.4) -> Tensor:
    """About `density` of the gates open, half of those at 1 and the rest between 0 and 1."""
    z = torch.rand(n, generator=generator).clamp(0.05, 1) * (torch.rand(n, generator=generator) < density)
    return torch.where((torch.rand(n, generator=generator) < 0.5) & (z > 0), 1.0, z)


def _sample(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
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
    packed = [
        pack(g.cpu(), layout, where, rank)
        for g, layout, where in zip(matrices(1e-2), layer.layouts, layer.maps, strict=True)
    ]
    moment = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "matrices": Matrices(
            maps=layer.maps,
            n_gates=layer.n_gates,
            bases=bases,
            weights=[torch.full_like(base, float("nan")) for base in bases],
            deltas=matrices(1e-2),
            exp_avgs=matrices(1e-3, moment),
            exp_avg_sqs=[x.square() for x in matrices(1e-2, moment)],
        ),
        "grads": Gradients(
            tensors=[tensor.to(device) for tensor, _ in packed],
            col_panels=[None if panel is None else panel.to(device) for _, panel in packed],
            layouts=layer.layouts,
            rank=rank.to(device),
        ),
        "gate": gate.to(gate_dtype).to(device),
        "gate_new": gate_sample(layer.n_gates, generator).to(gate_dtype).to(device),
    }


def make_weight_eff(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    return {name: sample[name] for name in ("matrices", "gate")}


def make_differs(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    """The second matrix as it has to be, but for its first row; of numbers with which every dtype computes exactly."""
    sample = make_weight_eff(dtype, device, seed, size)
    generator, matrices = torch.Generator().manual_seed(seed), sample["matrices"]
    for tensor in (*matrices.bases, *matrices.deltas):
        tensor.copy_(torch.randint(-4, 5, tensor.shape, generator=generator))
    sample["gate"].copy_(torch.randint(0, 3, sample["gate"].shape, generator=generator) / 2)
    weight_eff_ref(matrices, sample["gate"])
    matrices.weights[1][0] += 1
    return {**sample, "m": 1}


def make_grad_stats(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    return {name: sample[name] for name in ("matrices", "grads", "gate")}


def make_adamw(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    sample = _sample(dtype, device, seed, size)
    sample["gate_old"] = sample.pop("gate")
    return {**sample, "adam": AdamWStep(lr=1e-3, weight_decay=0.1, step=7, grad_scale=0.8)}


# --- the same, as eager PyTorch would have it: in the matrices' own dtype, one whole-matrix operation after another ---


def _vectors(gate: Tensor, where: GateMap, like: Tensor) -> tuple[Tensor, Tensor]:
    n_out, n_in = like.shape
    heads = gate[where.col_start : where.col_start + n_in // where.repeat].view(-1, where.head_dim)
    c = heads.repeat_interleave(where.repeat, 0).view(-1)
    return gate[where.row_start : where.row_start + n_out].to(like.dtype)[:, None], c.to(like.dtype)


def _dense(grads: Gradients, m: int, where: GateMap, like: Tensor) -> Tensor:
    """The gradient as a dense matrix, as far as it is known (outside of block and panels it is zero)."""
    grad, panel, rank = grads.tensors[m], grads.col_panels[m], grads.rank
    if grads.layouts[m] == DENSE:
        return grad
    assert rank is not None
    place = torch.arange(like.numel()).view(like.shape)
    first, second = pack(place, grads.layouts[m], where, rank.cpu())
    dense = torch.zeros(like.numel(), dtype=grad.dtype, device=grad.device)
    dense[first.reshape(-1).to(grad.device)] = grad.reshape(-1)
    if panel is not None and second is not None:
        dense[second.reshape(-1).to(grad.device)] = panel.reshape(-1)
    return dense.view(like.shape)


def _with_grads(matrices: Matrices, grads: Gradients) -> Iterator[tuple[int, GateMap, Tensor, Tensor]]:
    for m, (where, delta) in enumerate(zip(matrices.maps, matrices.deltas, strict=True)):
        yield m, where, delta, _dense(grads, m, where, delta)


def weight_eff_expression(matrices: Matrices, gate: Tensor) -> None:
    lists = (matrices.weights, matrices.bases, matrices.deltas, matrices.maps)
    for weight, base, delta, where in zip(*lists, strict=True):
        r, c = _vectors(gate, where, delta)
        weight.copy_(base + r * c * delta)


def differs_expression(matrices: Matrices, m: int, gate: Tensor) -> Tensor:
    before = matrices.weights[m].clone()
    weight_eff_expression(matrices, gate)
    return (before != matrices.weights[m]).sum()


def grad_stats_expression(matrices: Matrices, grads: Gradients, gate: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, sq_norm = torch.zeros_like(gate), torch.zeros_like(gate[0])
    for _, where, delta, g in _with_grads(matrices, grads):
        n_out, n_in = delta.shape
        r, c = _vectors(gate, where, delta)
        d_gate[where.row_start : where.row_start + n_out] += (c * delta * g).sum(1)
        per_head = (r * delta * g).sum(0).view(-1, where.repeat, where.head_dim).sum(1)
        d_gate[where.col_start : where.col_start + n_in // where.repeat] += per_head.view(-1)
        sq_norm += (r * c * g).square().sum()
    return d_gate, sq_norm


def adamw_expression(matrices: Matrices, grads: Gradients, gate_old: Tensor, gate_new: Tensor, adam: AdamWStep) -> None:
    for n, where, delta, g in _with_grads(matrices, grads):
        m, v = matrices.exp_avgs[n], matrices.exp_avg_sqs[n]
        r, c = _vectors(gate_old, where, delta)
        grad = r * c * g * adam.grad_scale
        delta.mul_(adam.decay)
        m.lerp_(grad.to(m.dtype), 1 - adam.beta1)
        v.mul_(adam.beta2).addcmul_(grad.to(v.dtype), grad.to(v.dtype), value=1 - adam.beta2)
        root = (v.sqrt() / adam.root_bias2).add_(adam.eps)
        delta.sub_((m / root * adam.step_size).to(delta.dtype))
    weight_eff_expression(matrices, gate_new)


CASES = {
    "weight_eff_": Case(
        make=make_weight_eff,
        expression=weight_eff_expression,
        outputs=("matrices.weights",),
        in_place=True,
        exact=frozenset({"matrices.weights"}),
    ),
    "weight_differs": Case(
        make=make_differs, expression=differs_expression, outputs=("count",), exact=frozenset({"count"})
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
        outputs=("matrices.weights", "matrices.deltas", "matrices.exp_avgs", "matrices.exp_avg_sqs"),
        in_place=True,
    ),
}
