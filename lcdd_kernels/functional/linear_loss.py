"""Cross-entropy and KL from hidden states, logits never stored whole.

Exact in 16-bit dtypes too: logits are float32 products of 16-bit operands.

N students, T rows (tokens), D model width, V vocabulary.
"""

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import FLOATS, fail
from lcdd_kernels.ops import linear_loss as ops
from lcdd_kernels.ops.linear_loss import default_chunk

__all__ = ["default_chunk", "linear_cross_entropy", "linear_kl"]

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
    0, not NaN, where none does. chunk: rows at a time; None: as many as suit the vocabulary, the width and the device.
    reject_nan: on a CPU, a NaN in hidden is an error. Pass False where a NaN loss is dealt with by the caller, as
    `LCDDOptimizer.step` does: the loss is then NaN, as PyTorch's is, and as it always is on a GPU, where the host would
    have to wait for the answer. (It waits once, for the number of rows that count.)

    Differentiable once in hidden, and in weight where that requires a gradient (a frozen head costs nothing).
    Raises ValueError on a bad argument, a label out of range included, before anything is computed.
    """
    checks.check_shape("hidden", hidden, (None, None))
    _check_head(hidden[None], weight, "hidden", "weight")
    rows = hidden.shape[0]
    checks.check_shape("labels", labels, (rows,))
    checks.check_dtype("labels", labels, (torch.int64,))
    checks.check_device("labels", labels, hidden.device)
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    checks.check_int("ignore_index", ignore_index, -(2**63), 2**63)
    chunk, shape = _chunk(chunk), _shape(bias, scale, softcap, weight)
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

    hidden: [T, D], or [N, T, D] for N students of one reference, whose logits are then made once -> loss[N]; weight:
    [V, D], of hidden's dtype. The reference is either ref_logprobs [T, V] (any float dtype;
    they are normalised again in float32, so logits and rounded log-probabilities do as well; −inf is probability zero),
    or ref_hidden [T, D'] with ref_weight [V, D'] and ref_bias [V], whose logits are made chunk by chunk too, and shaped
    by scale and softcap as the student's are. It gets no gradient.
    reduction: over the T rows; 0 where T is 0. chunk, reject_nan and the rest as in `linear_cross_entropy`.
    """
    checks.check_tensor("hidden", hidden)
    students = hidden if hidden.dim() == 3 else hidden[None]
    _check_head(students, weight, "hidden", "weight")
    rows, vocab = students.shape[1], weight.shape[0]
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
        _check_head(ref_hidden[None], ref_weight, "ref_hidden", "ref_weight")
        checks.check_shape("ref_weight", ref_weight, (vocab, None))
        checks.check_device("ref_hidden", ref_hidden, hidden.device)
    checks.check_choice("reduction", reduction, _REDUCTIONS)
    chunk, shape = _chunk(chunk), _shape(bias, scale, softcap, weight)
    if ref_bias is not None:
        if ref_weight is None:
            raise fail("ref_bias", "None without ref_hidden and ref_weight", "a tensor")
        _check_bias("ref_bias", ref_bias, ref_weight)
    references = [None if t is None else t.detach() for t in (ref_logprobs, ref_hidden, ref_weight)]
    needs = _needs(hidden, weight)
    if needs[1] and len(students) != 1:
        raise fail("weight", "a frozen one (hidden has several students)", "one that requires a gradient")
    loss, *_ = ops.linear_kl(students, weight, *references, bias, ref_bias, *shape, chunk, bool(reject_nan), *needs)
    loss = loss / max(rows, 1) if reduction == "mean" else loss
    return loss if hidden.dim() == 3 else loss[0]


def _check_head(hidden: Tensor, weight: Tensor, hidden_name: str, weight_name: str) -> None:
    """hidden: [N, T, D]."""
    checks.check_shape(hidden_name, hidden, (None, None, None))
    checks.check_dtype(hidden_name, hidden, FLOATS)
    checks.check_shape(weight_name, weight, (None, hidden.shape[2]))
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


def _chunk(chunk: int | None) -> int:
    """As the ops take it: 0 for the default."""
    if chunk is None:
        return 0
    checks.check_int("chunk", chunk, 1, _MAX_ROWS)
    return chunk


def _needs(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether hidden and weight get a gradient."""
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad
