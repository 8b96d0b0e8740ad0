"""Cases of pack_columns and unpack_columns: odd sizes, rows that are not contiguous, padding to a multiple."""

import torch
from torch import Tensor

from lcdd_kernels.cases import Case, Inputs


def _inputs(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> tuple[Tensor, Tensor, int]:
    """x[T, K] as a slice of wider rows, cols int32[C], K."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens, n_features = 33 * size, 301 * size
    x = torch.randn(n_tokens, n_features + 3, generator=generator).to(device, dtype)[:, 1:-2]
    cols = torch.nonzero(torch.rand(n_features, generator=generator) < 0.3).view(-1).to(device, torch.int32)
    return x, cols, n_features


def make_pack(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    x, cols, _ = _inputs(dtype, device, seed, size)
    return {"x": x, "cols": cols, "multiple": 8}


def pack_expression(x: Tensor, cols: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x[:, cols.long()], (0, -cols.numel() % multiple))


def make_unpack(dtype: torch.dtype, device: torch.device, seed: int, size: int) -> Inputs:
    x, cols, n_features = _inputs(dtype, device, seed, size)
    return {"packed": pack_expression(x, cols, 8), "cols": cols, "n_cols": n_features}


def unpack_expression(packed: Tensor, cols: Tensor, n_cols: int) -> Tensor:
    out = torch.zeros(packed.shape[0], n_cols, dtype=packed.dtype, device=packed.device)
    out[:, cols.long()] = packed[:, : cols.numel()]
    return out


CASES = {
    "pack_columns": Case(make=make_pack, expression=pack_expression, outputs=("packed",), exact=frozenset({"packed"})),
    "unpack_columns": Case(make=make_unpack, expression=unpack_expression, outputs=("x",), exact=frozenset({"x"})),
}
