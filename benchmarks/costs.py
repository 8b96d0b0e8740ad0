"""Costs of what is smaller than a model; a model's own are `lcdd.models.costs`. A multiply-add is two FLOPs."""

from collections.abc import Sequence

from lcdd.models import Architecture, adamw_bytes, grad_stats_bytes, refresh_bytes, step_flops

__all__ = [
    "Architecture", "adamw_bytes", "cross_entropy_flops", "grad_stats_bytes", "linear_flops", "refresh_bytes",
    "step_flops", "tensor_bytes",
]  # fmt: skip


def linear_flops(tokens: int, rows: int, cols: int) -> float:
    """Forward, input gradient and weight gradient of one linear layer."""
    return 6.0 * tokens * rows * cols


def cross_entropy_flops(tokens: int, vocab: int, width: int) -> float:
    """Logits and their gradient to the hidden states, frozen head."""
    return 4.0 * tokens * vocab * width


def tensor_bytes(tensors: Sequence) -> int:
    """Bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in tensors)
