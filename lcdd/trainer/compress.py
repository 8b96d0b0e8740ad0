"""An LCDD run: the loop, the best carrier on the way, and what is to be said of the result.

The result is the sparsest carrier whose held-out loss kept the budget, whatever came after it: the last state if that
is as good, else the best one seen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from lcdd.carrier import Carrier
from lcdd.checkpoint import CheckpointStore, RunLog
from lcdd.data import Encoded
from lcdd.errors import InputError
from lcdd.models import PreTrainedModel, shards
from lcdd.optimizer import LCDDOptimizer
from lcdd.optimizer.pacing import Pace
from lcdd.report import auc
from lcdd.trainer.anchors import Anchors
from lcdd.trainer.diagnose import diagnose
from lcdd.trainer.fit import StartLosses, TrainResult, fit
from lcdd.trainer.loop import Loop
from lcdd.trainer.losses import HeldOut


class BestCarrier:
    """The sparsest carrier so far that kept the budget on held-out text; of equally sparse ones the last.

    Carriers with more than half of their gates open are not kept: they would cost a copy of the weights.
    """

    def __init__(self, optimizer: LCDDOptimizer, *, base_loss: float) -> None:
        self.optimizer, self.base_loss = optimizer, base_loss
        self.carrier: Carrier | None = None
        self._before: Carrier | None = None

    def observe(self, loss: float) -> None:
        """Take in the held-out loss of the gates that would ship now, as the controller does, too."""
        optimizer = self.optimizer
        optimizer.observe_held_out(loss, self.base_loss)
        epsilon = optimizer.dual.epsilon
        kept = self.carrier.n_open if self.carrier else optimizer.gates.layout.n_gates // 2
        self._before = self.carrier
        if epsilon is not None and loss <= epsilon and optimizer.n_open <= kept:
            self.carrier = optimizer.carrier()

    def withdraw(self) -> None:
        """Take the last observation back: that state is not to ship, whatever its loss."""
        self.carrier = self._before

    def better_than(self, loss: float) -> Carrier | None:
        """The carrier that is to ship instead of the run's state, whose held-out loss is given; None: the state is."""
        epsilon = self.optimizer.dual.epsilon
        if self.carrier is None or epsilon is None:
            return None
        unfit = loss > epsilon or cast(Pace, self.optimizer.dual).behavior_lost
        return self.carrier if unfit or self.carrier.n_open < self.optimizer.n_open else None

    def state_dict(self) -> dict[str, Any] | None:
        if self.carrier is None:
            return None
        parts = ("gate", "gate_logits", "deltas", "unmasked", "unmasked_norm")
        return {name: getattr(self.carrier, name) for name in parts}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.carrier = None if state is None else dataclasses.replace(self.optimizer.carrier(), **state)


def compress(
    optimizer: LCDDOptimizer,
    train: Sequence[Encoded],
    held_out: HeldOut,
    *,
    start: StartLosses,
    anchors: Anchors | None = None,
    log: RunLog | None = None,
    teacher: PreTrainedModel | None = None,
    checkpoints: CheckpointStore | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_validation: Sequence[Callable[[Loop, float], None]] = (),
    progress: bool = True,
) -> TrainResult:
    """Run LCDD on the model that `optimizer` is attached to; it comes back as `fit` leaves it, as the best carrier.

    The paper's dual descent ends where it ends: of its states only the last is looked at.

    Args:
        start: held-out losses of the base and the SFT model; the latter is the budget's baseline.
        anchors: the base's own answers, for `config.base_kl_weight`.

    Raises:
        InputError: `base_kl_weight` without anchors; and as `fit`.
    """
    shards.check_agreement(gates=optimizer.gates.logits)
    log = log or RunLog(None, stage="lcdd")
    config = optimizer.config
    best = BestCarrier(optimizer, base_loss=start.base) if config.paced else None
    if config.base_kl_weight and anchors is None:
        raise InputError("anchors: expected the base's answers for base_kl_weight, got None")
    result = fit(
        optimizer, train, held_out, start=start, anchors=anchors, log=log, teacher=teacher, checkpoints=checkpoints,
        say=say, on_validation=on_validation, best=best, progress=progress,
    )  # fmt: skip
    if best is not None and (carrier := best.better_than(result.loss_end)) is not None:
        last = {"n_open": optimizer.n_open, "held_out_loss": result.loss_end}
        optimizer.load_carrier(carrier)
        result = dataclasses.replace(result, loss_end=held_out.loss(optimizer.model))
        log.write({"step": result.steps, "last_state": last, "held_out_loss": result.loss_end})
    return _judged(optimizer, result, log)


def _judged(optimizer: LCDDOptimizer, result: TrainResult, log: RunLog) -> TrainResult:
    """`result` with what is wrong with the carrier (`diagnose`), which is also logged."""
    gates = optimizer.gates
    kept = gates.evaluation_values() != 0
    noise = auc(gates.initial_logits.tolist(), kept.tolist())
    findings = diagnose(
        config=optimizer.config,
        loss_base=result.loss_base,
        loss_sft=result.loss_start,
        loss_carrier=result.loss_end,
        sparsity=1.0 - float(kept.double().mean()),
        dual_lambda=optimizer.dual.dual_lambda,
        ema=optimizer.dual.ema,
        epsilon=optimizer.dual.epsilon,
        auc_initial_theta=noise,
    )
    log.write({"step": result.steps, "auc_initial_theta": noise, "findings": [f.code for f in findings]})
    return dataclasses.replace(result, auc_initial_theta=noise, findings=tuple(findings))
