"""A training run from its first measurement to its last: what `Loop` does, between the held-out losses around it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lcdd.checkpoint import CheckpointStore, RunLog
from lcdd.data import Encoded
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, shards
from lcdd.optimizer import TrainingOptimizer
from lcdd.trainer.anchors import Anchors
from lcdd.trainer.diagnose import Finding
from lcdd.trainer.guards import check_labels, check_ranks
from lcdd.trainer.loop import Best, Loop
from lcdd.trainer.losses import HeldOut


@dataclass(frozen=True, kw_only=True)
class StartLosses:
    """Held-out losses before training, in nats a token: of the base, and of the model that training starts from."""

    base: float
    model: float


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


def fit(
    optimizer: TrainingOptimizer,
    train: Sequence[Encoded],
    held_out: HeldOut,
    *,
    start: StartLosses | None = None,
    log: RunLog | None = None,
    teacher: PreTrainedModel | None = None,
    checkpoints: CheckpointStore | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_validation: Sequence[Callable[[Loop, float], None]] = (),
    best: Best | None = None,
    anchors: Anchors | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train the model that `optimizer` is attached to, in place, for as long as its config says.

    The model comes back in evaluation mode and holds what ships: after LCDD W_eff of the deterministic gates, so that
    `optimizer.carrier()` or `optimizer.fold()` is the next call.

    Args:
        start: the losses before training, measured before gates were attached; None for SFT, where the model is the
            base and is measured here.
        teacher: the SFT model's own copy, needed where `config.distills`.
        checkpoints: where the run's state goes, and what it goes on from under `config.resume`.
        say, on_validation, best, anchors: as of `Loop`.

    Raises:
        InputError: no training data, no teacher for a KL loss, or no `start` beside attached gates.
        TrainingStopped: as `Loop.run`.
    """
    check_labels(train)
    check_ranks(optimizer.config, train)
    if optimizer.config.distills and teacher is None:
        raise InputError("teacher: expected the SFT model for loss 'kl', got None")
    if optimizer.base is not None and start is None:
        raise InputError("start: expected the losses measured before gates were attached, got None")
    log = log or RunLog(None, stage="train")
    target = teacher if optimizer.config.distills else None
    loop = Loop(
        optimizer, train, held_out=held_out, log=log, teacher=target, checkpoints=checkpoints,
        say=say, on_validation=on_validation, best=best, anchors=anchors, progress=progress,
    )  # fmt: skip
    resumed = loop.resume()
    if start is None and not resumed:
        loss = held_out.loss(optimizer.model)
        start = StartLosses(base=loss, model=loss)
    if start is not None:
        loop.measured = dataclasses.asdict(start)
    start = StartLosses(**loop.measured)
    loop.run()
    seconds = loop.seconds
    optimizer.eval()
    loss_end = shards.mean(held_out.loss(optimizer.model))
    if best is not None:  # which is to know of the state that would ship
        best.observe(loss_end)
        for hook in on_validation:
            hook(loop, loss_end)
    log.write({
        "step": loop.step, "held_out_loss_base": start.base, "held_out_loss_start": start.model,
        "held_out_loss": loss_end,
    })  # fmt: skip
    return TrainResult(
        steps=loop.steps,
        loss=optimizer.last_loss,
        loss_base=start.base,
        loss_start=start.model,
        loss_end=loss_end,
        response_tokens=loop.response_tokens,
        seconds=seconds,
        skipped_steps=optimizer.skipped_steps,
    )
