"""Training on several ranks under torchrun: the process group, each rank's share, DDP and FSDP2."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from lcdd.models import shards
from lcdd.models.faults import one_voice

T = TypeVar("T")
_groups = itertools.count()
"""Of the process groups that this process has made; all ranks make the same ones, one after another."""


@contextmanager
def process_group(device: str, *, timeout: float) -> Iterator[None]:
    """Inside: the process group that torchrun's variables describe, made here if there is none; else nothing.

    An error inside is told by one rank: see `lcdd.models.faults`.

    device: a stage's `device`; GPUs talk by NCCL, anything else by gloo. timeout: seconds that a rank waits for others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    wait = timedelta(seconds=timeout)
    store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=wait)))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"lcdd-{attempt}-{next(_groups)}", store)  # no earlier group has left anything there
    group = dist.PrefixStore("group", store)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=group, rank=rank, world_size=ranks, timeout=wait)
    try:
        with one_voice(dist.PrefixStore("faults", store)):
            yield
    finally:
        dist.destroy_process_group()


def share(micro_batches: Sequence[T]) -> list[tuple[T, float]]:
    """This rank's micro-batches of a step, and their weights: as many on every rank, by fillers of weight 0."""
    ranks, me = shards.world_size(), shards.rank()
    rounds = -(-len(micro_batches) // ranks)
    mine = [(micro, 1.0) for micro in micro_batches[me::ranks]]
    return mine + [(micro_batches[0], 0.0)] * (rounds - len(mine))


class Replicated:
    """Runs a loss function under DDP where the model is whole on several ranks, and as it is elsewhere.

    average: what to wrap a step's last backward in, where gradients are averaged by somebody else than DDP.
    """

    def __init__(self, module: nn.Module, average: Callable[[], AbstractContextManager[Any]] | None = None) -> None:
        whole = not any(shards.is_sharded(p) for p in module.parameters())
        self._average = average
        self._ddp = shards.world_size() > 1 and whole and average is None
        if self._ddp:
            from torch.nn.parallel import DistributedDataParallel

            module = DistributedDataParallel(module, broadcast_buffers=False)
        self.module: Any = module

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def accumulating(self, more: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: gradients are averaged over the ranks only once no `more` follow."""
        if self._average is not None and not more:
            return self._average()
        return self.module.no_sync() if self._ddp and more else nullcontext()
