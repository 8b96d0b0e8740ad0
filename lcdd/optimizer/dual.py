"""The constraint CE ≤ ε, kept by multiplicative dual ascent on its price λ (method, section 3). Plain Python."""

import math
from dataclasses import dataclass

from lcdd.errors import InputError


@dataclass(kw_only=True)
class DualController:
    """Prices open gates: λ grows while the loss is inside its budget and shrinks while it is over.

    `update(loss)` once an optimizer step. Until `warmup_steps` updates have been seen, λ stays at its initial value
    and only its share in `penalty` ramps up; the update that ends the warm-up sets the baseline and ε.
    """

    lambda_init: float
    lr: float
    lr_shrink: float | None
    lambda_min: float
    lambda_max: float
    violation_clip: float
    ema_beta: float
    warmup_steps: int
    loss_budget: float
    loss_floor: float

    def __post_init__(self) -> None:
        self.dual_lambda = self.lambda_init
        self.step = 0
        self.violation = 0.0
        self.baseline: float | None = None
        self._biased_ema = 0.0

    @property
    def penalty(self) -> float:
        """λ·min(1, step/warm-up) of the step that is about to be taken: the price of one expected open gate."""
        if self.warmup_steps == 0:
            return self.dual_lambda
        return self.dual_lambda * min(1.0, (self.step + 1) / self.warmup_steps)

    @property
    def ema(self) -> float:
        """Bias-corrected moving average of the loss, in nats; NaN before the first update."""
        return self._biased_ema / (1 - self.ema_beta**self.step) if self.step else math.nan

    @property
    def epsilon(self) -> float | None:
        """The loss budget in nats; None during warm-up. The floor keeps a tiny baseline from being pure noise."""
        if self.baseline is None:
            return None
        return max(self.baseline * (1 + self.loss_budget), self.baseline + self.loss_floor)

    def update(self, loss: float, *, frozen: bool = False) -> None:
        """Account for one optimizer step's loss; a `frozen` step moves the average but not λ.

        Raises:
            InputError: `loss` is not finite; the controller is unchanged.
        """
        if not math.isfinite(loss):
            raise InputError(f"loss: expected a finite number, got {loss}")
        self.step += 1
        self._biased_ema = self.ema_beta * self._biased_ema + (1 - self.ema_beta) * loss
        if self.baseline is None:
            if self.step >= self.warmup_steps:
                self.baseline = self.ema
            return
        epsilon = self.epsilon
        assert epsilon is not None  # the baseline is set
        gap = self.ema - epsilon
        violation = gap / epsilon if epsilon else math.copysign(math.inf, gap) if gap else 0.0  # a budget of nothing
        self.violation = max(-self.violation_clip, min(self.violation_clip, violation))
        if frozen:
            return
        rate = self.lr if self.violation < 0 or self.lr_shrink is None else self.lr_shrink
        moved = self.dual_lambda * math.exp(min(700.0, -rate * self.violation))  # exp(710) overflows
        self.dual_lambda = max(self.lambda_min, min(self.lambda_max, moved))

    def state_dict(self) -> dict:
        return {k: getattr(self, k) for k in _STATE}

    def load_state_dict(self, state: dict) -> None:
        if set(state) != set(_STATE):
            raise InputError(f"state: expected the keys {_STATE}, got {tuple(state)}")
        for key, value in state.items():
            setattr(self, key, value)


_STATE = ("dual_lambda", "step", "violation", "baseline", "_biased_ema")
