"""Bytes that must move and operations that must be done: one formula each, for roofs, records and predictions.

Sizes in elements, item sizes in bytes. A multiply-add is two FLOPs. These are lower limits: every operand read once,
every result written once, caches ignored.
"""

from collections.abc import Sequence

from lcdd.models import ModelShape, adamw_bytes, grad_stats_bytes, layer_parameters, masked_parameters, refresh_bytes

__all__ = [
    "adamw_bytes", "cross_entropy_flops", "grad_stats_bytes", "layer_parameters", "linear_flops", "masked_parameters",
    "refresh_bytes", "step_flops", "tensor_bytes",
]  # fmt: skip


def step_flops(shape: ModelShape, tokens: int, *, sequence: int, weight_grads: float = 1.0) -> float:
    """Matrix products of a forward and backward over `tokens` tokens: layers 2 + 2 + 2·weight_grads, the frozen head
    2 + 2, causal attention (half of the square) forward and backward.

    weight_grads: share of the weight gradients that is computed (1 where all gates are open).
    """
    layers = (4 + 2 * weight_grads) * masked_parameters(shape) * tokens
    head = 4 * shape.vocab_size * shape.d_model * tokens
    attention = 6 * shape.n_layers * tokens * sequence * shape.n_heads * shape.head_dim
    return float(layers + head + attention)


def linear_flops(tokens: int, rows: int, cols: int) -> float:
    """Forward, input gradient and weight gradient of one linear layer."""
    return 6.0 * tokens * rows * cols


def cross_entropy_flops(tokens: int, vocab: int, width: int) -> float:
    """Logits and their gradient to the hidden states, frozen head."""
    return 4.0 * tokens * vocab * width


def tensor_bytes(tensors: Sequence) -> int:
    """Bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in tensors)
