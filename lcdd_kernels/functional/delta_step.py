"""One optimizer step over every matrix of a model: passes A and B, and the refresh of W_eff alone.

Shapes: N gates of the model, M matrices, each `[out, in]`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import MAX_INT, check_gate, fail
from lcdd_kernels.ops import delta_step as delta_ops
from lcdd_kernels.reference.delta_step import LAYOUTS, GateMap

__all__ = ["GateMap", "delta_adamw_", "delta_grad_stats", "weight_eff_"]

_MATRIX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def weight_eff_(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    gate: Tensor,
    gate_maps: Sequence[GateMap],
) -> None:
    """weights[m] := bases[m] + (r x c) o deltas[m], in place, for all M matrices of a model (method section 1).

    weights, bases: same dtype (float32, float16, bfloat16; float64 with a float64 gate); deltas: any of these, and
    contiguous like them. Bit-identical on every backend; where a gate is closed the base's bits are copied.
    """
    maps = check_matrices(gate, gate_maps, {"weights": weights, "bases": bases, "deltas": deltas})
    check_written({"weights": weights}, {"bases": bases, "deltas": deltas})
    # The weights are leaves that require a gradient, and an optimizer's write is not part of a graph.
    with torch.no_grad():
        delta_ops.weight_eff_(list(weights), list(bases), list(deltas), gate, maps)


def delta_grad_stats(
    grads: Sequence[Tensor | tuple[Tensor, Tensor]],
    deltas: Sequence[Tensor],
    gate: Tensor,
    gate_maps: Sequence[GateMap],
    *,
    layouts: Sequence[str] | None = None,
    rank: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass A: (d_gate[N], sq_norm[]) in the gate's dtype, from G = dL/dW_eff; deterministic (method section 1).

    d_gate[n] = sum over every row and column that uses gate n of its gradient; sq_norm = sum ||(r x c) o G||^2, for
    clipping.
    layouts[m]: "dense" (default; grads[m] is [out, in]), "block" (open rows x open columns; closed gates get zero), or
    "panels" (grads[m] is a pair: open rows x all columns, all rows x open columns). Packed ones need `rank` of
    `open_indices`.
    """
    maps = check_matrices(gate, gate_maps, {"deltas": deltas})
    rows, cols, codes = check_grads(grads, deltas, gate, maps, layouts, rank)
    with torch.no_grad():
        return delta_ops.delta_grad_stats(rows, cols, list(deltas), gate, maps, codes, rank)


def delta_adamw_(
    weights: Sequence[Tensor],
    bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor | tuple[Tensor, Tensor]],
    gate_old: Tensor,
    gate_new: Tensor,
    gate_maps: Sequence[GateMap],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    layouts: Sequence[str] | None = None,
    rank: Tensor | None = None,
) -> None:
    """Pass B, in place: AdamW on deltas with the gradient grad_scale*(r_old x c_old) o G, then weights from the new
    gates.

    Adam is torch.optim.AdamW's (decoupled decay, bias correction; `step` counts from 1). Moments: bfloat16, float32
    (float64), each matrix its own; the update uses them before they are rounded for storage. grads, layouts, rank: as
    `delta_grad_stats`, with `rank` of the *old* gates; an entry that a packed gradient lacks has gradient zero, and
    its momenta still move delta.
    """
    written = {"weights": weights, "deltas": deltas, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    maps = check_matrices(gate_old, gate_maps, {**written, "bases": bases}, gate_name="gate_old")
    check_gate("gate_new", gate_new, gate_old.numel())
    checks.check_dtype("gate_new", gate_new, (gate_old.dtype,))
    checks.check_device("gate_new", gate_new, gate_old.device)
    rows, cols, codes = check_grads(grads, deltas, gate_old, maps, layouts, rank)
    check_written(written, {"bases": bases, "grads": rows, "grads (columns)": cols})
    largest = torch.finfo(torch.float32).max
    checks.check_real("lr", lr, 0.0, largest)
    checks.check_real("beta1", beta1, 0.0, 1.0, high_open=True)
    checks.check_real("beta2", beta2, 0.0, 1.0, high_open=True)
    checks.check_real("eps", eps, 0.0, largest)
    checks.check_real("weight_decay", weight_decay, 0.0, largest)
    checks.check_int("step", step, 1, MAX_INT)
    checks.check_real("grad_scale", grad_scale, 0.0, largest)
    with torch.no_grad():
        delta_ops.delta_adamw_(
            list(weights),
            list(bases),
            list(deltas),
            list(exp_avgs),
            list(exp_avg_sqs),
            rows,
            cols,
            gate_old,
            gate_new,
            maps,
            codes,
            rank,
            float(lr),
            float(beta1),
            float(beta2),
            float(eps),
            float(weight_decay),
            step,
            float(grad_scale),
        )


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
