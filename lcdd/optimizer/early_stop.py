"""What stops an LCDD run before it wastes more time: over-pruning and stalled compression."""

from collections.abc import Mapping
from typing import Any

from lcdd.config import LCDDConfig

FAR_OVER = 2.0
"""A loss above this many times its budget is far over it."""
CLOSING = 1e-3
"""Share of all gates that has to close within the patience for compression to go on."""


class EarlyStop:
    """Watches an LCDD run's `stats` line after every step; says why to stop, or None.

    Over-pruned: the loss's average stays above twice its budget. Stalled: λ is at its cap (or never moves), the loss is
    within its budget, and yet the number of open gates does not fall. Each has to last `config.early_stop_patience`
    steps.
    """

    def __init__(self, config: LCDDConfig) -> None:
        self.config = config
        self.over = self.stalled = 0
        self.fewest = 1.0

    def check(self, stats: Mapping[str, Any]) -> str | None:
        """Take note of one step."""
        c = self.config
        if not c.early_stop_patience or stats["epsilon"] is None:
            return None
        self.over = self.over + 1 if stats["ema"] > FAR_OVER * stats["epsilon"] else 0
        density = 1 - stats["sparsity"]
        closing = density < self.fewest - CLOSING
        capped = stats["dual_lambda"] >= 0.99 * c.dual_lambda_max or c.dual_lr == 0
        self.fewest = density if closing else self.fewest
        self.stalled = self.stalled + 1 if capped and not closing and stats["ema"] < stats["epsilon"] else 0
        if self.over >= c.early_stop_patience:
            return (
                f"over-pruned: the loss's average has been above {FAR_OVER:g} times its budget for {self.over} steps "
                f"(now {stats['ema']:.3g} against {stats['epsilon']:.3g} nats, sparsity {stats['sparsity']:.1%}, "
                f"lambda {stats['dual_lambda']:.3g}). Change: a smaller --dual_lambda_init or --dual_lr, a smaller "
                "--violation_clip, or a larger --warmup_steps"
            )
        if self.stalled >= c.early_stop_patience:
            return (
                f"stalled compression: no more gates have closed for {self.stalled} steps, although the loss is within "
                f"its budget and lambda at {stats['dual_lambda']:.3g} (sparsity {stats['sparsity']:.1%}). Change: a "
                "larger --dual_lambda_max, --dual_lr or --gate_lr, or a smaller --gate_init_mean"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"over": self.over, "stalled": self.stalled, "fewest": self.fewest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.over, self.stalled, self.fewest = state["over"], state["stalled"], state["fewest"]
