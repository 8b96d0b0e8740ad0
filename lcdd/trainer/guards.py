"""What stops a run before it wastes more time: over-pruning, stalled compression, no labels, no memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.config import LCDDConfig
from lcdd.data import IGNORE, Encoded
from lcdd.errors import InputError
from lcdd.models import local

FAR_OVER = 2.0
"""A loss above this many times its budget is far over it."""
CLOSING = 1e-3
"""Share of all gates that has to close within the patience for compression to go on."""


def check_labels(items: Sequence[Encoded]) -> None:
    """Raise InputError, naming the rows, if an example has no token with a loss: a batch of such has no gradient."""
    if not items:
        raise InputError("train: expected at least one example, got none")
    empty = [row for row, item in enumerate(items) if all(label == IGNORE for label in item.labels[1:])]
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", …" if len(empty) > 10 else "")
        raise InputError(
            f"train: expected a response token to learn in every example, got none in {len(empty)} of {len(items)} "
            f"(all labels are masked), rows {shown} counted from 0"
        )


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


def _gigabytes(tensors: Sequence[Tensor | None]) -> float:
    return sum(local(t).numel() * t.element_size() for t in tensors if t is not None) / 1e9


def memory_table(model: nn.Module, optimizer: torch.optim.Optimizer, *, base: nn.Module | None, tokens: int) -> str:
    """What a training step holds on this device, in GB, a line each; activations are an estimate.

    tokens: of the largest micro-batch, padding included.
    """
    parameters = list(model.parameters())
    states: dict[str, list[Tensor]] = {}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                states.setdefault(name, []).append(value)
    trained = [p for p in parameters if p.requires_grad]
    config: Any = model.config
    # a decoder layer saves about 34 values a token and unit of width for the backward pass, in the weights' dtype
    activations = 34 * tokens * config.hidden_size * config.num_hidden_layers * parameters[0].element_size() / 1e9
    rows = {
        "model": _gigabytes(parameters),
        "base": _gigabytes(list(base.parameters())) if base is not None else 0.0,
        "gradients": _gigabytes(trained),
        **{f"optimizer's {name}": _gigabytes(values) for name, values in states.items()},
        f"activations (estimate, {tokens} tokens)": activations,
    }
    rows["together"] = sum(rows.values())
    return "\n".join(f"  {name:<42} {size:>10.4g} GB" for name, size in rows.items())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
