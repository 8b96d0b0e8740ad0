"""What `LCDDOptimizer` needs once, when it is attached: checks of the models, the dual, Δ, inner optimizers."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, local, shards, unmasked_parameters
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.dual import DualController

logger = logging.getLogger("lcdd.optimizer")


def check_pair(name: str, weight: Tensor, fixed: Tensor) -> None:
    """Raise InputError unless `weight` can be trained against `fixed`, the base's weight of the linear `name`."""
    shards.check_sharding(f"{name}.weight", weight)
    if shards.is_sharded(weight) != shards.is_sharded(fixed) or local(weight).shape != local(fixed).shape:
        raise InputError(f"base: expected {name}.weight sharded as the model's is, got another sharding")
    if local(weight).numel() and local(weight).data_ptr() == local(fixed).data_ptr():
        raise InputError(f"base: expected its own copy of {name}.weight, got the tensor that is trained")
    if weight.device != fixed.device or weight.dtype != fixed.dtype:
        raise InputError(
            f"base: expected {name}.weight as {weight.dtype} on {weight.device}, got {fixed.dtype} on {fixed.device}"
        )


def dual_controller(config: LCDDConfig) -> DualController:
    """The constraint's controller with the settings of `config`."""
    return DualController(
        lambda_init=config.dual_lambda_init,
        lr=config.dual_lr,
        lr_shrink=config.dual_lr_shrink,
        lambda_min=config.dual_lambda_min,
        lambda_max=config.dual_lambda_max,
        violation_clip=config.violation_clip,
        ema_beta=config.loss_ema_beta,
        warmup_steps=config.warmup_steps,
        loss_budget=config.loss_budget,
        loss_floor=config.loss_floor,
    )


def fix_unmasked(
    model: PreTrainedModel, base: PreTrainedModel, config: LCDDConfig, *, masked: Sequence[Tensor]
) -> list[nn.Parameter]:
    """Set what is not gated to the base's values and freeze it; return what is trained beside Δ."""
    trained = unmasked_parameters(model) if config.train_unmasked else {}
    for name, parameter in trained.items():
        shards.check_sharding(name, parameter)
    gated = set(map(id, masked))
    moved = []
    for (name, parameter), fixed in zip(model.named_parameters(), base.parameters(), strict=True):
        if id(parameter) in gated or name in trained:
            parameter.requires_grad_(True)
            continue
        parameter.requires_grad_(False)
        ours, theirs = local(parameter.detach()), local(fixed.detach())
        if not torch.equal(ours, theirs):
            moved.append(name)
            ours.copy_(theirs)
    if moved:
        logger.warning(
            "%d parameters outside the masked linears differed from the base and were reset to it: %s%s",
            len(moved), ", ".join(moved[:3]), ", …" if len(moved) > 3 else "",
        )  # fmt: skip
    return list(trained.values())


def inner_optimizers(
    config: LCDDConfig, logits: nn.Parameter, unmasked: list[nn.Parameter]
) -> dict[str, torch.optim.Optimizer]:
    """θ's optimizer under "gates", and AdamW for what is trained beside Δ, if anything is, under "unmasked"."""
    c = config
    inner: dict[str, torch.optim.Optimizer] = {
        "gates": torch.optim.Adam([logits], lr=c.gate_lr)
        if c.gate_optimizer == "adam"
        else torch.optim.SGD([logits], lr=c.gate_lr, momentum=c.gate_momentum)
    }
    if unmasked:
        inner["unmasked"] = torch.optim.AdamW(
            unmasked, lr=c.learning_rate, betas=(c.adam_beta1, c.adam_beta2), eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
        )  # fmt: skip
    for optimizer in inner.values():
        _fill_state(optimizer)
    return inner


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """The state that the first step would make, made now: a loader that fills in tensors has to find them there."""
    settings = optimizer.param_groups[0]
    for parameter in settings["params"]:
        zeros = partial(torch.zeros_like, parameter.detach())
        if "betas" in settings:
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros(), "exp_avg_sq": zeros()}
        elif settings["momentum"]:
            optimizer.state[parameter] = {"momentum_buffer": zeros()}


def load_inner_(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Copy the tensors of an inner optimizer's state, whole or sharded or rows on disk; the settings stay."""
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for key, tensor in optimizer.state[parameter].items():
            shards.copy_rows_(tensor, state_dict["state"][index][key])


def masked_state(config: LCDDConfig, weight: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """Δ and, where it is trained, AdamW's moments at zero; sharded like the weight."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta_dtype = getattr(torch, config.delta_dtype or "", reference_compat.delta_dtype(config, weight.dtype))
    state = {"delta": (weight.detach().to(wide) - fixed.to(wide)).to(delta_dtype)}
    if config.train_delta:
        moment_dtype = getattr(torch, config.moment_dtype or "", wide)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(weight.detach(), dtype=moment_dtype)
    return state
