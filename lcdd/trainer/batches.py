"""Which examples an optimizer step sees, and how many steps a run has."""

import math
from collections.abc import Iterator, Sequence

import torch

from lcdd.config import TrainConfig
from lcdd.data import Encoded
from lcdd.models import shards


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
