"""LCDD as an optimizer (method, sections 1 to 3).

Between two optimizer steps gates and deltas are constant, and every gradient that LCDD needs is linear in
G = ∂L/∂W_eff. So the model stays an ordinary model whose linear weights *are* W_eff = W_base + (r ⊗ c) ∘ Δ; G
arrives in `weight.grad` like any gradient, and all of LCDD happens in `step`:

    pass A   (G, Δ, gates) -> gate gradients, ‖dΔ‖²
    θ step   chain through the gates, plus the price of open gates in closed form
    gates    new z for the whole model
    pass B   AdamW on Δ with the gradient formed on the fly, and the next W_eff
    look     the host's one: what is not finite, how many gates are open
    dual     moving average of the loss, ε, λ

All up to the look is queued without knowing how it comes out: how far to clip, and whether to take the step at all,
pass B reads on the device. The host looks while pass B runs, and then prepares the next step.
"""

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lcdd.carrier import Carrier
from lcdd.checkpoint import model_fingerprint
from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import Ends, PreTrainedModel, decoder_layers, shards
from lcdd.optimizer import compat as reference_compat
from lcdd.optimizer.averaging import OpenAverage, OpenReduceScatter
from lcdd.optimizer.controller import Constraint, DualDescent, GateController
from lcdd.optimizer.forward import ForwardGates
from lcdd.optimizer.gates import Drawn, Gates, starting_logits
from lcdd.optimizer.inner import drop_gradients
from lcdd.optimizer.leaving import leave, leave_folded
from lcdd.optimizer.measured import Measured
from lcdd.optimizer.pacing import PacedClosing
from lcdd.optimizer.packed import OpenParts, PackPlan, packed_kind
from lcdd.optimizer.unmasked import UnmaskedParameters
from lcdd.optimizer.watch import Watch, check_unwatched
from lcdd.optimizer.weights import Grads, MaskedWeights, MatricesByName

logger = logging.getLogger(__name__)

_COUNTERS = ("skipped_steps", "skipped_in_a_row", "last_loss", "grad_norm")


class LCDDOptimizer(torch.optim.Optimizer):
    """Trains the gates and the delta of a model against its base, under a loss budget.

    Use `attach`, then the ordinary loop:

        optimizer = LCDDOptimizer.attach(model, base, config, total_steps=400)
        loss.backward(); optimizer.step(loss); optimizer.zero_grad()

    While training, the model's weights hold W_eff of the gates drawn for the coming step. `eval()` writes W_eff of
    the deterministic gates, `train()` goes back; running the model in evaluation mode, taking its state dict, or
    copying or pickling it on sampled gates is an error. Weights that somebody else writes are taken in where that has
    one meaning, else an error (`heed_writes`). An optimizer that is deleted leaves an ordinary model behind, folded.

    `param_groups[0]` are the masked weights: their lr, betas, eps and weight_decay are those of AdamW on Δ, for any
    scheduler to move. `param_groups[1]` is θ, whose rate is `config.gate_lr` whatever a scheduler writes there. With
    `config.train_unmasked` `param_groups[2]` are norms and biases. No further group can be added.

    Attributes:
        gates: θ and the gates in force.
        dual: the constraint's controller.
        model, base: the model in training, and the one it is held against.
        names: of the masked weights, in the order of `param_groups[0]`.
        skipped_steps, skipped_in_a_row: steps not taken because the loss or a gradient was not finite.
        penalties: how often the coming step adds the price of open gates: once, but in `reference_compat`.
    """

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        base: PreTrainedModel,
        config: LCDDConfig,
        *,
        total_steps: int,
        initial_logits: Tensor | None = None,
        prices: Tensor | None = None,
    ) -> "LCDDOptimizer":
        """Put `model` (fine-tuned) under LCDD against `base`; its weights become W_eff at once, its mode training.

        The base's weights are referenced, not copied: keep them unchanged. Parameters outside the masked linears are
        set to the base's values, so that a model with all gates closed is the base.

        Args:
            model: the fine-tuned model; trained in place. torch.compile may come before or after; DDP comes after.
            base: the model before fine-tuning, same architecture, on the same device.
            config: the run's settings.
            total_steps: optimizer steps of the whole run (the last `freeze_fraction` of them freeze the gates).
            initial_logits: θ to start from, float [n_gates], which asks for the dual descent unless the config says
                paced (gates above 0 start open); None: as the config has it.
            prices: float [n_gates], above 0: what each gate's worth is divided by under paced closing, so that dear
                ones close first (`lcdd.carrier.prices_of`); None: all alike.

        Raises:
            InputError: the models differ in architecture, share weights, or a value is out of range; the model is
                attached already, or wrapped for several ranks; prices under the dual descent.
        """
        return cls(model, base, config, total_steps=total_steps, initial_logits=initial_logits, prices=prices)

    def __init__(
        self,
        model: PreTrainedModel,
        base: PreTrainedModel,
        config: LCDDConfig,
        *,
        total_steps: int,
        initial_logits: Tensor | None = None,
        prices: Tensor | None = None,
    ) -> None:
        if initial_logits is not None and config.gate_controller == "auto" and not config.settings_of("paced"):
            config = replace(config, gate_controller="dual")  # θ is what the dual descent moves
        if prices is not None and not config.paced:
            raise InputError("prices: expected None under the dual descent, which has one price for all, got some")
        self.penalties = reference_compat.penalties_in_step(config)
        if config.gating == "forward" and shards.world_size() > 1:
            raise InputError("gating: expected 'optimizer' on several ranks, got 'forward', whose Δ no engine averages")
        model, base = _unwrapped("model", model), _unwrapped("base", base)
        check_unwatched(model)
        self.model, self.base, self.config = model, base, config
        self._masked = MaskedWeights(model, base, config)
        self.names, weights, layout = self._masked.names, self._masked.parameters, self._masked.layout
        _warn_of_float16(weights)
        logits = starting_logits(layout, config, like=weights[0], given=initial_logits)
        gates = Gates(layout, kind=config.gate_kind, seed=config.seed, logits=logits)
        self._controller: GateController = (
            PacedClosing(gates, config, total_steps=total_steps, prices=prices)
            if config.paced
            else DualDescent(gates, config, total_steps=total_steps)
        )
        self._unmasked = UnmaskedParameters(model, base, config, masked=weights)
        self._ready = False
        super().__init__(self._groups(), _adam_settings(config))
        self._ready = True
        self._share_state()
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan
        self._observed: tuple[Any, float] | None = None
        self._in_eval = False
        self._inside: list[Callable[[], None]] = []  # what takes ours out of the model
        self._forward = self._forward_route() if config.gating == "forward" else None
        self._plan = self._pack_plan() if shards.world_size() == 1 and not self._masked.sharded else None
        self._parts = self._open_reduce_scatter()
        self._average: OpenAverage | None = None
        self._watch = Watch(model, self)
        self._write_weights(evaluation=False)
        model.train()
        parts = (model, self._watch, self._masked, self._controller, self._inside)
        self._finalizer = weakref.finalize(self, leave_folded, *parts)
        self._finalizer.atexit = False

    # ------------------------------------------------------------------ one step

    def begin_step(self, micro_batches: int) -> None:
        """Take note of how many backwards the coming step has: `reference_compat` adds the price in each of them."""
        if self.config.reference_compat:  # an epoch's last group may be smaller
            self.penalties = micro_batches

    def observe(self, loss: float | Tensor, *, tokens: float = 1.0) -> None:
        """Hand over the loss of the coming step, as `step` takes it, where a trainer calls `step()` itself."""
        self._observed = loss, tokens

    def observe_held_out(self, loss: float, base: float | None = None) -> None:
        """Hand over a loss on held-out text, in nats, measured under `eval()`: paced closing keeps its budget there.
        base: the base's on the same text; without it the budget is the paper's (`lcdd.optimizer.pacing.epsilon_of`)."""
        self._controller.observe_held_out(loss, base)

    def observe_behavior(self, rate: float) -> bool:
        """Hand over the share of answers that show the behaviour, under `eval()`, the same prompts every time: below
        three quarters of the first one paced closing gives back, and True comes back."""
        return self._controller.observe_behavior(rate)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, loss: float | Tensor | Callable | None = None, closure: Callable | None = None, *, tokens: float = 1.0
    ) -> None:
        """Take one optimizer step on gradients that `backward` left in the weights.

        Args:
            loss: this step's mean loss over all its micro-batches, in nats; a tensor is left on its device until the
                step looks at everything at once. Not needed after `observe(loss)`.
            closure: as of any torch optimizer: called first, and its loss taken. It may also come in the place of
                `loss`, which is where torch's optimizers have it.
            tokens: on several ranks, how many tokens this rank's `loss` is the mean of: λ follows the mean over all
                ranks' tokens. The gradients have to be those of that mean, as DDP's and FSDP2's averages are where
                each rank scales its summed loss by ranks / (all ranks' tokens).

        A loss, a gradient or a θ that is not finite skips the step: Δ and λ keep their values, θ those of the last
        good step, and `skipped_in_a_row` counts. Gradients are dropped (None) in either case.

        Raises:
            RuntimeError: the optimizer is in evaluation mode, or detached.
            InputError: no loss was given, a masked weight has no gradient, or somebody else has written the weights
                since the forward.
        """
        self._refuse_detached("step")
        if self._in_eval:
            raise RuntimeError("step: the optimizer is in evaluation mode; call optimizer.train() first")
        loss, tokens = self._take_loss(loss if closure is None else closure, tokens)
        if self._masked.moved and self._masked.differing(self.gates):
            raise self._foreign()
        fixed = self._controller.frozen
        grads, before = self._masked.grads(self.gates), self.gates.drawn
        measured = self._pass_a_and_gates(grads, loss, tokens)
        if not measured.hopeless:
            self._pass_b(grads, measured, before)
        found = measured.look(self.gates.drawn)
        if found.foreign or not found.finite():
            self._controller.restore()
            self.gates.drawn = before
            if found.foreign:
                raise self._foreign()
            self._skip(str(found))
            return
        self._controller.step(found.loss, found.proposed)
        self._masked.finish(self.gates)
        self._step_unmasked(found.norm)
        if self._controller.frozen:
            self._masked.settle(self.gates)
        if not fixed:
            self._announce_gates()
        drop_gradients(self)
        self.skipped_in_a_row = 0
        self.last_loss, self.grad_norm = found.loss, found.norm

    def _pass_a_and_gates(self, grads: Grads, loss: float | Tensor, tokens: float) -> Measured:
        """Gate gradients and the norm, over all ranks, and the gates of the next step."""
        d_gate, sq_norm = self._masked.pass_a(grads, self.gates)
        sq_norm = sq_norm + self._unmasked.sq_norm()
        loss, d_gate, sq_norm = shards.reduce_step(loss, tokens, d_gate, sq_norm, sharded=self._masked.sharded)
        chained = self.gates.logits.grad
        gate_sum = (d_gate if chained is None else chained).sum()
        probe = self._masked.probe(self.gates, self.completed_steps)
        proposed = self._controller.propose(d_gate, loss, penalties=self.penalties)
        return Measured(loss=loss, norm=sq_norm.sqrt(), gate_sum=gate_sum, foreign=probe, proposed=proposed)

    def _pass_b(self, grads: Grads, measured: Measured, before: Drawn) -> None:
        """Clip, step Δ, and write W_eff of the new gates, if the device finds that the step can be taken."""
        masked, theta, *_ = self.param_groups
        theta["lr"] = self.config.gate_lr  # which a scheduler may have written
        lr, decay = masked["lr"] * self._controller.delta_rate, self._controller.delta_decay
        settings = {**masked, "lr": lr, "weight_decay": masked["weight_decay"] + (decay / lr if lr else 0.0)}
        grad_scale = measured.grad_scale(self.config.max_grad_norm)
        self._masked.pass_b(
            grads, before, self.gates, settings=settings, step=self.completed_steps, grad_scale=grad_scale
        )

    def _step_unmasked(self, norm: float) -> None:
        limit = self.config.max_grad_norm
        grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        for group in self.param_groups[2:]:
            self._unmasked.step(settings=group, grad_scale=grad_scale)

    def _take_loss(self, loss: Any, tokens: float) -> tuple[float | Tensor, float]:
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        given, tokens = self._observed or (None, 1.0) if loss is None else (loss, tokens)
        self._observed = None
        if given is None:
            raise InputError("loss: expected the step's mean loss, by step(loss) or by observe(loss) before step()")
        if isinstance(given, Tensor) and given.numel() != 1:
            raise InputError(f"loss: expected one number, got a tensor of shape {list(given.shape)}")
        return given.detach().view(()) if isinstance(given, Tensor) else float(given), tokens

    def _refuse_detached(self, action: str) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(
                f"{action}: the optimizer is detached from its model, by fold() or detach(); attach anew"
            )

    def _skip(self, reason: str) -> None:
        """Count a step that is not taken."""
        drop_gradients(self)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step skipped: %s", reason)

    def averaging(self) -> Callable[[], AbstractContextManager[None]] | None:
        """For several ranks that hold the whole model each: what to wrap a step's last backward in, in DDP's place.

            average = optimizer.averaging()          once, before the first forward
            with average(): loss.backward()          the step's last micro-batch; those before it without

        Gradients are then packed as on one rank, and what is open of them goes over the wire alone (`OpenAverage`).
        None where it is somebody else's: on one rank, of shards, on the forward route, and with `pack` never.
        """
        if shards.world_size() == 1 or self._masked.sharded or self._forward or self.config.pack == "never":
            return None
        if self._average is None:
            self._plan = self._pack_plan()
            self._announce_gates()
            assert self._plan is not None
            others = self._unmasked.parameters
            self._average = OpenAverage(self._masked.sites, self._plan.parts.of, others=others)
            self._inside.append(self._average.close)
        return self._average.last

    # ------------------------------------------------------------------ how it stands

    @property
    def gates(self) -> Gates:
        return self._controller.gates

    @property
    def dual(self) -> Constraint:
        return self._controller.dual

    @property
    def completed_steps(self) -> int:
        return self._controller.completed_steps

    @property
    def loss_weight(self) -> float:
        return self._controller.loss_weight

    @property
    def gates_frozen(self) -> bool:
        """Whether the coming step leaves θ, λ and the gates alone: the last `freeze_fraction` of the run, or all that
        comes after `target_sparsity`."""
        return self._controller.frozen

    def stats(self) -> dict[str, Any]:
        """A line for a log: loss, EMA and ε in nats, λ, gradient norm, open gates per group, whether they are fixed."""
        own = {"loss": self.last_loss, "grad_norm": self.grad_norm, "skipped_steps": self.skipped_steps}
        return {**own, **self._controller.stats()}

    def stop_reason(self) -> str | None:
        """To be called once after every step: why the run leads nowhere, or None."""
        return self._controller.stop_reason()

    @property
    def n_open(self) -> int:
        """Gates that are open at evaluation."""
        return int(self.gates.evaluation_values().count_nonzero())

    @cached_property
    def base_fingerprint(self) -> str:
        """`model_fingerprint` of the base, which is not to change under the optimizer."""
        return model_fingerprint(self.base)

    def masked(self) -> Mapping[str, tuple[Tensor, Tensor, Any]]:
        """name -> (weight_base, delta, gate map) of every masked matrix, in order; made when asked for."""
        return MatricesByName(self._masked.items)

    # ------------------------------------------------------------------ modes and results

    def eval(self) -> None:
        """Write W_eff of the deterministic gates into the model, for evaluation or saving; `train()` goes back.

        Raises:
            InputError: as of `heed_writes`.
        """
        self._switch(evaluation=True)

    def train(self) -> None:
        """Back to the gates of the coming step, bit for bit. Trainers call this before every batch: then it is free.

        Raises:
            InputError: as of `heed_writes`.
        """
        self._switch(evaluation=False)

    def _switch(self, *, evaluation: bool) -> None:
        self._refuse_detached("eval" if evaluation else "train")
        self.heed_writes(exact=evaluation != self._in_eval)
        if evaluation != self._in_eval:
            self._in_eval = evaluation
            self._write_weights(evaluation=evaluation)

    def heed_writes(self, *, exact: bool = False) -> None:
        """Take in, or refuse, weights that somebody else has written; `eval`, `train`, `carrier`, `fold`, `state_dict`
        and every forward in training do this by themselves.

        One kind can be taken in: weights that this run had with its deterministic gates as they are now (a saved state
        that is loaded into the model, say). Δ follows them, and the weights become W_eff of the gates in force.
        exact: look at the values, which `.data` changes unseen, in any case.

        Raises:
            InputError: the weights are none of this run's gates, were replaced, cast or moved, or the base was written.
        """
        if not self._finalizer.alive:
            return
        self._unmasked.check_frozen()
        if not (exact or self._masked.moved):
            return
        if self._masked.differing(self.gates):
            if not self._masked.take_in(self.gates.evaluation_values()):
                raise self._foreign()
            logger.warning("weights that somebody else wrote were taken in: Δ follows them")
            self._masked.write(self.gates)
        self._masked.mark()

    def _foreign(self) -> InputError:
        name = self._masked.differing(self.gates)[0].name
        return InputError(
            f"model: {name}.weight was written by somebody else (or its base was), and is not W_eff of this run's "
            "gates; put the weights back, or restore the run's state by optimizer.load_state_dict (optimizer.detach() "
            "leaves the model as it is)"
        )

    def check_ends(self, ends: Ends) -> None:
        """Write the weights of all gates open, and of all closed, into the model, and look at its logits.

        ends: made of the two models before `attach` (with what no gate masks at the base's values). On the forward
        route the weights are nobody's, and nothing is looked at.

        Raises:
            InputError: open is not the SFT model, or closed is not the base; the message has the difference.
        """
        if self._forward is not None:
            return
        self._watch.sampled = False
        try:
            self._masked.write_all(1.0)
            ends.check_opened(self.model)
            self._masked.write_all(0.0)
            if not self._unmasked.parameters:
                ends.check_closed(self.model)
        finally:
            self._write_weights(evaluation=self._in_eval)

    def carrier(self) -> Carrier:
        """The open gates and their part of Δ, as a patch for the base.

        Raises:
            InputError: as of `heed_writes`.
        """
        self.heed_writes(exact=True)
        return Carrier.from_training(self)

    def load_carrier(self, carrier: Carrier) -> None:
        """Put a carrier of this run in the place of its gates, Δ and unmasked parameters, in evaluation mode."""
        self._masked.load_deltas(carrier)
        self._controller.load_logits(carrier.gate_logits)
        with torch.no_grad():
            for name, value in carrier.unmasked.items():
                shards.copy_rows_(self.model.get_parameter(name), value)
        self._in_eval = True
        self._write_weights(evaluation=True)

    def fold(self) -> PreTrainedModel:
        """Bake the deterministic gates into the weights for good, detach, and return the now ordinary model.

        Raises:
            InputError: as of `heed_writes`.
        """
        self.heed_writes(exact=True)
        self.eval()
        self.detach()
        return self.model

    def detach(self) -> None:
        """Leave the model with the weights as they stand and nothing of ours in it."""
        if self._finalizer.detach() is not None:
            leave(self.model, self._watch, self._masked, self._inside)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs but the base: Δ, moments, θ and its optimizer, dual, step counts.

        Raises:
            InputError: as of `heed_writes`.
        """
        self.heed_writes(exact=True)
        state = super().state_dict()
        counters = {name: getattr(self, name) for name in _COUNTERS}
        own = {**self._controller.state_dict(), **self._unmasked.state_dict(), **counters}
        state["lcdd"] = {**own, "settled": self._masked.settled}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result into an optimizer attached to the same models; rewrites the model's weights,
        whoever wrote them last, and drops gradients.
        """
        self._refuse_detached("load_state_dict")
        ours = state_dict["lcdd"]
        if ours["gate_logits"].shape != self.gates.logits.shape:
            raise InputError(
                f"state_dict: expected {self.gates.logits.numel()} gate logits, got {ours['gate_logits'].numel()}"
            )
        # gates of which the state holds the open blocks alone; earlier versions knew whole tensors only
        settled = self.gates.of(ours["gate_logits"]) if ours.get("settled", False) else None
        self._masked.check_state(state_dict["state"], settled)  # all of it before any of it
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "lcdd"})
        # torch's own loader casts state to the parameter's dtype, which would round float32 moments of bf16 weights
        self._masked.load_state(state_dict["state"], settled)
        self._share_state()
        self._controller.load_state_dict(ours)
        self._unmasked.load_state_dict(ours)
        for name in _COUNTERS:
            setattr(self, name, ours[name])
        super().zero_grad()
        self._in_eval = False
        self._write_weights(evaluation=False)

    def _share_state(self) -> None:
        """Each weight's state, where torch.optim keeps it."""
        self.state.update(self._masked.states)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once attached: LCDD trains what `attach` found."""
        if self._ready:
            raise InputError(
                "add_param_group: expected no further parameters, LCDD trains what attach found; give others an "
                "optimizer of their own"
            )
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("LCDDOptimizer: cannot be copied or pickled; save optimizer.state_dict(), and attach anew")

    # ------------------------------------------------------------------ parts

    def _groups(self) -> list[dict[str, Any]]:
        c = self.config
        groups: list[dict[str, Any]] = [
            {"params": self._masked.parameters, "lr": c.learning_rate},
            {"params": [self.gates.logits], "lr": c.gate_lr},
        ]
        if self._unmasked.parameters:
            groups.append({"params": self._unmasked.parameters, "lr": c.learning_rate})
        return groups

    def _forward_route(self) -> ForwardGates:
        """The model's linears swapped for ones that apply the gates themselves, on this optimizer's θ and Δ."""
        deltas = {item.name: item.state["delta"] for item in self._masked.items}
        self._masked.take_gated_grads(self.gates.logits)
        c, logits = self.config, self.gates.logits
        found = ForwardGates.attach(self.model, self.base, kind=c.gate_kind, logits=logits, seed=c.seed, deltas=deltas)
        self._inside.append(found.restore)
        return found

    def _pack_plan(self) -> PackPlan | None:
        if self._forward is not None:
            return None
        plan = PackPlan.for_sites(self._masked.sites, self._masked.layout, self.config)
        self._inside.append(plan.restore)
        return plan

    def _open_reduce_scatter(self) -> OpenParts | None:
        """FSDP2's reduce-scatter for what is open, where this model's layers are its modules."""
        if not self._masked.sharded or self.config.pack == "never":
            return None
        parts = OpenParts(self._masked.layout, gate_kind=packed_kind(self.config))
        OpenReduceScatter.install(list(decoder_layers(self.model)), self._masked.sites, parts.of)
        return parts

    def _write_weights(self, *, evaluation: bool) -> None:
        self._controller.draw(evaluation=evaluation)
        self._announce_gates()
        self._masked.write(self.gates)

    def _announce_gates(self) -> None:
        """Tell the watch, and the modules that gate for themselves or pack their gradients, of the gates in force."""
        self._watch.sampled = self.gates.sampled
        if self._forward is not None:
            self._forward.draw(step=self.gates.step, training=self.gates.sampled)
        for listener in (self._plan, self._parts):
            if listener is not None:
                listener.update(self.gates, fixed=self._controller.frozen)


def _adam_settings(config: LCDDConfig) -> dict[str, Any]:
    """AdamW's settings of Δ, as torch's optimizers have them in their groups."""
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}


def _unwrapped(name: str, model: Any) -> PreTrainedModel:
    """The model itself where torch.compile has wrapped it.

    Raises:
        InputError: it is wrapped for several ranks.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise InputError(f"{name}: expected the model itself, got {type(model).__name__} around it; attach, then wrap")
    return model


def _warn_of_float16(weights: Sequence[Tensor]) -> None:
    if any(weight.dtype == torch.float16 for weight in weights):
        logger.warning(
            "model: float16 weights have float16 gradients, in which small entries become zero, and which GradScaler "
            "refuses; load both models in bfloat16, or in float32 and train under torch.autocast with a GradScaler"
        )
