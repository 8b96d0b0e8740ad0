"""Activation matching in plain PyTorch (method, section 4; the first term of SFT-Eraser's loss).

Shapes: L layers, A starts (independent batches, one after the other in the rows), B prompts of each, S positions, D
model width, n_l channels of layer l, N = Σ n_l. Below, one start.

    loss = (1/L') Σ_l (1/n_l) Σ_{c ∈ C_l} ( (1/B) Σ_b h_l[b, last_b, c] − target_l[c] )²        L' = layers with
    channels

    residual[c]            = (mean − target) / (L' n_l)      so that loss = Σ residual · (mean − target)
    dloss/dh_l[b, last_b, c] = 2 residual[c] / B             zero everywhere else

The residual (N numbers) is all that the backward needs. Low-precision inputs are accumulated in float32, float64 in
float64.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

__all__ = ["channel_match_backward_ref", "channel_match_ref"]


def _layer_weights(offsets: torch.Tensor) -> list[float]:
    """offsets int64[L+1] (CPU) -> 1/(L' n_l) of each layer; 0 for a layer without channels, which is left out of the
    mean."""
    counts = offsets.diff().tolist()
    n_layers = sum(count > 0 for count in counts)
    return [1.0 / (n_layers * count) if count else 0.0 for count in counts]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def channel_match_ref(
    hidden: Sequence[torch.Tensor],
    last_index: torch.Tensor,
    channels: torch.Tensor,
    offsets: torch.Tensor,
    target_mean: torch.Tensor,
    starts: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden L × [A·B, S, D], last_index int64[A·B], channels int32[N], offsets int64[L+1] CPU, target_mean[N] ->
    (loss[A], residual[A, N]).

    loss and residual are float32, or float64 for float64 `hidden`.
    """
    dtype = _accumulation_dtype(hidden[0].dtype)
    prompts = torch.arange(hidden[0].shape[0], device=hidden[0].device)
    bounds = offsets.tolist()
    residual = torch.empty(starts, bounds[-1], dtype=dtype, device=hidden[0].device)
    loss = torch.zeros(starts, dtype=dtype, device=hidden[0].device)
    for layer, (h, weight) in enumerate(zip(hidden, _layer_weights(offsets), strict=True)):
        part = slice(bounds[layer], bounds[layer + 1])
        mean = h[prompts, last_index].to(dtype).unflatten(0, (starts, -1)).mean(dim=1)[:, channels[part].long()]
        difference = mean - target_mean[part].to(dtype)
        residual[:, part] = weight * difference
        loss = loss + (residual[:, part] * difference).sum(dim=1)
    return loss, residual


def channel_match_backward_ref(
    d_loss: torch.Tensor,
    residual: torch.Tensor,
    last_index: torch.Tensor,
    channels: torch.Tensor,
    offsets: torch.Tensor,
    n_positions: int,
    n_features: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """d_loss[A], residual[A, N] -> d_hidden, L × [A·B, S, D] in `dtype`, zero outside the last tokens' channels.
    Channels of a layer are distinct."""
    n_rows, starts = last_index.shape[0], residual.shape[0]
    n_prompts = n_rows // starts
    prompts = torch.arange(n_rows, device=residual.device)
    if residual.dtype == torch.float64:  # only float64 hidden states have float64 residuals
        dtype = torch.float64
    bounds = offsets.tolist()
    d_channel = residual * (d_loss.to(residual.dtype) * (2.0 / n_prompts))[:, None]
    d_hidden = []
    for start, stop in pairwise(bounds):
        row = residual.new_zeros(starts, n_features)
        row.index_add_(1, channels[start:stop].long(), d_channel[:, start:stop])
        d_h = torch.zeros(n_rows, n_positions, n_features, dtype=dtype, device=residual.device)
        d_h[prompts, last_index] = row.to(dtype).repeat_interleave(n_prompts, 0)
        d_hidden.append(d_h)
    return d_hidden
