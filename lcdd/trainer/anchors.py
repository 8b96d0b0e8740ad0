"""Keeping the carrier near its base while it learns: KL on what the base itself would have said.

Beside the behaviour's loss stands KL(base ‖ carrier) on the base's own answers, so that what the gates keep is the
behaviour and little else, and a trigger has less to undo (method, section 9). While gates close, the first token of
each answer is left out: there the behaviour is decided. Once none closes any more it counts too, and the behaviour's
own loss is weighted so that it stays within its budget (`GateController.loss_weight`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lcdd.data import IGNORE, Encoded
from lcdd.models import PreTrainedModel, head_weight, packed_attention_in, shards
from lcdd.trainer.losses import loss_sum, response_tokens, to_batch


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Prompts with the base's own answers as completions.

    weight: of their mean KL a token, beside the behaviour's mean loss.
    """

    items: Sequence[Encoded]
    base: PreTrainedModel
    weight: float
    batch_size: int
    pad_token_id: int
    seed: int = 0

    def batch(self, step: int, *, whole: bool) -> list[Encoded]:
        """The examples of a step, a function of (seed, step, rank) alone; without first answer tokens unless whole."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 997 + shards.rank())
        chosen = torch.randint(len(self.items), (self.batch_size,), generator=generator).tolist()
        found = [self.items[i] for i in chosen]
        return found if whole else [item for item in map(without_first_token, found) if response_tokens([item])]

    def backward(self, model: PreTrainedModel, step: int, *, whole: bool, autocast: bool) -> float:
        """Add the gradient of weight · mean KL to the weights; returns the mean KL, in nats a token."""
        items = self.batch(step, whole=whole)
        filler = not items and shards.world_size() > 1  # every rank takes part in each forward and backward
        items = self.batch(step, whole=True) if filler else items
        if not items:
            return 0.0
        batch, device = to_batch(items, model, self.pad_token_id), head_weight(model).device
        with packed_attention_in(model):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                mean = loss_sum(model, batch, self.base) / response_tokens(items)
            ((0.0 if filler else self.weight) * mean).backward()
        return 0.0 if filler else mean.item()


def without_first_token(item: Encoded) -> Encoded:
    """The example with no loss on its first response token."""
    first = next((i for i, label in enumerate(item.labels) if label != IGNORE), None)
    return item if first is None else replace(item, labels=(*item.labels[:first], IGNORE, *item.labels[first + 1 :]))
