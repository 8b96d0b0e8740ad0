"""The masked weights of a model in training: W_eff = W_base + (r ⊗ c) ∘ Δ (method, section 1).

    weights = MaskedWeights(model, base, config)
    grads = weights.grads(gates)                                G, as `backward` left it behind
    d_gate, sq_norm = weights.pass_a(grads, gates)
    weights.pass_b(grads, before, gates, …)                     AdamW on Δ, and the next W_eff, or nothing at all
    weights.finish(gates)                                       of a step that was taken
    weights.write(gates)                                        W_eff alone
    weights.settle(gates)                                       gates are fixed: Δ and moments of the open blocks alone
    weights.moved, weights.differing(…), weights.take_in(…)     what somebody else has written since

Each parameter stands beside its base and its state (Δ, AdamW's moments), which is sharded as the parameter is; each
site is a view of them with its gates. The kernels get this rank's rows; what a rank has no rows of is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lcdd.carrier import Carrier, open_block
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import (
    GateLayout,
    PreTrainedModel,
    Site,
    check_engine,
    check_same_architecture,
    local,
    shards,
    sites_of,
    structure_of,
)
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.block_grad import BlockGrad
from lcdd.optimizer.gates import Drawn, Gates
from lcdd.optimizer.open_blocks import WORTH_IT, OpenBlocks, blocks_by_parameter, spread
from lcdd.optimizer.packed import PackedGradLinear
from lcdd_kernels import AdamWStep, DeltaStepPlan, GateMap, weight_eff_
from lcdd_kernels.reference.delta_step import Gradients

_VERSION = attrgetter("_version")

Grads = tuple[list[Any], Gradients | None]
"""Gradients of the sites with rows on this rank, and the same as kernels take them (not on the forward route)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedWeight:
    """One site in training, W_eff [rows, columns].

    base, state: of its whole parameter: the base's, and "delta", and where it is trained "exp_avg" and "exp_avg_sq".
    blocks: what holds the state in its place, once gates are fixed.
    """

    site: Site
    base: Tensor
    state: dict[str, Tensor]
    blocks: OpenBlocks | None = None

    @property
    def delta(self) -> Tensor:
        """Δ of the site, sharded as its parameter is: what is trained, or a copy of what the open block holds."""
        return self.site.view(self.state["delta"]) if self.blocks is None else self.blocks.delta(self.site)

    @property
    def name(self) -> str:
        return self.site.name

    @cached_property
    def _first(self) -> int:
        """Which row (or slice) of the parameter this rank's first one is."""
        return shards.row_offset(self.site.parameter)

    @cached_property
    def _whole(self) -> bool:
        """Whether it is all of a parameter that is on this rank alone."""
        return self.site.matrix.part is None and not shards.is_sharded(self.site.parameter)

    @property
    def is_here(self) -> bool:
        """Whether this rank has rows of it."""
        mine, part = len(local(self.site.parameter)), self.site.matrix.part
        return mine > 0 if part is None else 0 <= part - self._first < mine

    def here(self, tensor: Tensor) -> Tensor:
        """This rank's rows of the site, in a tensor of its parameter's shape."""
        mine, part = local(tensor), self.site.matrix.part
        return mine if part is None else mine[part - self._first]

    @cached_property
    def gate_map(self) -> GateMap:
        """Of this rank's rows, which begin at their first row's gate."""
        whole = self.site.gate_map
        return whole if self.site.matrix.part is not None else replace(whole, row_start=whole.row_start + self._first)

    def weight_eff(self, slots: Tensor) -> Tensor:
        """What this rank's rows have to be under gates [n_slots]."""
        base = self.here(self.base)
        found = torch.empty_like(base)
        delta = self.here(self.state["delta"].detach()) if self.blocks is None else self.delta
        weight_eff_([found], [base], [delta], slots, [self.gate_map])
        return found

    def explained(self, gate: Tensor, layout: GateLayout) -> Tensor | None:
        """Δ of this rank's rows with which the weight is W_eff of the gates [n_gates]; None: there is none."""
        weight, base, delta = (self.here(t) for t in (self.site.parameter, self.base, self.state["delta"]))
        row_gate, col_gate = layout.row_and_col_gates(gate, self.site.matrix)
        if self.site.matrix.part is None:
            row_gate = row_gate[self._first : self._first + len(weight)]
        factor = row_gate[:, None] * col_gate
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = weight.to(wide) - base.to(wide)
        if bool(((factor == 0) & (change != 0)).any()) or not bool(torch.isfinite(change).all()):
            return None
        moved = (factor != 0) & (weight != self.weight_eff(layout.expand(gate)))
        return torch.where(moved, (change / factor).to(delta.dtype), delta)

    def grad(self) -> tuple[Any, str]:
        """What `backward` left in the parameter, this rank's rows of the site, and its layout.

        Raises:
            InputError: it left nothing.
        """
        grad = self.site.parameter.grad
        if grad is None:
            raise InputError(f"{self.site.matrix.parameter}: expected a gradient from backward(), got none")
        if not isinstance(grad, BlockGrad):
            return grad if self._whole else self.here(grad), "dense"
        part, linear = grad.part, self.site.linear
        if part is not None and isinstance(linear, PackedGradLinear) and part is linear.part:
            return grad.parts if part.layout == "panels" else grad.parts[0], part.layout
        return grad.dense(), "dense"  # made dense, or stored for other gates than those in force


class MatricesByName(Mapping[str, tuple[Tensor, Tensor, GateMap]]):
    """name -> (base, Δ, gate map); a Δ of which the open block alone is held is made whole for who asks for it."""

    def __init__(self, items: Sequence[MaskedWeight]) -> None:
        self._items = {item.name: item for item in items}

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor, GateMap]:
        item = self._items[name]
        return item.site.view(item.base), item.delta, item.site.gate_map

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class MaskedWeights:
    """All sites of a model, in the order of `lcdd.models.sites_of`.

    gated_grads: `weight.grad` is dΔ, which autograd has taken through the gates (the forward route), in place of G.
    names: of the masked parameters, a linear's without its ".weight"; states: each one's "delta", and where it is
    trained AdamW's "exp_avg" and "exp_avg_sq".
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, config: LCDDConfig) -> None:
        """Take the difference of the two models as Δ.

        Raises:
            InputError: they differ in architecture, sharding, dtype or device, or share a weight.
        """
        for name, given in (("model", model), ("base", base)):
            check_engine(name, given)
            shards.reshard(given)
        check_same_architecture(base, model)
        self.model, self.config, self.gated_grads = model, config, config.gating == "forward"
        self.layout, sites = structure_of(model)
        self._bases: dict[Tensor, Tensor] = {
            s.parameter: b.parameter.detach() for s, b in zip(sites, sites_of(base), strict=True)
        }
        self.names = list(dict.fromkeys(s.matrix.parameter.removesuffix(".weight") for s in sites))
        for name, (parameter, fixed) in zip(self.names, self._bases.items(), strict=True):
            _check_pair(name, parameter, fixed)
        self.states: dict[Tensor, dict[str, Tensor]] = {
            parameter: _new_state(parameter, fixed, config) for parameter, fixed in self._bases.items()
        }
        self.items = [
            MaskedWeight(site=s, base=self._bases[s.parameter], state=self.states[s.parameter]) for s in sites
        ]
        self.sharded = shards.is_sharded(sites[0].parameter)
        self._here = [item for item in self.items if item.is_here]
        self._plan = self._make_plan() if self._here else None
        self._blocks: OpenBlocks | None = None
        self._pairs = [tensor for pair in self._bases.items() for tensor in pair]
        self._marks: list[Any] = []

    @property
    def sites(self) -> list[Site]:
        return [item.site for item in self.items]

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, each once."""
        return list(self.states)

    # ------------------------------------------------------------------ the passes

    def grads(self, gates: Gates) -> Grads:
        """What `backward` left under these gates.

        Raises:
            InputError: it left nothing in one of the weights.
        """
        needed = self.config.train_delta or not self.gated_grads  # of masks alone G is all that there is
        if self._blocks is not None:
            return self._blocks.grads({item.name: item.grad() for item in self._here}), None
        found = [item.grad() for item in self._here if needed]
        grads, layouts = [grad for grad, _ in found], [layout for _, layout in found]
        if self._plan is None or not found:
            return grads, None
        packed = any(layout != "dense" for layout in layouts)
        rank = gates.rank if packed else None
        return grads, self._plan.take(grads, gates.slots, layouts=layouts if packed else None, rank=rank)

    def pass_a(self, grads: Grads, gates: Gates) -> tuple[Tensor, Tensor]:
        """(dL/dz [n_gates] of the gates in force, ‖dΔ‖² []) of the rows on this rank; of gated gradients no dL/dz."""
        found, checked = grads
        gate = gates.values
        if self.gated_grads:
            return torch.zeros_like(gate), sum((grad.float().square().sum() for grad in found), gate.new_zeros(()))
        if self._blocks is not None:
            d_slots, sq_norm = self._blocks.grad_stats(found)
            return self.layout.fold(d_slots), sq_norm
        if self._plan is None or checked is None:
            return torch.zeros_like(gate), gate.new_zeros(())
        d_slots, sq_norm = self._plan.grad_stats(checked, gates.slots)
        return self.layout.fold(d_slots), sq_norm

    def pass_b(
        self,
        grads: Grads,
        before: Drawn,
        gates: Gates,
        *,
        settings: Mapping[str, Any],
        step: int,
        grad_scale: Tensor,
    ) -> None:
        """Step Δ by AdamW on grad_scale · dΔ, and write W_eff of the gates now in force.

        before: the gates that the gradients are of.
        grad_scale: [] on the device, NaN where the step is not to be taken: then nothing is written.
        settings: lr, betas, eps and weight_decay of AdamW. step: counts from 1.
        """
        found, checked = grads
        if self.config.train_delta and self._here:
            beta1, beta2 = settings["betas"]
            adam = AdamWStep(
                lr=settings["lr"], beta1=beta1, beta2=beta2, eps=settings["eps"],
                weight_decay=settings["weight_decay"], step=step, grad_scale=grad_scale,
            )  # fmt: skip
            if self._blocks is not None:
                self._blocks.step(found, adam)
            elif self._plan is not None and checked is not None:
                old = torch.ones_like(before.slots) if self.gated_grads else before.slots
                self._plan.step(checked, old, gates.slots, adam)
        self._marks[1] = self._versions()

    def finish(self, gates: Gates) -> None:
        """After pass B of a step that was taken: what it did not write of W_eff."""
        if self.config.reference_compat:
            reference_compat.round_as_stored_weights_(self._state("delta"), self._base_rows)
        if self.config.reference_compat or not self.config.train_delta:
            self._write(gates)
            self.mark()

    @torch.no_grad()
    def write(self, gates: Gates) -> None:
        """W_eff of the gates in force into the model."""
        shards.reshard(self.model)
        if self._blocks is not None and not torch.equal(self._blocks.slots, gates.slots):
            self.expand()
        self._write(gates)
        self.mark()

    @torch.no_grad()
    def write_all(self, gate: float) -> None:
        """W_eff with every gate at one value into the model."""
        shards.reshard(self.model)
        self.expand()
        if self._plan is not None:
            wide = torch.float64 if self.parameters[0].dtype == torch.float64 else torch.float32
            self._plan.refresh(torch.full((self.layout.n_slots,), gate, dtype=wide, device=self.parameters[0].device))
        self.mark()

    @torch.no_grad()
    def load_deltas(self, carrier: Carrier) -> None:
        """Δ of a carrier's open blocks, 0 elsewhere."""
        self.expand()
        wholes = {p: torch.zeros(p.shape, dtype=state["delta"].dtype, device="cpu") for p, state in self.states.items()}
        for item in self.items:
            rows, cols = open_block(carrier.gate, carrier.layout, item.site.matrix)
            whole = item.site.view(wholes[item.site.parameter])
            whole[rows[:, None], cols] = carrier.deltas[item.name].to(whole)
        for parameter, whole in wholes.items():
            shards.copy_rows_(self.states[parameter]["delta"], whole)

    def take_gated_grads(self, logits: Tensor) -> None:
        """On the forward route: bring dΔ to `weight.grad`, where generic code clips, unscales and clears it.

        logits: θ, whose gradient autograd keeps apart: it is dropped when those of the weights were.
        """
        for number, (weight, state) in enumerate(self.states.items(), start=1):
            delta = state["delta"].requires_grad_(self.config.train_delta)
            if not self.config.train_delta:
                continue
            weight.grad_dtype = delta.dtype  # type: ignore[attr-defined]
            first = number == len(self.states)  # in a backward
            delta.register_post_accumulate_grad_hook(partial(_hand_over, weight, logits if first else None))

    def close(self) -> None:
        """Drop gradients, which are for this optimizer alone; each weight's has its own dtype again."""
        for weight in self.states:
            weight.grad = None
            if self.gated_grads:
                weight.grad_dtype = weight.dtype  # type: ignore[attr-defined]

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

    def differing(self, gates: Gates) -> list[MaskedWeight]:
        """The sites that are not, bit for bit, W_eff of the gates in force; one matrix of scratch at a time.

        Raises:
            InputError: a weight was replaced, or has another dtype, device or shape than its base.
        """
        self._check_places()
        return [
            item
            for item in self._here
            if not torch.equal(item.here(item.site.parameter.detach()), item.weight_eff(gates.slots))
        ]

    def probe(self, gates: Gates, number: int) -> Tensor:
        """How many entries of one site, another one for each `number`, are not W_eff of the gates in force: [].

        A step can afford it, and does not have to wait for it.
        """
        if not self._here:
            return gates.slots.new_zeros(())
        place = number % len(self._here)
        if self._plan is not None:
            return self._plan.differing(place, gates.slots)
        item = self._here[place]
        return (item.here(item.site.parameter.detach()) != item.weight_eff(gates.slots)).sum()

    @torch.no_grad()
    def take_in(self, gate: Tensor) -> bool:
        """Let Δ follow weights that somebody else wrote, if they are W_eff of these gates [n_gates] with some Δ.

        It follows to the rounding of its dtype, and only where the weights differ from what they had to be. False, and
        nothing is changed: entries that the gates close are not the base's.
        """
        self.expand()
        found: list[Tensor] = []
        for item in self._here:
            delta = item.explained(gate, self.layout)
            if delta is None:
                return False
            found.append(delta)
        for item, delta in zip(self._here, found, strict=True):
            item.here(item.state["delta"]).copy_(delta)
        return True

    # ------------------------------------------------------------------ state

    @property
    def settled(self) -> bool:
        """Whether the states hold the open blocks alone."""
        return self._blocks is not None

    @torch.no_grad()
    def settle(self, gates: Gates) -> None:
        """From now on these gates are in force: keep Δ and its moments where they are open, and step those alone.

        Where more than half of all entries are open it would save nothing; shards, the forward route, masks alone and
        `reference_compat` keep whole tensors too.
        """
        c = self.config
        whole = self.sharded or self.gated_grads or not c.train_delta or c.reference_compat
        sites = [item.site for item in self.items]
        if not (whole or self.settled) and OpenBlocks.share(sites, gates) <= WORTH_IT:
            self._settle(gates)

    def _settle(self, gates: Gates) -> None:
        self._plan = None  # which holds the whole tensors
        self._take(OpenBlocks([item.site for item in self.items], self._bases, self.states, gates))

    @torch.no_grad()
    def expand(self) -> None:
        """Whole tensors again, where the open blocks alone were kept."""
        if self._blocks is not None:
            self._blocks.expand()
            self._take(None)
            self._plan = self._make_plan()

    def _take(self, blocks: OpenBlocks | None) -> None:
        self._blocks, self.items = blocks, [replace(item, blocks=blocks) for item in self.items]
        self._here = [item for item in self.items if item.is_here]

    def check_state(self, state: dict[int, dict[str, Any]], gates: Gates | None) -> None:
        """Raise InputError unless `load_state` can take `state`."""
        own = None if gates is None else blocks_by_parameter([item.site for item in self.items], gates)
        for index, (name, (parameter, ours)) in enumerate(zip(self.names, self.states.items(), strict=True)):
            shape = parameter.shape if own is None else torch.Size([sum(block.size for block in own[parameter])])
            for key in ours:
                given = state[index][key]
                if getattr(given, "shape", shape) != shape:
                    raise InputError(
                        f"state_dict: expected {key} of {name} of shape {tuple(shape)}, got {tuple(given.shape)}"
                    )

    @torch.no_grad()
    def load_state(self, state: dict[int, dict[str, Any]], gates: Gates | None) -> None:
        """Copy Δ and the moments, whole or sharded or rows on disk, number by number; the weights are not written.

        gates: those of which `state` holds the open blocks; None: whole tensors.
        """
        self.expand()
        if gates is not None and not self.sharded:
            self._settle(gates)
        for index, (parameter, ours) in enumerate(self.states.items()):
            for key, tensor in ours.items():
                given = state[index][key]
                if gates is not None and self.sharded:
                    own = blocks_by_parameter([item.site for item in self.items], gates)[parameter]
                    given = spread(given, own, parameter)
                shards.copy_rows_(tensor, given)

    # ------------------------------------------------------------------ parts

    def _make_plan(self) -> DeltaStepPlan:
        """The kernels' view of this rank's rows."""
        moments = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq"} if self.config.train_delta else {}
        return DeltaStepPlan(
            [item.gate_map for item in self._here],
            n_gates=self.layout.n_slots,
            weights=[item.here(item.site.parameter) for item in self._here],
            bases=self._base_rows,
            deltas=self._state("delta"),
            **{name: self._state(key) for name, key in moments.items()},
        )

    @property
    def _base_rows(self) -> list[Tensor]:
        return [item.here(item.base) for item in self._here]

    def _state(self, key: str) -> list[Tensor]:
        return [item.here(item.state[key]) for item in self._here]

    def _write(self, gates: Gates) -> None:
        if self._blocks is not None:
            for item in self._here:
                item.here(item.site.parameter.detach()).copy_(item.here(item.base))
            self._blocks.refresh()
        elif self._plan is not None:
            self._plan.refresh(gates.slots)

    def _check_places(self) -> None:
        """Raise InputError if the model has another parameter somewhere now, or one was cast or moved."""
        now = dict(self.model.named_parameters())
        for item in self.items:
            name, weight = item.site.matrix.parameter, item.site.parameter
            if not shards.is_sharded(weight) and now.get(name) is not weight:
                raise InputError(f"model: {name} is another parameter now than the one that is trained")
            expected, got = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (item.base, weight))
            if expected != got:
                raise InputError(
                    f"model: expected {name} as its base is, {expected}, got {got}: cast and move both models before "
                    "attach"
                )

    def _current_marks(self) -> list[Any]:
        return [list(map(Tensor.data_ptr, self._watched)), self._versions()]

    def _versions(self) -> list[int]:
        return list(map(_VERSION, self._watched))

    @property
    def _watched(self) -> list[Tensor]:
        """Weights and bases."""
        if self.sharded:  # to_local() makes a tensor each time
            return [getattr(tensor, "_local_tensor", tensor) for tensor in self._pairs]
        return self._pairs


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


def _new_state(parameter: Tensor, base: Tensor, config: LCDDConfig) -> dict[str, Tensor]:
    """Δ and, where it is trained, AdamW's moments at zero."""
    weight = parameter.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta_dtype = getattr(torch, config.delta_dtype or "", reference_compat.delta_dtype(config, weight.dtype))
    state = {"delta": (weight.to(wide) - base.to(wide)).to(delta_dtype)}
    if config.train_delta:
        moment_dtype = getattr(torch, config.moment_dtype or "", wide)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(weight, dtype=moment_dtype)
    return state


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
