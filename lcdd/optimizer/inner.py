"""torch's own optimizers: inside ours for θ, and for norms and biases where they are trained; and beneath it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lcdd.models import shards


def fill_state_(optimizer: torch.optim.Optimizer) -> None:
    """The state that the first step would make, made now: a loader that fills in tensors has to find them there."""
    settings = optimizer.param_groups[0]
    for parameter in settings["params"]:
        zeros = partial(torch.zeros_like, parameter.detach())
        if "betas" in settings:
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": zeros(), "exp_avg_sq": zeros()}
        elif settings["momentum"]:
            optimizer.state[parameter] = {"momentum_buffer": zeros()}


def load_state_(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Copy the tensors of an optimizer's state, whole or sharded or rows on disk; the settings stay."""
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        for key, tensor in optimizer.state[parameter].items():
            shards.copy_rows_(tensor, state_dict["state"][index][key])


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """`zero_grad` without all that torch asks every parameter; the device may be waiting."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
