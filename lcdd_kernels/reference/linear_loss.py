"""Losses of a chunk of logits, and the naive whole-logits losses that the chunked ops must equal.

Shapes: T tokens (rows), n rows of one chunk, D model width, V vocabulary.

With l the logits of a row, y its label and q the reference's logits:

    cross-entropy   lse(l) − l_y                         gradient  softmax(l) − onehot(y)
    KL(q ‖ l)       Σ_v p_v·(log p_v − log softmax(l)_v)  gradient  softmax(l) − p,   p = softmax(q)

Statistics are in float32 (float64 for float64 logits) whatever the storage.
"""

import torch
from torch import Tensor

# Elements that the CPU implementation widens to float32 at a time: 4 MiB, so that half-precision logits never need
# a second, wider copy of the chunk.
WIDENED_ELEMENTS = 1 << 20


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax statistics for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_entropy_chunk_ref(logits: Tensor, labels: Tensor, losses: Tensor, *, write_grad: bool) -> None:
    """Cross-entropy of every row of a chunk; with `write_grad` the logits become their own gradient, in place.

    Args:
        logits: [n, V], any float dtype.
        labels: [n] int64, every one in [0, V).
        losses: [n], written: nats, float32 (float64 for float64 logits).
    """
    n, vocab = logits.shape
    step = max(1, WIDENED_ELEMENTS // vocab)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        wide = logits[rows].to(losses.dtype)
        label = labels[rows, None]
        lse = wide.logsumexp(dim=1, keepdim=True)
        losses[rows] = (lse - wide.gather(1, label)).squeeze(1)
        if write_grad:
            wide.sub_(lse).exp_()
            wide.scatter_add_(1, label, -torch.ones_like(label, dtype=wide.dtype))
            logits[rows] = wide


def kl_chunk_ref(logits: Tensor, ref_logits: Tensor, losses: Tensor, *, write_grad: bool) -> None:
    """KL(reference ‖ student) of every row; with `write_grad` the logits become their own gradient, in place.

    Args:
        logits: student, [n, V], any float dtype.
        ref_logits: reference, [n, V]; log-probabilities are logits too (their log-sum-exp is zero). A −inf entry is
            a token of probability zero and adds nothing.
        losses: [n], written: nats, float32 (float64 for float64 logits).
    """
    n, vocab = logits.shape
    step = max(1, WIDENED_ELEMENTS // vocab)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        wide = logits[rows].to(losses.dtype)
        log_p = ref_logits[rows].to(losses.dtype).log_softmax(dim=1)
        p = log_p.exp()
        log_q = wide.log_softmax(dim=1)
        losses[rows] = torch.where(p > 0, p * (log_p - log_q), 0).sum(dim=1)
        if write_grad:
            logits[rows] = log_q.exp_().sub_(p)


def linear_cross_entropy_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of hidden @ weightᵀ, naively: all logits at once.

    Args:
        hidden: [T, D]; weight: [V, D]; labels: [T] int64, `ignore_index` where a row does not count.

    Returns:
        (sum of losses [], d_hidden [T, D], d_weight [V, D]).
    """
    kept = labels != ignore_index
    grad = hidden @ weight.T
    logits = grad[kept]
    losses = torch.empty(logits.shape[0], dtype=statistics_dtype(logits.dtype), device=logits.device)
    cross_entropy_chunk_ref(logits, labels[kept], losses, write_grad=True)
    grad = torch.zeros_like(grad)
    grad[kept] = logits
    return losses.sum(), grad @ weight, grad.T @ hidden


def linear_kl_ref(hidden: Tensor, weight: Tensor, ref_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed KL(reference ‖ student) of the student's logits hidden @ weightᵀ, naively: all logits at once.

    Args:
        hidden: [T, D]; weight: [V, D]; ref_logprobs: [T, V].

    Returns:
        (sum of losses [], d_hidden [T, D], d_weight [V, D]).
    """
    grad = hidden @ weight.T
    losses = torch.empty(grad.shape[0], dtype=statistics_dtype(grad.dtype), device=grad.device)
    kl_chunk_ref(grad, ref_logprobs, losses, write_grad=True)
    return losses.sum(), grad @ weight, grad.T @ hidden
