"""`lcdd::linear_cross_entropy` and `lcdd::linear_kl`: losses from hidden states and the head's weight, in chunks of
rows.

A chunk's logits are a buffer that is reused; the backends (`reference/linear_loss.py`) make losses and d_logits of it.
The library multiplies. Logits are float32 also where hidden states and head are 16-bit: rounded to bfloat16 they put a
floor under small losses (a KL of 1.0e-3 reads 1.8e-3). d_logits are then in the storage dtype, for the products that
follow, unscaled, so that a mean over many rows does not underflow in float16; for float32 they are written over the
logits.

The gradient is made in the forward, chunk by chunk, and only scaled in the backward: two products, or three with
d_weight. Recomputing it in the backward would need the logits (the largest product of the model) a second time, to save
one [T, D] tensor, which is D/V of what the logits would take. Where no gradient is needed there is one product and
nothing is written back.

Two things that are not done, and why. `torch.nn.functional.linear_cross_entropy` (torch 2.13) returns its loss in the
storage dtype, has no KL, scale or cap, and is less exact in bfloat16 or slower: `benchmarks` holds it beside this. A
kernel that never stores logits (Cut Cross-Entropy) has to add every vocabulary block's share of d_hidden [rows, D],
which no register file holds: it uses atomics, whose order changes from run to run, or makes the product twice.

N students, T rows (tokens), D model width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose
from lcdd_kernels.checks import fail
from lcdd_kernels.reference.linear_loss import statistics_dtype

# Logits held at a time on a CPU: 256 rows at V = 151,936.
CPU_CHUNK_LOGITS = 40 << 20
CHUNK_MULTIPLE = 64  # rows of a product's tile; also the fewest rows of a chunk
# Floating-point operations a byte at which a current GPU's products are bound by arithmetic rather than memory (data
# sheets: 156 for an A100, 206 for an H200, 295 for an H100; not measured here).
ARITHMETIC_INTENSITY = 300
GPU_CHUNK_ROWS = 2048  # the most: for narrow models, whose products are bound by the logits they write
# Elements of a 16-bit head that are widened at a time on a CPU, whose library multiplies into its own dtype only.
WIDENED_ELEMENTS = 1 << 19

# (rows of the chunk, its logits, its losses, where d_logits go or None)
ChunkLoss = Callable[[Tensor | slice, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True, kw_only=True)
class Head:
    """What makes logits of hidden states; softcap 0 is none."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float

    def product(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden weightᵀ + bias into `out`, whose dtype is that of the statistics."""
        if hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif hidden.device.type == "cuda":
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            wide, step = hidden.to(out.dtype), max(1, WIDENED_ELEMENTS // hidden.shape[1])
            for start in range(0, len(self.weight), step):
                block = slice(start, start + step)
                torch.mm(wide, self.weight[block].T.to(out.dtype), out=out[:, block])
        return out if self.bias is None else out.add_(self.bias)


def default_chunk(vocab: int, width: int, memory: int | None = None) -> int:
    """Rows of logits that are held at a time where none are asked for.

    memory: bytes of the GPU; None on a CPU. A product of n rows reads the whole head [V, D] (2 bytes each) and writes
    n·V float32 logits: arithmetic is what bounds it from n = D·I / (D − 2·I) rows on, I being ARITHMETIC_INTENSITY;
    twice as many are taken, while logits and gradient stay within 1/16 of the memory.
    """
    if memory is None:
        rows = CPU_CHUNK_LOGITS // vocab
    else:
        slack = width - 2 * ARITHMETIC_INTENSITY
        rows = GPU_CHUNK_ROWS if slack <= 0 else min(GPU_CHUNK_ROWS, 2 * width * ARITHMETIC_INTENSITY // slack)
        rows = min(rows, memory // 16 // (vocab * 6))
    return max(CHUNK_MULTIPLE, rows // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


def _rows_of_chunk(chunk: int, hidden: Tensor, vocab: int) -> int:
    """As asked for, or (0) the default, halved while a GPU that is nearly full could not hold them."""
    if chunk:
        return chunk
    if hidden.device.type != "cuda":
        return default_chunk(vocab, hidden.shape[-1])
    device = hidden.device
    rows = default_chunk(vocab, hidden.shape[-1], torch.cuda.get_device_properties(device).total_memory)
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    while rows > CHUNK_MULTIPLE and rows * vocab * 6 > free // 2:
        rows //= 2
    return rows


def _in_chunks(
    hidden: Tensor,
    head: Head,
    rows: Tensor | None,
    chunk: int,
    needs: tuple[bool, bool],
    loss_of: ChunkLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of losses [N], d_hidden [N, T, D], d_weight [V, D]) over `rows` of each student (None: all); empty where not
    needed."""
    need_hidden, need_weight = needs
    students, count = hidden.shape[0], hidden.shape[1] if rows is None else rows.shape[0]
    vocab, width = head.weight.shape
    wide = statistics_dtype(hidden.dtype)
    chunk = max(1, min(_rows_of_chunk(chunk, hidden, vocab) // students, count))
    losses = hidden.new_empty((students, count), dtype=wide)
    buffer = hidden.new_empty((students * chunk, vocab), dtype=wide)
    d_buffer: Tensor | None = None
    if any(needs):
        d_buffer = buffer if hidden.dtype == wide else hidden.new_empty(buffer.shape)
    d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    # Chunks are summed in float32: a bfloat16 sum would drop the later ones.
    d_weight = hidden.new_zeros((vocab, width), dtype=wide) if need_weight else None
    # Under autocast the products would come back in its dtype, whatever the operands are.
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, count, chunk):
            part = slice(start, min(start + chunk, count))
            index = part if rows is None else rows[part]
            h = hidden[:, index].flatten(0, 1)
            logits = head.product(h, buffer[: len(h)])
            d_logits = None if d_buffer is None else d_buffer[: len(h)]
            of_rows = losses.new_empty(len(h))
            loss_of(index, logits, of_rows, d_logits)
            losses[:, part] = of_rows.view(students, -1)
            if need_hidden and d_logits is not None:
                d_hidden[:, index] = (d_logits @ head.weight).view(students, -1, width)
            if d_weight is not None and d_logits is not None:
                d_weight += d_logits.T @ h
    return losses.sum(1), d_hidden, hidden.new_empty(0) if d_weight is None else d_weight.to(head.weight.dtype)


def _reject_nan(**tensors: Tensor | None) -> None:
    """On the CPU: on a GPU the host would have to wait, and a NaN makes a NaN loss."""
    for name, value in tensors.items():
        if value is not None and value.device.type == "cpu" and bool(torch.isnan(value).any()):
            raise fail(name, "no NaN", f"{int(torch.isnan(value).sum())} NaN of {value.numel()}")


def _counted_rows(labels: Tensor, vocab: int, ignore_index: int) -> Tensor | None:
    """The rows that count (None: all of them). The host waits once: for how many they are, and whether they are in
    range."""
    kept = labels != ignore_index
    outside = kept & ((labels < 0) | (labels >= vocab))
    count, n_outside = torch.stack([kept.sum(), outside.sum()]).tolist()
    if n_outside:
        where = int(outside.nonzero()[0])
        raise fail(
            "labels",
            f"{ignore_index} or 0 to {vocab - 1} (the rows of weight)",
            f"{int(labels[where])} in row {where}",
        )
    if count == len(labels):
        return None
    # Each row that counts to its place among those; all others to one extra slot.
    place = torch.where(kept, kept.cumsum(0) - 1, count)
    rows = torch.empty(count + 1, dtype=torch.int64, device=labels.device)
    return rows.scatter_(0, place, torch.arange(len(labels), device=labels.device))[:count]


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
    """hidden [T, D] -> (sum of losses [], d_hidden, d_weight). The values of the labels are checked here, before
    anything is computed. chunk: 0 for the default."""
    rows = _counted_rows(labels, weight.shape[0], ignore_index)
    if reject_nan:
        _reject_nan(hidden=hidden)

    def loss_of(index: Tensor | slice, logits: Tensor, losses: Tensor, d_logits: Tensor | None) -> None:
        chunk_loss = choose("cross_entropy_chunk_", logits)
        chunk_loss(logits, labels[index], losses, d_logits, scale=scale, softcap=softcap)

    head = Head(weight=weight, bias=bias, scale=scale, softcap=softcap)
    loss, d_hidden, d_weight = _in_chunks(hidden[None], head, rows, chunk, (need_hidden, need_weight), loss_of)
    return loss.sum(), d_hidden.view(hidden.shape) if need_hidden else d_hidden, d_weight


@linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(hidden, weight, (), *settings[-2:])


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
    """hidden [N, T, D] -> (sum of losses [N], d_hidden, d_weight), from the reference's log-probabilities [T, V], or
    its hidden states [T, D'] and head, whose logits are made once for all students and shaped as theirs are."""
    if reject_nan:
        _reject_nan(hidden=hidden, ref_hidden=ref_hidden, ref_logprobs=ref_logprobs)
    head = Head(weight=weight, bias=bias, scale=scale, softcap=softcap)
    shape = {"scale": scale, "softcap": softcap, "ref_scale": 1.0, "ref_softcap": 0.0}
    if ref_hidden is not None and ref_weight is not None:
        ref_head = Head(weight=ref_weight, bias=ref_bias, scale=scale, softcap=softcap)
        shape |= {"ref_scale": scale, "ref_softcap": softcap}

    def ref_logits_of(index: Tensor | slice) -> Tensor:
        if ref_logprobs is not None:
            return ref_logprobs[index].contiguous()
        assert ref_hidden is not None  # the public function checked it
        h = ref_hidden[index]
        return ref_head.product(h, h.new_empty((len(h), len(ref_head.weight)), dtype=statistics_dtype(h.dtype)))

    def loss_of(index: Tensor | slice, logits: Tensor, losses: Tensor, d_logits: Tensor | None) -> None:
        ref_logits = ref_logits_of(index)
        choose("kl_chunk_", logits, ref_logits)(logits, ref_logits, losses, d_logits, **shape)

    return _in_chunks(hidden, head, None, chunk, (need_hidden, need_weight), loss_of)


@linear_kl.register_fake
def _(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_results(hidden, weight, hidden.shape[:1], *settings[-2:])


def _empty_results(
    hidden: Tensor, weight: Tensor, shape: tuple[int, ...], need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty(shape, dtype=statistics_dtype(hidden.dtype))
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
        _scaled(d_weight, d_loss.sum()) if need_weight else None,  # of one student: the public function sees to it
        *[None] * (ctx.count - 2),
    )


def _scaled(grad: Tensor, d_loss: Tensor) -> Tensor:
    """In d_loss's dtype: the 1/n of a mean must not be rounded to bfloat16 before it meets every gradient."""
    d_loss = d_loss.view(*d_loss.shape, *[1] * (grad.dim() - d_loss.dim()))
    return (grad.to(d_loss.dtype) * d_loss).to(grad.dtype)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
linear_kl.register_autograd(_backward, setup_context=_setup)
