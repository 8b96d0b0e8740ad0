"""SFT's optimizer: AdamW with clipping, skipped steps, a bound on the distance from the start, and a whole state."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcdd.config import SFTConfig
from lcdd.models import LoRALayers, PreTrainedModel, shards, sites_of, unmasked_parameters

COUNTERS = ("skipped_steps", "skipped_in_a_row", "last_loss", "grad_norm")


class SFTOptimizer(torch.optim.AdamW):
    """AdamW over the transformer layers' weights, or under `config.use_peft` over low-rank layers on them; a
    `TrainingOptimizer`.

    `step(loss)` clips, skips steps whose loss or gradient is not finite, and keeps the weights within
    `config.max_delta_norm` of where they started, if that is set (the nearest point: the delta is scaled).
    Embeddings, head and, unless `config.train_unmasked`, norms and biases are frozen.

    Args:
        weights: the parameters to train instead of the layers': an adapter's, say.
    """

    base = None

    def __init__(
        self, model: PreTrainedModel, config: SFTConfig, weights: Sequence[nn.Parameter] | None = None
    ) -> None:
        self.lora: LoRALayers | None = None
        if weights is not None:
            weights = list(weights)
        elif config.use_peft:
            self.lora = LoRALayers(
                model, rank=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout,
                targets=config.lora_target_modules, seed=config.seed,
            )  # fmt: skip
            weights = self.lora.parameters
        else:
            weights = _layer_weights(model, unmasked=config.train_unmasked)
        chosen = {id(weight) for weight in weights}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        super().__init__(
            weights,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self.model, self.config, self.weights = model, config, weights
        bounded = config.max_delta_norm is not None
        self.starts = [w.detach().clone() for w in weights] if bounded and not self.lora else []
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan

    loss_weight, gates_frozen = 1.0, True

    def averaging(self) -> None:
        """None: DDP or FSDP2 averages the gradients."""

    def begin_step(self, micro_batches: int) -> None:
        """Nothing: as `LCDDOptimizer.begin_step`."""

    @torch.no_grad()
    def step(self, loss: float | Tensor) -> None:  # type: ignore[override]
        """One step on averaged gradients; on several ranks `loss` is averaged over them."""
        limit = self.config.max_grad_norm or math.inf
        norm = float(shards.full(nn.utils.clip_grad_norm_(self.weights, limit)))
        loss = shards.mean(float(loss))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            self.zero_grad()
            return
        self.skipped_in_a_row = 0
        self.last_loss, self.grad_norm = loss, norm
        super().step()
        self.zero_grad()
        if self.config.max_delta_norm is not None:
            self._project(self.config.max_delta_norm)

    def _project(self, bound: float) -> None:
        if self.lora is not None:
            if (norm := self.lora.delta_norm()) > bound:
                self.lora.scale_(bound / norm)
            return
        pairs = zip(self.weights, self.starts, strict=True)
        norm = math.sqrt(sum(float(shards.full((w - s).double().square().sum())) for w, s in pairs))
        if norm > bound:
            for weight, start in zip(self.weights, self.starts, strict=True):
                weight.copy_(start + (weight - start) * (bound / norm))

    def model_state(self) -> dict[str, Tensor]:
        """The model's state dict as it would ship now: ordinary names, low-rank layers merged."""
        return self.lora.merged_state() if self.lora is not None else self.model.state_dict()

    def merge(self) -> None:
        """At the end: low-rank layers become part of the weights, which are then no longer this optimizer's."""
        if self.lora is not None:
            self.lora.merge()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: weights, moments, counters."""
        state = super().state_dict()
        state["sft"] = {
            "weights": [weight.detach() for weight in self.weights],
            **{name: getattr(self, name) for name in COUNTERS},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore `state_dict`'s result into an optimizer of the same model; overwrites the weights.

        Tensors may be whole, sharded, or rows on disk, whatever the model's are.
        """
        counts = {index: {"step": values["step"]} for index, values in state_dict["state"].items()}
        super().load_state_dict({"state": counts, "param_groups": state_dict["param_groups"]})
        with torch.no_grad():
            for index, weight in enumerate(self.weights):
                shards.copy_rows_(weight, state_dict["sft"]["weights"][index])
                for key in ("exp_avg", "exp_avg_sq"):
                    if index in counts:
                        self.state[weight][key] = torch.zeros_like(weight)
                        shards.copy_rows_(self.state[weight][key], state_dict["state"][index][key])
        for name in COUNTERS:
            setattr(self, name, state_dict["sft"][name])

    def stop_reason(self) -> str | None:
        """None: there is always sense in going on."""
        return None

    def eval(self) -> None:
        """Nothing: the weights in training are the ones that ship."""

    def train(self) -> None:
        """Nothing, as `eval`."""

    def stats(self) -> dict[str, Any]:
        """One step's line for the log."""
        return {"loss": self.last_loss, "grad_norm": self.grad_norm, "skipped_steps": self.skipped_steps}


def _layer_weights(model: PreTrainedModel, *, unmasked: bool) -> list[nn.Parameter]:
    weights = list(dict.fromkeys(site.parameter for site in sites_of(model)))
    return weights + (list(unmasked_parameters(model).values()) if unmasked else [])
