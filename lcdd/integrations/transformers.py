"""LCDD in transformers' Trainer: packing, accumulation, evaluation, resuming and the best model at the end included.

    trainer = LCDDTrainer(model=sft, base=base, config=LCDDConfig(), args=TrainingArguments(...), train_dataset=rows)
    trainer.train()
    trainer.save_carrier("carrier/")

`args` decide what they decide for any Trainer: batches, steps, the schedule of Δ's rate, logging, saving, precision.
`config` decides about the optimizer: rates, Adam's settings, clipping, gates and the dual. What is set in the wrong
place is an error.

On several GPUs: `accelerate launch script.py` (or torchrun). The base is whole on each of them; models that need
sharding are for `lcdd train --parallel fsdp2`.

A Trainer of one's own takes `optimizers=(LCDDOptimizer.attach(...), None)` with `LCDDCallback`, and hands each step's
mean loss to `optimizer.observe`.
"""

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from lcdd.carrier import Carrier
from lcdd.config import LCDDConfig
from lcdd.errors import InputError, TrainingStopped
from lcdd.models import PreTrainedModel, check_parallelism, load_model
from lcdd.optimizer import LCDDOptimizer

logger = logging.get_logger(__name__)

_OURS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
"""Settings that both classes have, and LCDDConfig decides about."""
_APART = ("seed", "warmup_steps")
"""Settings of one name that mean two things (the noise of the gates, the dual's warm-up): both hold."""
_COMMANDS = (
    *("base_model_name_or_path", "sft_model_name_or_path", "initial_carrier", "separate_from", "save_folded", "device"),
    *("parallel", "resume", "resume_override", "checkpoint_override", "max_length", "completion_only", "loss"),
    "lr_warmup_steps",
)
"""Settings that `lcdd train` alone reads."""
_SHOWN = ("sparsity", "dual_lambda", "ema", "epsilon", "skipped_steps")


class LCDDCallback(TrainerCallback):
    """Saves on the gates that ship, and ends a run that leads nowhere."""

    def __init__(self, optimizer: LCDDOptimizer) -> None:
        self.optimizer = optimizer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        limit = self.optimizer.config.max_nonfinite_steps
        if self.optimizer.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"the loss or its gradient was not finite in {limit} steps in a row, the last of them step "
                f"{state.global_step}. Change: a smaller LCDDConfig.learning_rate, or check the model's weights."
            )
        if (reason := self.optimizer.stop_reason()) is not None:
            logger.warning("stopped after step %d, %s", state.global_step, reason)
            control.should_training_stop = True
        return self._ship(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        return self._ship(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.optimizer.eval()

    def _ship(self, control: TrainerControl) -> TrainerControl:
        """Deterministic gates for what comes; Trainer calls the optimizer's train() before the next batch."""
        if control.should_save or control.should_evaluate:
            self.optimizer.eval()
        return control


class LCDDTrainer(Trainer):
    """A Trainer whose optimizer is LCDD's.

    Args:
        model: the fine-tuned model, or its directory or hub name.
        base: the model before fine-tuning, or where it is.
        config: gates, dual and optimizer.
        initial_logits: θ to start from, as of `LCDDOptimizer.attach`.
        more: as of Trainer. Optimizer and scheduler are made here: `optimizers` and `model_init` are refused.

    Attributes:
        lcdd: the optimizer, from the beginning of `train()` on.

    Raises:
        InputError: a setting in the wrong place, or an engine that shards the model.
    """

    lcdd: LCDDOptimizer

    def __init__(
        self,
        model: PreTrainedModel | str,
        base: PreTrainedModel | str,
        config: LCDDConfig,
        *,
        args: TrainingArguments,
        initial_logits: Tensor | None = None,
        **more: Any,
    ) -> None:
        for name in ("optimizers", "optimizer_cls_and_kwargs", "model_init"):
            if more.get(name) is not None:
                raise InputError(f"{name}: expected none, LCDDTrainer attaches its optimizer to the model itself")
        check_settings(args, config)
        args = copy.copy(args)
        args.max_grad_norm = 0.0  # `config.max_grad_norm` bounds ‖dΔ‖ in the step
        super().__init__(model=_loaded(model), args=args, **more)
        self.base, self.config, self._initial_logits = _loaded(base), config, initial_logits
        self._seen, self._in_step = 0.0, False

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Attach, on the model's device, for as many steps as this `train()` takes."""
        if self.optimizer is None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
                raise InputError(
                    "LCDDTrainer: expected the whole model on every rank (accelerate launch, torchrun), got FSDP, "
                    "DeepSpeed or several GPUs in one process; to shard a model, use lcdd train --parallel fsdp2"
                )
            check_parallelism("LCDDTrainer: parallelism_config", self.accelerator.parallelism_config)
            unwrapped: Any = self.accelerator.unwrap_model(self.model)
            self.base = self.base.to(unwrapped.device)  # type: ignore[arg-type]
            self.lcdd = LCDDOptimizer.attach(
                unwrapped, self.base, self.config, total_steps=self.state.max_steps, initial_logits=self._initial_logits
            )
            self.optimizer = self.lcdd
            self.add_callback(LCDDCallback(self.lcdd))
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self._in_step:
            self._seen = 0.0
            self.lcdd.begin_step(self.current_gradient_accumulation_steps)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._seen += float(loss)  # which is scaled for accumulation: the sum is the step's mean
        self._in_step = not self.accelerator.sync_gradients
        self.lcdd.observe(self._seen)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            stats = self.lcdd.stats()
            logs.update({name: stats[name] for name in _SHOWN if stats.get(name) is not None})
        super().log(logs, *args, **options)

    def carrier(self) -> Carrier:
        """The open gates and their part of Δ, as a patch for the base; it knows the trainer's tokenizer."""
        tokenizer: Any = self.processing_class
        carrier = self.lcdd.carrier()
        return carrier if tokenizer is None else carrier.with_tokenizer(tokenizer)

    def save_carrier(self, directory: str | Path) -> None:
        """Write `carrier()` into a new directory; of several ranks the first one does."""
        carrier = self.carrier()
        if self.is_world_process_zero():
            carrier.save_pretrained(directory)

    # ------------------------------------------------------------------ checkpoints

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.lcdd.load_state_dict(_optimizer_state(str(self.state.best_model_checkpoint), "load_best_model_at_end"))
        self.lcdd.eval()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _optimizer_file(checkpoint, "resume_from_checkpoint")
        super()._load_optimizer_and_scheduler(checkpoint)


def check_settings(args: TrainingArguments, config: LCDDConfig) -> None:
    """Raise InputError if a setting is made where it would do nothing."""
    theirs = {item.name: item for item in dataclasses.fields(args)}
    for item in dataclasses.fields(config):
        wanted = getattr(config, item.name)
        if item.name in _COMMANDS and item.name not in theirs and wanted != item.default:
            raise InputError(
                f"{item.name}: expected LCDDConfig's default, since lcdd train alone reads it, got {wanted!r}"
            )
        if item.name not in theirs or item.name in _APART:
            continue
        given = getattr(args, item.name)
        ours = item.name in _OURS
        untouched = given == theirs[item.name].default if ours else wanted == item.default
        off = item.name == "max_grad_norm" and given == 0
        if not (untouched or off or given == wanted):
            decides, other = ("LCDDConfig", type(args).__name__)[:: 1 if ours else -1]
            raise InputError(
                f"{item.name}: expected it in {decides}, which decides about it here, got {wanted!r} in LCDDConfig and "
                f"{given!r} in {type(args).__name__}; leave {other}'s at its default"
            )
    if args.load_best_model_at_end and args.save_only_model:
        raise InputError(
            "save_only_model: expected False beside load_best_model_at_end, since the best θ and Δ are in the "
            "optimizer's state, got True"
        )


def _loaded(model: PreTrainedModel | str) -> PreTrainedModel:
    return load_model(model) if isinstance(model, str | os.PathLike) else model


def _optimizer_file(checkpoint: str, setting: str) -> Path:
    path = Path(checkpoint) / "optimizer.pt"
    if not path.is_file():
        raise InputError(f"{setting}: expected {path}, which holds θ and Δ (save_only_model leaves it out), found none")
    return path


def _optimizer_state(checkpoint: str, setting: str) -> dict[str, Any]:
    return torch.load(_optimizer_file(checkpoint, setting), map_location="cpu", weights_only=True)
