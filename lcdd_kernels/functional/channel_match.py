"""Activation matching over all layers (method, section 4).

Shapes: L layers, B prompts, S positions, D model width, n_l channels of layer l, N = Σ n_l.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import FLOATS, fail
from lcdd_kernels.ops import channel_match as ops

__all__ = ["channel_match", "last_token_index"]


def last_token_index(attention_mask: Tensor) -> Tensor:
    """attention_mask[B, S] (nonzero = a real token; right- or left-padded) -> int64[B], position of each prompt's last
    token."""
    checks.check_shape("attention_mask", attention_mask, (None, None))
    real = attention_mask != 0
    if real.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(real.any(dim=1).all()):
        raise fail(
            "attention_mask",
            "at least one token in every row",
            f"no token in row {int(real.any(dim=1).long().argmin())}",
        )
    return (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(dim=1)


def channel_match(
    hidden: Sequence[Tensor],
    channels: Tensor,
    offsets: Tensor,
    target_mean: Tensor,
    *,
    attention_mask: Tensor | None = None,
    last_index: Tensor | None = None,
    starts: int | None = None,
) -> Tensor:
    """mean over layers of MSE( mean over prompts of h_l[last token, C_l],  target_mean of layer l ) -> loss[], float32.

    hidden: L tensors [B, S, D] of one shape, dtype and device (any strides), with `attention_mask`[B, S] or
            `last_index` int64[B]; or L tensors [B, D] that hold the last tokens already, with neither. Differentiable;
            float64 gives a float64 loss.
    channels: int32[N], layer after layer, distinct within a layer. offsets: int64[L+1] on the CPU, 0 to N.
    target_mean: float[N], no gradient.
    starts: so many batches in one, all of a size, the prompts of one after those of another: their losses [starts].
    A layer without channels is left out of the mean; no channels at all give 0.

    To autograd d_hidden is a dense [B, S, D] for every layer, alive until that layer's backward. Where that memory
    matters, gather the last tokens ([B, D]) in a hook of each layer: then its gradient is made when the layer's turn
    comes.
    """
    rows = _check_hidden(hidden)
    n_prompts, n_positions, n_features = rows[0].shape
    device = rows[0].device
    if starts is not None:
        checks.check_int("starts", starts, 1, n_prompts + 1)
        if n_prompts % starts:
            raise fail("starts", f"a divisor of {n_prompts} (rows of hidden)", starts)
    last = _last_index(hidden, attention_mask, last_index, n_prompts, n_positions)
    checks.check_device("last_index", last, device)
    _check_channels(channels, offsets, len(rows), n_features, device)
    checks.check_shape("target_mean", target_mean, (channels.shape[0],))
    checks.check_dtype("target_mean", target_mean, FLOATS)
    checks.check_device("target_mean", target_mean, device)
    if target_mean.requires_grad:
        raise fail("target_mean", "a constant", "a tensor that requires grad")
    loss, _ = ops.channel_match(list(rows), last, channels, offsets, target_mean, starts or 1)
    return loss.view(()) if starts is None else loss


def _check_hidden(hidden: Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(hidden, Tensor) or len(hidden) == 0:
        raise fail("hidden", "a non-empty sequence of tensors, one a layer", type(hidden).__name__)
    first = checks.check_tensor("hidden", hidden[0])
    if first.dim() not in (2, 3):
        raise fail("hidden", "tensors [B, S, D] or [B, D]", f"shape {list(first.shape)}")
    if 0 in first.shape:
        raise fail("hidden", "no empty dimension", f"shape {list(first.shape)}")
    checks.check_dtype("hidden[0]", first, FLOATS)
    for layer, h in enumerate(hidden):
        checks.check_shape(f"hidden[{layer}]", h, first.shape)
        checks.check_dtype(f"hidden[{layer}]", h, (first.dtype,))
        checks.check_device(f"hidden[{layer}]", h, first.device)
    return hidden if first.dim() == 3 else [h.unsqueeze(1) for h in hidden]


def _last_index(
    hidden: Sequence[Tensor], attention_mask: Tensor | None, last_index: Tensor | None, n_prompts: int, n_positions: int
) -> Tensor:
    given = [name for name, v in (("attention_mask", attention_mask), ("last_index", last_index)) if v is not None]
    if hidden[0].dim() == 2:
        if given:
            raise fail(given[0], "None with hidden [B, D]", "a tensor")
        return torch.zeros(n_prompts, dtype=torch.int64, device=hidden[0].device)
    if len(given) != 1:
        raise fail("attention_mask", "it or last_index, one of the two", "both" if given else "neither")
    if attention_mask is not None:
        checks.check_shape("attention_mask", attention_mask, (n_prompts, n_positions))
        return last_token_index(attention_mask)
    assert last_index is not None
    checks.check_shape("last_index", last_index, (n_prompts,))
    checks.check_dtype("last_index", last_index, (torch.int64,))
    if last_index.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(last_index.min()), int(last_index.max())
        if low < 0 or high >= n_positions:
            raise fail("last_index", f"positions in [0, {n_positions})", f"positions in [{low}, {high}]")
    return last_index


def _check_channels(channels: Tensor, offsets: Tensor, n_layers: int, n_features: int, device: torch.device) -> None:
    checks.check_shape("channels", channels, (None,))
    checks.check_dtype("channels", channels, (torch.int32,))
    checks.check_device("channels", channels, device)
    checks.check_shape("offsets", offsets, (n_layers + 1,))
    checks.check_dtype("offsets", offsets, (torch.int64,))
    checks.check_device("offsets", offsets, torch.device("cpu"))
    if torch.compiler.is_compiling():
        return
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != channels.shape[0] or any(a > b for a, b in pairwise(bounds)):
        raise fail("offsets", f"ascending from 0 to {channels.shape[0]} (the number of channels)", bounds)
    # On a GPU reading them would make the host wait; there the kernel answers a channel out of range with a NaN loss.
    if channels.device.type != "cpu" or channels.numel() == 0:
        return
    low, high = int(channels.min()), int(channels.max())
    if low < 0 or high >= n_features:
        raise fail("channels", f"indices in [0, {n_features})", f"indices in [{low}, {high}]")
    layer = torch.repeat_interleave(torch.arange(n_layers, device="cpu"), offsets.diff())
    keys = layer * n_features + channels.long()
    if keys.unique().numel() != keys.numel():
        raise fail("channels", "distinct channels within a layer", "a channel twice in a layer")
