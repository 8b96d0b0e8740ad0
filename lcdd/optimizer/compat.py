"""The authors' arithmetic where ours is better: what `--reference_compat` changes (DEVIATIONS.md, lines 1 and 2).

They add the penalty to every micro-batch's loss, so its gradient grows with accumulation; and they store W_ft, so that
an update smaller than the rounding of the weight's dtype is lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdd.config import LCDDConfig
from lcdd.errors import InputError
from lcdd.models import shards


def penalties_in_step(config: LCDDConfig) -> int:
    """How many times a step's gradient of θ holds the penalty's.

    Raises:
        InputError: compat on several ranks, where the authors never synchronise θ.
    """
    if not config.reference_compat:
        return 1
    if shards.world_size() > 1:
        raise InputError(f"reference_compat: expected one rank, got {shards.world_size()}")
    return config.gradient_accumulation_steps


def delta_dtype(config: LCDDConfig, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of Δ where the config names none: the weight's; in compat one that holds the difference of two."""
    return torch.promote_types(weight_dtype, torch.float32) if config.reference_compat else weight_dtype


def round_as_stored_weights_(deltas: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Δ := W_ft − W_base of the W_ft that the base's dtype can hold; both [out, in], pair by pair, Δ in place."""
    for delta, base in zip(deltas, bases, strict=True):
        stored = (delta + base).to(base.dtype)
        torch.sub(stored.to(delta.dtype), base, out=delta)
