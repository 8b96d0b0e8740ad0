"""Patches made from patches: gates closed by group, by layer, by another patch's, or at random (method, section 5)."""

from dataclasses import replace

import torch
from torch import Tensor

from lcdd.carrier.carrier import Carrier
from lcdd.carrier.patching import open_block
from lcdd.models import GROUPS


def with_gates(patch: Carrier, gate: Tensor) -> Carrier:
    """`patch` with other gates [n_gates], open only where its own are, and the part of Δ that they leave.

    Parameters that no gate masks stay as the patch has them.

    Raises:
        ValueError: a gate is open where the patch's is closed: the patch has no Δ there.
    """
    if gate.shape != patch.gate.shape:
        raise ValueError(f"gate: expected shape {tuple(patch.gate.shape)}, got {tuple(gate.shape)}")
    gate = gate.to(patch.gate)
    if extra := int(((gate != 0) & (patch.gate == 0)).sum()):
        raise ValueError(f"gate: expected gates open only where the patch's are, {extra} others are open")
    deltas = {}
    for name, gate_map, size in patch.sites():
        before, after = open_block(patch.gate, gate_map, size), open_block(gate, gate_map, size)
        rows, cols = (torch.searchsorted(old, new) for old, new in zip(before, after, strict=True))
        deltas[name] = patch.deltas[name][rows][:, cols].contiguous()
    return replace(patch, gate=gate, deltas=deltas)


def without_group(patch: Carrier, group: str) -> Carrier:
    """`patch` with every gate of `group` closed, in all layers."""
    if group not in GROUPS:
        raise ValueError(f"group: expected one of {GROUPS}, got {group!r}")
    gate = patch.gate.clone()
    for layer in range(patch.shape.n_layers):
        gate[patch.layout.slice(layer, group)] = 0
    return with_gates(patch, gate)


def without_layer(patch: Carrier, layer: int) -> Carrier:
    """`patch` with every gate of one layer closed."""
    if not 0 <= layer < patch.shape.n_layers:
        raise ValueError(f"layer: expected 0 to {patch.shape.n_layers - 1}, got {layer}")
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
    chosen = torch.zeros(carrier.layout.n_gates, dtype=torch.bool)
    for layer in range(carrier.shape.n_layers):
        for group in GROUPS:
            part = carrier.layout.slice(layer, group)
            count = int((carrier.gate[part] != 0).sum())
            order = torch.randperm(part.stop - part.start, generator=generator)
            chosen[part.start + order[:count]] = True
    return chosen
