"""The typed public functions: they validate (a bad argument is a `ValueError`, and nothing is written) and call one op.

Shapes: N gates of the model, G groups, M matrices, each `[out, in]`.
NaN gates and logits are rejected on the CPU; on a GPU the check would make the host wait, so there a NaN is the
caller's to catch (the optimizer sees it in the squared norm, which any NaN reaches).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.checks import fail
from lcdd_kernels.gated import gated_linear, gated_mlp, gated_qkv
from lcdd_kernels.losses import linear_cross_entropy, linear_kl
from lcdd_kernels.matching import channel_match, last_token_index
from lcdd_kernels.matrix_checks import (
    MAX_INT,
    GateMap,
    check_gate,
    check_gate_arguments,
    check_grads,
    check_matrices,
    check_written,
)
from lcdd_kernels.ops import delta_step as delta_ops
from lcdd_kernels.ops import gates as gate_ops
from lcdd_kernels.pack_plan import PackCrossover, default_crossover, measure_crossover, pack_layout, packed_multiple
from lcdd_kernels.packed import expand_columns, pack_columns, packed_weight_grad

__all__ = [
    "GateMap",
    "PackCrossover",
    "channel_match",
    "default_crossover",
    "delta_adamw_",
    "delta_grad_stats",
    "expand_columns",
    "gate_logits_grad",
    "gate_values",
    "gated_linear",
    "gated_mlp",
    "gated_qkv",
    "last_token_index",
    "linear_cross_entropy",
    "linear_kl",
    "measure_crossover",
    "open_indices",
    "pack_columns",
    "pack_layout",
    "packed_multiple",
    "packed_weight_grad",
    "weight_eff_",
]


# --- gates ------------------------------------------------------------------------------------------------------------


def gate_values(
    logits: Tensor, *, kind: str, seed: int, step: int, training: bool, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Every gate of a model in one launch: logits[N] -> (gate[N], expected_l0[]), differentiable in logits.

    kind: "heaviside_ste" (0 or 1; straight-through gradient) or "hard_concrete" (in [0, 1]; noise drawn from Philox
    with (seed, step, offset + position) in training, deterministic otherwise). logits: float32 (float64: reference),
    contiguous. `offset`: position of logits[0] in the model's flat vector, so that a slice draws the noise of the
    whole. Method section 2.
    """
    check_gate_arguments(logits, kind, seed, step, offset)
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
    """d_logits[N] = d_gate * dz/dtheta + l0_weight * dE[L0]/dtheta: the backward of `gate_values`, with the same
    arguments.
    """
    check_gate_arguments(logits, kind, seed, step, offset)
    checks.check_shape("d_gate", d_gate, logits.shape)
    checks.check_dtype("d_gate", d_gate, (logits.dtype,))
    checks.check_device("d_gate", d_gate, logits.device)
    checks.check_contiguous("d_gate", d_gate)
    checks.check_real("l0_weight", l0_weight, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    return gate_ops.gate_logits_grad(logits, d_gate, kind, seed, step, bool(training), float(l0_weight), offset)


def open_indices(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate[N], offsets[G+1] (int64, CPU) -> (indices[N], counts[G], rank[N]), int32 on gate's device.

    Group g is gate[offsets[g] : offsets[g+1]]. indices[offsets[g] : offsets[g]+counts[g]] lists its open (nonzero)
    gates' local positions, ascending, and -1 fills the rest; rank[n] is gate n's place in that list, -1 where closed.
    """
    check_gate("gate", gate)
    checks.check_shape("offsets", offsets, (None,))
    checks.check_dtype("offsets", offsets, (torch.int64,))
    checks.check_device("offsets", offsets, torch.device("cpu"))
    checks.check_contiguous("offsets", offsets)
    if not torch.compiler.is_compiling():
        values = offsets.tolist()
        if not values or values[0] != 0 or values[-1] != gate.numel() or any(a > b for a, b in pairwise(values)):
            shown = values if len(values) <= 12 else f"{values[:4]} ... {values[-4:]}"
            raise fail("offsets", f"ascending int64 from 0 to {gate.numel()} (the number of gates)", shown)
    return gate_ops.open_indices(gate, offsets)


# --- delta_step -------------------------------------------------------------------------------------------------------


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
    # The weights are leaves that require a gradient, and an optimizer\'s write is not part of a graph.
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
