"""Cross-entropy and KL of a chunk of logits, and their gradients, in Triton.

One program a row, two sweeps over it. In the first every thread keeps a maximum m and a sum s = Σ exp(l − m) of its
own, rescaled when m moves; the threads meet once, after the loop, for lse = m + ln s. The second writes

    cross-entropy   exp(l − lse) − 1[v = label]                     loss = lse − l_label
    KL(ref ‖ l)     exp(l − lse) − p,  p = exp(q − lse_q)           loss = Σ p·((q − lse_q) − (l − lse))

where l = scale·z, or softcap·tanh(scale·z / softcap), is made of the stored z as it is loaded, and the gradient is
multiplied by that function's slope. Arithmetic is float32 for every storage dtype; where the gradient has the logits'
dtype it may be written over them. Shapes: N students, n rows of the chunk, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch, triton_dtype
from lcdd_kernels.triton_kernels.accurate import accurate_log


@dataclass(frozen=True, kw_only=True)
class RowConfig(LaunchConfig):
    """`block_v` logits of a row at a time, four neighbours a thread whatever the dtypes; `aligned`: row strides and V
    are multiples of 16, so loads are vectors."""

    block_v: int = 1024
    num_warps: int = 8
    aligned: bool


CONFIGS = {aligned: RowConfig(aligned=aligned) for aligned in (True, False)}
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
def _take(x, maximum, total):
    """Take a block of logits into every thread's own (maximum, Σ exp(l − maximum)), both [BLOCK / 4]; blocks of −inf
    alone are fine."""
    own = tl.reshape(x, [maximum.shape[0], 4])
    new = tl.maximum(maximum, tl.max(own, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(maximum - shift) + tl.sum(tl.exp(own - shift[:, None]), axis=1)


@triton.jit
def _logsumexp(maximum, total):
    """What all threads' (maximum, total) come to."""
    largest = tl.max(maximum, axis=0)
    return largest + accurate_log(tl.sum(total * tl.exp(maximum - largest), axis=0))


@triton.jit(do_not_specialize=["labels_ptr", "losses_ptr", "scale", "softcap", "stride_row", "stride_grad_row", "V"])
def linear_loss_cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    losses_ptr,
    grad_ptr,
    scale: tl.float32,
    softcap: tl.float32,
    stride_row: tl.int32,
    stride_grad_row: tl.int32,
    V: tl.int32,
    CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    stride_row = _multiple_of_16(stride_row, ALIGNED)
    stride_grad_row = _multiple_of_16(stride_grad_row, ALIGNED)
    V = _multiple_of_16(V, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    label = tl.load(labels_ptr + row)
    label_logit = _shaped(tl.load(row_ptr + label).to(tl.float32), scale, softcap, CAPPED)

    maximum = tl.full((BLOCK_V // 4,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V // 4,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        x = tl.where(cols < V, _shaped(x, scale, softcap, CAPPED), float("-inf"))
        maximum, total = _take(x, maximum, total)
    lse = _logsumexp(maximum, total)
    tl.store(losses_ptr + row, lse - label_logit)

    if grad_ptr is not None:
        grad_row_ptr = grad_ptr + row * stride_grad_row
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            x = _shaped(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), scale, softcap, CAPPED)
            grad = tl.exp(x - lse) - tl.where(cols == label, 1.0, 0.0)
            grad *= _slope(x, scale, softcap, CAPPED)
            tl.store(grad_row_ptr + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)


@triton.jit(
    do_not_specialize=[
        "losses_ptr", "scale", "softcap", "ref_scale", "ref_softcap", "stride_row", "stride_ref_row",
        "stride_grad_row", "n_ref_rows", "V",
    ]
)  # fmt: skip
def linear_loss_kl_kernel(
    logits_ptr,
    ref_ptr,
    losses_ptr,
    grad_ptr,
    scale: tl.float32,
    softcap: tl.float32,
    ref_scale: tl.float32,
    ref_softcap: tl.float32,
    stride_row: tl.int32,
    stride_ref_row: tl.int32,
    stride_grad_row: tl.int32,
    n_ref_rows: tl.int32,
    V: tl.int32,
    CAPPED: tl.constexpr,
    REF_CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Row r of the students is held against row r % n_ref_rows of the reference."""
    stride_row = _multiple_of_16(stride_row, ALIGNED)
    stride_ref_row = _multiple_of_16(stride_ref_row, ALIGNED)
    stride_grad_row = _multiple_of_16(stride_grad_row, ALIGNED)
    V = _multiple_of_16(V, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    ref_row_ptr = ref_ptr + (tl.program_id(0) % n_ref_rows).to(tl.int64) * stride_ref_row

    maximum = tl.full((BLOCK_V // 4,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_V // 4,), tl.float32)
    ref_maximum = tl.full((BLOCK_V // 4,), float("-inf"), tl.float32)
    ref_total = tl.zeros((BLOCK_V // 4,), tl.float32)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        x = _shaped(tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32), scale, softcap, CAPPED)
        q = tl.load(ref_row_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        q = _shaped(q, ref_scale, ref_softcap, REF_CAPPED)
        maximum, total = _take(tl.where(cols < V, x, float("-inf")), maximum, total)
        ref_maximum, ref_total = _take(tl.where(cols < V, q, float("-inf")), ref_maximum, ref_total)
    lse = _logsumexp(maximum, total)
    ref_lse = _logsumexp(ref_maximum, ref_total)

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
        if grad_ptr is not None:
            grad = (tl.exp(x) - p) * _slope(shaped, scale, softcap, CAPPED)
            at = grad_ptr + row * stride_grad_row + cols
            tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=cols < V)
    tl.store(losses_ptr + row, tl.sum(loss, 0))


def _config(vocab: int, *chunks: Tensor | None) -> RowConfig:
    """`aligned` where every row of every chunk starts at a multiple of 16 elements of an aligned address."""
    found = [c for c in chunks if c is not None]
    return CONFIGS[vocab % 16 == 0 and all(c.stride(0) % 16 == 0 and c.data_ptr() % 16 == 0 for c in found)]


def cross_entropy_chunk_triton(
    logits: Tensor, labels: Tensor, losses: Tensor, d_logits: Tensor | None, *, scale: float, softcap: float
) -> None:
    """`reference.linear_loss.cross_entropy_chunk_ref`; the rows of `logits` and `d_logits` are contiguous."""
    n, vocab = logits.shape
    config = _config(vocab, logits, d_logits)
    launch(
        linear_loss_cross_entropy_kernel,
        (n,),
        config,
        logits_ptr=logits,
        labels_ptr=labels.contiguous(),
        losses_ptr=losses,
        grad_ptr=d_logits,
        scale=scale,
        softcap=softcap,
        stride_row=logits.stride(0),
        stride_grad_row=0 if d_logits is None else d_logits.stride(0),
        V=vocab,
        CAPPED=softcap != 0,
        ALIGNED=config.aligned,
        BLOCK_V=config.block_v,
    )


def kl_chunk_triton(
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
    """`reference.linear_loss.kl_chunk_ref`; the rows of all chunks are contiguous."""
    n, vocab = logits.shape
    config = _config(vocab, logits, ref_logits, d_logits)
    launch(
        linear_loss_kl_kernel,
        (n,),
        config,
        logits_ptr=logits,
        ref_ptr=ref_logits,
        losses_ptr=losses,
        grad_ptr=d_logits,
        scale=scale,
        softcap=softcap,
        ref_scale=ref_scale,
        ref_softcap=ref_softcap,
        stride_row=logits.stride(0),
        stride_ref_row=ref_logits.stride(0),
        stride_grad_row=0 if d_logits is None else d_logits.stride(0),
        n_ref_rows=ref_logits.shape[0],
        V=vocab,
        CAPPED=softcap != 0,
        REF_CAPPED=ref_softcap != 0,
        ALIGNED=config.aligned,
        BLOCK_V=config.block_v,
    )


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers can choose, but for a reference shaped otherwise than the student.

    The core: float32 logits, as 16-bit and float32 hidden states give them, with a gradient in the storage dtype.
    """
    flags = (True, False)
    for logits, grad, aligned, capped in itertools.product(DTYPES, (*DTYPES, None), flags, flags):
        if grad not in (logits, None) and logits != torch.float32:
            continue  # 16-bit logits are given by tests alone, and written over
        config = CONFIGS[aligned]
        name = triton_dtype(logits)
        label = f"{name} {'loss alone' if grad is None else 'gradient ' + triton_dtype(grad)}"
        label += (" aligned" if aligned else "") + (" capped" if capped else "")
        core = logits == torch.float32 and grad is not None and (not capped or (aligned and grad == torch.bfloat16))
        signature = {"logits_ptr": f"*{name}", "losses_ptr": "*fp32", "scale": "fp32", "softcap": "fp32"}
        signature |= {"stride_row": "i32", "stride_grad_row": "i32", "V": "i32"}
        constexprs: dict[str, Any] = {"CAPPED": capped, "ALIGNED": aligned, "BLOCK_V": config.block_v}
        vectors = ["logits_ptr"]
        if grad is None:
            constexprs["grad_ptr"] = None
        else:
            signature["grad_ptr"] = f"*{triton_dtype(grad)}"
            vectors.append("grad_ptr")
        yield AotSignature(
            kernel=linear_loss_cross_entropy_kernel,
            label=label,
            config=config,
            signature=signature | {"labels_ptr": "*i64"},
            constexprs=constexprs,
            divisible_by_16=tuple(vectors) if aligned else (),
            core=core,
        )
        more = {"ref_scale": "fp32", "ref_softcap": "fp32", "stride_ref_row": "i32", "n_ref_rows": "i32"}
        for ref in DTYPES:
            yield AotSignature(
                kernel=linear_loss_kl_kernel,
                label=f"{label}, reference {triton_dtype(ref)}",
                config=config,
                signature=signature | more | {"ref_ptr": f"*{triton_dtype(ref)}"},
                constexprs={**constexprs, "REF_CAPPED": capped},
                divisible_by_16=(*vectors, "ref_ptr") if aligned else (),
                core=core and aligned and ref == torch.float32,
            )
