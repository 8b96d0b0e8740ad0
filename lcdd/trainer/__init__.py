"""One loop for SFT and LCDD, its losses, guards and diagnosis."""

from lcdd.trainer.diagnose import auc, diagnose
from lcdd.trainer.guards import EarlyStop, check_labels, is_out_of_memory
from lcdd.trainer.loop import TrainResult, step_batches, total_steps, train_lcdd, train_sft
from lcdd.trainer.losses import completion_loss, loss_sum, response_tokens, to_batch

__all__ = [
    "EarlyStop",
    "TrainResult",
    "auc",
    "check_labels",
    "completion_loss",
    "diagnose",
    "is_out_of_memory",
    "loss_sum",
    "response_tokens",
    "step_batches",
    "to_batch",
    "total_steps",
    "train_lcdd",
    "train_sft",
]
