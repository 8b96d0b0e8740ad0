"""Losses of an encoded batch: cross-entropy or KL on response tokens, summed so that micro-batches can be weighted.

Shapes: B examples, S tokens, D model width, V vocabulary, R response tokens of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdd.data import IGNORE, Encoded, collate
from lcdd.models import PreTrainedModel, backbone, head_weight
from lcdd_kernels import linear_cross_entropy, linear_kl


def _response_positions(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(mask [B, S-1] of the positions whose next token has a label, those labels [R])."""
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORE
    return keep, labels[keep]


def _hidden(model: PreTrainedModel, batch: dict[str, Tensor], keep: Tensor) -> Tensor:
    """Final hidden states [R, D] at the positions that predict a response token."""
    output = backbone(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    hidden = output.last_hidden_state[:, :-1][keep]
    kind = hidden.device.type  # the norm's float32 output would make the head's product a float32 one
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def loss_sum(model: PreTrainedModel, batch: dict[str, Tensor], teacher: PreTrainedModel | None = None) -> Tensor:
    """Summed cross-entropy of a batch's response tokens, or with a teacher the summed KL(teacher || model)."""
    keep, labels = _response_positions(batch)
    hidden, head = _hidden(model, batch, keep), head_weight(model)
    if teacher is None:
        return linear_cross_entropy(hidden, head.to(hidden.dtype), labels, reduction="sum", reject_nan=False)
    with torch.no_grad():
        ref_hidden = _hidden(teacher, batch, keep)
    ref_head = head_weight(teacher).to(ref_hidden.dtype)
    # A NaN loss is the optimizer's to skip, not an error.
    mean = linear_kl(hidden, head.to(hidden.dtype), ref_hidden=ref_hidden, ref_weight=ref_head, reject_nan=False)
    return mean * len(labels)


def to_batch(items: Sequence[Encoded], model: PreTrainedModel, pad_token_id: int) -> dict[str, Tensor]:
    """`collate`'s tensors on the model's device."""
    device = head_weight(model).device
    return {key: value.to(device) for key, value in collate(items, pad_token_id=pad_token_id).items()}


def response_tokens(items: Sequence[Encoded]) -> int:
    """Labels that have a position before them to be predicted from."""
    return sum(label != IGNORE for item in items for label in item.labels[1:])


@torch.no_grad()
def completion_loss(
    model: PreTrainedModel, items: Sequence[Encoded], *, pad_token_id: int, batch_size: int = 16
) -> float:
    """Mean cross-entropy over the completions' tokens alone, in nats, whatever the items' labels cover.

    An empty list gives NaN.
    """
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    ordered = sorted(items, key=lambda item: len(item.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = [_completion_labels(item) for item in ordered[start : start + batch_size]]
        total += float(loss_sum(model, to_batch(batch, model, pad_token_id)))
        tokens += response_tokens(batch)
    model.train(was_training)
    return total / tokens if tokens else math.nan


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Examples that a model is measured on, and how: `completion_loss` in batches of `batch_size`."""

    items: Sequence[Encoded]
    pad_token_id: int
    batch_size: int = 16

    def loss(self, model: PreTrainedModel) -> float:
        """Mean cross-entropy over the completions' tokens, in nats."""
        return completion_loss(model, self.items, pad_token_id=self.pad_token_id, batch_size=self.batch_size)


def _completion_labels(item: Encoded) -> Encoded:
    labels = (*[IGNORE] * item.n_prompt, *item.input_ids[item.n_prompt :])
    return Encoded(input_ids=item.input_ids, labels=labels, n_prompt=item.n_prompt, truncated=item.truncated)
