"""Patches made from patches: gates closed by group, by layer, by another patch's, or at random (method, section 5)."""

from dataclasses import replace

import torch
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.errors import InputError
from lcdd.models import GROUPS


def with_gates(patch: Carrier, gate: Tensor) -> Carrier:
    """`patch` with other gates [n_gates], open only where its own are, and the part of Δ that they leave.

    Parameters that no gate masks stay as the patch has them.

    Raises:
        InputError: a gate is open where the patch's is closed: the patch has no Δ there.
    """
    if gate.shape != patch.gate.shape:
        raise InputError(f"gate: expected shape {tuple(patch.gate.shape)}, got {tuple(gate.shape)}")
    gate = gate.to(patch.gate)
    if extra := int(((gate != 0) & (patch.gate == 0)).sum()):
        raise InputError(f"gate: expected gates open only where the patch's are, {extra} others are open")
    deltas = {}
    for matrix in patch.layout.matrices:
        before, after = (patch.open_block(values, matrix) for values in (patch.gate, gate))
        rows, cols = (torch.searchsorted(old, new) for old, new in zip(before, after, strict=True))
        deltas[matrix.name] = patch.deltas[matrix.name][rows][:, cols].contiguous()
    return replace(patch, gate=gate, deltas=deltas)


def without_group(patch: Carrier, group: str) -> Carrier:
    """`patch` with every gate of `group` closed, in all layers."""
    if group not in GROUPS:
        raise InputError(f"group: expected one of {GROUPS}, got {group!r}")
    gate = patch.gate.clone()
    for layer in range(patch.layout.n_layers):
        gate[patch.layout.slice(layer, group)] = 0
    return with_gates(patch, gate)


def without_layer(patch: Carrier, layer: int) -> Carrier:
    """`patch` with every gate of one layer closed."""
    gate = patch.gate.clone()
    for group in GROUPS:
        gate[patch.layout.slice(layer, group)] = 0
    return with_gates(patch, gate)


def only_channels(patch: Carrier, channels: Tensor) -> Carrier:
    """`patch` on the gates that `channels`, bool [n_gates], marks; its own gate values there."""
    return with_gates(patch, patch.gate * channels.to(patch.gate.dtype))


def without_channels(patch: Carrier, channels: Tensor) -> Carrier:
    """`patch` on all gates but those that `channels`, bool [n_gates], marks."""
    return only_channels(patch, ~channels)


def random_channels(carrier: Carrier, *, seed: int) -> Tensor:
    """bool [n_gates]: in every group of every layer as many channels as the carrier has open, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(carrier.layout.n_gates, dtype=torch.bool, device="cpu")
    for (_, _, size), start in zip(carrier.layout.groups, carrier.layout.offsets.tolist(), strict=False):
        count = int((carrier.gate[start : start + size] != 0).sum())
        chosen[start + torch.randperm(size, generator=generator, device="cpu")[:count]] = True
    return chosen
