"""The masked weights of a model in training: W_eff = W_base + (r ⊗ c) ∘ Δ (method, section 1).

    weights = MaskedWeights(model, base, layout, config)
    grads = weights.grads()                                     G, as `backward` left it behind
    d_gate, sq_norm = weights.pass_a(grads, gates)
    weights.pass_b(grads, gate_old, rank_old, gates, …)         AdamW on Δ, and the next W_eff
    weights.write(gates)                                        W_eff alone
    weights.moved, weights.differing(…), weights.take_in(…)     what somebody else has written since

Each weight stands beside its base, where it finds its gates, and its state (Δ, AdamW's moments), which is sharded as
the weight is. The kernels get this rank's rows; what a rank has no rows of is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lcdd.carrier.patching import expanded_gates
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import (
    GateLayout,
    PreTrainedModel,
    Projection,
    check_same_architecture,
    local,
    projections,
    shards,
)
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.block_grad import BlockGrad
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.packed import PackedGradLinear
from lcdd_kernels import AdamWStep, DeltaStepPlan, GateMap, weight_eff_

Grads = tuple[list[Any], list[str] | None]
"""Gradients of the weights with rows on this rank, and their layouts where any is packed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedWeight:
    """One masked weight W_eff [out, in].

    base: the base's weight, sharded as `weight` is. gate_map: where the whole matrix finds its gates.
    state: "delta", and where it is trained AdamW's "exp_avg" and "exp_avg_sq".
    """

    site: Projection
    weight: Tensor
    base: Tensor
    gate_map: GateMap
    state: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.site.name

    @cached_property
    def row_map(self) -> GateMap:
        """The gate map of this rank's rows, which begin at their first row's gate."""
        return replace(self.gate_map, row_start=self.gate_map.row_start + shards.row_offset(self.weight))

    def check_place(self) -> None:
        """Raise InputError if the model has another parameter here now, or this one was cast or moved."""
        weight, base = self.weight, self.base
        if not shards.is_sharded(weight) and self.site.linear.weight is not weight:
            raise InputError(f"model: {self.name}.weight is another parameter now than the one that is trained")
        expected, got = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (base, weight))
        if expected != got:
            raise InputError(
                f"model: expected {self.name}.weight as its base is, {expected}, got {got}: cast and move both models "
                "before attach"
            )

    def grad(self) -> tuple[Any, str]:
        """What `backward` left in the weight, this rank's rows, and its layout.

        Raises:
            InputError: it left nothing.
        """
        grad = self.weight.grad
        if grad is None:
            raise InputError(f"{self.name}.weight: expected a gradient from backward(), got none")
        if not isinstance(grad, BlockGrad):
            return local(grad), "dense"
        part, linear = grad.part, self.site.linear
        if part is not None and isinstance(linear, PackedGradLinear) and part is linear.part:
            return grad.parts if part.layout == "panels" else grad.parts[0], part.layout
        return grad.dense(), "dense"  # made dense, or stored for other gates than those in force


class MaskedWeights:
    """All masked weights of a model, in the order of `lcdd.models.projections`.

    gated_grads: `weight.grad` is dΔ, which autograd has taken through the gates (the forward route), in place of G.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, layout: GateLayout, config: LCDDConfig) -> None:
        """Take the difference of the two models as Δ.

        Raises:
            InputError: they differ in architecture, sharding, dtype or device, or share a weight.
        """
        shards.reshard(model)
        shards.reshard(base)
        check_same_architecture(base, model)
        self.model, self.config, self.gated_grads = model, config, config.gating == "forward"
        self.items = [
            _pair(site, base_site.linear.weight.detach(), layout, config)
            for site, base_site in zip(projections(model), projections(base), strict=True)
        ]
        self.sharded = shards.is_sharded(self.items[0].weight)
        self._here = [item for item in self.items if len(local(item.weight))]
        self._plan = self._make_plan(layout.n_gates) if self._here else None
        self._marks: list[Any] = []

    def __iter__(self) -> Iterator[MaskedWeight]:
        return iter(self.items)

    # ------------------------------------------------------------------ the passes

    def grads(self) -> Grads:
        """What `backward` left; valid until new gates are drawn.

        Raises:
            InputError: it left nothing in one of the weights.
        """
        needed = self.config.train_delta or not self.gated_grads  # of masks alone G is all that there is
        found = [item.grad() for item in self._here if needed]
        layouts = [layout for _, layout in found]
        return [grad for grad, _ in found], layouts if any(layout != "dense" for layout in layouts) else None

    def pass_a(self, grads: Grads, gates: Gates) -> tuple[Tensor, Tensor]:
        """(dL/dz [n_gates] of the gates in force, ‖dΔ‖² []) of the rows on this rank; of gated gradients no dL/dz."""
        found, layouts = grads
        gate = gates.values
        if self.gated_grads:
            return torch.zeros_like(gate), sum((grad.float().square().sum() for grad in found), gate.new_zeros(()))
        if self._plan is None:
            return torch.zeros_like(gate), gate.new_zeros(())
        return self._plan.grad_stats(found, gate, layouts=layouts, rank=gates.rank if layouts else None)

    def pass_b(
        self,
        grads: Grads,
        gate_old: Tensor,
        rank_old: Tensor,
        gates: Gates,
        *,
        settings: Mapping[str, Any],
        step: int,
        grad_scale: float,
    ) -> None:
        """Step Δ by AdamW on grad_scale · dΔ, and write W_eff of the gates now in force.

        gate_old, rank_old: the gates [n_gates] that the gradients are of, and each one's place among the open ones.
        settings: lr, betas, eps and weight_decay of AdamW. step: counts from 1.
        """
        if self.config.train_delta and self._plan is not None:
            found, layouts = grads
            beta1, beta2 = settings["betas"]
            adam = AdamWStep(
                lr=settings["lr"], beta1=beta1, beta2=beta2, eps=settings["eps"],
                weight_decay=settings["weight_decay"], step=step, grad_scale=grad_scale,
            )  # fmt: skip
            old = torch.ones_like(gate_old) if self.gated_grads else gate_old
            self._plan.step(found, old, gates.values, adam, layouts=layouts, rank=rank_old if layouts else None)
        if self.config.reference_compat:
            reference_compat.round_as_stored_weights_(self._state("delta"), self._bases)
        if self.config.reference_compat or not self.config.train_delta:
            self._write(gates)
        self.mark()

    @torch.no_grad()
    def write(self, gates: Gates) -> None:
        """W_eff of the gates in force into the model."""
        shards.reshard(self.model)
        self._write(gates)
        self.mark()

    def take_gated_grads(self, logits: Tensor) -> None:
        """On the forward route: bring dΔ to `weight.grad`, where generic code clips, unscales and clears it.

        logits: θ, whose gradient autograd keeps apart: it is dropped when those of the weights were.
        """
        for item in self.items:
            delta = item.state["delta"].requires_grad_(self.config.train_delta)
            if not self.config.train_delta:
                continue
            item.weight.grad_dtype = delta.dtype  # type: ignore[attr-defined]
            first = item is self.items[-1]  # in a backward
            delta.register_post_accumulate_grad_hook(partial(_hand_over, item.weight, logits if first else None))

    def close(self) -> None:
        """Drop gradients, which are for this optimizer alone; each weight's has its own dtype again."""
        for item in self.items:
            item.weight.grad = None
            if self.gated_grads:
                item.weight.grad_dtype = item.weight.dtype  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ what somebody else writes

    def mark(self) -> None:
        """Take the weights and the bases as they stand for what they have to be."""
        self._marks = self._current_marks()

    @property
    def moved(self) -> bool:
        """Whether a weight or a base has been written, or its memory exchanged, since the last `mark`.

        What is written through `.data` moves no version counter: `differing` looks at all values, and `probe`, once a
        step, at those of one weight; the step itself overwrites the others.
        """
        return self._current_marks() != self._marks

    def differing(self, gate: Tensor) -> list[MaskedWeight]:
        """The weights that are not, bit for bit, W_eff of the gates [n_gates]; one matrix of scratch at a time.

        Raises:
            InputError: a weight was replaced, or has another dtype, device or shape than its base.
        """
        for item in self.items:
            item.check_place()
        return [
            item for item in self._here if not torch.equal(local(item.weight.detach()), self._weight_eff(item, gate))
        ]

    def probe(self, gate: Tensor, number: int) -> Tensor:
        """How many entries of one weight, another one for each `number`, are not W_eff of the gates: [], as `gate`.

        A step can afford it, and does not have to wait for it.
        """
        if not self._here:
            return gate.new_zeros(())
        item = self._here[number % len(self._here)]
        return (local(item.weight.detach()) != self._weight_eff(item, gate)).sum().to(gate.dtype)

    @torch.no_grad()
    def take_in(self, gate: Tensor) -> bool:
        """Let Δ follow weights that somebody else wrote, if they are W_eff of these gates [n_gates] with some Δ.

        It follows to the rounding of its dtype, and only where the weights differ from what they had to be. False, and
        nothing is changed: entries that the gates close are not the base's.
        """
        found = [(item, self._explained(item, gate)) for item in self._here]
        if any(delta is None for _, delta in found):
            return False
        for item, delta in found:
            local(item.state["delta"]).copy_(delta)
        return True

    # ------------------------------------------------------------------ state

    def check_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Raise InputError unless `load_state` can take `state`."""
        for index, item in enumerate(self.items):
            for key, tensor in item.state.items():
                given = state[index][key]
                if getattr(given, "shape", tensor.shape) != tensor.shape:
                    raise InputError(
                        f"state_dict: expected {key} of {item.name} of shape {tuple(tensor.shape)}, "
                        f"got {tuple(given.shape)}"
                    )

    @torch.no_grad()
    def load_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Copy Δ and the moments, whole or sharded or rows on disk, number by number; the weights are not written."""
        for index, item in enumerate(self.items):
            for key, tensor in item.state.items():
                shards.copy_rows_(tensor, state[index][key])

    # ------------------------------------------------------------------ parts

    def _make_plan(self, n_gates: int) -> DeltaStepPlan:
        """The kernels' view of this rank's rows."""
        moments = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"} if self.config.train_delta else {}
        return DeltaStepPlan(
            [item.row_map for item in self._here],
            n_gates=n_gates,
            weights=[local(item.weight) for item in self._here],
            bases=self._bases,
            deltas=self._state("delta"),
            **{name: self._state(key) for name, key in moments.items()},
        )

    @property
    def _bases(self) -> list[Tensor]:
        return [local(item.base) for item in self._here]

    def _state(self, key: str) -> list[Tensor]:
        return [local(item.state[key]) for item in self._here]

    def _write(self, gates: Gates) -> None:
        if self._plan is not None:
            self._plan.refresh(gates.values)

    def _current_marks(self) -> list[Any]:
        tensors = (tensor for item in self._here for tensor in (item.weight, item.base))
        memory = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)  # to_local() makes a tensor each time
        return [(tensor.data_ptr(), tensor._version) for tensor in memory]

    def _weight_eff(self, item: MaskedWeight, gate: Tensor) -> Tensor:
        """What this rank's rows of a weight have to be."""
        base, delta = local(item.base), local(item.state["delta"].detach())
        found = torch.empty_like(base)
        weight_eff_([found], [base], [delta], gate, [item.row_map])
        return found

    def _explained(self, item: MaskedWeight, gate: Tensor) -> Tensor | None:
        """Δ of this rank's rows with which the weight is W_eff of the gates; None: there is none."""
        weight, base, delta = local(item.weight), local(item.base), local(item.state["delta"])
        row_gate, col_gate = expanded_gates(gate, item.row_map, weight.shape)
        factor = row_gate[:, None] * col_gate
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = weight.to(wide) - base.to(wide)
        if bool(((factor == 0) & (change != 0)).any()) or not bool(torch.isfinite(change).all()):
            return None
        moved = (factor != 0) & (weight != self._weight_eff(item, gate))
        return torch.where(moved, (change / factor).to(delta.dtype), delta)


def _hand_over(weight: Tensor, logits: Tensor | None, delta: Tensor) -> None:
    """Move Δ's gradient to the weight's; `logits`: θ, of the first weight of a backward."""
    grad, delta.grad = delta.grad, None
    assert grad is not None
    if weight.grad is not None:
        weight.grad.add_(grad)
        return
    weight.grad = grad
    if logits is not None:
        logits.grad = None


def _pair(site: Projection, base: Tensor, layout: GateLayout, config: LCDDConfig) -> MaskedWeight:
    """The masked weight of a site, with Δ and, where it is trained, AdamW's moments at zero."""
    weight = site.linear.weight
    _check_pair(site.name, weight, base)
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta_dtype = getattr(torch, config.delta_dtype or "", reference_compat.delta_dtype(config, weight.dtype))
    state = {"delta": (weight.detach().to(wide) - base.to(wide)).to(delta_dtype)}
    if config.train_delta:
        moment_dtype = getattr(torch, config.moment_dtype or "", wide)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(weight.detach(), dtype=moment_dtype)
    gate_map = layout.gate_map(site.kind, site.layer)
    return MaskedWeight(site=site, weight=weight, base=base, gate_map=gate_map, state=state)


def _check_pair(name: str, weight: Tensor, base: Tensor) -> None:
    """Raise InputError unless `weight` can be trained against `base`."""
    shards.check_sharding(f"{name}.weight", weight)
    if shards.is_sharded(weight) != shards.is_sharded(base) or local(weight).shape != local(base).shape:
        raise InputError(f"base: expected {name}.weight sharded as the model's is, got another sharding")
    if local(weight).numel() and local(weight).data_ptr() == local(base).data_ptr():
        raise InputError(f"base: expected its own copy of {name}.weight, got the tensor that is trained")
    if weight.device != base.device or weight.dtype != base.dtype:
        raise InputError(
            f"base: expected {name}.weight as {weight.dtype} on {weight.device}, got {base.dtype} on {base.device}"
        )
