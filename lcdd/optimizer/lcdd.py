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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import GateLayout, PreTrainedModel, shape_of, shards
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.controller import DualDescent, GateController
from lcdd.optimizer.dual import DualController
from lcdd.optimizer.forward import ForwardGates
from lcdd.optimizer.gates import Gates
from lcdd.optimizer.packed import PackPlan
from lcdd.optimizer.unmasked import UnmaskedParameters
from lcdd.optimizer.weights import Grads, MaskedWeights

logger = logging.getLogger(__name__)

_COUNTERS = ("skipped_steps", "skipped_in_a_row", "last_loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What a step knows before it moves anything; of all ranks together. sums: of gate gradients and of θ."""

    loss: float
    norm: float
    sums: list[float]
    d_gate: Tensor

    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.norm, *self.sums)))

    def __str__(self) -> str:
        return f"loss {self.loss:g}, gradient norm {self.norm:g}, sums of gate gradients and θ {self.sums}"


class LCDDOptimizer(torch.optim.Optimizer):
    """Trains the gates and the delta of a model against its base, under a loss budget.

    Use `attach`, then the ordinary loop:

        optimizer = LCDDOptimizer.attach(model, base, config, total_steps=400)
        loss.backward(); optimizer.step(loss); optimizer.zero_grad()

    While training, the model's weights hold W_eff of the gates drawn for the coming step. `eval()` writes W_eff of
    the deterministic gates, `train()` goes back; running the model in evaluation mode, or taking its state dict, on
    sampled gates is an error.

    `param_groups[0]` are the masked weights (their `lr` is Δ's), `param_groups[1]` is θ, whose rate is always
    `config.gate_lr`, and with `config.train_unmasked` `param_groups[2]` are norms and biases.

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

    def __init__(
        self,
        model: PreTrainedModel,
        base: PreTrainedModel,
        config: LCDDConfig,
        *,
        total_steps: int,
        initial_logits: Tensor | None = None,
    ) -> None:
        self.penalties = reference_compat.penalties_in_step(config)
        if config.gating == "forward" and shards.world_size() > 1:
            raise InputError("gating: expected 'optimizer' on several ranks, got 'forward', whose Δ no engine averages")
        layout = GateLayout(shape_of(model.config))
        self.model, self.base, self.config = model, base, config
        self._masked = MaskedWeights(model, base, layout, config)
        self.names = [item.name for item in self._masked]
        weights = [item.weight for item in self._masked]
        logits = _start(layout, config, like=weights[0], given=initial_logits)
        gates = Gates(layout, kind=config.gate_kind, seed=config.seed, logits=logits)
        self._controller: GateController = DualDescent(gates, config, total_steps=total_steps)
        self._unmasked = UnmaskedParameters(model, base, config, masked=weights)
        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": config.learning_rate},
            {"params": [gates.logits], "lr": config.gate_lr},
        ]
        if self._unmasked.parameters:
            groups.append({"params": self._unmasked.parameters, "lr": config.learning_rate})
        super().__init__(groups, {})
        self._share_state()
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan
        self._observed: tuple[Any, float] | None = None
        self._in_eval = False
        self._forward = self._forward_route() if config.gating == "forward" else None
        self._plan = self._pack_plan(layout)
        self._handles = [
            model.register_forward_pre_hook(self._refuse_sampled_evaluation),
            model.register_state_dict_pre_hook(self._refuse_sampled_state),
        ]
        self._write_weights(evaluation=False)

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
        good step, and `skipped_in_a_row` counts. Gradients are dropped (None) in either case.

        Raises:
            RuntimeError: the optimizer is in evaluation mode.
            InputError: no loss was given, or a masked weight has no gradient.
        """
        if self._in_eval:
            raise RuntimeError("step: the optimizer is in evaluation mode; call optimizer.train() first")
        loss, tokens = self._take_loss(loss, tokens)
        grads = self._masked.grads()
        found = self._pass_a(grads, loss, tokens)
        if not found.finite():
            self._skip(str(found))
            return
        gate_old, rank_old = self.gates.values, self.gates.rank
        if not self._controller.step(found.d_gate, found.loss, penalties=self.penalties):
            self._skip("its update of θ is not finite")
            return
        self._announce_gates()
        self._pass_b(grads, found.norm, gate_old, rank_old)
        super().zero_grad()
        self.skipped_in_a_row = 0
        self.last_loss, self.grad_norm = found.loss, found.norm

    def _pass_a(self, grads: Grads, loss: float, tokens: float) -> _Measured:
        """Gate gradients and the norm, over all ranks; the host's one look at them."""
        d_gate, sq_norm = self._masked.pass_a(grads, self.gates)
        sq_norm = sq_norm + self._unmasked.sq_norm()
        loss, d_gate, sq_norm = shards.reduce_step(loss, tokens, d_gate, sq_norm, sharded=self._masked.sharded)
        logits = self.gates.logits
        gate_sum = (d_gate if logits.grad is None else logits.grad).sum()
        norm, *sums = torch.stack([x.to(sq_norm.dtype) for x in (sq_norm.sqrt(), gate_sum, logits.sum())]).tolist()
        return _Measured(loss=loss, norm=norm, sums=sums, d_gate=d_gate)

    def _pass_b(self, grads: Grads, norm: float, gate_old: Tensor, rank_old: Tensor) -> None:
        """Clip, step Δ and what no gate masks, and write W_eff of the new gates."""
        limit = self.config.max_grad_norm
        grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        self._masked.pass_b(
            grads, gate_old, rank_old, self.gates,
            lr=self.param_groups[0]["lr"], step=self.completed_steps, grad_scale=grad_scale,
        )  # fmt: skip
        if self._unmasked.parameters:
            self._unmasked.step(lr=self.param_groups[2]["lr"], grad_scale=grad_scale)

    def _take_loss(self, loss: Any, tokens: float) -> tuple[float, float]:
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        given, tokens = self._observed or (None, 1.0) if loss is None else (loss, tokens)
        self._observed = None
        if given is None:
            raise InputError("loss: expected the step's mean loss, by step(loss) or by observe(loss) before step()")
        return float(given), tokens

    def _skip(self, reason: str) -> None:
        """Count a step that is not taken; θ goes back to the last good one."""
        self._controller.restore()
        super().zero_grad()
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step skipped: %s", reason)

    # ------------------------------------------------------------------ how it stands

    @property
    def gates(self) -> Gates:
        return self._controller.gates

    @property
    def dual(self) -> DualController:
        return self._controller.dual

    @property
    def completed_steps(self) -> int:
        return self._controller.completed_steps

    @property
    def gates_frozen(self) -> bool:
        """Whether the coming step leaves θ, λ and the gates alone: the last `freeze_fraction` of the run."""
        return self._controller.frozen

    def stats(self) -> dict[str, Any]:
        """A line for a log: loss, EMA and ε in nats, λ, gradient norm, open gates per group, whether they are fixed."""
        own = {"loss": self.last_loss, "grad_norm": self.grad_norm, "skipped_steps": self.skipped_steps}
        return {**own, **self._controller.stats()}

    def stop_reason(self) -> str | None:
        """To be called once after every step: why the run leads nowhere, or None."""
        return self._controller.stop_reason()

    def masked(self) -> dict[str, tuple[Tensor, Tensor, Any]]:
        """name -> (weight_base, delta, gate map) of every masked linear, in order."""
        return {item.name: (item.base, item.state["delta"], item.gate_map) for item in self._masked}

    # ------------------------------------------------------------------ modes and results

    def eval(self) -> None:
        """Write W_eff of the deterministic gates into the model, for evaluation or saving; `train()` goes back."""
        if not self._in_eval:
            self._in_eval = True
            self._write_weights(evaluation=True)

    def train(self) -> None:
        """Back to the gates of the coming step, bit for bit. Trainers call this before every batch: then it is free."""
        if self._in_eval:
            self._in_eval = False
            self._write_weights(evaluation=False)

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

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs but the base: Δ, moments, θ and its optimizer, dual, step counts."""
        state = super().state_dict()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        state["lcdd"] = {**self._controller.state_dict(), **self._unmasked.state_dict(), **counters}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result into an optimizer attached to the same models; rewrites the model's weights."""
        ours = state_dict["lcdd"]
        if ours["gate_logits"].shape != self.gates.logits.shape:
            raise InputError(
                f"state_dict: expected {self.gates.logits.numel()} gate logits, got {ours['gate_logits'].numel()}"
            )
        self._masked.check_state(state_dict["state"])  # all of it before any of it
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "lcdd"})
        # torch's own loader casts state to the parameter's dtype, which would round float32 moments of bf16 weights
        self._masked.load_state(state_dict["state"])
        self._share_state()
        self._controller.load_state_dict(ours)
        self._unmasked.load_state_dict(ours)
        for name in _COUNTERS:
            setattr(self, name, ours[name])
        self._in_eval = False
        self._write_weights(evaluation=False)

    def _share_state(self) -> None:
        """Each weight's state, where torch.optim keeps it."""
        for item in self._masked:
            self.state[item.weight] = item.state

    # ------------------------------------------------------------------ parts

    def _forward_route(self) -> ForwardGates:
        """The model's projections swapped for ones that apply the gates themselves, on this optimizer's θ and Δ."""
        deltas = {item.name: item.state["delta"] for item in self._masked}
        self._masked.take_gated_grads(self.gates.logits)
        c, logits = self.config, self.gates.logits
        return ForwardGates.attach(self.model, self.base, kind=c.gate_kind, logits=logits, seed=c.seed, deltas=deltas)

    def _pack_plan(self, layout: GateLayout) -> PackPlan | None:
        if self._forward is not None:
            return None
        if shards.world_size() > 1:
            logger.info("weight gradients are not packed on several ranks: engines average weight.grad alone")
            return None
        return PackPlan.for_sites([item.site for item in self._masked], layout, self.config)

    def _write_weights(self, *, evaluation: bool) -> None:
        self._controller.draw(evaluation=evaluation)
        self._announce_gates()
        self._masked.write(self.gates)

    def _announce_gates(self) -> None:
        """Tell the modules that gate for themselves, or pack their gradients, of the gates now in force."""
        if self._forward is not None:
            self._forward.draw(step=self.gates.step, training=self.gates.sampled)
        if self._plan is not None:
            self._plan.update(self.gates)

    def _refuse_sampled_evaluation(self, module: nn.Module, _args: Any) -> None:
        if not module.training and self.gates.sampled:
            raise RuntimeError("the model runs in evaluation mode on sampled gates; call optimizer.eval() first")

    def _refuse_sampled_state(self, *_args: Any) -> None:
        if self.gates.sampled:
            raise RuntimeError("the model's weights hold sampled gates; call optimizer.eval() before saving them")


def _start(layout: GateLayout, config: LCDDConfig, *, like: Tensor, given: Tensor | None) -> Tensor:
    """θ to start from, float32 (float64 beside float64 weights), on the device of `like`."""
    if given is None:
        given = Gates.initial(layout, mean=config.gate_init_mean, std=config.gate_init_std, seed=config.seed)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return given.detach().to(device=like.device, dtype=dtype)
