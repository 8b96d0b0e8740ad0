"""The forward route: gates applied inside a differentiable op.

Gradients are those of the optimizer route (`delta_grad_stats`) for the same gates, and gates are the same for the same
seed, step and place in the model's flat vector. Shapes: D model width, F feed-forward width; x [..., in].

Dtypes: x, bases and deltas float32, float16, bfloat16 or float64, each on its own; logits float32 or float64. W_eff is
formed in x's dtype with one rounding, and the result has x's dtype. Any float64 operand is served by the reference.
Under autocast x is cast as nn.Linear would cast it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import FLOATS, MAX_INT, check_gate, fail
from lcdd_kernels.functional.delta_step import check_gate_map
from lcdd_kernels.functional.gates import check_spec, settings
from lcdd_kernels.ops import gated_block
from lcdd_kernels.ops import gated_linear as linear_op
from lcdd_kernels.reference.delta_step import GateMap
from lcdd_kernels.reference.gates import GateSpec

T = TypeVar("T")

__all__ = ["gated_linear", "gated_mlp", "gated_qkv"]

# Up to this many tokens, and without gradients, base and delta are multiplied one after the other instead of being
# combined first: that reads two matrices, while forming W_eff reads two, writes one and reads it back. With more tokens
# the second product's arithmetic costs more than the two passes that it saves (a product is bound by memory up to some
# tens of tokens; 16 is one tile of a tensor core).
SMALL_BATCH_TOKENS = 16


def gated_linear(
    x: Tensor,
    weight_base: Tensor,
    delta: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    spec: GateSpec,
    *,
    where: GateMap = GateMap(0, 0),  # noqa: B008
    bias: Tensor | None = None,
    small_batch: bool | None = None,
) -> Tensor:
    """y = x (W_base + (r x c) o delta)^T + bias, with r and c drawn from their logits: x [..., in] -> y [..., out].

    weight_base, delta: [out, in]; row_logits: [out]; col_logits: [in / repeat]; bias: [out] in x's dtype (or None).
    spec: as in `gate_values`. where: the place of these logits in the model's flat vector, whose noise they draw, and
    GQA's shared columns. small_batch: multiply by base and delta apart (see SMALL_BATCH_TOKENS); None: where that pays.

    Differentiable in x, delta, both logits and bias; what needs no gradient costs none. The backward saves these inputs
    only and forms W_eff again. weight_base is frozen: one that requires a gradient is an error.
    Raises ValueError on a bad argument. Method sections 1 and 2.
    """
    x = _autocast(x)
    check_spec(spec)
    checks.check_shape("weight_base", weight_base, (None, None))
    _check_x(x, weight_base, "weight_base")
    _check_matrix(x, ("weight_base", weight_base), ("delta", delta), None)
    rows, cols = weight_base.shape
    check_gate_map("where", where, (rows, cols), MAX_INT)
    _check_logits(x, "row_logits", row_logits, rows)
    _check_logits(x, "col_logits", col_logits, cols // where.repeat)
    if bias is not None:
        bias = bias.to(x.dtype) if _autocast_dtype(x) is not None else bias
        checks.check_shape("bias", bias, (rows,))
        checks.check_dtype("bias", bias, (x.dtype,))
        checks.check_device("bias", bias, x.device)
    split = _small_batch(small_batch, x, delta, row_logits, col_logits, bias)
    place = [where.row_start, where.col_start, where.head_dim, where.repeat]
    return _without_autocast(
        x,
        lambda: linear_op.gated_linear(
            x, weight_base, delta, row_logits, col_logits, bias, *settings(spec), place, split
        ),
    )


def gated_mlp(
    x: Tensor,
    weight_bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    read_logits: Tensor,
    hidden_logits: Tensor,
    write_logits: Tensor,
    spec: GateSpec,
    *,
    offsets: Sequence[int] = (0, 0, 0),
    small_batch: bool | None = None,
) -> Tensor:
    """y = down(silu(gate x) * up x), every projection gated: x [..., D] -> y [..., D].

    weight_bases, deltas: (gate [F, D], up [F, D], down [D, F]). read_logits [D] gate the columns of gate and up,
    hidden_logits [F] their rows and the columns of down, write_logits [D] the rows of down; offsets: where the three
    are in the model's flat vector. Saves its inputs only: the backward multiplies by gate and up again. The rest as in
    `gated_linear`.
    """
    x = _autocast(x)
    check_spec(spec)
    _check_matrices(x, weight_bases, deltas)
    width, hidden = x.shape[-1], weight_bases[0].shape[0]
    _check_matrix(x, ("weight_bases[0]", weight_bases[0]), ("deltas[0]", deltas[0]), (hidden, width))
    _check_matrix(x, ("weight_bases[1]", weight_bases[1]), ("deltas[1]", deltas[1]), (hidden, width))
    _check_matrix(x, ("weight_bases[2]", weight_bases[2]), ("deltas[2]", deltas[2]), (None, hidden))
    written = weight_bases[2].shape[0]
    _check_logits(x, "read_logits", read_logits, width)
    _check_logits(x, "hidden_logits", hidden_logits, hidden)
    _check_logits(x, "write_logits", write_logits, written)
    logits = [read_logits, hidden_logits, write_logits]
    _check_offsets(offsets, logits)
    split = _small_batch(small_batch, x, *deltas, *logits)
    matrices = (list(weight_bases), list(deltas))
    return _without_autocast(
        x, lambda: gated_block.gated_mlp(x, *matrices, logits, list(offsets), *settings(spec), split)
    )


def gated_qkv(
    x: Tensor,
    weight_bases: Sequence[Tensor],
    deltas: Sequence[Tensor],
    read_logits: Tensor,
    q_logits: Tensor,
    k_logits: Tensor,
    v_logits: Tensor,
    spec: GateSpec,
    *,
    offsets: Sequence[int] = (0, 0, 0, 0),
    small_batch: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) = the three gated projections of x [..., D], which share their column gates.

    weight_bases, deltas: (q [H*d, D], k [K*d, D], v [K*d, D]) for H query heads and K KV heads of width d; read_logits
    [D] gate the columns, q_logits, k_logits and v_logits the rows; offsets: where the four are in the model's flat
    vector. o_proj is `gated_linear` with v_logits as its column logits, head_dim = d and repeat = H / K. The rest as in
    `gated_linear`.
    """
    x = _autocast(x)
    check_spec(spec)
    _check_matrices(x, weight_bases, deltas)
    width = x.shape[-1]
    _check_logits(x, "read_logits", read_logits, width)
    for i, (name, logits) in enumerate((("q", q_logits), ("k", k_logits), ("v", v_logits))):
        base = (f"weight_bases[{i}]", weight_bases[i])
        _check_matrix(x, base, (f"deltas[{i}]", deltas[i]), (None, width))
        _check_logits(x, f"{name}_logits", logits, weight_bases[i].shape[0])
    all_logits = [read_logits, q_logits, k_logits, v_logits]
    _check_offsets(offsets, all_logits)
    split = _small_batch(small_batch, x, *deltas, *all_logits)
    matrices = (list(weight_bases), list(deltas))
    return _without_autocast(
        x, lambda: gated_block.gated_qkv(x, *matrices, all_logits, list(offsets), *settings(spec), split)
    )


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give a product of x, or None where it leaves it alone (off, or float64)."""
    checks.check_tensor("x", x)
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled and x.dtype != torch.float64 else None


def _autocast(x: Tensor) -> Tensor:
    dtype = _autocast_dtype(x)
    return x if dtype is None else x.to(dtype)


def _without_autocast(x: Tensor, call: Callable[[], T]) -> T:
    """The op chose its dtypes already; autocast must not change those of the products inside it."""
    if _autocast_dtype(x) is None:
        return call()
    with torch.autocast(x.device.type, enabled=False):
        return call()


def _small_batch(asked: bool | None, x: Tensor, *differentiable: Tensor | None) -> bool:
    if asked is not None:
        return bool(asked)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *differentiable))
    return not trains and x.numel() <= SMALL_BATCH_TOKENS * x.shape[-1]


def _check_x(x: Tensor, weight: Tensor, name: str) -> None:
    checks.check_dtype("x", x, FLOATS)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise fail("x", f"shape [..., {weight.shape[1]}] ({name} has so many columns)", f"shape {list(x.shape)}")


def _check_matrices(x: Tensor, bases: Sequence[Tensor], deltas: Sequence[Tensor]) -> None:
    checks.check_length("weight_bases", bases, 3)
    checks.check_length("deltas", deltas, 3)
    checks.check_shape("weight_bases[0]", bases[0], (None, None))
    _check_x(x, bases[0], "weight_bases[0]")


def _check_matrix(
    x: Tensor, base: tuple[str, Tensor], delta: tuple[str, Tensor], shape: Sequence[int | None] | None
) -> None:
    for name, value in (base, delta):
        checks.check_shape(name, value, base[1].shape if name == delta[0] else shape or (None, None))
        checks.check_dtype(name, value, FLOATS)
        checks.check_device(name, value, x.device)
        checks.check_contiguous(name, value)
    name, value = base
    if value.requires_grad and torch.is_grad_enabled():
        raise fail(name, "a frozen tensor (the base never gets a gradient)", "requires_grad=True")


def _check_logits(x: Tensor, name: str, logits: Tensor, count: int) -> None:
    check_gate(name, logits, count)
    checks.check_device(name, logits, x.device)


def _check_offsets(offsets: Sequence[int], logits: Sequence[Tensor]) -> None:
    checks.check_length("offsets", offsets, len(logits))
    for i, (offset, part) in enumerate(zip(offsets, logits, strict=True)):
        checks.check_int(f"offsets[{i}]", offset, 0, MAX_INT - part.numel())
