"""Losses of a chunk of logits, and the naive whole-logits losses that the chunked ops must equal.

Shapes: N students, T tokens (rows), n rows of one chunk, D model width, V vocabulary.

With l the logits of a row, y its label and q the reference's logits:

    cross-entropy   lse(l) − l_y                         gradient  softmax(l) − onehot(y)
    KL(q ‖ l)       Σ_v p_v·(log p_v − log softmax(l)_v)  gradient  softmax(l) − p,   p = softmax(q)

l is what the model makes of its head's product z (`shaped_logits`): scale·z, or softcap·tanh(scale·z / softcap), whose
slope scale·(1 − (l/softcap)²) the gradient by z has as a factor. Statistics are in float32 (float64 for float64
logits) whatever the storage.
"""

import itertools

import torch
from torch import Tensor

# Elements that the CPU implementation widens to float32 at a time: 2 MiB, so that half-precision logits never need
# a second, wider copy of the chunk.
WIDENED_ELEMENTS = 1 << 19


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and softmax statistics for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def shaped_logits(raw: Tensor, scale: float, softcap: float) -> Tensor:
    """What a model makes of its head's product: scale · raw, and softcap · tanh of that / softcap; softcap 0: none."""
    shaped = raw if scale == 1.0 else raw * scale
    return softcap * (shaped / softcap).tanh() if softcap else shaped


def raw_gradient_(grad: Tensor, shaped: Tensor, scale: float, softcap: float) -> None:
    """dL/dshaped [n, V] to dL/draw, in place."""
    if softcap:
        grad.mul_(1 - (shaped / softcap).square())
    if scale != 1.0:
        grad.mul_(scale)


def cross_entropy_chunk_ref(
    logits: Tensor, labels: Tensor, losses: Tensor, d_logits: Tensor | None, *, scale: float, softcap: float
) -> None:
    """Cross-entropy of every row of a chunk, and its gradient.

    Args:
        logits: [n, V], any float dtype, as the head gives them; `shaped_logits` is what the loss is of.
        labels: [n] int64, every one in [0, V).
        losses: [n], written: nats, float32 (float64 for float64 logits).
        d_logits: [n, V], any float dtype, written; the logits themselves (in place), or None.
    """
    n, vocab = logits.shape
    step = max(1, WIDENED_ELEMENTS // vocab)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        wide = shaped_logits(logits[rows].to(losses.dtype), scale, softcap)
        label = labels[rows, None]
        lse = wide.logsumexp(dim=1, keepdim=True)
        losses[rows] = (lse - wide.gather(1, label)).squeeze(1)
        if d_logits is not None:
            grad = (wide - lse).exp_()
            grad.scatter_add_(1, label, -torch.ones_like(label, dtype=wide.dtype))
            raw_gradient_(grad, wide, scale, softcap)
            d_logits[rows] = grad


def kl_chunk_ref(
    logits: Tensor,
    ref_logits: Tensor,
    losses: Tensor,
    d_logits: Tensor | None,
    *,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
) -> None:
    """KL(reference ‖ student) of every row, and its gradient.

    Args:
        logits: students, [N·n, V], any float dtype, as their head gives them; `shaped_logits` is what the loss is of.
        ref_logits: reference, [n, V], the same for each of the N students; log-probabilities are logits too (their
            log-sum-exp is zero). A −inf entry is a token of probability zero and adds nothing. They are shaped by
            `ref_scale` and `ref_softcap`.
        losses: [N·n], written: nats, float32 (float64 for float64 logits).
        d_logits: as in `cross_entropy_chunk_ref`.
    """
    n, vocab = ref_logits.shape
    step = max(1, WIDENED_ELEMENTS // vocab)
    for first, start in itertools.product(range(0, logits.shape[0], max(n, 1)), range(0, n, step)):
        ref_rows = slice(start, min(start + step, n))
        rows = slice(first + start, first + ref_rows.stop)
        wide = shaped_logits(logits[rows].to(losses.dtype), scale, softcap)
        log_p = shaped_logits(ref_logits[ref_rows].to(losses.dtype), ref_scale, ref_softcap).log_softmax(dim=1)
        p = log_p.exp()
        log_q = wide.log_softmax(dim=1)
        losses[rows] = torch.where(p > 0, p * (log_p - log_q), 0).sum(dim=1)
        if d_logits is not None:
            grad = log_q.exp_().sub_(p)
            raw_gradient_(grad, wide, scale, softcap)
            d_logits[rows] = grad


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross-entropy of `shaped_logits` of hidden @ weightᵀ + bias, naively: all logits at once.

    Args:
        hidden: [T, D]; weight: [V, D]; labels: [T] int64, `ignore_index` where a row does not count.

    Returns:
        (sum of losses [], d_hidden [T, D], d_weight [V, D]).
    """
    kept = labels != ignore_index
    grad = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = grad[kept]
    losses = torch.empty(logits.shape[0], dtype=statistics_dtype(logits.dtype), device=logits.device)
    cross_entropy_chunk_ref(logits, labels[kept], losses, logits, scale=scale, softcap=softcap)
    grad = torch.zeros_like(grad)
    grad[kept] = logits
    return losses.sum(), grad @ weight, grad.T @ hidden


def linear_kl_ref(
    hidden: Tensor,
    weight: Tensor,
    ref_logprobs: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed KL(reference ‖ student) of `shaped_logits` of hidden @ weightᵀ + bias, naively: all logits at once.

    Args:
        hidden: [T, D]; weight: [V, D]; ref_logprobs: [T, V].

    Returns:
        (sum of losses [], d_hidden [T, D], d_weight [V, D]).
    """
    grad = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    losses = torch.empty(grad.shape[0], dtype=statistics_dtype(grad.dtype), device=grad.device)
    plain = {"ref_scale": 1.0, "ref_softcap": 0.0}
    kl_chunk_ref(grad, ref_logprobs, losses, grad, scale=scale, softcap=softcap, **plain)
    return losses.sum(), grad @ weight, grad.T @ hidden
