"""The typed public functions: they validate (a bad argument is a `ValueError`, and nothing is written) and call one op.

Shapes: N gates of the model, G groups, M matrices, each `[out, in]`.
NaN gates and logits are rejected on the CPU; on a GPU the check would make the host wait, so there a NaN is the caller's to
catch (the optimizer sees it in the squared norm, which any NaN reaches).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import fail
from lcdd_kernels.ops import gates as gate_ops
from lcdd_kernels.reference.gates import KINDS

__all__ = ["GateMap", "gate_logits_grad", "gate_values", "open_indices"]

_GATE_DTYPES = (torch.float32, torch.float64)
_MAX_SEED = 2**63  # schema integers are signed


@dataclass(frozen=True)
class GateMap:
    """Where a matrix `[out, in]` finds its gates in the model's flat vector.

    row i:  gate[row_start + i]
    col j:  gate[col_start + (j // (repeat*head_dim))*head_dim + j % head_dim]
    With repeat = 1 that is gate[col_start + j]. GQA's o_proj has repeat = query heads per KV head, as each KV head's gates
    serve that many query heads; the expanded vector is never made.
    """

    row_start: int
    col_start: int
    head_dim: int = 1
    repeat: int = 1


# --- gates ------------------------------------------------------------------------------------------------------------


def gate_values(
    logits: Tensor, *, kind: str, seed: int, step: int, training: bool, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Every gate of a model in one launch: logits[N] -> (gate[N], expected_l0[]), differentiable in logits.

    kind: "heaviside_ste" (0 or 1; straight-through gradient) or "hard_concrete" (in [0, 1]; noise drawn from Philox with
    (seed, step, offset + position) in training, deterministic otherwise). logits: float32 (float64: reference), contiguous.
    `offset`: position of logits[0] in the model's flat vector, so that a slice draws the noise of the whole. Method section 2.
    """
    _check_gate_arguments(logits, kind, seed, step, offset)
    return gate_ops.gate_values(logits, kind, seed, step, bool(training), offset)


def gate_logits_grad(
    logits: Tensor,
    d_gate: Tensor,
    *,
    kind: str,
    seed: int,
    step: int,
    training: bool,
    l0_weight: float = 0.0,
    offset: int = 0,
) -> Tensor:
    """d_logits[N] = d_gate * dz/dtheta + l0_weight * dE[L0]/dtheta: the backward of `gate_values`, with the same arguments."""
    _check_gate_arguments(logits, kind, seed, step, offset)
    checks.check_shape("d_gate", d_gate, logits.shape)
    checks.check_dtype("d_gate", d_gate, (logits.dtype,))
    checks.check_device("d_gate", d_gate, logits.device)
    checks.check_contiguous("d_gate", d_gate)
    checks.check_real("l0_weight", l0_weight, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return gate_ops.gate_logits_grad(logits, d_gate, kind, seed, step, bool(training), float(l0_weight), offset)


def open_indices(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate[N], offsets[G+1] (int64, CPU) -> (indices[N], counts[G], rank[N]), int32 on gate's device.

    Group g is gate[offsets[g] : offsets[g+1]]. indices[offsets[g] : offsets[g]+counts[g]] lists its open (nonzero) gates'
    local positions, ascending, and -1 fills the rest; rank[n] is gate n's place in that list, -1 where closed.
    """
    _check_gate("gate", gate)
    checks.check_shape("offsets", offsets, (None,))
    checks.check_dtype("offsets", offsets, (torch.int64,))
    checks.check_device("offsets", offsets, torch.device("cpu"))
    checks.check_contiguous("offsets", offsets)
    if not torch.compiler.is_compiling():
        values = offsets.tolist()
        if not values or values[0] != 0 or values[-1] != gate.numel() or any(a > b for a, b in zip(values, values[1:])):
            shown = values if len(values) <= 12 else f"{values[:4]} ... {values[-4:]}"
            raise fail("offsets", f"ascending int64 from 0 to {gate.numel()} (the number of gates)", shown)
    return gate_ops.open_indices(gate, offsets)


def _check_gate(name: str, gate: Tensor, n: int | None = None) -> None:
    checks.check_shape(name, gate, (n,))
    checks.check_dtype(name, gate, _GATE_DTYPES)
    checks.check_contiguous(name, gate)
    checks.check_no_nan(name, gate)


def _check_gate_arguments(logits: Tensor, kind: str, seed: int, step: int, offset: int) -> None:
    _check_gate("logits", logits)
    checks.check_choice("kind", kind, KINDS)
    checks.check_int("seed", seed, 0, _MAX_SEED)
    checks.check_int("step", step, 0, _MAX_SEED)
    checks.check_int("offset", offset, 0, _MAX_SEED - logits.numel())
