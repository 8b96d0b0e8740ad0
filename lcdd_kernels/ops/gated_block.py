"""`lcdd::gated_mlp` and `lcdd::gated_qkv`: the projections of a block that share gates, in one op each.

    gated_mlp   gate, up: [F, D], rows `hidden`, columns `read`;  down: [D, F], rows `write`, columns `hidden`
                y = down(silu(gate x) * up x)
    gated_qkv   q, k, v: rows of their own, columns `read`

Launches: one draws the gates of the block, one forms the W_eff of its three projections, the library multiplies three
times, and the MLP has SwiGLU between: 6 and 5. What stays separate, and why: the products, because a matrix product
that formed W_eff on the fly would form it again for every tile of tokens; SwiGLU, because as an epilogue it needs gate
and up in one product kernel of our own, which has to be as fast as the library's to gain the one pass over [T, F]
that it saves, and nobody has measured that here; the gates, because tiles that drew them themselves would each draw
what others have drawn.

Only inputs are saved. The MLP's backward multiplies by gate and up again rather than keep three [T, F] activations. The
gradient of a shared gate is summed over its projections before it is chained to the logits. Pieces as in
`ops/gated_linear.py`. D model width, F feed-forward width, T tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lcdd_kernels.backends import choose
from lcdd_kernels.ops.gated_linear import Block, absent, present, total
from lcdd_kernels.reference.gates import GateSpec

# For every matrix of a block, which vectors of logits gate its rows and its columns.
MLP_SIDES = ((1, 0), (1, 0), (2, 1))  # gate, up, down of read, hidden, write
QKV_SIDES = ((1, 0), (2, 0), (3, 0))  # q, k, v of read, q, k, v


def _spec(kind: str, seed: int, step: int, training: bool) -> GateSpec:
    return GateSpec(kind=kind, seed=seed, step=step, training=training)


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
    block = Block(bases, deltas, logits, offsets, _spec(kind, seed, step, training), MLP_SIDES)
    x2 = x.reshape(-1, x.shape[-1])
    if small_batch:
        activated = choose("swiglu", x2)(block.split_product(x2, 0), block.split_product(x2, 1))
        y = block.split_product(activated, 2)
    else:
        gate, up, down = block.weights(x.dtype, 0, 1, 2)
        y = linear(choose("swiglu", x2)(linear(x2, gate), linear(x2, up)), down)
    return y.view(*x.shape[:-1], bases[2].shape[0])


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
    block = Block(bases, deltas, logits, offsets, _spec(kind, seed, step, training), MLP_SIDES)
    need_x, need_deltas, need_logits = needs[0], needs[1:4], needs[4:]
    need_read, need_hidden, need_write = need_logits
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])

    weights = block.weights(x.dtype, 0, 1, 2)
    gate, up = x2 @ weights[0].T, x2 @ weights[1].T
    activated = dy2 @ weights.pop()
    if not need_x:
        weights.clear()
    choose("swiglu_grad_", gate)(activated, gate, up)
    d_gate, d_up = gate, up  # in place, and d_hidden has become the activation itself

    d_down, d_write, d_hidden = block.grads(
        dy2, activated, 2, need_delta=need_deltas[2], need_gates=need_hidden or need_write
    )
    del activated
    grads_in = [
        block.grads(d_out, x2, i, need_delta=need_deltas[i], need_gates=need_read or need_hidden)
        for i, d_out in enumerate((d_gate, d_up))
    ]
    dx = None
    if need_x:
        dx = torch.addmm(d_gate @ weights[0], d_up, weights[1]).view(x.shape)
    (d_delta_gate, row_gate, col_gate), (d_delta_up, row_up, col_up) = grads_in
    d_logits = [
        block.chain(total(col_gate, col_up), 0) if need_read else None,
        block.chain(total(row_gate, row_up, d_hidden), 1) if need_hidden else None,
        block.chain(d_write, 2) if need_write else None,
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
    block = Block(bases, deltas, logits, offsets, _spec(kind, seed, step, training), QKV_SIDES)
    x2 = x.reshape(-1, x.shape[-1])
    if small_batch:
        found = [block.split_product(x2, i) for i in range(3)]
    else:
        found = [linear(x2, weight) for weight in block.weights(x.dtype, 0, 1, 2)]
    q, k, v = (y.view(*x.shape[:-1], y.shape[-1]) for y in found)
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
    block = Block(bases, deltas, logits, offsets, _spec(kind, seed, step, training), QKV_SIDES)
    need_x, need_deltas, need_read, need_rows = needs[0], needs[1:4], needs[4], needs[5:]
    x2, dys2 = x.reshape(-1, x.shape[-1]), [dy.reshape(-1, dy.shape[-1]) for dy in dys]
    dx: Tensor | None = None
    if need_x:
        weights = block.weights(x.dtype, 0, 1, 2)
        dx = dys2[0] @ weights[0]
        for dy, weight in zip(dys2[1:], weights[1:], strict=True):
            dx = torch.addmm(dx, dy, weight)
        del weights, weight
    found = [
        block.grads(dys2[i], x2, i, need_delta=need_deltas[i], need_gates=need_read or need_rows[i]) for i in range(3)
    ]
    d_deltas = [d_delta for d_delta, _, _ in found]
    d_read = total(*(d_col for _, _, d_col in found)) if need_read else None
    d_rows = [block.chain(d_row, 1 + i) if need_rows[i] else None for i, (_, d_row, _) in enumerate(found)]
    d_logits = [block.chain(d_read, 0), *d_rows]
    grads = [None if dx is None else dx.view(x.shape), *d_deltas, *d_logits]
    return [present(grad, like) for grad, like in zip(grads, [x, *deltas, *logits], strict=True)]


gated_qkv_backward.register_fake(_needed_gradients)


def _qkv_backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Any, ...]:
    x, bases, deltas, logits, needs = _lists(ctx)
    grads = gated_qkv_backward([dq, dk, dv], x, bases, deltas, logits, needs, *ctx.settings)
    return _gradients(grads, needs, 6)


gated_qkv.register_autograd(_qkv_backward, setup_context=_setup)
