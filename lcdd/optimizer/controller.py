"""Which gates are open: what happens between passes A and B of a step.

    controller.step(d_gate, loss)      θ step, dual step, and the gates of the next step, in `controller.gates`

`LCDDOptimizer` asks no more than `GateController` says; `DualDescent` is the paper's way.
"""

import math
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

    def step(self, d_gate: Tensor, loss: float, *, penalties: int) -> bool:
        """Take one step, all or nothing; False: what came of it is not finite, and θ is that of the last good step.

        Args:
            d_gate: dL/dz [n_gates] of the gates in force, all ranks' together. On the forward route it is zero, and
                autograd has left dL/dθ in `gates.logits.grad`.
            loss: the step's mean loss, in nats.
            penalties: how often the price of open gates counts: once, but in `reference_compat`.
        """

    def draw(self, *, evaluation: bool) -> None:
        """Put the gates of the coming step, or the deterministic ones, in force."""

    def restore(self) -> None:
        """θ as the last good step left it."""

    def load_logits(self, logits: Tensor) -> None:
        """Put θ [n_gates] of a carrier in the place of the run's."""

    def observe_held_out(self, loss: float) -> None:
        """Take in the loss on held-out text, in nats, of the gates that would ship now."""

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

    @property
    def frozen(self) -> bool:
        """The last `freeze_fraction` of the run."""
        return self.completed_steps + 1 > self.total_steps * (1 - self.config.freeze_fraction)

    def step(self, d_gate: Tensor, loss: float, *, penalties: int) -> bool:
        frozen = self.frozen
        if not frozen and not self._step_logits(d_gate, penalties):
            self.restore()
            return False
        self.dual.update(loss, frozen=frozen)
        self.completed_steps += 1
        self.draw(evaluation=False)
        return True

    def _step_logits(self, d_gate: Tensor, penalties: int) -> bool:
        """Whether θ is finite after its step."""
        logits, chained = self.gates.logits, self.gates.logits.grad
        d_logits = self.gates.logits_grad(d_gate, l0_weight=penalties * self.dual.penalty)
        logits.grad = d_logits if chained is None else d_logits + chained
        self._optimizer.step()
        logits.grad = None
        if not math.isfinite(float(logits.sum())):
            return False
        self._good_logits = logits.detach().clone()
        return True

    def draw(self, *, evaluation: bool) -> None:
        self.gates.draw(step=self.completed_steps + 1, training=not (evaluation or self.frozen))

    @torch.no_grad()
    def load_logits(self, logits: Tensor) -> None:
        self.gates.logits.copy_(logits)
        self._good_logits = self.gates.logits.detach().clone()

    def observe_held_out(self, loss: float) -> None:
        pass

    def restore(self) -> None:
        self.gates.logits.copy_(self._good_logits)
        self.gates.logits.grad = None

    def stop_reason(self) -> str | None:
        return None if self.frozen else self._early_stop.check(self.stats())

    def stats(self) -> dict[str, Any]:
        """EMA and ε in nats, λ, E[L0], open gates per group, the closed share, whether the gates are fixed."""
        counts = self.gates.open_counts()
        return {
            "ema": self.dual.ema,
            "epsilon": self.dual.epsilon,
            "dual_lambda": self.dual.dual_lambda,
            "expected_l0": float(self.gates.expected_l0),
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
