"""Adam on several triggers at once: projection, clipping, the best of each, and a state that a run resumes from.

Everything is elementwise or per start, so S starts together take the steps that each would take alone.

Shapes: S starts, T trigger tokens, D model width.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.config import EraserConfig
from lcdd.errors import InputError
from lcdd.optimizer import schedule


class TriggerSearch:
    """S triggers in optimisation.

    Args:
        starts: initial embeddings [S, T, D].
        radius: every embedding stays in the ball of this radius.

    Attributes:
        embeds: the parameter [S, T, D]; gradients arrive in `embeds.grad`.
        completed_steps: optimisation steps taken.
        best, best_loss: each start's embeddings with the lowest held-out loss, and that loss.
        steps, validation: log lines and held-out losses so far.
    """

    def __init__(self, starts: Tensor, config: EraserConfig, *, radius: float) -> None:
        self.config, self.radius = config, radius
        self.embeds = nn.Parameter(projected(starts, radius))
        self.optimizer = torch.optim.Adam([self.embeds], lr=config.learning_rate)
        self.completed_steps = 0
        self.best = self.embeds.detach().clone()
        self.best_loss = [math.inf] * len(starts)
        self.steps: list[dict[str, Any]] = []
        self.validation: list[dict[str, Any]] = []
        self._factor = schedule(config.lr_scheduler_type, warmup=0, steps=config.max_steps)

    @property
    def learning_rate(self) -> float:
        """Of the coming step."""
        return self.config.learning_rate * self._factor(self.completed_steps)

    @property
    def leader(self) -> int:
        """The start with the lowest held-out loss so far."""
        return self.best_loss.index(min(self.best_loss))

    def stalled(self, patience: int) -> bool:
        """Whether the last `patience` held-out losses are no better than the best before them; never for 0."""
        losses = [line["loss"] for line in self.validation]
        return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])

    @property
    def gradient(self) -> Tensor:
        """Of the triggers [S, T, D], as `backward` left it.

        Raises:
            InputError: it left none.
        """
        if self.embeds.grad is None:
            raise InputError("embeds: expected a gradient from backward(), got none")
        return self.embeds.grad

    @torch.no_grad()
    def step(self) -> None:
        """Clip each start's gradient, take one Adam step, project; the gradient is then gone."""
        grad, limit = self.gradient, self.config.max_grad_norm
        if limit:
            norms = grad.flatten(1).norm(dim=1)
            grad.mul_((limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None])
        self.optimizer.param_groups[0]["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.embeds.copy_(projected(self.embeds, self.radius))
        self.completed_steps += 1

    @torch.no_grad()
    def observe(self, held_out: Sequence[float]) -> None:
        """Take note of each start's held-out loss; keep the embeddings of those that have not been as good before."""
        for start, loss in enumerate(held_out):
            if loss < self.best_loss[start]:
                self.best_loss[start] = loss
                self.best[start] = self.embeds[start]
        several = {"starts": list(held_out)} if len(held_out) > 1 else {}
        self.validation.append({"step": self.completed_steps, "loss": min(held_out), **several})

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "embeds": self.embeds.detach(),
            "best": self.best,
            "best_loss": self.best_loss,
            "optimizer": self.optimizer.state_dict(),
            "completed_steps": self.completed_steps,
            "steps": self.steps,
            "validation": self.validation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s result; the optimizer's settings stay this run's."""
        with torch.no_grad():
            self.embeds.copy_(state["embeds"])
            self.best.copy_(state["best"])
        self.optimizer.load_state_dict(
            {**state["optimizer"], "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        self.completed_steps, self.best_loss = state["completed_steps"], list(state["best_loss"])
        self.steps, self.validation = list(state["steps"]), list(state["validation"])


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Hex SHA-256 over the dtypes, shapes and bytes of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def projected(embeds: Tensor, radius: float) -> Tensor:
    """Every row of `embeds` [..., D] scaled down to norm `radius` where it is longer."""
    norms = embeds.norm(dim=-1, keepdim=True)
    return embeds * (radius / norms.clamp_min(radius))
