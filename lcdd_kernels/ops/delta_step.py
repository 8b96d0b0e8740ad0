"""`lcdd::weight_eff_`, `lcdd::delta_grad_stats` (pass A) and `lcdd::delta_adamw_` (pass B); see
`reference/delta_step.py`.

One call each for all matrices of a model. They are steps of an optimizer and have no autograd formula.
"""

import torch
from torch import Tensor

from lcdd_kernels.backends import choose


@torch.library.custom_op("lcdd::weight_eff_", mutates_args=("weights",))
def weight_eff_(
    weights: list[Tensor], bases: list[Tensor], deltas: list[Tensor], gate: Tensor, gate_maps: Tensor
) -> None:
    choose("weight_eff_", gate)(weights, bases, deltas, gate, gate_maps)


@weight_eff_.register_fake
def _(weights: list[Tensor], bases: list[Tensor], deltas: list[Tensor], gate: Tensor, gate_maps: Tensor) -> None:
    return None


@torch.library.custom_op("lcdd::delta_grad_stats", mutates_args=())
def delta_grad_stats(
    grads: list[Tensor],
    col_panels: list[Tensor],
    deltas: list[Tensor],
    gate: Tensor,
    gate_maps: Tensor,
    layouts: list[int],
    rank: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return choose("delta_grad_stats", gate)(grads, col_panels, deltas, gate, gate_maps, layouts, rank)


@delta_grad_stats.register_fake
def _(
    grads: list[Tensor],
    col_panels: list[Tensor],
    deltas: list[Tensor],
    gate: Tensor,
    gate_maps: Tensor,
    layouts: list[int],
    rank: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), gate.new_empty(())


@torch.library.custom_op("lcdd::delta_adamw_", mutates_args=("weights", "deltas", "exp_avgs", "exp_avg_sqs"))
def delta_adamw_(
    weights: list[Tensor],
    bases: list[Tensor],
    deltas: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    col_panels: list[Tensor],
    gate_old: Tensor,
    gate_new: Tensor,
    gate_maps: Tensor,
    layouts: list[int],
    rank: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    choose("delta_adamw_", gate_old)(
        weights, bases, deltas, exp_avgs, exp_avg_sqs, grads, col_panels, gate_old, gate_new, gate_maps, layouts, rank,
        lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step, grad_scale=grad_scale,
    )  # fmt: skip


@delta_adamw_.register_fake
def _(
    weights: list[Tensor],
    bases: list[Tensor],
    deltas: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    col_panels: list[Tensor],
    gate_old: Tensor,
    gate_new: Tensor,
    gate_maps: Tensor,
    layouts: list[int],
    rank: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    return None
