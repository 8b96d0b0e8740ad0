"""Packed weight gradients in plain PyTorch: only the open rows and columns of G = dYᵀX (method, section 1).

Shapes: T tokens, K in_features, O out_features, C open columns, R open rows.

    "block"   G[R, C]             = dY[:, R]ᵀ X[:, C]            hard-concrete: a clamped gate has no gradient at all
    "panels"  G[R, :], G[:, C]    = dY[:, R]ᵀ X, dYᵀ X[:, C]     Heaviside: every gate has one, through the open gates
                                                                 of the other side

Both are sums over tokens, so micro-batches accumulate. Every function keeps the dtype of its inputs (float64 included).
"""

import torch

__all__ = ["pack_columns_ref", "packed_block_ref", "packed_panels_ref", "unpack_columns_ref"]


def pack_columns_ref(x: torch.Tensor, cols: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """x[T, K], cols int[C] -> x[:, cols] as a contiguous [T, P]: P is C rounded up to `multiple`, the padding zero."""
    padding = -cols.numel() % multiple
    if x.element_size() == 2:
        # On the CPU index_select copies 16-bit elements one at a time; gather over the same bits is three times as
        # fast.
        index = cols.long().expand(x.shape[0], -1)
        packed = torch.gather(x.view(torch.int16), 1, index).view(x.dtype)
    else:
        packed = torch.index_select(x, 1, cols)
    return torch.nn.functional.pad(packed, (0, padding)) if padding else packed


def unpack_columns_ref(packed: torch.Tensor, cols: torch.Tensor, n_cols: int) -> torch.Tensor:
    """The adjoint of `pack_columns_ref`: packed[T, P], cols int[C] distinct -> [T, n_cols], zero outside `cols`."""
    out = packed.new_zeros(packed.shape[0], n_cols)
    return out.index_copy_(1, cols.long(), packed[:, : cols.numel()])


def packed_block_ref(x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """x[T, K], dy[T, O], rows int[R], cols int[C] -> G[R, C]."""
    return pack_columns_ref(dy, rows).t() @ pack_columns_ref(x, cols)


def packed_panels_ref(
    x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x[T, K], dy[T, O], rows int[R], cols int[C] -> (G[R, :] as [R, K], G[:, C] as [O, C])."""
    return pack_columns_ref(dy, rows).t() @ x, dy.t() @ pack_columns_ref(x, cols)
