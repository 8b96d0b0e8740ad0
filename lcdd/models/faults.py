"""What ranks say when a run of several fails: one message, by the rank that failed.

That rank says so in the ranks' common store before it ends, and its error goes on as it is. The others find a
connection closed: their error becomes `ToldByAnotherRank`, which is said nowhere. Where nobody has said anything, a
rank was killed or hangs, and one of those that are left names it (`RankLost`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lcdd.errors import RankLost, ToldByAnotherRank
from lcdd.models import shards

GRACE = 5.0
"""Seconds in which a rank that failed has said so, and in which those that are left have all noticed."""
SAID = "said"


@contextmanager
def one_voice(store: Any) -> Iterator[None]:
    """Inside: errors are told by one rank alone.

    store: of `torch.distributed`, the same on all ranks and for nothing else.

    Raises:
        RankLost: a rank ended without a word, or does not answer; on one of the others.
        ToldByAnotherRank: any error, on all ranks but the one that tells it.
    """
    try:
        yield
    except Exception as error:
        told = _told(store, error)
        if told is None:
            raise
        raise told from error


def _told(store: Any, error: Exception) -> Exception | None:
    """What becomes of an error on this rank; None: it is this rank's to tell."""
    me, ranks = shards.rank(), shards.world_size()
    try:
        if not _is_lost_connection(error):
            return None if store.add(SAID, 1) == 1 else ToldByAnotherRank(error)
        store.set(f"left-{me}", "1")
        end = time.monotonic() + GRACE
        while not store.check([SAID]):
            if time.monotonic() > end:
                lost = [rank for rank in range(ranks) if not store.check([f"left-{rank}"])]
                return _lost(lost, ranks) if store.add(SAID, 1) == 1 else ToldByAnotherRank(error)
            time.sleep(0.1)
        return ToldByAnotherRank(error)
    except dist.DistError:  # the store went with rank 0, which kept it
        return _lost([0], ranks)


def _lost(lost: list[int], ranks: int) -> RankLost:
    names = ", ".join(map(str, lost)) or "unknown"
    return RankLost(
        f"rank {names} of {ranks} ended without a word (killed, out of memory?) or did not answer within ddp_timeout; "
        "complete checkpoints are kept, and --resume goes on from the newest"
    )


def _is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank is not there any more; gloo has no error class of its own."""
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    lost = isinstance(error, dist.DistError) or any(word in str(error) for word in words)
    return isinstance(error, RuntimeError) and lost
