"""What no gate masks, in training: embeddings, head, and norms and biases, which `config.train_unmasked` trains."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.models import PreTrainedModel, local, shards, unmasked_parameters
from lcdd.optimizer.inner import fill_state_, load_state_

logger = logging.getLogger(__name__)


class UnmaskedParameters:
    """What no gate masks: at the base's values and frozen, but norms and biases where `config.train_unmasked`."""

    def __init__(
        self, model: PreTrainedModel, base: PreTrainedModel, config: LCDDConfig, *, masked: Sequence[Tensor]
    ) -> None:
        trained = unmasked_parameters(model) if config.train_unmasked else {}
        for name, parameter in trained.items():
            shards.check_sharding(name, parameter)
        _reset(model, base, kept={id(parameter) for parameter in [*masked, *trained.values()]})
        self.parameters = list(trained.values())
        self._optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            self._optimizer = torch.optim.AdamW(
                self.parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon, weight_decay=config.weight_decay,
            )  # fmt: skip
            fill_state_(self._optimizer)

    def sq_norm(self) -> Tensor | int:
        """‖gradient‖² [] of the rows on this rank; 0 where nothing has one."""
        return sum(local(p.grad).float().square().sum() for p in self.parameters if p.grad is not None)

    def step(self, *, lr: float, grad_scale: float) -> None:
        """AdamW on grad_scale · gradient."""
        if self._optimizer is None:
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(grad_scale)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "unmasked": [parameter.detach().clone() for parameter in self.parameters],
            "unmasked_optimizer": self._optimizer.state_dict() if self._optimizer is not None else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for parameter, value in zip(self.parameters, state_dict["unmasked"], strict=True):
            shards.copy_rows_(parameter, value)
        if self._optimizer is not None:
            load_state_(self._optimizer, state_dict["unmasked_optimizer"])


def _reset(model: PreTrainedModel, base: PreTrainedModel, *, kept: set[int]) -> None:
    """Set every parameter to the base's value and freeze it, but those whose `id` is in `kept`, which are trained."""
    moved = []
    for (name, parameter), fixed in zip(model.named_parameters(), base.parameters(), strict=True):
        parameter.requires_grad_(id(parameter) in kept)
        if id(parameter) in kept:
            continue
        ours, theirs = local(parameter.detach()), local(fixed.detach())
        if not torch.equal(ours, theirs):
            moved.append(name)
            ours.copy_(theirs)
    if moved:
        logger.warning(
            "%d parameters outside the masked linears differed from the base and were reset to it: %s%s",
            len(moved), ", ".join(moved[:3]), ", …" if len(moved) > 3 else "",
        )  # fmt: skip
