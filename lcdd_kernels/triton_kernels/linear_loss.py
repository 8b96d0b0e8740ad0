"""Cross-entropy and KL of a chunk of logits, with the gradient written over the logits, in Triton.

One program a row. The first sweep keeps a running maximum m and a running sum s = Σ exp(l − m), rescaled when m moves;
then lse = m + ln s. The second sweep (mostly from L2: a row of 151,936 bf16 logits is 300 KiB) writes

    cross-entropy   l ← exp(l − lse) − 1[v = label]                     loss = lse − l_label
    KL(ref ‖ l)     l ← exp(l − lse) − p,  p = exp(q − lse_q)           loss = Σ p·((q − lse_q) − (l − lse))

in place, where l = scale·z, or softcap·tanh(scale·z / softcap), is made of the stored z as it is loaded, and the
gradient is multiplied by that function's slope. Arithmetic is float32 for every storage dtype. Shapes: n rows of the
chunk, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch, triton_dtype


@dataclass(frozen=True, kw_only=True)
class RowConfig(LaunchConfig):
    """`block_v` logits of a row at a time; `aligned`: row strides and V are multiples of 16, so loads are vectors."""

    block_v: int
    aligned: bool


CROSS_ENTROPY_CONFIGS = {aligned: RowConfig(block_v=4096, num_warps=8, aligned=aligned) for aligned in (True, False)}
KL_CONFIGS = {aligned: RowConfig(block_v=2048, num_warps=8, aligned=aligned) for aligned in (True, False)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _multiple_of_16(x, ALIGNED: tl.constexpr):
    """x; where it is known to be a multiple of 16, in a form that lets the compiler know it too."""
    if ALIGNED:
        x = (x // 16) * 16
    return x


@triton.jit
def _shaped(z, scale, softcap, CAPPED: tl.constexpr):
    """scale·z, or softcap·tanh(scale·z / softcap) by way of an exponential that cannot overflow."""
    x = z * scale
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(x) / softcap)
        t = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -softcap * t, softcap * t)
    return x


@triton.jit
def _slope(x, scale, softcap, CAPPED: tl.constexpr):
    """d_shaped / d_z at the shaped value x."""
    slope = scale
    if CAPPED:
        slope = scale * (1.0 - (x / softcap) * (x / softcap))
    return slope


@triton.jit
def _running_logsumexp(x, maximum, total):
    """Take a block of logits into a running (maximum, Σ exp(l − maximum)); blocks of −inf alone are fine."""
    new = tl.maximum(maximum, tl.max(x, 0))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), 0)


@triton.jit(do_not_specialize=["labels_ptr", "losses_ptr", "scale", "softcap", "stride_row", "V"])
def linear_loss_cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    scale: tl.float32,
    softcap: tl.float32,
    stride_row: tl.int32,
    V: tl.int32,
    CAPPED: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    stride_row = _multiple_of_16(stride_row, ALIGNED)
    V = _multiple_of_16(V, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row)
    label_logit = _shaped(tl.load(row_ptr + label).to(tl.float32), scale, softcap, CAPPED)

    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        x = tl.where(cols < V, _shaped(x, scale, softcap, CAPPED), float("-inf"))
        maximum, total = _running_logsumexp(x, maximum, total)
    lse = maximum + tl.log(total)
    tl.store(losses_ptr + row, lse - label_logit)

    if WRITE_GRAD:
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = _shaped(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), scale, softcap, CAPPED)
            grad = tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0)
            grad *= _slope(x, scale, softcap, CAPPED)
            tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)


@triton.jit(
    do_not_specialize=[
        "losses_ptr", "scale", "softcap", "ref_scale", "ref_softcap", "stride_row", "stride_ref_row", "V"
    ]
)  # fmt: skip
def linear_loss_kl_kernel(
    logits_ptr,
    ref_ptr,
    losses_ptr,
    scale: tl.float32,
    softcap: tl.float32,
    ref_scale: tl.float32,
    ref_softcap: tl.float32,
    stride_row: tl.int32,
    stride_ref_row: tl.int32,
    V: tl.int32,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    WRITE_GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    stride_row = _multiple_of_16(stride_row, ALIGNED)
    stride_ref_row = _multiple_of_16(stride_ref_row, ALIGNED)
    V = _multiple_of_16(V, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    ref_row_ptr = ref_ptr + row * stride_ref_row

    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    ref_maximum = tl.full((), float("-inf"), tl.float32)
    ref_total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _shaped(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), scale, softcap, CAPPED)
        q = tl.load(ref_row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        q = _shaped(q, ref_scale, ref_softcap, REF_CAPPED)
        x = tl.where(cols < V, x, float("-inf"))
        q = tl.where(cols < V, q, float("-inf"))
        maximum, total = _running_logsumexp(x, maximum, total)
        ref_maximum, ref_total = _running_logsumexp(q, ref_maximum, ref_total)
    lse = maximum + tl.log(total)
    ref_lse = ref_maximum + tl.log(ref_total)

    loss = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        shaped = _shaped(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), scale, softcap, CAPPED)
        q = tl.load(ref_row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        x = shaped - lse
        q = tl.where(cols < V, _shaped(q, ref_scale, ref_softcap, REF_CAPPED) - ref_lse, float("-inf"))
        p = tl.exp(q)
        # Not p * (q - x) alone: 0 * (−inf − −inf) is NaN.
        loss += p * (tl.where(p > 0, q, 0.0) - tl.where(p > 0, x, 0.0))
        if WRITE_GRAD:
            grad = (tl.exp(x) - p) * _slope(shaped, scale, softcap, CAPPED)
            tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)
    tl.store(losses_ptr + row, tl.sum(loss, 0))


def _aligned(vocab: int, *chunks: Tensor) -> bool:
    """Whether every row of every chunk starts at a multiple of 16 elements of an aligned address."""
    return vocab % 16 == 0 and all(c.stride(0) % 16 == 0 and c.data_ptr() % 16 == 0 for c in chunks)


def cross_entropy_chunk_triton(
    logits: Tensor, labels: Tensor, losses: Tensor, *, scale: float, softcap: float, write_grad: bool
) -> None:
    """`reference.linear_loss.cross_entropy_chunk_ref`; the rows of `logits` are contiguous."""
    n, vocab = logits.shape
    config = CROSS_ENTROPY_CONFIGS[_aligned(vocab, logits)]
    launch(
        linear_loss_cross_entropy_kernel,
        (n,),
        config,
        logits_ptr=logits,
        labels_ptr=labels.contiguous(),
        losses_ptr=losses,
        scale=scale,
        softcap=softcap,
        stride_row=logits.stride(0),
        V=vocab,
        CAPPED=softcap != 0,
        WRITE_GRAD=write_grad,
        ALIGNED=config.aligned,
        BLOCK_V=config.block_v,
    )


def kl_chunk_triton(
    logits: Tensor,
    ref_logits: Tensor,
    losses: Tensor,
    *,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    write_grad: bool,
) -> None:
    """`reference.linear_loss.kl_chunk_ref`; the rows of both are contiguous."""
    n, vocab = logits.shape
    config = KL_CONFIGS[_aligned(vocab, logits, ref_logits)]
    launch(
        linear_loss_kl_kernel,
        (n,),
        config,
        logits_ptr=logits,
        ref_ptr=ref_logits,
        losses_ptr=losses,
        scale=scale,
        softcap=softcap,
        ref_scale=ref_scale,
        ref_softcap=ref_softcap,
        stride_row=logits.stride(0),
        stride_ref_row=ref_logits.stride(0),
        V=vocab,
        CAPPED=softcap != 0,
        REF_CAPPED=ref_softcap != 0,
        WRITE_GRAD=write_grad,
        ALIGNED=config.aligned,
        BLOCK_V=config.block_v,
    )


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers can choose, but for a reference shaped otherwise than the student."""
    flags = (True, False)
    for dtype, write_grad, aligned, capped in itertools.product(DTYPES, flags, flags, flags):
        name = triton_dtype(dtype)
        label = f"{name} {'loss and gradient' if write_grad else 'loss'}{' aligned' if aligned else ''}"
        label += " capped" if capped else ""
        config = CROSS_ENTROPY_CONFIGS[aligned]
        constexprs = {"CAPPED": capped, "WRITE_GRAD": write_grad, "ALIGNED": aligned}
        yield AotSignature(
            kernel=linear_loss_cross_entropy_kernel,
            label=label,
            config=config,
            signature={
                "logits_ptr": f"*{name}",
                "labels_ptr": "*i64",
                "losses_ptr": "*fp32",
                "scale": "fp32",
                "softcap": "fp32",
                "stride_row": "i32",
                "V": "i32",
            },
            constexprs={**constexprs, "BLOCK_V": config.block_v},
            divisible_by_16=("logits_ptr",) if aligned else (),
            core=write_grad and (not capped or (aligned and dtype == torch.bfloat16)),
        )
        for ref_dtype in DTYPES:
            config = KL_CONFIGS[aligned]
            ref_name = triton_dtype(ref_dtype)
            yield AotSignature(
                kernel=linear_loss_kl_kernel,
                label=f"{label}, reference {ref_name}",
                config=config,
                signature={
                    "logits_ptr": f"*{name}",
                    "ref_ptr": f"*{ref_name}",
                    "losses_ptr": "*fp32",
                    "scale": "fp32",
                    "softcap": "fp32",
                    "ref_scale": "fp32",
                    "ref_softcap": "fp32",
                    "stride_row": "i32",
                    "stride_ref_row": "i32",
                    "V": "i32",
                },
                constexprs={**constexprs, "REF_CAPPED": capped, "BLOCK_V": config.block_v},
                divisible_by_16=("logits_ptr", "ref_ptr") if aligned else (),
                core=write_grad and aligned and ref_dtype == dtype and (not capped or dtype == torch.bfloat16),
            )
