"""SFT and LCDD: one loop.

    for every optimizer step:  micro-batches -> response-token loss, backward -> optimizer.step(loss) -> log

The loss of a step is the mean over the response tokens of all its micro-batches together, so gradient accumulation
changes nothing but memory. LCDD differs from SFT by its optimizer alone.
"""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lcdd.checkpoint import CheckpointStore, RunLog, random_state, set_random_state, termination
from lcdd.data import Encoded
from lcdd.errors import StopRequest, Terminated, TrainingStopped
from lcdd.models import PreTrainedModel, Replicated, head_weight, packed_attention_in, shards, share
from lcdd.optimizer import TrainingOptimizer, schedule
from lcdd.report import Bar, duration
from lcdd.trainer.anchors import Anchors
from lcdd.trainer.batches import step_batches, total_steps
from lcdd.trainer.guards import is_out_of_memory, memory_table
from lcdd.trainer.losses import Batch, HeldOut, loss_sum, packs, response_tokens, to_batch

VALIDATIONS, VALIDATION_STEPS = 10, 10
"""Held-out losses in a run, and the fewest steps between two, where `eval_steps` does not say."""
PACE_STEPS = 3
"""Steps after which is said how long the run will take."""
WORTH_SAYING = 20.0
"""Seconds from which on that is worth a line."""


class Best(Protocol):
    """What is kept of the states that a run goes through."""

    def observe(self, loss: float) -> None:
        """Take in the held-out loss, in nats a token, of the weights that would ship now."""

    def withdraw(self) -> None:
        """Take the last observation back: that state is not to ship, whatever its loss."""

    def state_dict(self) -> dict[str, Any] | None: ...
    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...


class Loop:
    """Takes an optimizer through its run: steps, log, checkpoints, and the reasons to stop.

    Args:
        optimizer: attached to the model in training; its config's batch, schedule and logging settings hold.
        items: the training examples.
        held_out: what `held_out_loss` is measured on.
        teacher: the model whose distribution is the target (KL) in place of the examples' tokens.
        checkpoints: where the run's state goes every `config.save_steps` steps, and when it stops early.
        say: told what a step costs and when the run will end, once that is known.
        on_validation: called with the loop and each held-out loss, in nats a token, while the model has the weights
            that would ship at this step; `loop.state()` is what a copy of the run at this point needs.
        best: takes in each held-out loss before they do.
        anchors: what is kept near the base beside the loss; None: nothing.

    Attributes:
        steps: optimizer steps of the whole run.
        step: those done, skipped ones included.
        tokens: of the examples seen, prompts included; never padding.
        response_tokens: those of them that have a loss.
        measured: losses from before training, kept in checkpoints so that a resumed run need not measure them again.
    """

    def __init__(
        self,
        optimizer: TrainingOptimizer,
        items: Sequence[Encoded],
        *,
        held_out: HeldOut,
        log: RunLog,
        teacher: PreTrainedModel | None = None,
        checkpoints: CheckpointStore | None = None,
        say: Callable[[str], None] = lambda _: None,
        on_validation: Sequence[Callable[["Loop", float], None]] = (),
        best: Best | None = None,
        anchors: Anchors | None = None,
        progress: bool = True,
    ) -> None:
        self.optimizer, self.model, self.config = optimizer, optimizer.model, optimizer.config
        self.items, self.held_out = items, held_out
        self.log, self.checkpoints, self.progress = log, checkpoints, progress
        self.say, self.on_validation, self.best, self.anchors = say, on_validation, best, anchors
        self.steps = total_steps(self.config, len(items))
        every = self.config.eval_steps
        self.validate_every = max(VALIDATION_STEPS, self.steps // VALIDATIONS) if every is None else every
        self.step = self.tokens = self.response_tokens = 0
        self.measured: dict[str, float] = {}
        self._beside: dict[str, float] = {}
        head = head_weight(self.model)
        self.device = head.device
        # SFT keeps float32 weights, since bfloat16 would round small updates away; LCDD's updates go to delta.
        self.autocast = self.config.bf16 and head.dtype == torch.float32
        self._loss = Replicated(_SummedLoss(self.model, teacher), average=optimizer.averaging())
        self._factor = schedule(self.config.lr_scheduler_type, warmup=self.config.lr_warmup, steps=self.steps)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(cast(torch.optim.Optimizer, optimizer), self._factor)
        self._start, self._spent = time.perf_counter(), 0.0
        self._validations: list[float] = []

    @property
    def seconds(self) -> float:
        """Of training, since the run began, without validations; what a resumed run had taken before is included."""
        return time.perf_counter() - self._start - sum(self._validations)

    def run(self) -> None:
        """Train up to `steps` optimizer steps; the model is left in evaluation mode, on the optimizer's weights.

        Raises:
            TrainingStopped: not finite for `config.max_nonfinite_steps` steps in a row, out of memory, or the
                optimizer's `stop_reason`.
            Terminated: a signal came; the state is in a checkpoint.
        """
        self._start = time.perf_counter() - self._spent
        self.model.train()
        with (
            _activation_checkpointing(self.model, wanted=self.config.gradient_checkpointing),
            self._progress_bar() as bar,
            termination(listen=self.checkpoints is not None) as asked,
        ):
            first = self.step
            if self._validation_due() and first == 0:
                self.validate(self.measured.get("model"))
            for micro_batches in itertools.islice(step_batches(self.items, self.config, self.steps), self.step, None):
                learning_rate = self.train_step(micro_batches)
                self.stop_if_not_finite()
                stats = self.optimizer.stats()
                self.write_log(stats, learning_rate)
                bar.update(shown=_shown(stats))
                if self._validation_due():
                    self.validate()
                if self.step == first + PACE_STEPS:
                    self.say_pace(first)
                self.stop_if_told(asked)
                if self.config.save_steps and self.step % self.config.save_steps == 0 and self.step < self.steps:
                    self.checkpoint()
        self.model.eval()

    # ------------------------------------------------------------------ a step

    def train_step(self, micro_batches: Sequence[Sequence[Encoded]]) -> float:
        """Forwards, backwards and the optimizer's step; the learning rate that it was taken at."""
        self.step += 1
        with_loss = sum(response_tokens(micro) for micro in micro_batches)
        try:
            loss = self._accumulate(micro_batches, with_loss)
            self._beside = self._backward_anchors()
            learning_rate: float = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step(loss)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingStopped(self._out_of_memory(micro_batches)) from error
        self.optimizer.zero_grad()
        self._scheduler.step()
        self.tokens += sum(len(item.input_ids) for micro in micro_batches for item in micro)
        self.response_tokens += with_loss
        return learning_rate

    def _accumulate(self, micro_batches: Sequence[Sequence[Encoded]], tokens: int) -> Tensor:
        """This rank's part of the mean loss over the `tokens` of all ranks, float64 [] on the device, and its
        gradients in the weights.
        """
        mine, ranks = share(micro_batches), shards.world_size()
        self.optimizer.begin_step(len(mine))
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (micro, weight) in enumerate(mine, start=1):
            batch = to_batch(micro, self.model, self.held_out.pad_token_id)
            # around the backward too, which may recompute activations
            with self._loss.accumulating(number < len(mine)), packed_attention_in(self.model):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                    part = self._loss(batch) / tokens
                    if ranks > 1:  # gradients and losses are averaged over the ranks
                        part = part * (weight * ranks)
                (self.optimizer.loss_weight * part).backward()
            loss += part.detach()
        return loss

    def _backward_anchors(self) -> dict[str, float]:
        """Gradients of the distance to the base beside the loss's, where anchors were given; a log's entry."""
        if self.anchors is None:
            return {}
        whole = self.optimizer.gates_frozen
        kl = self.anchors.backward(self.model, self.step, whole=whole, autocast=self.autocast)
        return {"base_kl": kl, "loss_weight": self.optimizer.loss_weight}

    def write_log(self, stats: Mapping[str, Any], learning_rate: float) -> None:
        """A line of the log, every `config.logging_steps` steps and for the last one."""
        if self.step % self.config.logging_steps and self.step < self.steps:
            return
        self.log.write({
            "step": self.step, **stats, **self._beside, "learning_rate": learning_rate, "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds, 1), "peak_memory_bytes": _peak_memory(self.device),
        })  # fmt: skip

    # ------------------------------------------------------------------ held-out loss

    def validate(self, loss: float | None = None) -> None:
        """Log the held-out loss (measured unless given) of the weights that would ship now, and call the hooks."""
        start = time.perf_counter()
        self.optimizer.eval()
        loss = shards.mean(self.held_out.loss(self.model)) if loss is None else loss
        self.log.write({"step": self.step, "held_out_loss": loss})
        if self.best is not None:
            self.best.observe(loss)
        for hook in self.on_validation:
            hook(self, loss)
        self.optimizer.train()
        self._validations.append(time.perf_counter() - start)

    def _validation_due(self) -> bool:
        return bool(self.validate_every) and self.step % self.validate_every == 0 and self.step < self.steps

    def say_pace(self, since: int) -> None:
        """What a step costs, by those after step `since`, and when the run will end."""
        steps, left = self.step - since, self.steps - self.step
        step = (self.seconds - self._spent) / steps
        validation = sum(self._validations) / max(1, len(self._validations))
        seconds = left * step + validation * (left // self.validate_every if self.validate_every else 0)
        if seconds < WORTH_SAYING:
            return
        tokens = self.tokens / self.step
        end = (datetime.now() + timedelta(seconds=seconds)).strftime("%H:%M")
        self.say(
            f"A step takes {step:.2g} s ({tokens:.0f} tokens, {tokens / step:.0f} a second); {left} more steps and "
            f"their validations about {duration(seconds)}, until {end}"
        )

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Everything that a run needs to go on from here; tensors are the run's own, not copies."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "tokens": [self.tokens, self.response_tokens],
            "seconds": self.seconds,
            "losses": self.measured,
            "best": self.best.state_dict() if self.best is not None else None,
            "random": random_state(),
        }

    def checkpoint(self) -> None:
        """Write `state` to the store, if there is one."""
        if self.checkpoints is not None:
            self.checkpoints.save(self.step, self.state())

    def resume(self) -> bool:
        """Go on from the newest checkpoint, where `config.resume` asks for it and there is one; whether it did."""
        if self.checkpoints is None or not self.config.resume:
            return False
        found = self.checkpoints.newest(self.log, override=self.config.resume_override)
        if found is None:
            return False
        self.step, self.measured = found["step"], found["losses"]
        self.tokens, self.response_tokens = found["tokens"]
        # the groups' settings are this run's: the same, or overridden on purpose
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**found["optimizer"], "param_groups": groups})
        self._scheduler.last_epoch = self.step
        for group, rate in zip(self.optimizer.param_groups, self._scheduler.base_lrs, strict=True):
            group["lr"] = rate * self._factor(self.step)
        if self.best is not None:
            self.best.load_state_dict(found["best"])
        set_random_state(found["random"])
        self._spent = found["seconds"]
        return True

    # ------------------------------------------------------------------ reasons to stop

    def stop_if_not_finite(self) -> None:
        """Raise after too many skipped steps in a row; weights, θ and λ are those of the last good step."""
        optimizer = self.optimizer
        if optimizer.skipped_in_a_row < self.config.max_nonfinite_steps:
            return
        in_a_row, optimizer.skipped_in_a_row = optimizer.skipped_in_a_row, 0
        self.checkpoint()
        raise TrainingStopped(
            f"the loss or its gradient was not finite in {in_a_row} steps in a row, "
            f"the last of them step {self.step}; {self._last()}, of the last good state. "
            "Change: a smaller --learning_rate, or check the checkpoint's weights."
        )

    def stop_if_told(self, asked: StopRequest) -> None:
        """Raise if the optimizer sees no sense in going on, or a signal asked (on any rank)."""
        reason = self.optimizer.stop_reason() if self.step < self.steps else None
        if reason is not None:
            self.checkpoint()
            raise TrainingStopped(f"stopped after step {self.step}, {reason}; {self._last()}")
        if not shards.all_agree(not asked.signal):
            self.checkpoint()
            raise Terminated(asked, step=self.step, last=self._last())

    def _last(self) -> str:
        return self.checkpoints.last() if self.checkpoints is not None else "no checkpoints were asked for"

    def _out_of_memory(self, micro_batches: Sequence[Sequence[Encoded]]) -> str:
        sizes = [[len(item.input_ids) for item in micro] for micro in micro_batches]
        size = max(sum(of) if packs(self.model) else len(of) * max(of) for of in sizes)
        return (
            f"out of memory in step {self.step}; {self._last()}. Held on {self.device}:\n"
            f"{memory_table(self.optimizer, tokens=size)}\n"
            "Change: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "
            "--gradient_checkpointing, or a shorter --max_length"
        )

    def _progress_bar(self) -> Bar:
        hidden = not self.progress or shards.rank() > 0
        return Bar(self.steps, self.log.stage, done=self.step, main=True, hidden=hidden)


class _SummedLoss(nn.Module):
    """`loss_sum` as a module's forward, which is where DDP has to be."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        super().__init__()
        self.model = model
        self._teacher = [teacher]  # in a list: not a submodule

    def forward(self, batch: Batch) -> Tensor:
        return loss_sum(self.model, batch, self._teacher[0])


@contextmanager
def _activation_checkpointing(model: PreTrainedModel, *, wanted: bool) -> Iterator[None]:
    """Inside: activation checkpointing if wanted, by the name that this version of transformers gives it."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    yield
    if wanted:
        getattr(model, f"{kind}_checkpointing_disable")()


def _peak_memory(device: torch.device) -> int:
    """Bytes: the GPU's peak allocation, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # Linux, where ru_maxrss would begin at the parent's
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _shown(stats: Mapping[str, Any]) -> dict[str, str]:
    shown = {"loss": f"{stats['loss']:.4f}"}
    if "sparsity" in stats:
        shown |= {"sparsity": f"{stats['sparsity']:.3f}", "lambda": f"{stats['dual_lambda']:.2g}"}
    return shown
