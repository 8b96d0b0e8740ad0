"""`lcdd::channel_match` and `lcdd::channel_match_backward`; shapes and formulas in `reference/channel_match.py`.

The last-token gather is inside the op. Gathering outside saves no traffic, because autograd then fills the same zeros
around the same rows, with two launches more for every layer. The forward touches B·n_l elements of a layer, keeps N
residuals for the backward and no hidden state; the backward is one memset a layer (its gradient is dense to autograd)
and one kernel.
"""

from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose


@torch.library.custom_op("lcdd::channel_match", mutates_args=())
def channel_match(
    hidden: list[Tensor], last_index: Tensor, channels: Tensor, offsets: Tensor, target_mean: Tensor, starts: int
) -> tuple[Tensor, Tensor]:
    return choose("channel_match", *hidden)(hidden, last_index, channels, offsets, target_mean, starts)


@channel_match.register_fake
def _(
    hidden: list[Tensor], last_index: Tensor, channels: Tensor, offsets: Tensor, target_mean: Tensor, starts: int
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if hidden[0].dtype == torch.float64 else torch.float32
    return hidden[0].new_empty(starts, dtype=dtype), hidden[0].new_empty(starts, channels.shape[0], dtype=dtype)


@torch.library.custom_op("lcdd::channel_match_backward", mutates_args=())
def channel_match_backward(
    d_loss: Tensor,
    residual: Tensor,
    last_index: Tensor,
    channels: Tensor,
    offsets: Tensor,
    n_positions: int,
    n_features: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    return choose("channel_match_backward", residual)(
        d_loss, residual, last_index, channels, offsets, n_positions, n_features, dtype
    )


@channel_match_backward.register_fake
def _(
    d_loss: Tensor,
    residual: Tensor,
    last_index: Tensor,
    channels: Tensor,
    offsets: Tensor,
    n_positions: int,
    n_features: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    shape = (last_index.shape[0], n_positions, n_features)
    return [residual.new_empty(shape, dtype=dtype) for _ in range(offsets.shape[0] - 1)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, last_index, channels, offsets, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.like = (hidden[0].shape[1], hidden[0].shape[2], hidden[0].dtype)
    ctx.save_for_backward(output[1], last_index, channels, offsets)


def _backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
    residual, last_index, channels, offsets = ctx.saved_tensors
    d_hidden = channel_match_backward(d_loss, residual, last_index, channels, offsets, *ctx.like)
    return d_hidden, *[None] * 5


channel_match.register_autograd(_backward, setup_context=_setup)
