"""`lcdd::gated_linear` and its backward: y = x W_eff^T + bias, with W_eff formed from gate logits inside the op.

The backends form W_eff and reduce the gate gradients (`reference/gated_linear.py`); the library multiplies. The
forward saves its inputs only; the backward forms W_eff again for dX, makes G = dY^T X, and takes d_delta and both gate
gradients from one read of it.

Where `small_batch` is true, y = x W_base^T + r o ((x o c) delta^T): no W_eff is written, which is what counts when
there are few tokens. The backward is the same.

A gradient that is not needed is not computed, and comes back from the backward op as an empty tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lcdd_kernels.backends import choose
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gated_linear import repeat_columns
from lcdd_kernels.reference.gates import GateSpec


def gated_product(
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    bias: Tensor | None,
    spec: GateSpec,
    where: GateMap,
    small_batch: bool,
) -> Tensor:
    """x [..., in] times W_eff^T [in, out], by way of W_eff or, in a small batch, of base and delta; contiguous."""
    shape = (*x.shape[:-1], delta.shape[0])
    x = x.reshape(-1, x.shape[-1])
    if not small_batch:
        weight = effective_weight(x.dtype, weight_base, delta, row_logits, col_logits, spec, where)
        return linear(x, weight, bias).view(shape)
    r = _gate(row_logits, spec, where.row_start)
    c = repeat_columns(_gate(col_logits, spec, where.col_start), where.head_dim, where.repeat)
    # The delta's product is in delta's dtype: converting it would cost the pass over a matrix that this path saves.
    moved = linear((x * c).to(delta.dtype), delta)
    return (linear(x, weight_base.to(x.dtype), bias) + (r * moved).to(x.dtype)).view(shape)


def effective_weight(
    dtype: torch.dtype,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
) -> Tensor:
    """W_eff [out, in] in `dtype`."""
    like = torch.empty(0, dtype=dtype, device=delta.device)
    form = choose("gated_weight", weight_base, delta, row_logits, col_logits, like)
    return form(weight_base, delta, row_logits, col_logits, spec, where, dtype=dtype)


def weight_grads(
    dy: Tensor,
    x: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    where: GateMap,
    *,
    need_delta: bool,
    need_gates: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_delta, d_row_gate, d_col_gate) from dy [T, out] and x [T, in]; G is not even formed where none is needed."""
    if not (need_delta or need_gates):
        return None, None, None
    grad = dy.T @ x
    reduce = choose("gated_weight_grad", grad, delta, row_logits, col_logits)
    return reduce(grad, delta, row_logits, col_logits, spec, where, need_delta=need_delta, need_gates=need_gates)


def chain_gates(logits: Tensor, d_gate: Tensor | None, spec: GateSpec, offset: int) -> Tensor | None:
    """d_logits from the gradient of the gates; the noise is drawn again."""
    if d_gate is None:
        return None
    return choose("gate_logits_grad", logits)(logits, d_gate, spec, l0_weight=0.0, offset=offset)


def total(*parts: Tensor | None) -> Tensor | None:
    """The sum of a shared gate's gradients; None where they are not needed."""
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


def present(value: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors only: an empty one stands for a gradient that was not needed."""
    return like.new_empty(0) if value is None else value


def absent(value: Tensor, need: bool) -> Tensor | None:
    """The other way round, for autograd."""
    return value if need else None


def _gate(logits: Tensor, spec: GateSpec, offset: int) -> Tensor:
    gate, _ = choose("gate_values", logits)(logits, spec, offset=offset)
    return gate


@torch.library.custom_op("lcdd::gated_linear", mutates_args=())
def gated_linear(
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    bias: Tensor | None,
    kind: str,
    seed: int,
    step: int,
    training: bool,
    where: list[int],
    small_batch: bool,
) -> Tensor:
    spec = GateSpec(kind=kind, seed=seed, step=step, training=training)
    return gated_product(x, weight_base, delta, row_logits, col_logits, bias, spec, GateMap(*where), small_batch)


@gated_linear.register_fake
def _(x: Tensor, weight_base: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_base.shape[0]))


@torch.library.custom_op("lcdd::gated_linear_backward", mutates_args=())
def gated_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    needs: list[bool],
    kind: str,
    seed: int,
    step: int,
    training: bool,
    where: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`needs` and the results are in the order x, delta, row_logits, col_logits, bias."""
    spec, place = GateSpec(kind=kind, seed=seed, step=step, training=training), GateMap(*where)
    need_x, need_delta, need_row, need_col, need_bias = needs
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = None
    if need_x:
        weight = effective_weight(x.dtype, weight_base, delta, row_logits, col_logits, spec, place)
        dx = (dy2 @ weight).view(x.shape)
        del weight
    d_delta, d_row, d_col = weight_grads(
        dy2, x2, delta, row_logits, col_logits, spec, place, need_delta=need_delta, need_gates=need_row or need_col
    )
    d_row = chain_gates(row_logits, d_row, spec, place.row_start) if need_row else None
    d_col = chain_gates(col_logits, d_col, spec, place.col_start) if need_col else None
    d_bias = dy2.sum(dim=0) if need_bias else None
    return (
        present(dx, x),
        present(d_delta, delta),
        present(d_row, row_logits),
        present(d_col, col_logits),
        present(d_bias, x),
    )


@gated_linear_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    needs: list[bool],
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_delta, need_row, need_col, need_bias = needs
    return (
        x.new_empty(x.shape if need_x else (0,)),
        delta.new_empty(delta.shape if need_delta else (0,)),
        row_logits.new_empty(row_logits.shape if need_row else (0,)),
        col_logits.new_empty(col_logits.shape if need_col else (0,)),
        x.new_empty((delta.shape[0] if need_bias else 0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_base, delta, row_logits, col_logits, _, *settings, _ = inputs
    ctx.settings = settings
    ctx.save_for_backward(x, weight_base, delta, row_logits, col_logits)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    need_x, _, need_delta, need_row, need_col, need_bias = ctx.needs_input_grad[:6]
    needs = [need_x, need_delta, need_row, need_col, need_bias]
    grads = gated_linear_backward(dy, *ctx.saved_tensors, needs, *ctx.settings)
    dx, *rest = (absent(grad, need) for grad, need in zip(grads, needs, strict=True))
    return dx, None, *rest, *[None] * 6


gated_linear.register_autograd(_backward, setup_context=_setup)
