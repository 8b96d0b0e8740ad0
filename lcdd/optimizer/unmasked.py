"""What no gate masks, in training: embeddings, head, and norms and biases, which `config.train_unmasked` trains."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
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
        kept = {id(parameter) for parameter in [*masked, *trained.values()]}
        self._frozen = [
            (name, parameter, fixed.detach())
            for (name, parameter), fixed in zip(model.named_parameters(), base.parameters(), strict=True)
            if id(parameter) not in kept
        ]
        _reset(self._frozen)
        for weight in [*masked, *trained.values()]:
            weight.requires_grad_(True)
        self._versions = self._current_versions()
        self.parameters = list(trained.values())
        self._optimizer: torch.optim.Optimizer | None = None
        if self.parameters:
            self._optimizer = torch.optim.AdamW(
                self.parameters, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                eps=config.adam_epsilon, weight_decay=config.weight_decay,
            )  # fmt: skip
            fill_state_(self._optimizer)

    def check_frozen(self) -> None:
        """Raise InputError if somebody else has written a frozen parameter, or the base's, and they differ now."""
        if self._current_versions() == self._versions:
            return
        for name, parameter, fixed in self._frozen:
            if not torch.equal(local(parameter.detach()), local(fixed)):
                raise InputError(
                    f"model: expected {name} at the base's value, which no gate masks and nothing trains, got another: "
                    "somebody else has written it, or the base"
                )
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [local(tensor)._version for _, *pair in self._frozen for tensor in pair]

    def sq_norm(self) -> Tensor | int:
        """‖gradient‖² [] of the rows on this rank; 0 where nothing has one."""
        return sum(local(p.grad).float().square().sum() for p in self.parameters if p.grad is not None)

    def step(self, *, settings: Mapping[str, Any], grad_scale: float) -> None:
        """AdamW on grad_scale · gradient; settings: lr, betas, eps and weight_decay."""
        if self._optimizer is None:
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(grad_scale)
        kept = ("lr", "betas", "eps", "weight_decay")
        self._optimizer.param_groups[0].update({name: settings[name] for name in kept})
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


def _reset(frozen: Sequence[tuple[str, nn.Parameter, Tensor]]) -> None:
    """Set the parameters to the base's values and freeze them."""
    moved = []
    for name, parameter, fixed in frozen:
        parameter.requires_grad_(False)
        ours, theirs = local(parameter.detach()), local(fixed)
        if not torch.equal(ours, theirs):
            moved.append(name)
            ours.copy_(theirs)
    if moved:
        logger.warning(
            "%d parameters outside the masked linears differed from the base and were reset to it: %s%s",
            len(moved), ", ".join(moved[:3]), ", …" if len(moved) > 3 else "",
        )  # fmt: skip
