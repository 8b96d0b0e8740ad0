"""Gather and scatter of open columns: the part of a packed weight gradient that the GEMM library cannot do.

T tokens, K columns of x, C open columns, P = C rounded up to `multiple` (the row pitch that the tensor cores want).

    pack    out[t, c] = x[t, cols[c]]  for c < C,  0 for C <= c < P
    unpack  out[t, k] = packed[t, rank[k]]  where rank[k] >= 0,  else 0

Elements are moved as bits (int16 or int32), so every float dtype of a width is one kernel and nothing is rounded. Open
lists ascend, so neighbouring lanes read neighbouring sectors, writes are whole lines, and at the usual densities (about
one column in five) a row's every sector holds an open column: the pass costs one read of x and one write of the panel.
A column that is not in x gives all-ones bits, which is NaN in every float format: loud, and no stray read.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, kw_only=True)
class PackConfig(LaunchConfig):
    """Tile of one program: 16 independent gathers a thread hide the latency of the index load. Where rows of the result
    start at multiples of 16 bytes a thread has neighbours, and stores 16 bytes at a time."""

    block_t: int = 16
    block_c: int = 128


CONFIG = PackConfig()


@triton.jit(do_not_specialize=["n_tokens", "n_features", "n_open", "n_packed", "stride_xt"])
def pack_columns_fwd_kernel(
    x_ptr,
    cols_ptr,
    out_ptr,
    n_tokens: tl.int32,
    n_features: tl.int32,
    n_open: tl.int32,
    n_packed: tl.int32,
    stride_xt: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """x[T, K] (row stride `stride_xt`), cols int32[C] -> out[T, P] contiguous."""
    if ALIGNED:
        n_packed = (n_packed // 8) * 8  # tells the compiler what the launcher checked
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    packed = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    col = tl.load(cols_ptr + packed, mask=packed < n_open, other=0)
    real = (col >= 0) & (col < n_features)
    bits = tl.load(x_ptr + token * stride_xt + col, mask=(token < n_tokens) & (packed < n_open) & real, other=0)
    bits = tl.where((packed < n_open) & (real == 0), -1, bits)
    tl.store(out_ptr + token * n_packed + packed, bits, mask=(token < n_tokens) & (packed < n_packed))


@triton.jit(do_not_specialize=["n_tokens", "n_features", "stride_pt"])
def unpack_columns_bwd_kernel(
    packed_ptr,
    rank_ptr,
    out_ptr,
    n_tokens: tl.int32,
    n_features: tl.int32,
    stride_pt: tl.int64,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """packed[T, P] (row stride `stride_pt`), rank int32[K] -> out[T, K] contiguous, every element written once."""
    if ALIGNED:
        n_features = (n_features // 8) * 8
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    rank = tl.load(rank_ptr + col, mask=col < n_features, other=-1)
    bits = tl.load(packed_ptr + token * stride_pt + rank, mask=(token < n_tokens) & (rank >= 0), other=0)
    tl.store(out_ptr + token * n_features + col, bits, mask=(token < n_tokens) & (col < n_features))


def _grid(n_tokens: int, n_cols: int) -> tuple[int, int]:
    return triton.cdiv(n_tokens, CONFIG.block_t), triton.cdiv(n_cols, CONFIG.block_c)


def _aligned(out: torch.Tensor) -> bool:
    """Whether every row starts at a multiple of 8 elements of an aligned address."""
    return out.shape[1] % 8 == 0 and out.data_ptr() % 16 == 0


def _as_bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory as integers; a row may have any stride, its elements are neighbours."""
    return (x if x.stride(-1) == 1 else x.contiguous()).view(_BITS[x.element_size()])


def pack_columns_triton(x: torch.Tensor, cols: torch.Tensor, multiple: int) -> torch.Tensor:
    """x[T, K] of 2 or 4 bytes an element, cols int[C] -> [T, P]; see the module's formula."""
    n_packed = -(-cols.numel() // multiple) * multiple
    out = torch.empty(x.shape[0], n_packed, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    bits = _as_bits(x)
    launch(
        pack_columns_fwd_kernel,
        _grid(x.shape[0], n_packed),
        CONFIG,
        x_ptr=bits,
        cols_ptr=cols.to(torch.int32).contiguous(),
        out_ptr=out.view(bits.dtype),
        n_tokens=x.shape[0],
        n_features=x.shape[1],
        n_open=cols.numel(),
        n_packed=n_packed,
        stride_xt=bits.stride(0),
        ALIGNED=_aligned(out),
        BLOCK_T=CONFIG.block_t,
        BLOCK_C=CONFIG.block_c,
    )
    return out


def unpack_columns_triton(packed: torch.Tensor, cols: torch.Tensor, n_cols: int) -> torch.Tensor:
    """packed[T, P], cols int[C] distinct -> [T, n_cols], zero outside `cols`."""
    out = torch.empty(packed.shape[0], n_cols, dtype=packed.dtype, device=packed.device)
    if out.numel() == 0 or cols.numel() == 0:
        return out.zero_()
    rank = torch.full((n_cols,), -1, dtype=torch.int32, device=packed.device)
    rank[cols.long()] = torch.arange(cols.numel(), dtype=torch.int32, device=packed.device)
    bits = _as_bits(packed)
    launch(
        unpack_columns_bwd_kernel,
        _grid(packed.shape[0], n_cols),
        CONFIG,
        packed_ptr=bits,
        rank_ptr=rank,
        out_ptr=out.view(bits.dtype),
        n_tokens=packed.shape[0],
        n_features=n_cols,
        stride_pt=bits.stride(0),
        ALIGNED=_aligned(out),
        BLOCK_T=CONFIG.block_t,
        BLOCK_C=CONFIG.block_c,
    )
    return out


def aot_signatures() -> Iterator[AotSignature]:
    """Both kernels for elements of two and four bytes, rows of the result aligned (the core: panels are) or not."""
    sizes = {"BLOCK_T": CONFIG.block_t, "BLOCK_C": CONFIG.block_c}
    shared = {"n_tokens": "i32", "n_features": "i32"}
    for bits, aligned in itertools.product(("i16", "i32"), (True, False)):
        matrix = f"*{bits}"
        pack = {"x_ptr": matrix, "cols_ptr": "*i32", "out_ptr": matrix, **shared}
        pack |= {"n_open": "i32", "n_packed": "i32", "stride_xt": "i64"}
        unpack = {"packed_ptr": matrix, "rank_ptr": "*i32", "out_ptr": matrix, **shared, "stride_pt": "i64"}
        for kernel, signature in ((pack_columns_fwd_kernel, pack), (unpack_columns_bwd_kernel, unpack)):
            yield AotSignature(
                kernel=kernel,
                label=f"{bits} elements{' aligned' if aligned else ''}",
                config=CONFIG,
                signature=signature,
                constexprs={"ALIGNED": aligned, **sizes},
                divisible_by_16=("out_ptr",) if aligned else (),
                core=aligned,
            )
