"""The second stage of the gate gradients' reduction, in Triton: partial sums of columns to sums of gates.

    out_n = sum over p and over the `repeat` columns j of gate n of partial_pj          the order is fixed, no atomics

Column j has gate (j // (repeat*head_dim))*head_dim + j % head_dim: in GQA's o_proj `repeat` query heads share a gate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdd_kernels.triton_kernels import AotSignature, LaunchConfig, launch


@dataclass(frozen=True, kw_only=True)
class ReduceConfig(LaunchConfig):
    """`block_p` partials of `block_n` gates at a time."""

    block_p: int = 16
    block_n: int = 64


CONFIG = ReduceConfig()


@triton.jit(do_not_specialize=["n_partials", "n_gates", "head_dim", "repeat"])
def gate_sums_kernel(
    partial_ptr,
    out_ptr,
    n_partials: tl.int32,
    n_gates: tl.int32,
    head_dim: tl.int32,
    repeat: tl.int32,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[n] = sum over p and over the `repeat` columns of gate n of partial[p, column]; the order is fixed."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = (n // head_dim) * head_dim * repeat + n % head_dim
    n_cols = tl.cast(n_gates, tl.int64) * repeat
    total = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for start in range(0, n_partials * repeat, BLOCK_P):
        q = start + tl.arange(0, BLOCK_P)
        offset = (q // repeat)[:, None] * n_cols + (q % repeat)[:, None] * head_dim + first_column[None, :]
        inside = (q < n_partials * repeat)[:, None] & (n < n_gates)[None, :]
        total += tl.load(partial_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + n, tl.sum(total, 0), mask=n < n_gates)


def sum_gate_partials(partials: Tensor, n_gates: int, *, head_dim: int, repeat: int) -> Tensor:
    """Partials [P, n_gates * repeat] -> sums [n_gates]."""
    out = torch.empty(n_gates, dtype=torch.float32, device=partials.device)
    launch(
        gate_sums_kernel,
        (triton.cdiv(n_gates, CONFIG.block_n),),
        CONFIG,
        partial_ptr=partials,
        out_ptr=out,
        n_partials=partials.shape[0],
        n_gates=n_gates,
        head_dim=head_dim,
        repeat=repeat,
        BLOCK_P=CONFIG.block_p,
        BLOCK_N=CONFIG.block_n,
    )
    return out


def aot_signatures() -> Iterator[AotSignature]:
    """The one configuration."""
    yield AotSignature(
        kernel=gate_sums_kernel,
        label=f"{CONFIG.block_p}x{CONFIG.block_n}",
        config=CONFIG,
        signature={
            "partial_ptr": "*fp32",
            "out_ptr": "*fp32",
            "n_partials": "i32",
            "n_gates": "i32",
            "head_dim": "i32",
            "repeat": "i32",
        },
        constexprs={"BLOCK_P": CONFIG.block_p, "BLOCK_N": CONFIG.block_n},
        divisible_by_16=("partial_ptr", "out_ptr"),
    )
