"""Every family's checkpoint read and written by several ranks together, against one process: the same bits.

torchrun --nproc-per-node 2 -m benchmarks.families.sharded
"""

import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist

from benchmarks.families.known import FAMILIES, Family
from lcdd.checkpoint import model_fingerprint
from lcdd.models import Sharding, hide_progress_bars, load_model, save_weights, shards

FILE_BYTES = 20_000
"""A few files for each of these small models."""


def check(which: Family, folder: Path) -> bool:
    """Whether a family's weights are the same after the ranks have read them, and after they have written them."""
    first, there, again = shards.rank() == 0, folder / "there", folder / "again"
    if first:
        which.model().save_pretrained(there, max_shard_size=FILE_BYTES)
        again.mkdir()
    dist.barrier()
    expected = model_fingerprint(load_model(there))
    model = load_model(there, shard=Sharding(trained=True))
    read = model_fingerprint(model) == expected and shards.holds_shards(model)
    save_weights(model, model.state_dict(), again, dtype=model.dtype, at_most=FILE_BYTES)
    dist.barrier()
    return shards.all_agree(read and model_fingerprint(load_model(again)) == expected)


def main() -> int:
    """A line for each family; 1 if one of them differs."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    hide_progress_bars()
    say = partial(print, flush=True) if shards.rank() == 0 else lambda *_: None
    wrong = []
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box)
        for number, which in enumerate(FAMILIES):
            same = check(which, Path(box[0]) / str(number))
            say(f"{number + 1:2} {which.label}: {'the same' if same else 'OTHERS'}")
            wrong += [] if same else [which.label]
        dist.barrier()
    say(f"{len(FAMILIES) - len(wrong)} of {len(FAMILIES)} families")
    dist.destroy_process_group()
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
