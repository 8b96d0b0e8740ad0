"""Bytes that must move and operations that must be done: one formula each, for roofs, records and predictions.

Sizes in elements, item sizes in bytes. A multiply-add is two FLOPs. These are lower limits: every operand read once,
every result written once, caches ignored.
"""

from collections.abc import Sequence

from lcdd.models import PROJECTION_PATHS, ModelShape


def layer_parameters(shape: ModelShape) -> int:
    """Masked parameters of one layer."""
    return sum(rows * cols for rows, cols in map(shape.weight_shape, PROJECTION_PATHS))


def masked_parameters(shape: ModelShape) -> int:
    """Masked parameters of the whole model."""
    return shape.n_layers * layer_parameters(shape)


def step_flops(shape: ModelShape, tokens: int, *, sequence: int, weight_grads: float = 1.0) -> float:
    """Matrix products of a forward and backward over `tokens` tokens: layers 2 + 2 + 2·weight_grads, the frozen head
    2 + 2, causal attention (half of the square) forward and backward.

    weight_grads: share of the weight gradients that is computed (1 where all gates are open).
    """
    layers = (4 + 2 * weight_grads) * masked_parameters(shape) * tokens
    head = 4 * shape.vocab_size * shape.d_model * tokens
    attention = 6 * shape.n_layers * tokens * sequence * shape.n_heads * shape.head_dim
    return float(layers + head + attention)


def grad_stats_bytes(n: int, *, grad: int, delta: int, share: float = 1.0) -> float:
    """Pass A over n parameters: G and Δ read; `share` of them where gradients are packed."""
    return share * n * (grad + delta)


def adamw_bytes(n: int, *, weight: int, delta: int, moment: int, grad: int, share: float = 1.0) -> float:
    """Pass B: G and base read, Δ and both moments read and written, W_eff written."""
    return n * (share * grad + 2 * weight + 2 * delta + 4 * moment)


def refresh_bytes(n: int, *, weight: int, delta: int) -> float:
    """W_eff alone: base and Δ read, W_eff written."""
    return n * (2 * weight + delta)


def linear_flops(tokens: int, rows: int, cols: int) -> float:
    """Forward, input gradient and weight gradient of one linear layer."""
    return 6.0 * tokens * rows * cols


def cross_entropy_flops(tokens: int, vocab: int, width: int) -> float:
    """Logits and their gradient to the hidden states, frozen head."""
    return 4.0 * tokens * vocab * width


def tensor_bytes(tensors: Sequence) -> int:
    """Bytes of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in tensors)
