"""Activation matching over all layers: one kernel forward, one backward, through a table of pointers.

L layers, A starts (independent batches, one after the other in the rows of h), B prompts of each, S positions, D model
width, n_l channels of layer l (ragged), L' = layers that have channels.

    m_c       = (1/B) Σ_b h_l[b, last_b, c]                     float32
    residual  = (m_c − target_c) / (L' n_l)                      loss = Σ residual · (m_c − target_c)
    d h_l[b, last_b, c] = 2 residual_c / B · dloss               everything else is zero

A program owns BLOCK_C channels of one layer and one start. The kernel reads the last tokens' open channels where they
lie (B·n_l elements of a layer's B·S·D), and the backward writes them into zero-filled gradients. Every program stores
its share of the loss, and the shares are added in a fixed order: no atomics. A channel or a last token outside its
range gives a NaN loss and no stray access.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch, triton_dtype
from lcdd_kernels.triton_kernels.tables import TableCache

# Columns of the table (5): address of h_l, its strides by prompt and by position (elements), first channel, number of
# channels.
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, kw_only=True)
class MatchConfig(LaunchConfig):
    """Channels and prompts a program takes at a time; a thread has eight gathers in flight."""

    block_b: int = 8
    block_c: int = 128


CONFIG = MatchConfig()
_tables = TableCache()


@triton.jit(do_not_specialize=["n_prompts", "n_positions", "n_features", "n_channels", "n_partials", "inv_layers"])
def channel_match_fwd_kernel(
    table_ptr,
    last_ptr,
    channels_ptr,
    target_ptr,
    residual_ptr,
    partial_ptr,
    n_prompts: tl.int32,
    n_positions: tl.int32,
    n_features: tl.int32,
    n_channels: tl.int32,
    n_partials: tl.int32,
    inv_layers: tl.float32,
    DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs (layer, block of channels, start): residual[A, N] and this program's share of the start's loss."""
    layer = tl.program_id(0)
    first_row = tl.program_id(2) * n_prompts
    row = table_ptr + layer * 5
    hidden = tl.load(row).to(tl.pointer_type(DTYPE))
    stride_b = tl.load(row + 1)
    stride_s = tl.load(row + 2)
    start = tl.load(row + 3)
    count = tl.load(row + 4)
    index = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = index < count
    channel = tl.load(channels_ptr + start + index, mask=inside, other=0)
    real = (channel >= 0) & (channel < n_features)
    of_prompts = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    for first in range(0, n_prompts, BLOCK_B):
        prompt = first + tl.arange(0, BLOCK_B)
        last = tl.load(last_ptr + first_row + prompt, mask=prompt < n_prompts, other=0)
        offset = ((first_row + prompt).to(tl.int64) * stride_b + last * stride_s)[:, None] + channel[None, :]
        there = (prompt < n_prompts) & (last >= 0) & (last < n_positions)
        value = tl.load(hidden + offset, mask=there[:, None] & (inside & real)[None, :], other=0.0).to(tl.float32)
        # A last token that is not there must not pass for a zero.
        of_prompts += tl.where(((prompt < n_prompts) & (there == 0))[:, None], float("nan"), value)
    total = tl.sum(of_prompts, axis=0)
    target = tl.load(target_ptr + start + index, mask=inside, other=0.0).to(tl.float32)
    difference = total / n_prompts - target
    difference = tl.where(inside, tl.where(real, difference, float("nan")), 0.0)
    residual = difference * (inv_layers / tl.maximum(count, 1).to(tl.float32))
    residual_row = residual_ptr + tl.program_id(2).to(tl.int64) * n_channels
    tl.store(residual_row + start + index, residual, mask=inside)
    place = (tl.program_id(2) * tl.num_programs(0) + layer) * n_partials + tl.program_id(1)
    tl.store(partial_ptr + place, tl.sum(residual * difference, axis=0))


@triton.jit(do_not_specialize=["n_prompts", "n_positions", "n_features", "n_channels"])
def channel_match_bwd_kernel(
    table_ptr,
    last_ptr,
    channels_ptr,
    residual_ptr,
    d_loss_ptr,
    n_prompts: tl.int32,
    n_positions: tl.int32,
    n_features: tl.int32,
    n_channels: tl.int32,
    DTYPE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs (layer, block of channels, start): writes the last tokens' channels of the zero-filled d_hidden in the
    table."""
    first_row = tl.program_id(2) * n_prompts
    row = table_ptr + tl.program_id(0) * 5
    d_hidden = tl.load(row).to(tl.pointer_type(DTYPE))
    stride_b = tl.load(row + 1)
    stride_s = tl.load(row + 2)
    start = tl.load(row + 3)
    count = tl.load(row + 4)
    index = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = index < count
    channel = tl.load(channels_ptr + start + index, mask=inside, other=0)
    inside = inside & (channel >= 0) & (channel < n_features)
    scale = tl.load(d_loss_ptr + tl.program_id(2)).to(tl.float32) * (2.0 / n_prompts)
    residual_row = residual_ptr + tl.program_id(2).to(tl.int64) * n_channels
    value = (tl.load(residual_row + start + index, mask=inside, other=0.0) * scale)[None, :]
    for first in range(0, n_prompts, BLOCK_B):
        prompt = first + tl.arange(0, BLOCK_B)
        last = tl.load(last_ptr + first_row + prompt, mask=prompt < n_prompts, other=0)
        offset = ((first_row + prompt).to(tl.int64) * stride_b + last * stride_s)[:, None] + channel[None, :]
        there = (prompt < n_prompts) & (last >= 0) & (last < n_positions)
        mask = there[:, None] & inside[None, :]
        tl.store(d_hidden + offset, (value + tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)).to(DTYPE), mask=mask)


def _table(tensors: Sequence[torch.Tensor], bounds: Sequence[int], device: torch.device) -> torch.Tensor:
    rows = tuple(
        (h.data_ptr(), h.stride(0), h.stride(1), bounds[layer], bounds[layer + 1] - bounds[layer])
        for layer, h in enumerate(tensors)
    )
    return _tables.get(rows, lambda: torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


def _blocks(bounds: Sequence[int]) -> int:
    return triton.cdiv(max(b - a for a, b in pairwise(bounds)), CONFIG.block_c)


def channel_match_triton(
    hidden: Sequence[torch.Tensor],
    last_index: torch.Tensor,
    channels: torch.Tensor,
    offsets: torch.Tensor,
    target_mean: torch.Tensor,
    starts: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden L × [A·B, S, D], last_index int64[A·B], channels int32[N], offsets int64[L+1] CPU, target_mean[N] ->
    (loss[A], residual[A, N])."""
    device = hidden[0].device
    bounds = offsets.tolist()
    rows = [h if h.stride(2) == 1 else h.contiguous() for h in hidden]
    residual = torch.empty(starts, bounds[-1], dtype=torch.float32, device=device)
    n_blocks = _blocks(bounds)
    partial = torch.empty(starts, len(rows) * n_blocks, dtype=torch.float32, device=device)
    n_layers = sum(b > a for a, b in pairwise(bounds))
    launch(
        channel_match_fwd_kernel,
        (len(rows), n_blocks, starts),
        CONFIG,
        table_ptr=_table(rows, bounds, device),
        last_ptr=last_index.contiguous(),
        channels_ptr=channels.contiguous(),
        target_ptr=target_mean.float().contiguous(),
        residual_ptr=residual,
        partial_ptr=partial,
        n_prompts=hidden[0].shape[0] // starts,
        n_positions=hidden[0].shape[1],
        n_features=hidden[0].shape[2],
        n_channels=bounds[-1],
        n_partials=n_blocks,
        inv_layers=1.0 / max(n_layers, 1),
        DTYPE=_DTYPES[hidden[0].dtype],
        BLOCK_B=CONFIG.block_b,
        BLOCK_C=CONFIG.block_c,
    )
    return partial.sum(dim=1), residual


def channel_match_backward_triton(
    d_loss: torch.Tensor,
    residual: torch.Tensor,
    last_index: torch.Tensor,
    channels: torch.Tensor,
    offsets: torch.Tensor,
    n_positions: int,
    n_features: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """d_loss[A], residual[A, N] -> d_hidden, L × [A·B, S, D] in `dtype`. Channels of a layer must be distinct."""
    bounds = offsets.tolist()
    n_rows, starts = last_index.shape[0], residual.shape[0]
    d_hidden = [
        torch.zeros(n_rows, n_positions, n_features, dtype=dtype, device=residual.device)
        for _ in range(len(bounds) - 1)
    ]
    launch(
        channel_match_bwd_kernel,
        (len(d_hidden), _blocks(bounds), starts),
        CONFIG,
        table_ptr=_table(d_hidden, bounds, residual.device),
        last_ptr=last_index.contiguous(),
        channels_ptr=channels.contiguous(),
        residual_ptr=residual,
        d_loss_ptr=d_loss.contiguous(),
        n_prompts=n_rows // starts,
        n_positions=n_positions,
        n_features=n_features,
        n_channels=bounds[-1],
        DTYPE=_DTYPES[dtype],
        BLOCK_B=CONFIG.block_b,
        BLOCK_C=CONFIG.block_c,
    )
    return d_hidden


def aot_signatures() -> Iterator[AotSignature]:
    """Both kernels for every dtype of the hidden states; there is one configuration."""
    for dtype, tl_dtype in _DTYPES.items():
        constexprs = {"DTYPE": tl_dtype, "BLOCK_B": CONFIG.block_b, "BLOCK_C": CONFIG.block_c}
        shared = {"table_ptr": "*i64", "last_ptr": "*i64", "channels_ptr": "*i32"}
        sizes = {"n_prompts": "i32", "n_positions": "i32", "n_features": "i32", "n_channels": "i32"}
        yield AotSignature(
            kernel=channel_match_fwd_kernel,
            label=triton_dtype(dtype),
            config=CONFIG,
            signature=shared
            | {"target_ptr": "*fp32", "residual_ptr": "*fp32", "partial_ptr": "*fp32"}
            | sizes
            | {"n_partials": "i32", "inv_layers": "fp32"},
            constexprs=constexprs,
        )
        yield AotSignature(
            kernel=channel_match_bwd_kernel,
            label=triton_dtype(dtype),
            config=CONFIG,
            signature=shared | {"residual_ptr": "*fp32", "d_loss_ptr": "*fp32"} | sizes,
            constexprs=constexprs,
        )
