"""`lcdd::pack_columns` and `lcdd::unpack_columns`, its backward; see `reference/packed_grad.py`.

The products of a packed weight gradient are torch.mm of what these return: the GEMM library's work, not an op of ours.
"""

from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose


@torch.library.custom_op("lcdd::pack_columns", mutates_args=())
def pack_columns(x: Tensor, cols: Tensor, multiple: int) -> Tensor:
    return choose("pack_columns", x)(x, cols, multiple)


@pack_columns.register_fake
def _(x: Tensor, cols: Tensor, multiple: int) -> Tensor:
    return x.new_empty(x.shape[0], -(-cols.shape[0] // multiple) * multiple)


@torch.library.custom_op("lcdd::unpack_columns", mutates_args=())
def unpack_columns(packed: Tensor, cols: Tensor, n_cols: int) -> Tensor:
    return choose("unpack_columns", packed)(packed, cols, n_cols)


@unpack_columns.register_fake
def _(packed: Tensor, cols: Tensor, n_cols: int) -> Tensor:
    return packed.new_empty(packed.shape[0], n_cols)


def _setup_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cols, _ = inputs
    ctx.n_cols = x.shape[1]
    ctx.save_for_backward(cols)


def _backward_pack(ctx: Any, d_packed: Tensor) -> tuple[Tensor | None, ...]:
    (cols,) = ctx.saved_tensors
    return unpack_columns(d_packed, cols, ctx.n_cols), None, None


pack_columns.register_autograd(_backward_pack, setup_context=_setup_pack)
