"""Losses of encoded examples: cross-entropy or KL on response tokens, summed so that micro-batches can be weighted.

Examples of any length run without padding, as they would one by one (`PackedRows`); a model whose attention cannot is
padded, which is said.

Shapes: B examples, S tokens, n tokens of all examples, D model width, R response tokens of a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdd.config import TrainConfig
from lcdd.data import IGNORE, Encoded, collate
from lcdd.models import (
    PackedRows,
    PreTrainedModel,
    backbone,
    can_share_prefix,
    common_prefix,
    head_of,
    head_weight,
    input_embeddings,
    packs,
)

WORTH_SHARING = 8
"""Tokens of a common beginning from which on computing it once pays for attention behind it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as one forward sees them: in one row without padding, or padded where `rows` is None.

    Attributes:
        input_ids: int64, packed [n] (the shared beginning, then each example's rest), padded [B, S].
        attention_mask: padded alone, [B, S], 1 on real tokens.
        rows: where the packed tokens belong.
        read: positions in the flattened input whose final hidden state predicts a label, int64 [R].
        labels: those labels, int64 [R].
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    rows: PackedRows | None
    read: Tensor
    labels: Tensor

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Final hidden states [R, D] at `read`."""
        if self.rows is not None:
            states = self.rows.forward(model, input_embeddings(model)(self.input_ids))
        else:
            output = backbone(model)(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False)
            states = output.last_hidden_state.flatten(0, 1)
        states = states.index_select(0, self.read)
        kind = states.device.type  # the norm's float32 output would make the head's product a float32 one
        return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def to_batch(items: Sequence[Encoded], model: PreTrainedModel, pad_token_id: int) -> Batch:
    """Examples as a batch on the model's device: packed if the model can, and behind one copy of what all begin with.

    The last token of an example predicts nothing and is left out where nothing is padded.
    """
    device = head_weight(model).device
    if not packs(model):
        return padded_batch(items, pad_token_id, device)
    shared = 0
    if len(items) > 1 and can_share_prefix(model):
        shared = common_prefix([item.input_ids for item in items], at_most=min(len(i.input_ids) for i in items) - 2)
    return packed_batch(items, shared if shared >= WORTH_SHARING else 0, device)


def packed_batch(items: Sequence[Encoded], shared: int, device: torch.device) -> Batch:
    """Examples without padding, behind one copy of the `shared` tokens that all begin with."""
    rows = PackedRows([len(item.input_ids) - 1 - shared for item in items], shared=shared, device=device)
    ids = list(items[0].input_ids[:shared])
    read, labels = [], []
    for item, first in zip(items, rows.first, strict=True):
        ids += item.input_ids[shared:-1]
        for place, label in enumerate(item.labels[1:]):
            if label != IGNORE:
                read.append(place if place < shared else first + place - shared)
                labels.append(label)
    tensors = (torch.tensor(values, dtype=torch.int64, device=device) for values in (ids, read, labels))
    tokens, positions, targets = tensors
    return Batch(input_ids=tokens, attention_mask=None, rows=rows, read=positions, labels=targets)


def padded_batch(items: Sequence[Encoded], pad_token_id: int, device: torch.device) -> Batch:
    """Examples as rows of the longest one's length."""
    batch = {key: value.to(device) for key, value in collate(items, pad_token_id=pad_token_id).items()}
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE).flatten()
    read = (targets != IGNORE).nonzero()[:, 0]
    mask = batch["attention_mask"]
    return Batch(input_ids=batch["input_ids"], attention_mask=mask, rows=None, read=read, labels=targets[read])


def loss_sum(model: PreTrainedModel, batch: Batch, teacher: PreTrainedModel | None = None) -> Tensor:
    """Summed cross-entropy of a batch's response tokens, or with a teacher the summed KL(teacher || model)."""
    head = head_of(model)  # before the forward that autograd and DDP follow
    hidden = batch.hidden(model)
    if teacher is None:  # a NaN loss is the optimizer's to skip, not an error
        return head.cross_entropy(hidden, batch.labels, reduction="sum", reject_nan=False)
    with torch.no_grad():
        ref_head, ref_hidden = head_of(teacher), batch.hidden(teacher)
    return head.kl(hidden, ref_hidden=ref_hidden, ref_head=ref_head, reject_nan=False) * len(batch.labels)


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

    @classmethod
    def of(
        cls, train: Sequence[Encoded], validation: Sequence[Encoded], config: TrainConfig, *, pad_token_id: int
    ) -> "HeldOut":
        """As the config says: the first validation examples, training ones where there are none."""
        items = (validation or train)[: config.max_eval_samples or None]
        return cls(items=items, pad_token_id=pad_token_id, batch_size=config.per_device_eval_batch_size)

    def loss(self, model: PreTrainedModel) -> float:
        """Mean cross-entropy over the completions' tokens, in nats."""
        return completion_loss(model, self.items, pad_token_id=self.pad_token_id, batch_size=self.batch_size)


def _completion_labels(item: Encoded) -> Encoded:
    labels = (*[IGNORE] * item.n_prompt, *item.input_ids[item.n_prompt :])
    return Encoded(input_ids=item.input_ids, labels=labels, n_prompt=item.n_prompt, truncated=item.truncated)
