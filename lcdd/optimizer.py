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
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.dual import DualController
from lcdd.gates import GateLayout, Gates
from lcdd.models import PreTrainedModel, check_same_architecture, projections, shape_of, unmasked_parameters
from lcdd.modules import ForwardGates
from lcdd.packed import PackedGradLinear, PackPlan
from lcdd_kernels import delta_adamw_, delta_grad_stats, weight_eff_

logger = logging.getLogger(__name__)


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
            ValueError: the models differ in architecture, share weights, or a value is out of range.
        """
        return cls(model, base, config, total_steps=total_steps, initial_logits=initial_logits)

    def __init__(self, model, base, config, *, total_steps, initial_logits=None):
        if total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
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
            if weight.data_ptr() == fixed.data_ptr():
                raise ValueError(f"base: expected its own copy of {name}.weight, got the tensor that is trained")
            if weight.device != fixed.device or weight.dtype != fixed.dtype:
                raise ValueError(
                    f"base: expected {name}.weight as {weight.dtype} on {weight.device}, "
                    f"got {fixed.dtype} on {fixed.device}"
                )
        self.gates = Gates(layout, kind=config.gate_kind, seed=config.seed, logits=self._start(layout, initial_logits))
        self.dual = DualController(
            lambda_init=config.dual_lambda_init,
            lr=config.dual_lr,
            lr_shrink=config.dual_lr_shrink,
            lambda_min=config.dual_lambda_min,
            lambda_max=config.dual_lambda_max,
            violation_clip=config.violation_clip,
            ema_beta=config.loss_ema_beta,
            warmup_steps=config.warmup_steps,
            loss_budget=config.loss_budget,
            loss_floor=config.loss_floor,
        )
        unmasked = self._fix_unmasked(base)
        groups: list[dict[str, Any]] = [
            {"params": self._weights, "lr": config.learning_rate},
            {"params": [self.gates.logits], "lr": config.gate_lr},
        ]
        if unmasked:
            groups.append({"params": unmasked, "lr": config.learning_rate})
        super().__init__(groups, {})
        self._inner = self._inner_optimizers(unmasked)
        for weight, fixed in zip(self._weights, self._bases, strict=True):
            self.state[weight] = self._masked_state(weight, fixed)
        self.completed_steps = 0
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan
        self._observed: float | Tensor | None = None
        self._in_eval = False
        self._forward = self._forward_route() if config.gating == "forward" else None
        packs = config.pack == "auto" and self._forward is None
        self._plan = PackPlan.for_sites(sites, layout, config) if packs else None
        self._handles = [
            model.register_forward_pre_hook(self._refuse_sampled_evaluation),
            model.register_state_dict_pre_hook(self._refuse_sampled_state),
        ]
        self._write_weights(training=not self.gates_frozen)

    # ------------------------------------------------------------------ one step

    def observe(self, loss: float | Tensor) -> None:
        """Hand over the loss of the coming step (mean cross-entropy, nats), where a trainer calls `step()` itself."""
        self._observed = loss

    @torch.no_grad()
    def step(self, loss: float | Tensor | Callable | None = None) -> None:  # type: ignore[override]
        """Take one optimizer step on gradients that `backward` left in the weights.

        Args:
            loss: this step's mean loss over all its micro-batches, in nats; not needed after `observe(loss)`. A
                closure, as torch.optim allows, is called and its loss taken.

        A loss or a gradient that is not finite skips the step: Δ, θ and λ keep their values, and
        `skipped_in_a_row` counts.

        Raises:
            RuntimeError: the optimizer is in evaluation mode.
            ValueError: no loss was given, or a masked weight has no gradient.
        """
        if self._in_eval:
            raise RuntimeError("step: the optimizer is in evaluation mode; call optimizer.train() first")
        loss = self._take_loss(loss)
        grads, layouts = self._gradients()
        deltas, old = self._state_of("delta"), self.gates.values
        if self._forward is None:
            chained = None
            d_gate, sq_norm = delta_grad_stats(
                grads, deltas, old, self._maps, layouts=layouts, rank=self.gates.rank if layouts else None
            )
        else:  # autograd has been through the gates: nothing is left to chain or to mask
            chained = self.gates.logits.grad
            d_gate, old = torch.zeros_like(old), torch.ones_like(old)
            sq_norm = sum((grad.float().square().sum() for grad in grads), old.new_zeros(()))
        sq_norm = sq_norm + sum(p.grad.float().square().sum() for p in self._unmasked() if p.grad is not None)
        gate_sum = (d_gate if chained is None else chained).sum()
        norm, probe = torch.stack([sq_norm.sqrt(), gate_sum.to(sq_norm.dtype)]).tolist()
        if not all(map(math.isfinite, (loss, norm, probe))):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            logger.warning("step skipped: loss %g, gradient norm %g, gate gradient sum %g", loss, norm, probe)
            return
        self.skipped_in_a_row = 0
        self.last_loss, self.grad_norm = loss, norm
        limit = self.config.max_grad_norm
        grad_scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0

        frozen = self.gates_frozen
        if not frozen:
            d_logits = self.gates.logits_grad(d_gate, l0_weight=self.dual.penalty)
            self.gates.logits.grad = d_logits if chained is None else d_logits + chained
            self._inner_step("gates", group=1)
            self.gates.logits.grad = None
        self.dual.update(loss, frozen=frozen)
        old_rank = self.gates.rank
        self.completed_steps += 1
        self._draw_gates(training=not self.gates_frozen)

        if self.config.train_delta:
            delta_adamw_(
                self._weights,
                self._bases,
                deltas,
                self._state_of("exp_avg"),
                self._state_of("exp_avg_sq"),
                grads,
                old,
                self.gates.values,
                self._maps,
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
        else:
            weight_eff_(self._weights, self._bases, deltas, self.gates.values, self._maps)
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
        """One step's line for a log: loss, EMA and ε in nats, λ, gradient norm, open gates per group."""
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
        }

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
            "completed_steps": self.completed_steps,
            "skipped_steps": self.skipped_steps,
            "unmasked": [p.detach().clone() for p in self._unmasked()],
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result into an optimizer attached to the same models; rewrites the model's weights."""
        ours = state_dict["lcdd"]
        if ours["gate_logits"].shape != self.gates.logits.shape:
            raise ValueError(
                f"state_dict: expected {self.gates.logits.numel()} gate logits, got {ours['gate_logits'].numel()}"
            )
        # torch's own loader casts state to the parameter's dtype, which would round float32 moments of bf16 weights
        kept = {weight: self.state[weight] for weight in self._weights}
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "lcdd"})
        for index, weight in enumerate(self._weights):
            for key, tensor in kept[weight].items():
                tensor.copy_(state_dict["state"][index][key])
            self.state[weight] = kept[weight]
        with torch.no_grad():
            self.gates.logits.copy_(ours["gate_logits"])
            for parameter, value in zip(self._unmasked(), ours["unmasked"], strict=True):
                parameter.copy_(value)
        self.gates.initial_logits = ours["initial_logits"].clone()
        for name, inner in self._inner.items():
            inner.load_state_dict(ours["inner"][name])
        self.dual.load_state_dict(ours["dual"])
        self.completed_steps, self.skipped_steps = ours["completed_steps"], ours["skipped_steps"]
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

    def _fix_unmasked(self, base: PreTrainedModel) -> list[nn.Parameter]:
        """Set what is not gated to the base's values and freeze it; return what is trained beside Δ."""
        trained = unmasked_parameters(self.model) if self.config.train_unmasked else {}
        masked = set(map(id, self._weights))
        moved = []
        for (name, parameter), fixed in zip(self.model.named_parameters(), base.parameters(), strict=True):
            if id(parameter) in masked or name in trained:
                parameter.requires_grad_(True)
                continue
            parameter.requires_grad_(False)
            if not torch.equal(parameter, fixed):
                moved.append(name)
                parameter.data.copy_(fixed)
        if moved:
            logger.warning(
                "%d parameters outside the masked linears differed from the base and were reset to it: %s%s",
                len(moved), ", ".join(moved[:3]), ", …" if len(moved) > 3 else "",
            )  # fmt: skip
        return list(trained.values())

    def _inner_optimizers(self, unmasked: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
        c = self.config
        logits = [self.gates.logits]
        inner: dict[str, torch.optim.Optimizer] = {
            "gates": torch.optim.Adam(logits, lr=c.gate_lr)
            if c.gate_optimizer == "adam"
            else torch.optim.SGD(logits, lr=c.gate_lr, momentum=c.gate_momentum)
        }
        if unmasked:
            betas = (c.adam_beta1, c.adam_beta2)
            inner["unmasked"] = torch.optim.AdamW(
                unmasked, lr=c.learning_rate, betas=betas, eps=c.adam_epsilon, weight_decay=c.weight_decay
            )
        return inner

    def _inner_step(self, name: str, *, group: int) -> None:
        """Step an inner optimizer at the learning rate that a scheduler may have given its group here."""
        self._inner[name].param_groups[0]["lr"] = self.param_groups[group]["lr"]
        self._inner[name].step()

    def _masked_state(self, weight: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta_dtype = getattr(torch, self.config.delta_dtype or "", weight.dtype)
        state = {"delta": (weight.detach().to(wide) - fixed.to(wide)).to(delta_dtype)}
        if self.config.train_delta:
            moment_dtype = getattr(torch, self.config.moment_dtype or "", wide)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(weight, dtype=moment_dtype)
        return state

    def _forward_route(self) -> ForwardGates:
        """The model's projections swapped for ones that apply the gates themselves, on this optimizer's θ and Δ."""
        deltas = dict(zip(self.names, self._state_of("delta"), strict=True))
        for delta in deltas.values():
            delta.requires_grad_(self.config.train_delta)
        c, logits = self.config, self.gates.logits
        return ForwardGates.attach(self.model, self.base, kind=c.gate_kind, logits=logits, seed=c.seed, deltas=deltas)

    def _state_of(self, key: str) -> list[Tensor]:
        return [self.state[weight][key] for weight in self._weights]

    def _unmasked(self) -> list[nn.Parameter]:
        return self.param_groups[2]["params"] if len(self.param_groups) > 2 else []

    def _take_loss(self, loss: Any) -> float:
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        given = self._observed if loss is None else loss
        self._observed = None
        if given is None:
            raise ValueError("loss: expected the step's mean loss, by step(loss) or by observe(loss) before step()")
        return float(given)

    def _gradients(self) -> tuple[list[Any], list[str] | None]:
        """G of every masked weight, dense or packed, and the layouts where any is packed (forward route: dΔ)."""
        if self._forward is not None:
            trained = self._forward.deltas if self.config.train_delta else {}
            return [self._present(name, delta.grad) for name, delta in trained.items()], None
        grads, layouts = [], []
        for name, site in zip(self.names, self._sites, strict=True):
            linear = site.linear
            layout = linear.layout if isinstance(linear, PackedGradLinear) else "dense"
            grad = linear.weight.grad if layout == "dense" else linear.packed_grad
            grads.append(self._present(name, grad))
            layouts.append(layout)
        return grads, layouts if any(kind != "dense" for kind in layouts) else None

    @staticmethod
    def _present(name: str, grad: Any) -> Any:
        if grad is None:
            raise ValueError(f"{name}.weight: expected a gradient from backward(), got none")
        return grad

    def _draw_gates(self, *, training: bool) -> None:
        self.gates.draw(step=self.completed_steps + 1, training=training)
        if self._forward is not None:
            self._forward.draw(step=self.completed_steps + 1, training=training)
        if self._plan is not None:
            self._plan.update(self.gates)

    def _write_weights(self, *, training: bool) -> None:
        self._draw_gates(training=training)
        with torch.no_grad():
            weight_eff_(self._weights, self._bases, self._state_of("delta"), self.gates.values, self._maps)

    def _refuse_sampled_evaluation(self, module: nn.Module, _args: Any) -> None:
        if not module.training and self.gates.sampled:
            raise RuntimeError("the model runs in evaluation mode on sampled gates; call optimizer.eval() first")

    def _refuse_sampled_state(self, *_args: Any) -> None:
        if self.gates.sampled:
            raise RuntimeError("the model's weights hold sampled gates; call optimizer.eval() before saving them")
