"""Gates of a whole model: values, their gradient, and the lists of open ones. N gates, G groups."""

import torch
from torch import Tensor

from lcdd_kernels import checks
from lcdd_kernels.backends import choose
from lcdd_kernels.checks import MAX_INT, check_gate, fail
from lcdd_kernels.ops import gates as gate_ops
from lcdd_kernels.reference.gates import KINDS, GateSpec

__all__ = ["GateSpec", "gate_logits_grad", "gate_values", "open_indices"]


def gate_values(logits: Tensor, spec: GateSpec, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Every gate of a model in one launch: logits[N] -> (gate[N], expected_l0[]), differentiable in logits.

    logits: float32 (float64: reference), contiguous. `offset`: position of logits[0] in the model's flat vector, so
    that a slice draws the noise of the whole: it is a function of (seed, step, offset + position) alone. Method
    section 2.
    """
    _check_arguments(logits, spec, offset)
    if untraced(logits):
        return choose("gate_values", logits)(logits, spec, offset=offset)
    return gate_ops.gate_values(logits, *settings(spec), offset)


def gate_logits_grad(
    logits: Tensor, d_gate: Tensor, spec: GateSpec, *, l0_weight: float = 0.0, offset: int = 0
) -> Tensor:
    """d_logits[N] = d_gate * dz/dtheta + l0_weight * dE[L0]/dtheta: the backward of `gate_values`, with the same
    arguments.
    """
    _check_arguments(logits, spec, offset)
    checks.check_shape("d_gate", d_gate, logits.shape)
    checks.check_dtype("d_gate", d_gate, (logits.dtype,))
    checks.check_device("d_gate", d_gate, logits.device)
    checks.check_contiguous("d_gate", d_gate)
    checks.check_real("l0_weight", l0_weight, -torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    if untraced(logits, d_gate):
        return choose("gate_logits_grad", logits)(logits, d_gate, spec, l0_weight=float(l0_weight), offset=offset)
    return gate_ops.gate_logits_grad(logits, d_gate, *settings(spec), float(l0_weight), offset)


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
        if not values or values[0] != 0 or values[-1] != gate.numel() or values != sorted(values):
            shown = values if len(values) <= 12 else f"{values[:4]} ... {values[-4:]}"
            raise fail("offsets", f"ascending int64 from 0 to {gate.numel()} (the number of gates)", shown)
    if untraced(gate):
        return choose("open_indices", gate)(gate, offsets)
    return gate_ops.open_indices(gate, offsets)


def untraced(*tensors: Tensor) -> bool:
    """Whether nobody asks for the graph of a call on these: neither autograd nor a tracer. Then the implementation is
    called as it is, without the op around it, whose wrapper costs the host more than the launch."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not differentiable and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def check_spec(spec: GateSpec) -> None:
    if not isinstance(spec, GateSpec):
        raise fail("spec", "a GateSpec", type(spec).__name__)
    checks.check_choice("kind", spec.kind, KINDS)
    checks.check_int("seed", spec.seed, 0, MAX_INT)
    checks.check_int("step", spec.step, 0, MAX_INT)


def settings(spec: GateSpec) -> tuple[str, int, int, bool]:
    """As the ops' schemas have it."""
    return spec.kind, spec.seed, spec.step, bool(spec.training)


def _check_arguments(logits: Tensor, spec: GateSpec, offset: int) -> None:
    check_gate("logits", logits)
    check_spec(spec)
    checks.check_int("offset", offset, 0, MAX_INT - logits.numel())
