"""Cross-entropy and KL from hidden states, logits never stored whole.

T rows (tokens), D model width, V vocabulary.
"""

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import FLOATS, fail
from lcdd_kernels.ops import linear_loss as ops

__all__ = ["linear_cross_entropy", "linear_kl"]

# Logits held at a time where `chunk` is None: 256 rows at V = 151,936. Each chunk reads the whole head, so fewer rows a
# product would be bound by that; about 200 is where arithmetic takes over on current GPUs (by their data sheets: not
# measured here).
CHUNK_LOGITS = 40 << 20
CHUNK_MULTIPLE = 64  # rows of a product's tile; also the fewest rows of a chunk

_REDUCTIONS = ("sum", "mean")
_MAX_ROWS = 2**31


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    reduction: str = "sum",
    ignore_index: int = -100,
    reject_nan: bool = True,
) -> Tensor:
    """Cross-entropy (nats) of logits against labels -> loss[], float32 (float64 for float64 inputs).

    logits = scale · (hidden weightᵀ + bias), and softcap · tanh(logits / softcap) where a softcap is given. bias: [V],
    of hidden's dtype, frozen.
    hidden: [T, D]; weight: [V, D], of hidden's dtype; labels: [T] int64, already aligned with the rows (shifted).
    Rows labelled `ignore_index` are dropped before any product. reduction: "sum", or "mean" over the rows that count;
    0, not NaN, where none does. chunk: rows at a time; None: as many as make CHUNK_LOGITS logits.
    reject_nan: a NaN in hidden is an error. Pass False where a NaN loss is dealt with by the caller, as
    `LCDDOptimizer.step` does: the loss is then NaN, as PyTorch's is.

    Differentiable once in hidden, and in weight where that requires a gradient (a frozen head costs nothing).
    Raises ValueError on a bad argument, a label out of range included, before anything is computed.
    """
    _check_head(hidden, weight, "hidden", "weight")
    rows = hidden.shape[0]
    checks.check_shape("labels", labels, (rows,))
    checks.check_dtype("labels", labels, (torch.int64,))
    checks.check_device("labels", labels, hidden.device)
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    checks.check_int("ignore_index", ignore_index, -(2**63), 2**63)
    chunk, shape = _chunk(chunk, weight), _shape(bias, scale, softcap, weight)
    needs = _needs(hidden, weight)
    loss, *_ = ops.linear_cross_entropy(
        hidden, weight, labels, bias, *shape, chunk, ignore_index, bool(reject_nan), *needs
    )
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return loss


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    *,
    ref_logprobs: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    reduction: str = "mean",
    reject_nan: bool = True,
) -> Tensor:
    """KL(reference ‖ student) (nats), exact over the vocabulary -> loss[], float32 (float64 for float64 inputs).

    hidden: [T, D]; weight: [V, D], of hidden's dtype. The reference is either ref_logprobs [T, V] (any float dtype;
    they are normalised again in float32, so logits and rounded log-probabilities do as well; −inf is probability zero),
    or ref_hidden [T, D'] with ref_weight [V, D'] and ref_bias [V], whose logits are made chunk by chunk too, and shaped
    by scale and softcap as the student's are. It gets no gradient.
    reduction: over the T rows; 0 where T is 0. chunk, reject_nan and the rest as in `linear_cross_entropy`.
    """
    _check_head(hidden, weight, "hidden", "weight")
    rows, vocab = hidden.shape[0], weight.shape[0]
    if (ref_logprobs is None) == (ref_hidden is None) or (ref_hidden is None) != (ref_weight is None):
        given = [n for n, t in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight)) if t is not None]
        given += ["ref_logprobs"] if ref_logprobs is not None else []
        raise fail("reference", "either ref_logprobs, or ref_hidden and ref_weight", " and ".join(given) or "none")
    if ref_logprobs is not None:
        checks.check_shape("ref_logprobs", ref_logprobs, (rows, vocab))
        checks.check_dtype("ref_logprobs", ref_logprobs, FLOATS)
        checks.check_device("ref_logprobs", ref_logprobs, hidden.device)
    if ref_hidden is not None and ref_weight is not None:
        checks.check_shape("ref_hidden", ref_hidden, (rows, None))
        _check_head(ref_hidden, ref_weight, "ref_hidden", "ref_weight")
        checks.check_shape("ref_weight", ref_weight, (vocab, None))
        checks.check_device("ref_hidden", ref_hidden, hidden.device)
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    chunk, shape = _chunk(chunk, weight), _shape(bias, scale, softcap, weight)
    if ref_bias is not None:
        if ref_weight is None:
            raise fail("ref_bias", "None without ref_hidden and ref_weight", "a tensor")
        _check_bias("ref_bias", ref_bias, ref_weight)
    references = [None if t is None else t.detach() for t in (ref_logprobs, ref_hidden, ref_weight)]
    loss, *_ = ops.linear_kl(
        hidden, weight, *references, bias, ref_bias, *shape, chunk, bool(reject_nan), *_needs(hidden, weight)
    )
    return loss / max(rows, 1) if reduction == "mean" else loss


def _check_head(hidden: Tensor, weight: Tensor, hidden_name: str, weight_name: str) -> None:
    checks.check_shape(hidden_name, hidden, (None, None))
    checks.check_dtype(hidden_name, hidden, FLOATS)
    checks.check_shape(weight_name, weight, (None, hidden.shape[1]))
    checks.check_dtype(weight_name, weight, (hidden.dtype,))
    checks.check_device(weight_name, weight, hidden.device)
    if weight.shape[0] == 0:
        raise fail(weight_name, "a vocabulary of at least 1", f"shape {list(weight.shape)}")


def _check_bias(name: str, bias: Tensor, weight: Tensor) -> None:
    checks.check_shape(name, bias, (weight.shape[0],))
    checks.check_dtype(name, bias, (weight.dtype,))
    checks.check_device(name, bias, weight.device)
    if bias.requires_grad:
        raise fail(name, "a frozen one", "one that requires a gradient")


def _shape(bias: Tensor | None, scale: float, softcap: float | None, weight: Tensor) -> tuple[float, float]:
    """(scale, softcap) as the ops take them: 0 for no cap."""
    if bias is not None:
        _check_bias("bias", bias, weight)
    largest = torch.finfo(torch.float32).max
    checks.check_real("scale", scale, -largest, largest)
    if softcap is not None:
        checks.check_real("softcap", softcap, torch.finfo(torch.float32).tiny, largest)
    return float(scale), float(softcap or 0.0)


def default_chunk(vocab: int) -> int:
    """Rows of logits that are held at a time where none are asked for."""
    return max(CHUNK_MULTIPLE, CHUNK_LOGITS // vocab // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


def _chunk(chunk: int | None, weight: Tensor) -> int:
    if chunk is None:
        return default_chunk(weight.shape[0])
    checks.check_int("chunk", chunk, 1, _MAX_ROWS)
    return chunk


def _needs(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether hidden and weight get a gradient."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad
