"""θ and the gates drawn from it."""

import torch
from torch import Tensor

from lcdd.errors import InputError
from lcdd.models.layout import GROUPS, GateLayout
from lcdd_kernels import GateSpec, gate_logits_grad, gate_values, open_indices


class Gates:
    """The gate logits θ of a whole model, and the gates last drawn from them.

    Attributes:
        logits: θ, float [n_gates] (float32, or float64 beside float64 weights).
        initial_logits: θ as it started, to tell later whether noise chose the carrier.
        values: the gates z in force, float [n_gates], in [0, 1].
        expected_l0: E[L0] of θ, a scalar tensor.
        sampled: whether `values` holds noise (hard-concrete gates in training); evaluation gates do not.
    """

    def __init__(self, layout: GateLayout, *, kind: str, seed: int, logits: Tensor) -> None:
        if logits.shape != (layout.n_gates,):
            raise InputError(f"logits: expected shape ({layout.n_gates},), got {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise InputError("logits: expected finite values, got NaN or Inf")
        self.layout = layout
        self.kind = kind
        self.seed = seed
        self.logits = torch.nn.Parameter(logits.clone())
        self.initial_logits = logits.clone()
        self.draw(step=1, training=False)

    @staticmethod
    def initial(layout: GateLayout, *, mean: float, std: float, seed: int) -> Tensor:
        """θ ~ N(mean, std²), float32 [n_gates], the same for a seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        return mean + std * torch.randn(layout.n_gates, generator=generator)

    def draw(self, *, step: int, training: bool) -> None:
        """Draw the gates that step number `step` uses; the noise is a function of (seed, step, gate) alone."""
        self.step = step
        self.sampled = training and self.kind == "hard_concrete"
        self.spec = GateSpec(kind=self.kind, seed=self.seed, step=step, training=self.sampled)
        self.values, self.expected_l0 = gate_values(self.logits.detach(), self.spec)
        self.indices, counts, self.rank = open_indices(self.values, self.layout.offsets)
        self.counts = counts.tolist()  # the step's one look at the gates from the host

    def logits_grad(self, d_gate: Tensor, *, l0_weight: float) -> Tensor:
        """Chain dL/dz [n_gates] of the gates in force to dL/dθ and add l0_weight · ∂E[L0]/∂θ."""
        return gate_logits_grad(self.logits.detach(), d_gate, self.spec, l0_weight=l0_weight)

    def evaluation_values(self) -> Tensor:
        """The deterministic gates of θ, float [n_gates]."""
        values, _ = gate_values(self.logits.detach(), GateSpec(kind=self.kind, training=False))
        return values

    def open_in(self, layer: int, group: str) -> Tensor:
        """Channels of `group` in `layer` whose gate is open, int32 ascending."""
        start = self.layout.slice(layer, group).start
        return self.indices[start : start + self.counts[self.layout.group_number(layer, group)]]

    def closed_in(self, layer: int, group: str) -> Tensor:
        """Channels of `group` in `layer` whose gate is closed, int64 ascending."""
        values = self.values[self.layout.slice(layer, group)]
        closed = values.numel() - self.counts[self.layout.group_number(layer, group)]
        return torch.nonzero_static(values == 0, size=closed)[:, 0]

    def open_counts(self) -> dict[str, int]:
        """Open gates of each group, summed over layers."""
        return {group: sum(self.counts[i :: len(GROUPS)]) for i, group in enumerate(GROUPS)}
