"""`GateMap`, and the checks of gates and of parallel lists of matrices that the public functions share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import fail
from lcdd_kernels.reference.gates import KINDS

LAYOUTS = ("dense", "block", "panels")  # position = code at op level
MAX_INT = 2**63  # schema integers are signed
_GATE_DTYPES = (torch.float32, torch.float64)
_MATRIX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class GateMap:
    """Where a matrix `[out, in]` finds its gates in the model's flat vector.

    row i:  gate[row_start + i]
    col j:  gate[col_start + (j // (repeat*head_dim))*head_dim + j % head_dim]
    With repeat = 1 that is gate[col_start + j]. GQA's o_proj has repeat = query heads per KV head, as each KV head's
    gates serve that many query heads; the expanded vector is never made.
    """

    row_start: int
    col_start: int
    head_dim: int = 1
    repeat: int = 1


def check_gate(name: str, gate: Tensor, n: int | None = None) -> None:
    checks.check_shape(name, gate, (n,))
    checks.check_dtype(name, gate, _GATE_DTYPES)
    checks.check_contiguous(name, gate)
    checks.check_no_nan(name, gate)


def check_gate_arguments(logits: Tensor, kind: str, seed: int, step: int, offset: int) -> None:
    check_gate("logits", logits)
    checks.check_choice("kind", kind, KINDS)
    checks.check_int("seed", seed, 0, MAX_INT)
    checks.check_int("step", step, 0, MAX_INT)
    checks.check_int("offset", offset, 0, MAX_INT - logits.numel())


def check_matrices(
    gate: Tensor,
    gate_maps: Sequence[GateMap],
    matrices: dict[str, Sequence[Tensor]],
    *,
    gate_name: str = "gate",
) -> Tensor:
    """Checks gate, maps and parallel lists of matrices (the first list gives the shapes); returns the maps as int64
    [M, 4].
    """
    check_gate(gate_name, gate)
    for name, tensors in matrices.items():
        checks.check_length(name, tensors, len(gate_maps))
    first_name, first = next(iter(matrices.items()))
    dtypes = _MATRIX_DTYPES if gate.dtype == torch.float32 else checks.FLOATS
    for name, tensors in matrices.items():
        for m, (like, value) in enumerate(zip(first, tensors, strict=True)):
            allowed = (like.dtype,) if name == "bases" else dtypes
            _check_matrix(
                f"{name}[{m}]", value, like.shape if name != first_name else (None, None), allowed, gate.device
            )
    for m, (where, like) in enumerate(zip(gate_maps, first, strict=True)):
        _check_gate_map(f"gate_maps[{m}]", where, like.shape, gate.numel())
    rows = [(g.row_start, g.col_start, g.head_dim, g.repeat) for g in gate_maps]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def _check_matrix(
    name: str,
    value: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    checks.check_shape(name, value, shape)
    checks.check_dtype(name, value, dtypes)
    checks.check_device(name, value, device)
    checks.check_contiguous(name, value)


def _check_gate_map(name: str, where: GateMap, shape: Sequence[int], n_gates: int) -> None:
    if not isinstance(where, GateMap):
        raise fail(name, "a GateMap", type(where).__name__)
    n_out, n_in = shape
    checks.check_int(f"{name}.row_start", where.row_start, 0, n_gates - n_out + 1)
    checks.check_int(f"{name}.head_dim", where.head_dim, 1)
    checks.check_int(f"{name}.repeat", where.repeat, 1)
    if where.repeat > 1 and n_in % (where.repeat * where.head_dim):
        raise fail(name, f"repeat*head_dim dividing {n_in} columns", f"{where.repeat}*{where.head_dim}")
    checks.check_int(f"{name}.col_start", where.col_start, 0, n_gates - n_in // where.repeat + 1)


def check_grads(
    grads: Sequence[Tensor | tuple[Tensor, Tensor]],
    deltas: Sequence[Tensor],
    gate: Tensor,
    maps: Tensor,
    layouts: Sequence[str] | None,
    rank: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Gradients as the op takes them: one tensor per matrix, the column panels apart, layout codes."""
    checks.check_length("grads", grads, len(deltas))
    names = ["dense"] * len(deltas) if layouts is None else list(layouts)
    checks.check_length("layouts", names, len(deltas))
    for m, layout in enumerate(names):
        checks.check_choice(f"layouts[{m}]", layout, LAYOUTS)
    if rank is not None:
        checks.check_shape("rank", rank, gate.shape)
        checks.check_dtype("rank", rank, (torch.int32,))
        checks.check_device("rank", rank, gate.device)
        checks.check_contiguous("rank", rank)
    elif any(layout != "dense" for layout in names):
        raise fail("rank", "the rank of open_indices (a gradient is packed)", None)
    dtypes = _MATRIX_DTYPES if gate.dtype == torch.float32 else checks.FLOATS
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    for m, (grad, delta, layout) in enumerate(zip(grads, deltas, names, strict=True)):
        n_out, n_in = delta.shape
        n_rows, n_cols = (None, None) if layout == "dense" else _open_counts(rank, maps[m].tolist(), n_out, n_in)
        if layout == "panels":
            if not isinstance(grad, tuple | list) or len(grad) != 2:
                raise fail(f"grads[{m}]", "a pair (rows panel, columns panel)", type(grad).__name__)
            _check_matrix(f"grads[{m}][0]", grad[0], (n_rows, n_in), dtypes, gate.device)
            _check_matrix(f"grads[{m}][1]", grad[1], (n_out, n_cols), (grad[0].dtype,), gate.device)
            rows.append(grad[0])
            cols.append(grad[1])
        elif isinstance(grad, tuple | list):
            raise fail(f"grads[{m}]", f"a tensor (layout {layout!r})", type(grad).__name__)
        else:
            shape = (n_out, n_in) if layout == "dense" else (n_rows, n_cols)
            _check_matrix(f"grads[{m}]", grad, shape, dtypes, gate.device)
            rows.append(grad)
    return rows, cols, [LAYOUTS.index(layout) for layout in names]


def _open_counts(rank: Tensor | None, where: list[int], n_out: int, n_in: int) -> tuple[int | None, int | None]:
    """Open rows and columns of a matrix as `rank` has them: on the CPU only, elsewhere the host would wait for it."""
    if rank is None or rank.device.type != "cpu" or torch.compiler.is_compiling():
        return None, None
    row_start, col_start, _, repeat = where
    n_rows = int((rank[row_start : row_start + n_out] >= 0).sum())
    return n_rows, int((rank[col_start : col_start + n_in // repeat] >= 0).sum()) * repeat


def check_written(written: dict[str, Sequence[Tensor]], read: dict[str, Sequence[Tensor]]) -> None:
    def named(lists: dict[str, Sequence[Tensor]]) -> list[tuple[str, Tensor]]:
        return [(f"{name}[{m}]", value) for name, tensors in lists.items() for m, value in enumerate(tensors)]

    checks.check_no_overlap(named(written), named(read))
