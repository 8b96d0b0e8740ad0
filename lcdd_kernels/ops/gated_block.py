"""`lcdd::gated_mlp` and `lcdd::gated_qkv`: the projections of a block that share gates, in one op each.

    gated_mlp   gate, up: [F, D], rows `hidden`, columns `read`;  down: [D, F], rows `write`, columns `hidden`
                y = down(silu(gate x) * up x)
    gated_qkv   q, k, v: rows of their own, columns `read`

Only inputs are saved. The MLP's backward multiplies by gate and up again rather than keep three [T, F] activations. The
gradient of a shared gate is summed over its projections before it is chained to the logits. Pieces as in
`ops/gated_linear.py`. D model width, F feed-forward width, T tokens.
"""

from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose
from lcdd_kernels.ops.gated_linear import (
    absent,
    chain_gates,
    effective_weight,
    gated_product,
    present,
    total,
    weight_grads,
)
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec


def _spec(kind: str, seed: int, step: int, training: bool) -> GateSpec:
    return GateSpec(kind=kind, seed=seed, step=step, training=training)


def _mlp_maps(offsets: list[int]) -> tuple[GateMap, GateMap]:
    """Of gate and up, and of down; `offsets` are those of read, hidden and write."""
    read, hidden, write = offsets
    return GateMap(hidden, read), GateMap(write, hidden)


def _needed_gradients(
    dy: Any, x: Tensor, bases: list[Tensor], deltas: list[Tensor], logits: list[Tensor], needs: list[bool], *_: Any
) -> list[Tensor]:
    """What the backwards return, without values: x, deltas, logits; empty where not needed."""
    inputs = [x, *deltas, *logits]
    return [like.new_empty(like.shape if need else (0,)) for like, need in zip(inputs, needs, strict=True)]


@torch.library.custom_op("lcdd::gated_mlp", mutates_args=())
def gated_mlp(
    x: Tensor,
    bases: list[Tensor],
    deltas: list[Tensor],
    logits: list[Tensor],
    offsets: list[int],
    kind: str,
    seed: int,
    step: int,
    training: bool,
    small_batch: bool,
) -> Tensor:
    """bases, deltas: gate, up, down. logits, offsets: read, hidden, write."""
    spec, (into, out) = _spec(kind, seed, step, training), _mlp_maps(offsets)
    read, hidden, write = logits
    gate = gated_product(x, bases[0], deltas[0], hidden, read, None, spec, into, small_batch)
    up = gated_product(x, bases[1], deltas[1], hidden, read, None, spec, into, small_batch)
    activated = choose("swiglu", gate)(gate, up)
    del gate, up
    return gated_product(activated, bases[2], deltas[2], write, hidden, None, spec, out, small_batch)


@gated_mlp.register_fake
def _(x: Tensor, bases: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], bases[2].shape[0]))


@torch.library.custom_op("lcdd::gated_mlp_backward", mutates_args=())
def gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    bases: list[Tensor],
    deltas: list[Tensor],
    logits: list[Tensor],
    needs: list[bool],
    offsets: list[int],
    kind: str,
    seed: int,
    step: int,
    training: bool,
) -> list[Tensor]:
    """`needs` and the results are in the order x, three deltas, read, hidden, write."""
    spec, (into, out) = _spec(kind, seed, step, training), _mlp_maps(offsets)
    read, hidden, write = logits
    need_x, need_deltas, need_logits = needs[0], needs[1:4], needs[4:]
    need_read, need_hidden, need_write = need_logits
    need_into = need_read or need_hidden
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])

    weights = [effective_weight(x.dtype, bases[i], deltas[i], hidden, read, spec, into) for i in (0, 1)]
    gate, up = x2 @ weights[0].T, x2 @ weights[1].T
    if not need_x:
        weights.clear()
    activated = dy2 @ effective_weight(x.dtype, bases[2], deltas[2], write, hidden, spec, out)
    choose("swiglu_grad_", gate)(activated, gate, up)
    d_gate, d_up = gate, up  # in place, and d_hidden has become the activation itself

    d_down, d_write, d_hidden = weight_grads(
        dy2,
        activated,
        deltas[2],
        write,
        hidden,
        spec,
        out,
        need_delta=need_deltas[2],
        need_gates=need_hidden or need_write,
    )
    del activated
    grads_in = [
        weight_grads(d_out, x2, deltas[i], hidden, read, spec, into, need_delta=need_deltas[i], need_gates=need_into)
        for i, d_out in enumerate((d_gate, d_up))
    ]
    dx = None
    if need_x:
        dx = torch.addmm(d_gate @ weights[0], d_up, weights[1]).view(x.shape)
    (d_delta_gate, row_gate, col_gate), (d_delta_up, row_up, col_up) = grads_in
    d_logits = [
        chain_gates(read, total(col_gate, col_up), spec, offsets[0]) if need_read else None,
        chain_gates(hidden, total(row_gate, row_up, d_hidden), spec, offsets[1]) if need_hidden else None,
        chain_gates(write, d_write, spec, offsets[2]) if need_write else None,
    ]
    grads = [dx, d_delta_gate, d_delta_up, d_down, *d_logits]
    return [present(grad, like) for grad, like in zip(grads, [x, *deltas, *logits], strict=True)]


gated_mlp_backward.register_fake(_needed_gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, bases, deltas, logits, *settings, _ = inputs
    ctx.settings = settings
    ctx.save_for_backward(x, *bases, *deltas, *logits)


def _lists(ctx: Any) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[bool]]:
    """What `_setup` saved, and which of x, deltas and logits need a gradient."""
    x, *rest = ctx.saved_tensors
    need_x, _, need_deltas, need_logits, *_ = ctx.needs_input_grad
    return x, rest[:3], rest[3:6], rest[6:], [need_x, *need_deltas, *need_logits]


def _gradients(grads: list[Tensor], needs: list[bool], settings: int) -> tuple[Any, ...]:
    """As autograd takes them: x, bases (never), deltas, logits, then the settings."""
    dx, *rest = (absent(grad, need) for grad, need in zip(grads, needs, strict=True))
    return dx, [None] * 3, rest[:3], rest[3:], *[None] * settings


def _mlp_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, bases, deltas, logits, needs = _lists(ctx)
    grads = gated_mlp_backward(dy, x, bases, deltas, logits, needs, *ctx.settings)
    return _gradients(grads, needs, 6)


gated_mlp.register_autograd(_mlp_backward, setup_context=_setup)


def _qkv_maps(offsets: list[int]) -> list[GateMap]:
    read, *rows = offsets
    return [GateMap(row, read) for row in rows]


@torch.library.custom_op("lcdd::gated_qkv", mutates_args=())
def gated_qkv(
    x: Tensor,
    bases: list[Tensor],
    deltas: list[Tensor],
    logits: list[Tensor],
    offsets: list[int],
    kind: str,
    seed: int,
    step: int,
    training: bool,
    small_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """bases, deltas: q, k, v. logits, offsets: read, q, k, v."""
    read, *rows = logits
    spec, maps = _spec(kind, seed, step, training), _qkv_maps(offsets)
    q, k, v = (gated_product(x, bases[i], deltas[i], rows[i], read, None, spec, maps[i], small_batch) for i in range(3))
    return q, k, v


@gated_qkv.register_fake
def _(x: Tensor, bases: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty((*x.shape[:-1], base.shape[0])) for base in bases)
    return q, k, v


@torch.library.custom_op("lcdd::gated_qkv_backward", mutates_args=())
def gated_qkv_backward(
    dys: list[Tensor],
    x: Tensor,
    bases: list[Tensor],
    deltas: list[Tensor],
    logits: list[Tensor],
    needs: list[bool],
    offsets: list[int],
    kind: str,
    seed: int,
    step: int,
    training: bool,
) -> list[Tensor]:
    """`needs` and the results are in the order x, three deltas, read, q, k, v."""
    read, *rows = logits
    spec, maps = _spec(kind, seed, step, training), _qkv_maps(offsets)
    need_x, need_deltas, need_read, need_rows = needs[0], needs[1:4], needs[4], needs[5:]
    x2 = x.reshape(-1, x.shape[-1])
    dx: Tensor | None = None
    d_read: Tensor | None = None
    d_deltas: list[Tensor | None] = []
    d_rows: list[Tensor | None] = []
    for i, where in enumerate(maps):
        dy = dys[i].reshape(-1, dys[i].shape[-1])
        if need_x:
            weight = effective_weight(x.dtype, bases[i], deltas[i], rows[i], read, spec, where)
            dx = dy @ weight if dx is None else torch.addmm(dx, dy, weight)
            del weight
        d_delta, d_row, d_col = weight_grads(
            dy,
            x2,
            deltas[i],
            rows[i],
            read,
            spec,
            where,
            need_delta=need_deltas[i],
            need_gates=need_read or need_rows[i],
        )
        d_deltas.append(d_delta)
        d_rows.append(chain_gates(rows[i], d_row, spec, offsets[i + 1]) if need_rows[i] else None)
        d_read = total(d_read, d_col) if need_read else None
    d_logits = [chain_gates(read, d_read, spec, offsets[0]), *d_rows]
    grads = [None if dx is None else dx.view(x.shape), *d_deltas, *d_logits]
    return [present(grad, like) for grad, like in zip(grads, [x, *deltas, *logits], strict=True)]


gated_qkv_backward.register_fake(_needed_gradients)


def _qkv_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    x, bases, deltas, logits, needs = _lists(ctx)
    grads = gated_qkv_backward([dq, dk, dv], x, bases, deltas, logits, needs, *ctx.settings)
    return _gradients(grads, needs, 6)


gated_qkv.register_autograd(_qkv_backward, setup_context=_setup)
