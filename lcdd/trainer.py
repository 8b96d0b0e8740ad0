"""SFT and LCDD: one loop.

    for every optimizer step:  micro-batches -> response-token loss, backward -> optimizer.step(loss) -> log

The loss of a step is the mean over the response tokens of all its micro-batches together, so gradient accumulation
changes nothing but memory. LCDD differs from SFT by its optimizer alone.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lcdd.config import LCDDConfig, SFTConfig, TrainConfig
from lcdd.data import Encoded
from lcdd.diagnose import Finding, auc, diagnose
from lcdd.losses import completion_loss, loss_sum, response_tokens, to_batch
from lcdd.models import PreTrainedModel, head_weight, projections, unmasked_parameters
from lcdd.optimizer import LCDDOptimizer
from lcdd.runlog import RunLog, TrainingStopped
from lcdd.schedules import schedule

__all__ = [
    "SFTOptimizer",
    "TrainResult",
    "TrainingStopped",
    "completion_loss",
    "diagnose",
    "schedule",
    "total_steps",
    "train_lcdd",
    "train_sft",
]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run came to. Losses are nats a response token; losses of no data are NaN.

    `loss` is the last step's; the other three are on held-out completions (on training ones where there are no
    held-out ones): of the base, of the model that training started from, of the result with deterministic gates.
    """

    steps: int
    loss: float
    loss_base: float
    loss_start: float
    loss_end: float
    response_tokens: int
    seconds: float
    skipped_steps: int
    auc_initial_theta: float = math.nan
    findings: tuple[Finding, ...] = ()


# ---------------------------------------------------------------- batches and schedule


def total_steps(config: TrainConfig, n_examples: int) -> int:
    """Optimizer steps of a run; a last, smaller accumulation group of an epoch counts as a step."""
    if config.max_steps > 0:
        return config.max_steps
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return math.ceil(config.num_train_epochs * math.ceil(n_examples / per_step))


def step_batches(items: Sequence[Encoded], config: TrainConfig, steps: int) -> Iterator[list[list[Encoded]]]:
    """For every optimizer step its micro-batches; every epoch is shuffled anew from (seed, epoch)."""
    size, groups = config.per_device_train_batch_size, config.gradient_accumulation_steps
    step = epoch = 0
    while True:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(items), generator=generator).tolist()
        micro = [[items[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        for start in range(0, len(micro), groups):
            if step == steps:
                return
            yield micro[start : start + groups]
            step += 1
        epoch += 1


# ---------------------------------------------------------------- SFT's optimizer


class SFTOptimizer(torch.optim.AdamW):
    """AdamW over the transformer layers' weights, with the interface of `LCDDOptimizer`.

    `step(loss)` clips, skips steps whose loss or gradient is not finite, and keeps the weights within
    `config.max_delta_norm` of where they started, if that is set (the nearest point: the delta is scaled).
    Embeddings, head and, unless `config.train_unmasked`, norms and biases are frozen.
    """

    def __init__(self, model: PreTrainedModel, config: SFTConfig) -> None:
        weights = [site.linear.weight for site in projections(model)]
        if config.train_unmasked:
            weights += list(unmasked_parameters(model).values())
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
        self.config, self.weights = config, weights
        self.starts = [w.detach().clone() for w in weights] if config.max_delta_norm else []
        self.skipped_steps = self.skipped_in_a_row = 0
        self.last_loss = self.grad_norm = math.nan

    @torch.no_grad()
    def step(self, loss: float) -> None:  # type: ignore[override]
        limit = self.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.weights, limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.last_loss, self.grad_norm = loss, norm
        super().step()
        if self.starts:
            self._project()

    def _project(self) -> None:
        bound = float(self.config.max_delta_norm or 0.0)
        norm = math.sqrt(
            sum(float((w - s).double().square().sum()) for w, s in zip(self.weights, self.starts, strict=True))
        )
        if norm > bound:
            for weight, start in zip(self.weights, self.starts, strict=True):
                weight.copy_(start + (weight - start) * (bound / norm))

    def stats(self) -> dict[str, Any]:
        """One step's line for the log."""
        return {"loss": self.last_loss, "grad_norm": self.grad_norm, "skipped_steps": self.skipped_steps}


# ---------------------------------------------------------------- the loop


def _peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak allocation, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fit(
    model: PreTrainedModel,
    optimizer: SFTOptimizer | LCDDOptimizer,
    items: Sequence[Encoded],
    config: SFTConfig | LCDDConfig,
    *,
    steps: int,
    pad_token_id: int,
    log: RunLog,
    teacher: PreTrainedModel | None,
    save: Callable[[int], None] | None,
    progress: bool,
) -> tuple[int, float]:
    """Train for `steps` optimizer steps; (response tokens seen, seconds)."""
    factor = schedule(config.lr_scheduler_type, warmup=config.lr_warmup, steps=steps)
    # Only the gate logits (group 1 of LCDD) keep their own learning rate.
    constant = {1} if isinstance(optimizer, LCDDOptimizer) else set()
    lambdas = [(lambda _: 1.0) if g in constant else factor for g in range(len(optimizer.param_groups))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas)
    device = head_weight(model).device
    # SFT keeps float32 weights, since bfloat16 would round small updates away; LCDD's updates go to delta.
    autocast = config.bf16 and head_weight(model).dtype == torch.float32
    model.train()
    if config.gradient_checkpointing:
        _switch_checkpointing(model, on=True)
    seen, start = 0, time.perf_counter()
    bar = tqdm(total=steps, desc=log.stage, unit="step", disable=not progress)
    for step, micro_batches in enumerate(step_batches(items, config, steps), start=1):
        tokens = sum(response_tokens(micro) for micro in micro_batches)
        loss = 0.0
        for micro in micro_batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                part = loss_sum(model, to_batch(micro, model, pad_token_id), teacher) / tokens
            part.backward()
            loss += part.item()
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step(loss)
        optimizer.zero_grad()
        scheduler.step()
        seen += tokens

        stats = optimizer.stats()
        if optimizer.skipped_in_a_row >= config.max_nonfinite_steps:
            raise TrainingStopped(
                f"{log.stage}: the loss or its gradient was not finite in {optimizer.skipped_in_a_row} steps in a row, "
                f"the last of them step {step}. Change: a smaller --learning_rate, or check the checkpoint's weights."
            )
        if step % config.logging_steps == 0 or step == steps:
            speed = seen / (time.perf_counter() - start)
            extra = {"learning_rate": learning_rate, "tokens_per_second": round(speed, 1)}
            log.write({"step": step, **stats, **extra, "peak_memory_bytes": _peak_memory(device)})
        bar.set_postfix(_shown(stats), refresh=False)
        bar.update()
        if save is not None and config.save_steps and step % config.save_steps == 0 and step < steps:
            save(step)
    bar.close()
    if config.gradient_checkpointing:
        _switch_checkpointing(model, on=False)
    model.eval()
    return seen, time.perf_counter() - start


def _switch_checkpointing(model: PreTrainedModel, *, on: bool) -> None:
    """Activation checkpointing, by the name that this version of transformers gives it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()


def _shown(stats: dict[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{stats['loss']:.4f}"}
    if "sparsity" in stats:
        shown |= {"sparsity": f"{stats['sparsity']:.3f}", "lambda": f"{stats['dual_lambda']:.2g}"}
    return shown


def _check_items(items: Sequence[Encoded]) -> None:
    if not items:
        raise ValueError("train: expected at least one example, got none")


def train_sft(
    model: PreTrainedModel,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    config: SFTConfig,
    *,
    pad_token_id: int,
    log: RunLog | None = None,
    save: Callable[[int], None] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Fine-tune `model`, the base on entry, in place; nothing but the transformer layers' weights moves.

    Args:
        save: called with the step every `config.save_steps` steps.

    Raises:
        ValueError: no training data.
        TrainingStopped: the loss was not finite for `config.max_nonfinite_steps` steps in a row.
    """
    _check_items(train)
    log = log or RunLog(None, stage="sft")
    held_out = validation or train
    steps = total_steps(config, len(train))
    sizes = {"pad_token_id": pad_token_id, "batch_size": config.per_device_eval_batch_size}
    loss_base = completion_loss(model, held_out, **sizes)
    optimizer = SFTOptimizer(model, config)
    seen, seconds = _fit(
        model, optimizer, train, config,
        steps=steps, pad_token_id=pad_token_id, log=log, teacher=None, save=save, progress=progress,
    )  # fmt: skip
    model.requires_grad_(False)
    loss_end = completion_loss(model, held_out, **sizes)
    log.write({"step": steps, "held_out_loss_start": loss_base, "held_out_loss": loss_end})
    return TrainResult(
        steps=steps,
        loss=optimizer.last_loss,
        loss_base=loss_base,
        loss_start=loss_base,
        loss_end=loss_end,
        response_tokens=seen,
        seconds=seconds,
        skipped_steps=optimizer.skipped_steps,
    )


def train_lcdd(
    model: PreTrainedModel,
    base: PreTrainedModel,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    config: LCDDConfig,
    *,
    pad_token_id: int,
    log: RunLog | None = None,
    teacher: PreTrainedModel | None = None,
    initial_logits: Tensor | None = None,
    save: Callable[[int, LCDDOptimizer], None] | None = None,
    progress: bool = True,
) -> tuple[LCDDOptimizer, TrainResult]:
    """Run LCDD on `model`, the SFT model on entry, in place.

    The optimizer comes back in evaluation mode: the model's weights are W_eff of the deterministic gates, and
    `optimizer.carrier()` or `optimizer.fold()` is the next call.

    Args:
        teacher: the SFT model's own copy, needed for `config.loss == "kl"`.
        initial_logits: gate logits [n_gates] of an earlier run to start from.
        save: called with step and optimizer (in evaluation mode) every `config.save_steps` steps.

    Raises:
        ValueError: no training data, models that do not fit together, or no teacher for a KL loss.
        TrainingStopped: the loss was not finite for `config.max_nonfinite_steps` steps in a row.
    """
    _check_items(train)
    if config.loss == "kl" and teacher is None:
        raise ValueError("teacher: expected the SFT model for loss 'kl', got None")
    log = log or RunLog(None, stage="lcdd")
    held_out = validation or train
    steps = total_steps(config, len(train))
    sizes = {"pad_token_id": pad_token_id, "batch_size": config.per_device_eval_batch_size}
    loss_base = completion_loss(base, held_out, **sizes)
    loss_start = completion_loss(model, held_out, **sizes)
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=steps, initial_logits=initial_logits)

    def checkpoint(step: int) -> None:
        if save is not None:
            optimizer.eval()
            save(step, optimizer)
            optimizer.train()

    seen, seconds = _fit(
        model, optimizer, train, config,
        steps=steps, pad_token_id=pad_token_id, log=log, teacher=teacher if config.loss == "kl" else None,
        save=checkpoint, progress=progress,
    )  # fmt: skip
    optimizer.eval()
    loss_end = completion_loss(model, held_out, **sizes)
    gates = optimizer.gates
    kept = gates.evaluation_values() != 0
    noise = auc(gates.initial_logits.tolist(), kept.tolist())
    findings = diagnose(
        config=config,
        loss_base=loss_base,
        loss_sft=loss_start,
        loss_carrier=loss_end,
        sparsity=1.0 - float(kept.double().mean()),
        dual_lambda=optimizer.dual.dual_lambda,
        ema=optimizer.dual.ema,
        epsilon=optimizer.dual.epsilon,
        auc_initial_theta=noise,
    )
    log.write({
        "step": steps, "held_out_loss_base": loss_base, "held_out_loss_start": loss_start,
        "held_out_loss": loss_end, "auc_initial_theta": noise, "findings": [f.code for f in findings],
    })  # fmt: skip
    result = TrainResult(
        steps=steps,
        loss=optimizer.last_loss,
        loss_base=loss_base,
        loss_start=loss_start,
        loss_end=loss_end,
        response_tokens=seen,
        seconds=seconds,
        skipped_steps=optimizer.skipped_steps,
        auc_initial_theta=noise,
        findings=tuple(findings),
    )
    return optimizer, result
