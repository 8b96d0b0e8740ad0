"""SFT and LCDD: one loop.

    for every optimizer step:  micro-batches -> response-token loss, backward -> optimizer.step(loss) -> log

The loss of a step is the mean over the response tokens of all its micro-batches together, so gradient accumulation
changes nothing but memory. LCDD differs from SFT by its optimizer alone.
"""

import itertools
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lcdd.checkpoint import CheckpointStore, RunLog, random_state, set_random_state, termination
from lcdd.config import LCDDConfig, SFTConfig, TrainConfig
from lcdd.data import Encoded
from lcdd.errors import InputError, Terminated, TrainingStopped
from lcdd.models import PreTrainedModel, Replicated, head_weight, shards, share
from lcdd.optimizer import LCDDOptimizer, SFTOptimizer, schedule
from lcdd.trainer.diagnose import Finding, auc, diagnose
from lcdd.trainer.guards import EarlyStop, check_labels, is_out_of_memory, memory_table
from lcdd.trainer.losses import completion_loss, loss_sum, response_tokens, to_batch

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
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * shards.world_size()
    return math.ceil(config.num_train_epochs * math.ceil(n_examples / per_step))


def step_batches(items: Sequence[Encoded], config: TrainConfig, steps: int) -> Iterator[list[list[Encoded]]]:
    """For every optimizer step its micro-batches, all ranks'; every epoch is shuffled anew from (seed, epoch)."""
    size, groups = config.per_device_train_batch_size, config.gradient_accumulation_steps * shards.world_size()
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


# ---------------------------------------------------------------- the loop


def _peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak allocation, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # Linux, where ru_maxrss would begin at the parent's
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _SummedLoss(nn.Module):
    """`loss_sum` as a module's forward, which is where DDP has to be."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__()
        self.model = model
        self._teacher = [teacher]  # in a list: not a submodule

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return loss_sum(self.model, batch, self._teacher[0])


def _resumed(checkpoints: CheckpointStore | None, config: TrainConfig, log: RunLog) -> dict[str, Any] | None:
    """The state to go on from, where `config.resume` asks for it and there is a finished checkpoint."""
    if checkpoints is None or not config.resume:
        return None
    return checkpoints.newest(log, override=config.resume_override)


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
    checkpoints: CheckpointStore | None,
    resumed: dict[str, Any] | None,
    losses: dict[str, float],
) -> tuple[int, float]:
    """Train up to `steps` optimizer steps; (response tokens seen, seconds), those before a resumption included.

    losses: what was measured before training, kept in checkpoints so that a resumed run need not measure it again.
    """
    factor = schedule(config.lr_scheduler_type, warmup=config.lr_warmup, steps=steps)
    # Only the gate logits (group 1 of LCDD) keep their own learning rate.
    constant = {1} if isinstance(optimizer, LCDDOptimizer) else set()
    lambdas = [(lambda _: 1.0) if g in constant else factor for g in range(len(optimizer.param_groups))]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas)
    early = EarlyStop(config) if isinstance(config, LCDDConfig) else None
    device = head_weight(model).device
    # SFT keeps float32 weights, since bfloat16 would round small updates away; LCDD's updates go to delta.
    autocast = config.bf16 and head_weight(model).dtype == torch.float32
    model.train()
    if config.gradient_checkpointing:
        _switch_checkpointing(model, on=True)
    done, seen, spent = 0, 0, 0.0
    if resumed is not None:
        done, seen, spent = resumed["step"], resumed["tokens"], resumed["seconds"]
        # the groups' settings are this run's: the same, or overridden on purpose
        optimizer.load_state_dict({**resumed["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
        scheduler.last_epoch = done
        for group, rate, decay in zip(optimizer.param_groups, scheduler.base_lrs, lambdas, strict=True):
            group["lr"] = rate * decay(done)
        if early is not None:
            early.load_state_dict(resumed["early_stop"])
        set_random_state(resumed["random"])
    start = time.perf_counter() - spent

    def write_checkpoint(step: int) -> None:
        if checkpoints is None:
            return
        state = {
            "optimizer": optimizer.state_dict(), "tokens": seen, "seconds": time.perf_counter() - start,
            "losses": losses, "early_stop": early.state_dict() if early else None, "random": random_state(),
        }  # fmt: skip
        checkpoints.save(step, state)

    last = checkpoints.last if checkpoints is not None else (lambda: "no checkpoints were asked for")
    run_loss = Replicated(_SummedLoss(model, teacher))
    bar = tqdm(total=steps, initial=done, desc=log.stage, unit="step", disable=not progress or shards.rank() > 0)
    with bar, termination(listen=checkpoints is not None) as asked:
        batches = itertools.islice(step_batches(items, config, steps), done, None)
        for step, micro_batches in enumerate(batches, start=done + 1):
            tokens = sum(response_tokens(micro) for micro in micro_batches)
            mine = share(micro_batches)
            if isinstance(optimizer, LCDDOptimizer) and optimizer.config.reference_compat:
                optimizer.penalties = len(mine)  # an epoch's last group may be smaller
            try:
                loss = 0.0
                for number, (micro, weight) in enumerate(mine, start=1):
                    with run_loss.accumulating(number < len(mine)):
                        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                            part = run_loss(to_batch(micro, model, pad_token_id)) / tokens
                            if shards.world_size() > 1:  # gradients and losses are averaged over the ranks
                                part = part * (weight * shards.world_size())
                        part.backward()
                    loss += part.item()
                learning_rate = optimizer.param_groups[0]["lr"]
                optimizer.step(loss)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = max(len(micro) * max(len(item.input_ids) for item in micro) for micro in micro_batches)
                base = optimizer.base if isinstance(optimizer, LCDDOptimizer) else None
                raise TrainingStopped(
                    f"out of memory in step {step}; {last()}. Held on {device}:\n"
                    f"{memory_table(model, optimizer, base=base, tokens=size)}\n"
                    "Change: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "
                    "--gradient_checkpointing, or a shorter --max_length"
                ) from error
            optimizer.zero_grad()
            scheduler.step()
            seen += tokens

            stats = optimizer.stats()
            if optimizer.skipped_in_a_row >= config.max_nonfinite_steps:
                in_a_row, optimizer.skipped_in_a_row = optimizer.skipped_in_a_row, 0
                write_checkpoint(step)  # weights, θ and λ are those of the last good step
                raise TrainingStopped(
                    f"the loss or its gradient was not finite in {in_a_row} steps in a row, "
                    f"the last of them step {step}; {last()}, of the last good state. "
                    "Change: a smaller --learning_rate, or check the checkpoint's weights."
                )
            if step % config.logging_steps == 0 or step == steps:
                speed = seen / (time.perf_counter() - start)
                extra = {"learning_rate": learning_rate, "tokens_per_second": round(speed, 1)}
                log.write({"step": step, **stats, **extra, "peak_memory_bytes": _peak_memory(device)})
            bar.set_postfix(_shown(stats), refresh=False)
            bar.update()
            ended = step == steps
            reason = early.check(stats) if early is not None and not stats["frozen"] and not ended else None
            if reason is not None:
                write_checkpoint(step)
                raise TrainingStopped(f"stopped after step {step}, {reason}; {last()}")
            if not shards.all_agree(not asked.signal):
                write_checkpoint(step)
                raise Terminated(asked, step=step, last=last())
            if config.save_steps and step % config.save_steps == 0 and not ended:
                write_checkpoint(step)
                if save is not None:
                    save(step)
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


def train_sft(
    model: PreTrainedModel,
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    config: SFTConfig,
    *,
    pad_token_id: int,
    log: RunLog | None = None,
    save: Callable[[int], None] | None = None,
    checkpoints: CheckpointStore | None = None,
    progress: bool = True,
) -> TrainResult:
    """Fine-tune `model`, the base on entry, in place; nothing but the transformer layers' weights moves.

    Args:
        save: called with the step every `config.save_steps` steps.
        checkpoints: where the run's state goes then, and what it goes on from under `config.resume`.

    Raises:
        InputError: no training data.
        TrainingStopped: the loss was not finite for `config.max_nonfinite_steps` steps in a row.
    """
    check_labels(train)
    log = log or RunLog(None, stage="sft")
    held_out = validation or train
    steps = total_steps(config, len(train))
    sizes = {"pad_token_id": pad_token_id, "batch_size": config.per_device_eval_batch_size}
    resumed = _resumed(checkpoints, config, log)
    losses = resumed["losses"] if resumed else {"base": completion_loss(model, held_out, **sizes)}
    loss_base = losses["base"]
    optimizer = SFTOptimizer(model, config)
    seen, seconds = _fit(
        model, optimizer, train, config,
        steps=steps, pad_token_id=pad_token_id, log=log, teacher=None, save=save, progress=progress,
        checkpoints=checkpoints, resumed=resumed, losses=losses,
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
    checkpoints: Callable[[LCDDOptimizer], CheckpointStore] | None = None,
    progress: bool = True,
) -> tuple[LCDDOptimizer, TrainResult]:
    """Run LCDD on `model`, the SFT model on entry, in place.

    The optimizer comes back in evaluation mode: the model's weights are W_eff of the deterministic gates, and
    `optimizer.carrier()` or `optimizer.fold()` is the next call.

    Args:
        teacher: the SFT model's own copy, needed for `config.loss == "kl"`.
        initial_logits: gate logits [n_gates] of an earlier run to start from.
        save: called with step and optimizer (in evaluation mode) every `config.save_steps` steps.
        checkpoints: gives, for the attached optimizer, the store that the run's state goes to then, and that it goes
            on from under `config.resume`.

    Raises:
        InputError: no training data, models that do not fit together, or no teacher for a KL loss.
        TrainingStopped: the loss was not finite for `config.max_nonfinite_steps` steps in a row.
    """
    check_labels(train)
    if config.loss == "kl" and teacher is None:
        raise InputError("teacher: expected the SFT model for loss 'kl', got None")
    log = log or RunLog(None, stage="lcdd")
    held_out = validation or train
    steps = total_steps(config, len(train))
    sizes = {"pad_token_id": pad_token_id, "batch_size": config.per_device_eval_batch_size}
    start = [completion_loss(base, held_out, **sizes), completion_loss(model, held_out, **sizes)]
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=steps, initial_logits=initial_logits)
    store = checkpoints(optimizer) if checkpoints is not None else None
    resumed = _resumed(store, config, log)
    loss_base, loss_start = start

    def checkpoint(step: int) -> None:
        if save is not None:
            optimizer.eval()
            save(step, optimizer)
            optimizer.train()

    seen, seconds = _fit(
        model, optimizer, train, config,
        steps=steps, pad_token_id=pad_token_id, log=log, teacher=teacher if config.loss == "kl" else None,
        save=checkpoint, progress=progress, checkpoints=store, resumed=resumed, losses={},
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
