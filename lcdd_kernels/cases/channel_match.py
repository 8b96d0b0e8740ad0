"""Cases of channel_match: ragged channel lists (one of them empty), last tokens anywhere, strided hidden states."""

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs

STARTS = 2


def _geometry(device: torch.device, seed: int, size: int) -> tuple[Inputs, int, int, int]:
    """last_index, channels, offsets; and B, S, D."""
    generator = torch.Generator().manual_seed(seed)
    n_prompts, n_positions, n_features = STARTS * 11, 5, 203 * size
    counts = [150 * size, 0, 1, 37]
    channels = torch.cat([torch.randperm(n_features, generator=generator)[:n].sort().values for n in counts])
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    last = torch.randint(n_positions, (n_prompts,), generator=generator)
    indices = {"last_index": last.to(device), "channels": channels.to(device, torch.int32), "offsets": offsets}
    return indices, n_prompts, n_positions, n_features


def make_forward(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    indices, n_prompts, n_positions, n_features = _geometry(device, seed, size)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = [
        torch.randn(n_positions, n_prompts, n_features, generator=generator).to(device, dtype).transpose(0, 1)
        for _ in range(4)
    ]
    target = torch.randn(indices["channels"].numel(), generator=generator).to(device)
    return {"hidden": hidden, **indices, "target_mean": target, "starts": STARTS}


def expression(
    hidden: list[Tensor], last_index: Tensor, channels: Tensor, offsets: Tensor, target_mean: Tensor, starts: int
) -> tuple[Tensor, Tensor]:
    """Layer by layer, in the dtype of the hidden states."""
    bounds = offsets.tolist()
    prompts = torch.arange(hidden[0].shape[0], device=hidden[0].device)
    losses, residuals = [], []
    for layer, h in enumerate(hidden):
        part = slice(bounds[layer], bounds[layer + 1])
        if part.stop > part.start:
            rows = h[prompts, last_index][:, channels[part].long()].unflatten(0, (starts, -1))
            difference = rows.mean(1) - target_mean[part].to(h.dtype)
            losses.append(difference.square().mean(1))
            residuals.append(difference / (part.stop - part.start))
    return torch.stack(losses).mean(0).float(), torch.cat(residuals, 1).float() / len(losses)


def make_backward(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    indices, _, n_positions, n_features = _geometry(device, seed, size)
    generator = torch.Generator().manual_seed(seed + 1)
    residual = torch.randn(STARTS, indices["channels"].numel(), generator=generator).to(device)
    d_loss = torch.tensor([0.7, -0.2], device=device)
    sizes = {"n_positions": n_positions, "n_features": n_features, "dtype": dtype}
    return {"d_loss": d_loss, "residual": residual, **indices, **sizes}


def backward_expression(
    d_loss: Tensor,
    residual: Tensor,
    last_index: Tensor,
    channels: Tensor,
    offsets: Tensor,
    n_positions: int,
    n_features: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    n_rows, starts = last_index.shape[0], residual.shape[0]
    n_prompts = n_rows // starts
    prompts = torch.arange(n_rows, device=residual.device)[:, None]
    d_hidden = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        d_h = torch.zeros(n_rows, n_positions, n_features, dtype=dtype, device=residual.device)
        value = (2 * d_loss[:, None] * residual[:, start:stop] / n_prompts).to(dtype)
        d_h[prompts, last_index[:, None], channels[start:stop].long()[None]] = value.repeat_interleave(n_prompts, 0)
        d_hidden.append(d_h)
    return d_hidden


CASES = {
    "channel_match": Case(
        make=make_forward, expression=expression, outputs=("loss", "residual"), depth={"loss": 8, "residual": 4}
    ),
    "channel_match_backward": Case(make=make_backward, expression=backward_expression, outputs=("d_hidden",)),
}
