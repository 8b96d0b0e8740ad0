"""`lcdd::gated_linear` and its backward: y = x W_eff^T + bias, with W_eff formed from gate logits inside the op.

A call draws its gates once (`block_gates`, one launch), forms the W_eff of all its matrices from them (`gated_weights`,
one launch), and leaves the products to the library. Gates are a few KB that the forming launch finds in the cache;
drawn by each of its tiles they would be drawn once for every 64 rows and every 256 columns. The forward saves its
inputs only; the backward draws and forms again for dX, makes G = dY^T X, and takes d_delta and both gate gradients from
one read of it.

Where `small_batch` is true, y = x W_base^T + r o ((x o c) delta^T): no W_eff is written, which is what counts when
there are few tokens. The backward is the same.

A gradient that is not needed is not computed, and comes back from the backward op as an empty tensor.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lcdd_kernels.backends import choose
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gated_linear import row_and_col_gates
from lcdd_kernels.reference.gates import GateSpec


class Block:
    """The matrices of a call, their gates drawn.

    logits, offsets: vectors of logits, and where each is in the model's flat vector. sides: for every matrix the
    vectors of its row and of its column gates, as numbers; head_dim, repeat: of the columns of all of them.
    """

    def __init__(
        self,
        bases: Sequence[Tensor],
        deltas: Sequence[Tensor],
        logits: Sequence[Tensor],
        offsets: Sequence[int],
        spec: GateSpec,
        sides: Sequence[tuple[int, int]],
        *,
        head_dim: int = 1,
        repeat: int = 1,
    ) -> None:
        self.bases, self.deltas, self.logits, self.offsets, self.spec = bases, deltas, logits, offsets, spec
        starts = [0, *accumulate(len(part) for part in logits)]
        self.maps = [GateMap(starts[row], starts[col], head_dim, repeat) for row, col in sides]
        self.gate = choose("block_gates", *logits)(logits, offsets, spec)

    def weights(self, dtype: torch.dtype, *which: int) -> list[Tensor]:
        """W_eff [out, in] of these matrices in `dtype`, by one launch."""
        bases, deltas = ([of_all[m] for m in which] for of_all in (self.bases, self.deltas))
        maps = [self.maps[m] for m in which]
        like = torch.empty(0, dtype=dtype, device=self.gate.device)
        form = choose("gated_weights", *bases, *deltas, self.gate, like)
        return form(bases, deltas, self.gate, maps, dtype=dtype)

    def split_product(self, x: Tensor, m: int, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times W_eff^T of matrix m, by way of base and delta: for small batches."""
        base, delta = self.bases[m], self.deltas[m]
        r, c = row_and_col_gates(self.gate, self.maps[m], base.shape)
        # The delta's product is in delta's dtype: converting it would cost the pass over a matrix that this path saves.
        moved = linear((x * c).to(delta.dtype), delta)
        return linear(x, base.to(x.dtype), bias) + (r * moved).to(x.dtype)

    def grads(
        self, dy: Tensor, x: Tensor, m: int, *, need_delta: bool, need_gates: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d_delta, d_row_gate, d_col_gate) of matrix m from dy [T, out] and x [T, in]; G is not even formed where none
        is needed."""
        if not (need_delta or need_gates):
            return None, None, None
        grad, delta = dy.T @ x, self.deltas[m]
        reduce = choose("gated_weight_grad", grad, delta, self.gate)
        return reduce(grad, delta, self.gate, self.maps[m], need_delta=need_delta, need_gates=need_gates)

    def chain(self, d_gate: Tensor | None, vector: int) -> Tensor | None:
        """d_logits of a vector of logits from the gradient of its gates; the noise is drawn again."""
        if d_gate is None:
            return None
        logits = self.logits[vector]
        chain = choose("gate_logits_grad", logits)
        return chain(logits, d_gate.to(logits.dtype), self.spec, l0_weight=0.0, offset=self.offsets[vector])


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


def _block(
    weight_base: Tensor, delta: Tensor, row_logits: Tensor, col_logits: Tensor, spec: GateSpec, place: GateMap
) -> Block:
    """One matrix; place: of its logits in the model's flat vector."""
    offsets = [place.row_start, place.col_start]
    rest = {"head_dim": place.head_dim, "repeat": place.repeat}
    return Block([weight_base], [delta], [row_logits, col_logits], offsets, spec, [(0, 1)], **rest)


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
    block = _block(weight_base, delta, row_logits, col_logits, spec, GateMap(*where))
    x2 = x.reshape(-1, x.shape[-1])
    y = block.split_product(x2, 0, bias) if small_batch else linear(x2, block.weights(x.dtype, 0)[0], bias)
    return y.view(*x.shape[:-1], delta.shape[0])


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
    spec = GateSpec(kind=kind, seed=seed, step=step, training=training)
    block = _block(weight_base, delta, row_logits, col_logits, spec, GateMap(*where))
    need_x, need_delta, need_row, need_col, need_bias = needs
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = (dy2 @ block.weights(x.dtype, 0)[0]).view(x.shape) if need_x else None
    d_delta, d_row, d_col = block.grads(dy2, x2, 0, need_delta=need_delta, need_gates=need_row or need_col)
    d_row = block.chain(d_row, 0) if need_row else None
    d_col = block.chain(d_col, 1) if need_col else None
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
