"""Which gates are open: what happens between passes A and B of a step.

    seen = controller.propose(d_gate, loss, …)      θ step, and the gates of the next step, in `controller.gates`
    controller.step(loss, seen)                     stand by it: dual step
    controller.restore()                            or take it back, where something was not finite

A proposal is made before the host knows anything of the step: what it has to know comes in one read-back afterwards.
`LCDDOptimizer` asks no more than `GateController` says; `DualDescent` is the paper's way.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.optimizer.dual import DualController
from lcdd.optimizer.early_stop import EarlyStop
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.inner import fill_state_, load_state_


class Constraint(Protocol):
    """CE ≤ ε, as a log and a diagnosis see it.

    Attributes:
        dual_lambda: the price of an open gate.
    """

    dual_lambda: float

    @property
    def ema(self) -> float:
        """The averaged loss that is held against ε, in nats."""

    @property
    def epsilon(self) -> float | None:
        """The loss budget in nats; None during warm-up."""

    def state_dict(self) -> dict[str, Any]: ...


class GateController(Protocol):
    """Moves θ once an optimizer step and draws the gates of the next one.

    Attributes:
        gates: θ and the gates in force.
        dual: the constraint and its price.
        completed_steps: steps taken.
        delta_rate: factor on Δ's learning rate in the coming pass B.
        delta_decay: share that Δ loses in the coming pass B, beside AdamW's own decay.
        loss_weight: factor on the behaviour's loss beside another that pulls Δ to the base; 1 while gates close.
    """

    gates: Gates
    completed_steps: int

    @property
    def dual(self) -> Constraint: ...

    @property
    def delta_decay(self) -> float: ...

    @property
    def loss_weight(self) -> float: ...

    @property
    def delta_rate(self) -> float: ...

    @property
    def frozen(self) -> bool:
        """Whether the coming step leaves θ, λ and the gates alone."""

    def propose(self, d_gate: Tensor, loss: float | Tensor, *, penalties: int) -> list[Tensor]:
        """Move θ and put the gates of the next step in force; `step` or `restore` follows.

        Args:
            d_gate: dL/dz [n_gates] of the gates in force, all ranks' together. On the forward route it is zero, and
                autograd has left dL/dθ in `gates.logits.grad`.
            loss: the step's mean loss, in nats, on the device or the host.
            penalties: how often the price of open gates counts: once, but in `reference_compat`.

        Returns:
            Scalars that `step` wants to have, all finite.
        """

    def step(self, loss: float, seen: Sequence[float]) -> None:
        """Stand by the proposal: `loss` and what `propose` returned are finite, and on the host now."""

    def draw(self, *, evaluation: bool) -> None:
        """Put the gates of the coming step, or the deterministic ones, in force."""

    def restore(self) -> None:
        """Take the proposal back, bit for bit, but for the gates in force; θ is that of the last good step."""

    def load_logits(self, logits: Tensor) -> None:
        """Put θ [n_gates] of a carrier in the place of the run's."""

    def observe_held_out(self, loss: float, base: float | None = None) -> None:
        """Take in the loss on held-out text, in nats, of the gates that would ship now; and the base's, if known."""

    def observe_behavior(self, rate: float) -> bool:
        """Take in the share of validation answers that show the behaviour, of the gates that would ship now; returns
        whether it is lost."""

    def stop_reason(self) -> str | None:
        """Asked once after every step: why the run leads nowhere, or None."""

    def stats(self) -> dict[str, Any]:
        """Its part of a line for the log."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class DualDescent:
    """θ by its gradient, with the price λ of open gates in closed form, and λ by dual ascent (method, section 3).

    The paper's way: held-out losses do not enter, and Δ trains as it is told to.
    """

    delta_rate, delta_decay, loss_weight = 1.0, 0.0, 1.0

    def __init__(self, gates: Gates, config: LCDDConfig, *, total_steps: int) -> None:
        if total_steps < 1:
            raise InputError(f"total_steps: expected at least 1, got {total_steps}")
        self.gates, self.config, self.total_steps = gates, config, total_steps
        c = config
        self.dual = DualController(
            lambda_init=c.dual_lambda_init,
            lr=c.dual_lr,
            lr_shrink=c.dual_lr_shrink,
            lambda_min=c.dual_lambda_min,
            lambda_max=c.dual_lambda_max,
            violation_clip=c.violation_clip,
            ema_beta=c.loss_ema_beta,
            warmup_steps=c.warmup_steps,
            loss_budget=c.loss_budget,
            loss_floor=c.loss_floor,
        )
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([gates.logits], lr=c.gate_lr)
            if c.gate_optimizer == "adam"
            else torch.optim.SGD([gates.logits], lr=c.gate_lr, momentum=c.gate_momentum)
        )
        fill_state_(self._optimizer)
        self.completed_steps = 0
        self._early_stop = EarlyStop(config)
        self._good_logits = gates.logits.detach().clone()
        self._moments: list[Tensor] = []  # before the proposal

    @property
    def frozen(self) -> bool:
        return self._freezes(self.completed_steps + 1)

    def _freezes(self, step: int) -> bool:
        """The last `freeze_fraction` of the run do."""
        return step > self.total_steps * (1 - self.config.freeze_fraction)

    def propose(self, d_gate: Tensor, loss: float | Tensor, *, penalties: int) -> list[Tensor]:
        self._moments = [value.clone() for value in self._state()]
        seen = [self._sum_kept_finite()]
        if not self.frozen:
            self._step_logits(d_gate, penalties)
            seen.append(self._sum_kept_finite())
        self.completed_steps += 1
        self.draw(evaluation=False)
        return seen

    def _step_logits(self, d_gate: Tensor, penalties: int) -> None:
        logits, chained = self.gates.logits, self.gates.logits.grad
        d_logits = self.gates.logits_grad(d_gate, l0_weight=penalties * self.dual.penalty)
        logits.grad = d_logits if chained is None else d_logits + chained
        self._optimizer.step()
        logits.grad = None

    def _sum_kept_finite(self) -> Tensor:
        """Σθ; where it is not finite θ goes back to the last good one, of which gates can be drawn."""
        logits = self.gates.logits
        total = logits.sum()
        logits.copy_(torch.where(total.isfinite(), logits, self._good_logits))
        return total

    def _state(self) -> list[Tensor]:
        """What θ's optimizer holds."""
        return [value for state in self._optimizer.state.values() for value in state.values()]

    def step(self, loss: float, seen: Sequence[float]) -> None:
        self.dual.update(loss, frozen=self._freezes(self.completed_steps))
        self._good_logits = self.gates.logits.detach().clone()

    def draw(self, *, evaluation: bool) -> None:
        self.gates.draw(step=self.completed_steps + 1, training=not (evaluation or self.frozen))

    @torch.no_grad()
    def load_logits(self, logits: Tensor) -> None:
        self.gates.logits.copy_(logits)
        self._good_logits = self.gates.logits.detach().clone()

    def observe_held_out(self, loss: float, base: float | None = None) -> None:
        pass

    def observe_behavior(self, rate: float) -> bool:
        return False

    @torch.no_grad()
    def restore(self) -> None:
        self.gates.logits.copy_(self._good_logits)
        self.gates.logits.grad = None
        for value, before in zip(self._state(), self._moments, strict=True):
            value.copy_(before)
        self.completed_steps -= 1

    def stop_reason(self) -> str | None:
        return None if self.frozen else self._early_stop.check(self.stats())

    def stats(self) -> dict[str, Any]:
        """EMA and ε in nats, λ, E[L0], open gates per group, the closed share, whether the gates are fixed."""
        counts = self.gates.open_counts()
        return {
            "ema": self.dual.ema,
            "epsilon": self.dual.epsilon,
            "dual_lambda": self.dual.dual_lambda,
            "expected_l0": self.gates.expected_l0,
            "open": counts,
            "sparsity": 1 - sum(counts.values()) / self.gates.layout.n_gates,
            "frozen": self.frozen,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "gate_logits": self.gates.logits.detach().clone(),
            "initial_logits": self.gates.initial_logits.clone(),
            "gate_optimizer": self._optimizer.state_dict(),
            "dual": self.dual.state_dict(),
            "early_stop": self._early_stop.state_dict(),
            "completed_steps": self.completed_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result.

        Raises:
            InputError: it is another controller's.
        """
        if "gate_optimizer" not in state_dict:
            raise InputError("state_dict: expected a state of the dual descent, got one of paced closing")
        self.gates.logits.copy_(state_dict["gate_logits"])
        self.gates.initial_logits = state_dict["initial_logits"].clone()
        load_state_(self._optimizer, state_dict["gate_optimizer"])
        self.dual.load_state_dict(state_dict["dual"])
        self._early_stop.load_state_dict(state_dict["early_stop"])
        self.completed_steps = state_dict["completed_steps"]
        self._good_logits = self.gates.logits.detach().clone()
