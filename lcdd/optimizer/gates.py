"""θ and the gates drawn from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import GROUPS, GateLayout, Run, base_group
from lcdd_kernels import GateSpec, gate_logits_grad, gate_values, open_indices


class Drawn:
    """Gates as they were drawn once, on the device; `Gates` has the same attributes, of those in force.

    What the host is told of them, open gates of every run and E[L0], comes by `tell` together with other things that
    a step reads, or is fetched where somebody asks earlier.
    """

    def __init__(self, logits: Tensor, layout: GateLayout, spec: GateSpec) -> None:
        self.spec = spec
        self.values, self._expected_l0 = gate_values(logits, spec)
        self.slots = layout.expand(self.values)
        self.indices, self._counts, self.rank = open_indices(self.slots, layout.slot_offsets)
        self._told: tuple[float, list[int]] | None = None

    def to_tell(self) -> Tensor:
        """What `tell` wants to have, float64 [1 + runs] on the device."""
        return torch.cat([self._expected_l0.double().view(1), self._counts.double()])

    def tell(self, told: Sequence[float]) -> None:
        """Take in `to_tell`'s values."""
        self._told = told[0], [int(count) for count in told[1:]]

    def _ask(self) -> tuple[float, list[int]]:
        if self._told is None:
            self.tell(self.to_tell().tolist())
        assert self._told is not None
        return self._told

    @property
    def expected_l0(self) -> float:
        return self._ask()[0]

    @property
    def counts(self) -> list[int]:
        return self._ask()[1]


class Gates:
    """The gate logits θ of a whole model, and the gates last drawn from them.

    Attributes:
        logits: θ, float [n_gates] (float32, or float64 beside float64 weights).
        initial_logits: θ as it started, to tell later whether noise chose the carrier.
        drawn: the gates in force; what may be put back after another draw.
        values: their z, float [n_gates], in [0, 1].
        slots: the same as kernels are given them, float [n_slots]: with the copies that `GateLayout` calls aliases.
        rank: place of each slot among the open ones of its run, int32 [n_slots]; -1 where it is closed.
        counts: open ones of each run, on the host.
        expected_l0: E[L0] of θ.
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

    def of(self, logits: Tensor) -> "Gates":
        """The deterministic gates of another θ [n_gates], on any device, for the same model."""
        return Gates(self.layout, kind=self.kind, seed=self.seed, logits=logits.to(self.logits))

    @staticmethod
    def initial(layout: GateLayout, *, mean: float, std: float, seed: int) -> Tensor:
        """θ ~ N(mean, std²), float32 [n_gates], the same for a seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        return mean + std * torch.randn(layout.n_gates, generator=generator, device="cpu")

    def draw(self, *, step: int, training: bool) -> None:
        """Draw the gates that step number `step` uses; the noise is a function of (seed, step, gate) alone."""
        sampled = training and self.kind == "hard_concrete"
        spec = GateSpec(kind=self.kind, seed=self.seed, step=step, training=sampled)
        self.drawn = Drawn(self.logits.detach(), self.layout, spec)

    @property
    def step(self) -> int:
        return self.drawn.spec.step

    @property
    def spec(self) -> GateSpec:
        return self.drawn.spec

    @property
    def sampled(self) -> bool:
        return self.drawn.spec.training

    @property
    def values(self) -> Tensor:
        return self.drawn.values

    @property
    def slots(self) -> Tensor:
        return self.drawn.slots

    @property
    def indices(self) -> Tensor:
        return self.drawn.indices

    @property
    def rank(self) -> Tensor:
        return self.drawn.rank

    @property
    def counts(self) -> list[int]:
        return self.drawn.counts

    @property
    def expected_l0(self) -> float:
        return self.drawn.expected_l0

    def logits_grad(self, d_gate: Tensor, *, l0_weight: float) -> Tensor:
        """Chain dL/dz [n_gates] of the gates in force to dL/dθ and add l0_weight · ∂E[L0]/∂θ."""
        return gate_logits_grad(self.logits.detach(), d_gate, self.spec, l0_weight=l0_weight)

    def evaluation_values(self) -> Tensor:
        """The deterministic gates of θ, float [n_gates]."""
        values, _ = gate_values(self.logits.detach(), GateSpec(kind=self.kind, training=False))
        return values

    def open_in(self, run: Run) -> Tensor:
        """Places in a run whose gates are open, int32 ascending."""
        return self.indices[run.start : run.start + self.counts[run.number]]

    def closed_in(self, run: Run) -> Tensor:
        """Places in a run whose gates are closed, int64 ascending."""
        return torch.nonzero_static(self.slots[run.slots] == 0, size=run.size - self.counts[run.number])[:, 0]

    def open_counts(self) -> dict[str, int]:
        """Open gates of each of `GROUPS`, over all layers."""
        totals = dict.fromkeys(GROUPS, 0)
        for (_, name, _), count in zip(self.layout.groups, self.counts, strict=False):  # copies are not counted
            totals[base_group(name)] += count
        return totals


def starting_logits(layout: GateLayout, config: LCDDConfig, *, like: Tensor, given: Tensor | None) -> Tensor:
    """θ to start from, float32 (float64 beside float64 weights), on the device of `like`."""
    if given is None:
        if config.paced:
            return torch.ones(layout.n_gates, dtype=_gate_dtype(like), device=like.device)
        given = Gates.initial(layout, mean=config.gate_init_mean, std=config.gate_init_std, seed=config.seed)
    return given.detach().to(device=like.device, dtype=_gate_dtype(like))


def _gate_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
