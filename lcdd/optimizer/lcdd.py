"""LCDD as an optimizer (method, sections 1 to 3).

Between two optimizer steps gates and deltas are constant, and every gradient that LCDD needs is linear in
G = ∂L/∂W_eff. So the model stays an ordinary model whose linear weights *are* W_eff = W_base + (r ⊗ c) ∘ Δ; G
arrives in `weight.grad` like any gradient, and all of LCDD happens in `step`:

    pass A   (G, Δ, gates) -> gate gradients, ‖dΔ‖²
    θ step   chain through the gates, plus the price of open gates in closed form
    dual     moving average of the loss, ε, λ
    gates    new z for the whole model
    pass B   AdamW on Δ with the gradient formed on the fly, and the next W_eff
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import GateLayout, PreTrainedModel, check_same_architecture, local, projections, shape_of, shards
from lcdd.optimizer import attach
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.early_stop import EarlyStop
from lcdd.optimizer.forward import ForwardGates
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.packed import PackedGradLinear, PackPlan
from lcdd_kernels import delta_adamw_, delta_grad_stats, weight_eff_

logger = logging.getLogger(__name__)

_COUNTERS = ("completed_steps", "skipped_steps", "skipped_in_a_row", "last_loss", "grad_norm")


class LCDDOptimizer(torch.optim.Optimizer):
    """Trains the gates and the delta of a model against its base, under a loss budget.

    Use `attach`, then the ordinary loop:

        optimizer = LCDDOptimizer.attach(model, base, config, total_steps=400)
        loss.backward(); optimizer.step(loss); optimizer.zero_grad()

    While training, the model's weights hold W_eff of the gates drawn for the coming step. `eval()` writes W_eff of
    the deterministic gates, `train()` goes back; running the model in evaluation mode, or taking its state dict, on
    sampled gates is an error.

    `param_groups[0]` are the masked weights (their `lr` is Δ's), `param_groups[1]` is θ, and with
    `config.train_unmasked` `param_groups[2]` are norms and biases.

    Attributes:
        gates: θ and the gates in force.
        dual: the constraint's controller.
        model, base: the model in training, and the one it is held against.
        names: the masked linears, in the order of `param_groups[0]`.
        skipped_steps, skipped_in_a_row: steps not taken because the loss or a gradient was not finite.
        unscheduled: the group of θ, whose rate no schedule changes.
        penalties: how often the coming step adds the price of open gates: once, but in `reference_compat`.
    """

    unscheduled = frozenset({1})

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        base: PreTrainedModel,
        config: LCDDConfig,
        *,
        total_steps: int,
        initial_logits: Tensor | None = None,
    ) -> "LCDDOptimizer":
        """Put `model` (fine-tuned) under LCDD against `base`; its weights become W_eff at once.

        The base's weights are referenced, not copied: keep them unchanged. Parameters outside the masked linears are
        set to the base's values, so that a model with all gates closed is the base.

        Args:
            model: the fine-tuned model; trained in place.
            base: the model before fine-tuning, same architecture, on the same device.
            config: the run's settings.
            total_steps: optimizer steps of the whole run (the last `freeze_fraction` of them freeze the gates).
            initial_logits: θ to start from, float [n_gates]; drawn from the config's normal distribution if None.

        Raises:
            InputError: the models differ in architecture, share weights, or a value is out of range.
        """
        return cls(model, base, config, total_steps=total_steps, initial_logits=initial_logits)

    def __init__(self, model, base, config, *, total_steps, initial_logits=None):
        if total_steps < 1:
            raise InputError(f"total_steps: expected at least 1, got {total_steps}")
        shards.reshard(model)
        shards.reshard(base)
        check_same_architecture(base, model)
        self.model, self.base, self.config, self.total_steps = model, base, config, total_steps
        sites, base_sites = projections(model), projections(base)
        layout = GateLayout(shape_of(model.config))
        self.names = [site.name for site in sites]
        self._sites = sites
        self._weights = [site.linear.weight for site in sites]
        self._bases = [site.linear.weight.detach() for site in base_sites]
        self._maps = [layout.gate_map(site.kind, site.layer) for site in sites]
        for name, weight, fixed in zip(self.names, self._weights, self._bases, strict=True):
            attach.check_pair(name, weight, fixed)
        self._sharded = shards.is_sharded(self._weights[0])
        # a shard's rows are gated from its first row's gate on; kernels see no matrix without rows
        self._row_maps = [
            replace(gate_map, row_start=gate_map.row_start + shards.row_offset(weight))
            for gate_map, weight in zip(self._maps, self._weights, strict=True)
        ]
        self._here = [index for index, weight in enumerate(self._weights) if len(local(weight))]
        if config.gating == "forward" and shards.world_size() > 1:
            raise InputError("gating: expected 'optimizer' on several ranks, got 'forward', whose Δ no engine averages")
        self.penalties = reference_compat.penalties_in_step(config)
        self.gates = Gates(layout, kind=config.gate_kind, seed=config.seed, logits=self._start(layout, initial_logits))
        self.dual = attach.dual_controller(config)
        unmasked = attach.fix_unmasked(model, base, config, masked=self._weights)
        groups: list[dict[str, Any]] = [
            {"params": self._weights, "lr": config.learning_rate},
            {"params": [self.gates.logits], "lr": config.gate_lr},
        ]
        if unmasked:
            groups.append({"params": unmasked, "lr": config.learning_rate})
        super().__init__(groups, {})
        self._inner = attach.inner_optimizers(config, self.gates.logits, unmasked)
        for weight, fixed in zip(self._weights, self._bases, strict=True):
            self.state[weight] = attach.masked_state(config, weight, fixed)
        self.completed_steps = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan
        self._early_stop = EarlyStop(config)
        self._good_logits = self.gates.logits.detach().clone()
        self._observed: tuple[Any, float] | None = None
        self._in_eval = False
        self._forward = self._forward_route() if config.gating == "forward" else None
        packs = config.pack == "auto" and self._forward is None
        if packs and shards.world_size() > 1:
            packs = False
            logger.info("weight gradients are not packed on several ranks: engines average weight.grad alone")
        self._plan = PackPlan.for_sites(sites, layout, config) if packs else None
        self._handles = [
            model.register_forward_pre_hook(self._refuse_sampled_evaluation),
            model.register_state_dict_pre_hook(self._refuse_sampled_state),
        ]
        self._write_weights(training=not self.gates_frozen)

    # ------------------------------------------------------------------ one step

    def begin_step(self, micro_batches: int) -> None:
        """Take note of how many backwards the coming step has: `reference_compat` adds the price in each of them."""
        if self.config.reference_compat:  # an epoch's last group may be smaller
            self.penalties = micro_batches

    def observe(self, loss: float | Tensor, *, tokens: float = 1.0) -> None:
        """Hand over the loss of the coming step, as `step` takes it, where a trainer calls `step()` itself."""
        self._observed = loss, tokens

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss: float | Tensor | Callable | None = None, *, tokens: float = 1.0
    ) -> None:
        """Take one optimizer step on gradients that `backward` left in the weights.

        Args:
            loss: this step's mean loss over all its micro-batches, in nats; not needed after `observe(loss)`. A
                closure, as torch.optim allows, is called and its loss taken.
            tokens: on several ranks, how many tokens this rank's `loss` is the mean of: λ follows the mean over all
                ranks' tokens. The gradients have to be those of that mean, as DDP's and FSDP2's averages are where
                each rank scales its summed loss by ranks / (all ranks' tokens).

        A loss, a gradient or a θ that is not finite skips the step: Δ and λ keep their values, θ those of the last
        good step, and `skipped_in_a_row` counts.

        Raises:
            RuntimeError: the optimizer is in evaluation mode.
            InputError: no loss was given, or a masked weight has no gradient.
        """
        if self._in_eval:
            raise RuntimeError("step: the optimizer is in evaluation mode; call optimizer.train() first")
        value, tokens = self._take_loss(loss, tokens)
        grads, layouts = self._gradients()
        deltas, old = self._state_of("delta"), self.gates.values
        if self._forward is None:
            chained = None
            d_gate, sq_norm = self._pass_a(grads, layouts)
        else:  # autograd has been through the gates: nothing is left to chain or to mask
            chained = self.gates.logits.grad
            d_gate, old = torch.zeros_like(old), torch.ones_like(old)
            sq_norm = sum((grad.float().square().sum() for grad in grads), old.new_zeros(()))
        unmasked = [local(p.grad) for p in self._unmasked() if p.grad is not None]
        sq_norm = sq_norm + sum(grad.float().square().sum() for grad in unmasked)
        value, d_gate, sq_norm = shards.reduce_step(value, tokens, d_gate, sq_norm, sharded=self._sharded)
        gate_sum = (d_gate if chained is None else chained).sum()
        theta_sum = self.gates.logits.sum()
        norm, *probes = torch.stack([x.to(sq_norm.dtype) for x in (sq_norm.sqrt(), gate_sum, theta_sum)]).tolist()
        if not all(map(math.isfinite, (value, norm, *probes))):
            self._skip(f"loss {value:g}, gradient norm {norm:g}, sums of gate gradients and θ {probes}")
            return
        self.last_loss, self.grad_norm = value, norm
        limit = self.config.max_grad_norm
        grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0

        frozen = self.gates_frozen
        if not frozen:
            d_logits = self.gates.logits_grad(d_gate, l0_weight=self.penalties * self.dual.penalty)
            self.gates.logits.grad = d_logits if chained is None else d_logits + chained
            self._inner_step("gates", group=1)
            self.gates.logits.grad = None
            if not math.isfinite(float(self.gates.logits.sum())):
                self._skip("its update of θ is not finite")
                return
            self._good_logits = self.gates.logits.detach().clone()
        self.skipped_in_a_row = 0
        self.dual.update(value, frozen=frozen)
        old_rank = self.gates.rank
        self.completed_steps += 1
        self._draw_gates(training=not self.gates_frozen)

        if self.config.train_delta:
            delta_adamw_(
                self._here_of(self._weights),
                self._here_of(self._bases),
                deltas,
                self._state_of("exp_avg"),
                self._state_of("exp_avg_sq"),
                grads,
                old,
                self.gates.values,
                self._here_of(self._row_maps),
                lr=self.param_groups[0]["lr"],
                beta1=self.config.adam_beta1,
                beta2=self.config.adam_beta2,
                eps=self.config.adam_epsilon,
                weight_decay=self.config.weight_decay,
                step=self.completed_steps,
                grad_scale=grad_scale,
                layouts=layouts,
                rank=old_rank if layouts else None,
            )
        if self.config.reference_compat:
            reference_compat.round_as_stored_weights_(deltas, self._here_of(self._bases))
        if self.config.reference_compat or not self.config.train_delta:
            self._refresh_weights()
        if "unmasked" in self._inner:
            for parameter in self._unmasked():
                if parameter.grad is not None:
                    parameter.grad.mul_(grad_scale)
            self._inner_step("unmasked", group=2)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for site in self._sites:
            if isinstance(site.linear, PackedGradLinear):
                site.linear.zero_packed_grad()
        for delta in self._forward.deltas.values() if self._forward is not None else ():
            delta.grad = None

    @property
    def gates_frozen(self) -> bool:
        """Whether the coming step leaves θ, λ and the gates alone: the last `freeze_fraction` of the run."""
        return self.completed_steps + 1 > self.total_steps * (1 - self.config.freeze_fraction)

    def stats(self) -> dict[str, Any]:
        """A line for a log: loss, EMA and ε in nats, λ, gradient norm, open gates per group, whether they are fixed."""
        counts = self.gates.open_counts()
        return {
            "loss": self.last_loss,
            "ema": self.dual.ema,
            "epsilon": self.dual.epsilon,
            "dual_lambda": self.dual.dual_lambda,
            "grad_norm": self.grad_norm,
            "expected_l0": float(self.gates.expected_l0),
            "open": counts,
            "sparsity": 1 - sum(counts.values()) / self.gates.layout.n_gates,
            "skipped_steps": self.skipped_steps,
            "frozen": self.gates_frozen,
        }

    def stop_reason(self) -> str | None:
        """To be called once after every step: why the run leads nowhere (`EarlyStop`), or None."""
        return None if self.gates_frozen else self._early_stop.check(self.stats())

    # ------------------------------------------------------------------ modes and results

    def eval(self) -> None:
        """Write W_eff of the deterministic gates into the model, for evaluation or saving; `train()` goes back.

        Call it between steps: gradients packed for the sampled gates are discarded.
        """
        if not self._in_eval:
            self._in_eval = True
            self._write_weights(training=False)

    def train(self) -> None:
        """Back to the gates of the coming step, bit for bit. Trainers call this before every batch: then it is free."""
        if self._in_eval:
            self._in_eval = False
            self._write_weights(training=not self.gates_frozen)

    def carrier(self) -> Carrier:
        """The open gates and their part of Δ, as a patch for the base."""
        return Carrier.from_training(self)

    def fold(self) -> PreTrainedModel:
        """Bake the deterministic gates into the weights for good, detach, and return the now ordinary model."""
        self.eval()
        self.detach()
        return self.model

    def detach(self) -> None:
        """Leave the model with the weights as they stand and nothing of ours in it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._plan is not None:
            self._plan.restore()
            self._plan = None
        if self._forward is not None:
            self._forward.restore()
            self._forward = None

    def masked(self) -> dict[str, tuple[Tensor, Tensor, Any]]:
        """name -> (weight_base, delta, gate map) of every masked linear, in order."""
        return {
            name: (fixed, self.state[weight]["delta"], gate_map)
            for name, weight, fixed, gate_map in zip(self.names, self._weights, self._bases, self._maps, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs but the base: Δ, moments, θ and its optimizer, dual, step counts."""
        state = super().state_dict()
        state["lcdd"] = {
            "gate_logits": self.gates.logits.detach().clone(),
            "initial_logits": self.gates.initial_logits.clone(),
            "inner": {name: inner.state_dict() for name, inner in self._inner.items()},
            "dual": self.dual.state_dict(),
            "early_stop": self._early_stop.state_dict(),
            **{name: getattr(self, name) for name in _COUNTERS},
            "unmasked": [p.detach().clone() for p in self._unmasked()],
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result into an optimizer attached to the same models; rewrites the model's weights."""
        ours = state_dict["lcdd"]
        if ours["gate_logits"].shape != self.gates.logits.shape:
            raise InputError(
                f"state_dict: expected {self.gates.logits.numel()} gate logits, got {ours['gate_logits'].numel()}"
            )
        for index, weight in enumerate(self._weights):  # all of it before any of it
            for key, tensor in self.state[weight].items():
                given = state_dict["state"][index][key]
                if getattr(given, "shape", tensor.shape) != tensor.shape:
                    raise InputError(
                        f"state_dict: expected {key} of {self.names[index]} of shape {tuple(tensor.shape)}, "
                        f"got {tuple(given.shape)}"
                    )
        # torch's own loader casts state to the parameter's dtype, which would round float32 moments of bf16 weights
        kept = {weight: self.state[weight] for weight in self._weights}
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "lcdd"})
        with torch.no_grad():
            for index, weight in enumerate(self._weights):
                for key, tensor in kept[weight].items():
                    shards.copy_rows_(tensor, state_dict["state"][index][key])
                self.state[weight] = kept[weight]
            self.gates.logits.copy_(ours["gate_logits"])
            for parameter, value in zip(self._unmasked(), ours["unmasked"], strict=True):
                shards.copy_rows_(parameter, value)
            for name, inner in self._inner.items():
                attach.load_inner_(inner, ours["inner"][name])
        self.gates.initial_logits = ours["initial_logits"].clone()
        self.dual.load_state_dict(ours["dual"])
        self._early_stop.load_state_dict(ours["early_stop"])
        for name in _COUNTERS:
            setattr(self, name, ours[name])
        self._good_logits = self.gates.logits.detach().clone()
        self._in_eval = False
        self._write_weights(training=not self.gates_frozen)

    # ------------------------------------------------------------------ parts

    def _start(self, layout: GateLayout, initial_logits: Tensor | None) -> Tensor:
        weight = self._weights[0]
        if initial_logits is None:
            c = self.config
            initial_logits = Gates.initial(layout, mean=c.gate_init_mean, std=c.gate_init_std, seed=c.seed)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return initial_logits.detach().to(device=weight.device, dtype=dtype)

    def _inner_step(self, name: str, *, group: int) -> None:
        """Step an inner optimizer at the learning rate that a scheduler may have given its group here."""
        self._inner[name].param_groups[0]["lr"] = self.param_groups[group]["lr"]
        self._inner[name].step()

    def _forward_route(self) -> ForwardGates:
        """The model's projections swapped for ones that apply the gates themselves, on this optimizer's θ and Δ."""
        deltas = dict(zip(self.names, self._state_of("delta"), strict=True))
        for delta in deltas.values():
            delta.requires_grad_(self.config.train_delta)
        c, logits = self.config, self.gates.logits
        return ForwardGates.attach(self.model, self.base, kind=c.gate_kind, logits=logits, seed=c.seed, deltas=deltas)

    def _state_of(self, key: str) -> list[Tensor]:
        """A state tensor of every masked weight that has rows on this rank: those rows."""
        return self._here_of([self.state[weight][key] for weight in self._weights])

    def _here_of(self, items: list[Any]) -> list[Any]:
        """Of one item a masked weight, those of weights with rows on this rank; of a sharded tensor those rows."""
        return [local(items[index]) for index in self._here]

    def _pass_a(self, grads: list[Any], layouts: list[str] | None) -> tuple[Tensor, Tensor]:
        """(d_gate [N], ‖dΔ‖² []) of the rows on this rank."""
        gate, rank = self.gates.values, self.gates.rank if layouts else None
        if not grads:
            return torch.zeros_like(gate), gate.new_zeros(())
        deltas, maps = self._state_of("delta"), self._here_of(self._row_maps)
        return delta_grad_stats(grads, deltas, gate, maps, layouts=layouts, rank=rank)

    def _skip(self, reason: str) -> None:
        """Count a step that is not taken; θ goes back to the last good one."""
        self.gates.logits.copy_(self._good_logits)
        self.gates.logits.grad = None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step skipped: %s", reason)

    def _unmasked(self) -> list[nn.Parameter]:
        return self.param_groups[2]["params"] if len(self.param_groups) > 2 else []

    def _take_loss(self, loss: Any, tokens: float) -> tuple[float, float]:
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        given, tokens = self._observed or (None, 1.0) if loss is None else (loss, tokens)
        self._observed = None
        if given is None:
            raise InputError("loss: expected the step's mean loss, by step(loss) or by observe(loss) before step()")
        return float(given), tokens

    def _gradients(self) -> tuple[list[Any], list[str] | None]:
        """G of every masked weight, dense or packed, and the layouts where any is packed (forward route: dΔ)."""
        if self._forward is not None:
            trained = self._forward.deltas if self.config.train_delta else {}
            return [self._present(name, delta.grad) for name, delta in trained.items()], None
        grads, layouts = [], []
        for index in self._here:
            linear = self._sites[index].linear
            layout = linear.layout if isinstance(linear, PackedGradLinear) else "dense"
            grad = self._weights[index].grad if layout == "dense" else linear.packed_grad
            grads.append(local(self._present(self.names[index], grad)))
            layouts.append(layout)
        return grads, layouts if any(kind != "dense" for kind in layouts) else None

    @staticmethod
    def _present(name: str, grad: Any) -> Any:
        if grad is None:
            raise InputError(f"{name}.weight: expected a gradient from backward(), got none")
        return grad

    def _draw_gates(self, *, training: bool) -> None:
        self.gates.draw(step=self.completed_steps + 1, training=training)
        if self._forward is not None:
            self._forward.draw(step=self.completed_steps + 1, training=training)
        if self._plan is not None:
            self._plan.update(self.gates)

    def _write_weights(self, *, training: bool) -> None:
        shards.reshard(self.model)
        self._draw_gates(training=training)
        with torch.no_grad():
            self._refresh_weights()

    def _refresh_weights(self) -> None:
        if self._here:
            weights, bases, maps = (self._here_of(items) for items in (self._weights, self._bases, self._row_maps))
            weight_eff_(weights, bases, self._state_of("delta"), self.gates.values, maps)

    def _refuse_sampled_evaluation(self, module: nn.Module, _args: Any) -> None:
        if not module.training and self.gates.sampled:
            raise RuntimeError("the model runs in evaluation mode on sampled gates; call optimizer.eval() first")

    def _refuse_sampled_state(self, *_args: Any) -> None:
        if self.gates.sampled:
            raise RuntimeError("the model's weights hold sampled gates; call optimizer.eval() before saving them")
