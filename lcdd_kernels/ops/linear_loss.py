"""`lcdd::linear_cross_entropy` and `lcdd::linear_kl`: losses from hidden states and the head's weight, in chunks of
rows.

A chunk's logits are a buffer that is reused; the backends (`reference/linear_loss.py`) turn it into losses and, in
place, into d_logits. The library multiplies.

The gradient is made in the forward, chunk by chunk, and only scaled in the backward: two products, or three with
d_weight. Recomputing it in the backward would need the logits (the largest product of the model) a second time, to save
one [T, D] tensor, which is D/V of what the logits would take. Where no gradient is needed there is one product and
nothing is written back. d_logits stays unscaled in the storage dtype, so that a mean over many rows does not underflow
in float16.

T rows, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose
from lcdd_kernels.checks import fail
from lcdd_kernels.reference.linear_loss import statistics_dtype

# (rows of the chunk, its logits, its losses): logits become d_logits where gradients are needed
ChunkLoss = Callable[[Tensor | slice, Tensor, Tensor], None]


def _reject_nan(name: str, value: Tensor) -> None:
    if bool(torch.isnan(value).any()):
        raise fail(name, "no NaN", f"{int(torch.isnan(value).sum())} NaN of {value.numel()}")


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    chunk: int,
    need_hidden: bool,
    need_weight: bool,
    loss_of: ChunkLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, d_hidden [T, D], d_weight [V, D]) over `rows` (None: all); empty where not needed."""
    count = hidden.shape[0] if rows is None else rows.shape[0]
    vocab, width = weight.shape
    wide = statistics_dtype(hidden.dtype)
    losses = torch.empty(count, dtype=wide, device=hidden.device)
    buffer = torch.empty(min(chunk, count), vocab, dtype=hidden.dtype, device=hidden.device)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    # Chunks are summed in float32: a bfloat16 sum would drop the later ones.
    d_weight = torch.zeros(vocab, width, dtype=wide, device=hidden.device) if need_weight else None
    # Under autocast the products would come back in its dtype, whatever the operands are.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            index = part if rows is None else rows[part]
            h = hidden[index]
            logits = _product(h, weight, bias, buffer[: h.shape[0]])
            loss_of(index, logits, losses[part])
            if need_hidden:
                d_hidden[index] = logits @ weight
            if d_weight is not None:
                d_weight += logits.T @ h
    return losses.sum(), d_hidden, hidden.new_empty(0) if d_weight is None else d_weight.to(weight.dtype)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden weightᵀ + bias into `out`."""
    return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


@torch.library.custom_op("lcdd::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    ignore_index: int,
    reject_nan: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, d_hidden, d_weight). The values of the labels are checked here, before anything is computed:
    the host waits for the number of rows anyway."""
    rows = (labels != ignore_index).nonzero().view(-1)
    kept = labels[rows]
    outside = (kept < 0) | (kept >= weight.shape[0])
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise fail(
            "labels",
            f"{ignore_index} or 0 to {weight.shape[0] - 1} (the rows of weight)",
            f"{int(kept[where])} in row {int(rows[where])}",
        )
    if reject_nan:
        _reject_nan("hidden", hidden)

    def loss_of(index: Tensor | slice, logits: Tensor, losses: Tensor) -> None:
        chunk_loss = choose("cross_entropy_chunk_", logits)
        chunk_loss(logits, labels[index], losses, scale=scale, softcap=softcap, write_grad=need_hidden or need_weight)

    everything = rows.shape[0] == labels.shape[0]
    return _in_chunks(hidden, weight, bias, None if everything else rows, chunk, need_hidden, need_weight, loss_of)


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    ignore_index: int,
    reject_nan: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(hidden, weight, need_hidden, need_weight)


@torch.library.custom_op("lcdd::linear_kl", mutates_args=())
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    reject_nan: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses, d_hidden, d_weight), from the reference's log-probabilities, or its hidden states and head, whose
    logits are shaped as the student's are."""
    if reject_nan:
        _reject_nan("hidden", hidden)
        if ref_hidden is not None:
            _reject_nan("ref_hidden", ref_hidden)
        if ref_logprobs is not None:
            _reject_nan("ref_logprobs", ref_logprobs)
    if ref_logprobs is None:
        assert ref_hidden is not None  # losses.linear_kl checked it
        assert ref_weight is not None
        ref_rows, ref_head = ref_hidden, ref_weight
        size = (min(chunk, ref_rows.shape[0]), ref_head.shape[0])
        buffer = torch.empty(size, dtype=ref_rows.dtype, device=ref_rows.device)

    shaped = ref_logprobs is None
    ref_shape = {"ref_scale": scale if shaped else 1.0, "ref_softcap": softcap if shaped else 0.0}

    def ref_logits_of(index: Tensor | slice) -> Tensor:
        if ref_logprobs is not None:
            return ref_logprobs[index].contiguous()
        h = ref_rows[index]
        return _product(h, ref_head, ref_bias, buffer[: h.shape[0]])

    def loss_of(index: Tensor | slice, logits: Tensor, losses: Tensor) -> None:
        ref_logits = ref_logits_of(index)
        chunk_loss = choose("kl_chunk_", logits, ref_logits)
        chunk_loss(
            logits, ref_logits, losses, scale=scale, softcap=softcap, **ref_shape,
            write_grad=need_hidden or need_weight,
        )  # fmt: skip

    return _in_chunks(hidden, weight, bias, None, chunk, need_hidden, need_weight, loss_of)


@linear_kl.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ref_logprobs: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    scale: float,
    softcap: float,
    chunk: int,
    reject_nan: bool,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(hidden, weight, need_hidden, need_weight)


def _empty_results(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=statistics_dtype(hidden.dtype))
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return loss, d_hidden, weight.new_empty(weight.shape if need_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, d_hidden, d_weight = output
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.count = len(inputs)
    ctx.save_for_backward(d_hidden, d_weight)


def _backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden, d_weight = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    return (
        _scaled(d_hidden, d_loss) if need_hidden else None,
        _scaled(d_weight, d_loss) if need_weight else None,
        *[None] * (ctx.count - 2),
    )


def _scaled(grad: Tensor, d_loss: Tensor) -> Tensor:
    """In d_loss's dtype: the 1/n of a mean must not be rounded to bfloat16 before it meets every gradient."""
    return (grad.to(d_loss.dtype) * d_loss).to(grad.dtype)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
linear_kl.register_autograd(_backward, setup_context=_setup)
