"""SwiGLU forward and backward in Triton; float32 arithmetic, one rounding.

h = silu(g) u,  s = sigmoid(g)
backward, in place:  d_h := h (recomputed),  g := d_h u s (1 + g (1 - s)),  u := d_h g s
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
class ElementConfig(LaunchConfig):
    """Elements per program; `aligned`: their number and the addresses are multiples of 16, so loads are vectors."""

    block: int = 1024
    aligned: bool


CONFIGS = {aligned: ElementConfig(aligned=aligned) for aligned in (True, False)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["count"])
def swiglu_fwd_kernel(gate_ptr, up_ptr, hidden_ptr, count: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    if ALIGNED:
        count = (count // 16) * 16  # tells the compiler what the launcher checked
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    g = tl.load(gate_ptr + offset, mask=inside).to(tl.float32)
    u = tl.load(up_ptr + offset, mask=inside).to(tl.float32)
    tl.store(hidden_ptr + offset, (g * tl.sigmoid(g) * u).to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def swiglu_bwd_kernel(d_hidden_ptr, gate_ptr, up_ptr, count: tl.int64, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    if ALIGNED:
        count = (count // 16) * 16  # tells the compiler what the launcher checked
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    dh = tl.load(d_hidden_ptr + offset, mask=inside).to(tl.float32)
    g = tl.load(gate_ptr + offset, mask=inside).to(tl.float32)
    u = tl.load(up_ptr + offset, mask=inside).to(tl.float32)
    s = tl.sigmoid(g)
    silu = g * s
    dtype = gate_ptr.dtype.element_ty
    tl.store(d_hidden_ptr + offset, (silu * u).to(dtype), mask=inside)
    tl.store(gate_ptr + offset, (dh * u * (s * (1.0 + g * (1.0 - s)))).to(dtype), mask=inside)
    tl.store(up_ptr + offset, (dh * silu).to(dtype), mask=inside)


def _config(*tensors: Tensor) -> ElementConfig:
    return CONFIGS[tensors[0].numel() % 16 == 0 and all(t.data_ptr() % 16 == 0 for t in tensors)]


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu.swiglu_ref`."""
    gate, up = gate.contiguous(), up.contiguous()
    hidden = torch.empty_like(gate)
    config = _config(gate, up, hidden)
    launch(
        swiglu_fwd_kernel,
        (triton.cdiv(gate.numel(), config.block),),
        config,
        gate_ptr=gate,
        up_ptr=up,
        hidden_ptr=hidden,
        count=gate.numel(),
        ALIGNED=config.aligned,
        BLOCK=config.block,
    )
    return hidden


def swiglu_grad_triton(d_hidden: Tensor, gate: Tensor, up: Tensor) -> None:
    """`reference.swiglu.swiglu_grad_ref`; all contiguous, as they are written in place."""
    config = _config(d_hidden, gate, up)
    launch(
        swiglu_bwd_kernel,
        (triton.cdiv(gate.numel(), config.block),),
        config,
        d_hidden_ptr=d_hidden,
        gate_ptr=gate,
        up_ptr=up,
        count=gate.numel(),
        ALIGNED=config.aligned,
        BLOCK=config.block,
    )


def aot_signatures() -> Iterator[AotSignature]:
    """Every configuration that the launchers can choose."""
    kernels = (
        (swiglu_fwd_kernel, ("gate_ptr", "up_ptr", "hidden_ptr")),
        (swiglu_bwd_kernel, ("d_hidden_ptr", "gate_ptr", "up_ptr")),
    )
    for dtype, aligned, (kernel, pointers) in itertools.product(DTYPES, (True, False), kernels):
        yield AotSignature(
            kernel=kernel,
            label=f"{triton_dtype(dtype)}{' aligned' if aligned else ''}",
            config=CONFIGS[aligned],
            signature={**dict.fromkeys(pointers, f"*{triton_dtype(dtype)}"), "count": "i64"},
            constexprs={"ALIGNED": aligned, "BLOCK": CONFIGS[aligned].block},
            divisible_by_16=pointers if aligned else (),
            core=aligned,
        )
