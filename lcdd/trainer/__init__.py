"""One loop for SFT and LCDD, its losses, guards and diagnosis."""

from lcdd.trainer.anchors import Anchors
from lcdd.trainer.batches import step_batches, total_steps
from lcdd.trainer.compress import compress
from lcdd.trainer.diagnose import Finding, behavior_lost, diagnose
from lcdd.trainer.fit import StartLosses, TrainResult, fit
from lcdd.trainer.guards import check_labels, check_ranks, is_out_of_memory
from lcdd.trainer.loop import Loop
from lcdd.trainer.losses import (
    Batch,
    HeldOut,
    completion_loss,
    loss_sum,
    padded_batch,
    response_tokens,
    to_batch,
)

__all__ = [
    "Anchors",
    "Batch",
    "Finding",
    "HeldOut",
    "Loop",
    "StartLosses",
    "TrainResult",
    "behavior_lost",
    "check_labels",
    "check_ranks",
    "completion_loss",
    "compress",
    "diagnose",
    "fit",
    "is_out_of_memory",
    "loss_sum",
    "padded_batch",
    "response_tokens",
    "step_batches",
    "to_batch",
    "total_steps",
]
