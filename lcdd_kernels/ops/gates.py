"""`lcdd::gate_values`, `lcdd::gate_logits_grad` (its backward) and `lcdd::open_indices`. Shapes as in
`reference/gates.py`.
"""

from typing import Any

import torch
from torch import Tensor

from lcdd_kernels.backends import choose
from lcdd_kernels.reference.gates import GateSpec


@torch.library.custom_op("lcdd::gate_values", mutates_args=())
def gate_values(logits: Tensor, kind: str, seed: int, step: int, training: bool, offset: int) -> tuple[Tensor, Tensor]:
    spec = GateSpec(kind=kind, seed=seed, step=step, training=training)
    return choose("gate_values", logits)(logits, spec, offset=offset)


@gate_values.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), logits.new_empty(())


@torch.library.custom_op("lcdd::gate_logits_grad", mutates_args=())
def gate_logits_grad(
    logits: Tensor,
    d_gate: Tensor,
    kind: str,
    seed: int,
    step: int,
    training: bool,
    l0_weight: float,
    offset: int,
) -> Tensor:
    spec = GateSpec(kind=kind, seed=seed, step=step, training=training)
    return choose("gate_logits_grad", logits)(logits, d_gate, spec, l0_weight=l0_weight, offset=offset)


@gate_logits_grad.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *ctx.settings = inputs
    ctx.save_for_backward(logits)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_gate: Tensor | None, d_l0: Tensor | None) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    *spec, offset = ctx.settings
    d_logits = None
    if d_gate is not None:
        d_logits = gate_logits_grad(logits, d_gate.contiguous(), *spec, 0.0, offset)
    if d_l0 is not None:  # a tensor, while l0_weight is a number: d_l0.item() would make the host wait
        slope = gate_logits_grad(logits, torch.zeros_like(logits), *spec, 1.0, offset)
        d_logits = slope * d_l0 if d_logits is None else d_logits + slope * d_l0
    return d_logits, None, None, None, None, None


gate_values.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("lcdd::open_indices", mutates_args=())
def open_indices(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return choose("open_indices", gate)(gate, offsets)


@open_indices.register_fake
def _(gate: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, groups = gate.shape[0], offsets.shape[0] - 1
    indices, counts, rank = (gate.new_empty(size, dtype=torch.int32) for size in (n, groups, n))
    return indices, counts, rank
