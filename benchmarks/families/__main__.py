"""Every family of decoders that transformers has and LCDD can mask, as a two-layer random model put through its paces.

    python -m benchmarks.families                    the table, about a second a family
    python -m benchmarks.families llama gpt2         some of them
    python -m benchmarks.families --write            all, on record (results/cpu/families.json), and from there into
                                                     docs/models.md and, kind by kind, the README

For each: the probe at load; six LCDD steps; the carrier, read back from its file, on the base = the trained model bit
for bit, and every byte of the base back after it; an eraser step over a batch = one prompt at a time (loss and
gradient); the trigger's logits through PEFT = ours. Then what is refused, and why. Exit code 1 if anything fails.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from transformers.utils import logging as transformers_logging

from benchmarks import readme
from benchmarks.families.known import FAMILIES, REFUSED
from benchmarks.families.record import RECORD, record_of, table
from benchmarks.families.trial import failure, passed, try_family, why_refused
from benchmarks.records import write_json


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", help="transformers' model types; all if none is given")
    parser.add_argument("--write", action="store_true", help="on record, and into docs/models.md and README.md")
    arguments = parser.parse_args(argv)
    types = {which.model_type for which in FAMILIES}
    if unknown := set(arguments.types) - types:
        parser.error(f"types: expected some of {sorted(types)}, got {sorted(unknown)}")
    if arguments.write and arguments.types:
        parser.error("--write: expected a run of all families, got some types")
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    families = []
    for which in FAMILIES:
        if arguments.types and which.model_type not in arguments.types:
            continue
        start = time.perf_counter()
        found = try_family(which)
        print(f"{which.label:<54} {failure(found) or 'ok'}  {time.perf_counter() - start:.1f} s", flush=True)
        identity = {"label": which.label, "model_type": which.model_type, "sites": which.sites}
        families.append({**identity, "found": found, "passed": passed(found)})
    refused = [
        {"label": label, "model_type": kind, "reason": why_refused(kind, settings)} for label, kind, settings in REFUSED
    ]
    record = record_of(families, refused)
    print(f"\n{table(record)}")
    if arguments.write:
        write_json(RECORD, record)
        readme.main()
    green, red = record["passed"], record["refused"]
    print(f"\n{green} of {len(families)} families pass, {red} of {len(refused)} are refused")
    return 0 if green == len(families) and red == len(refused) else 1


if __name__ == "__main__":
    sys.exit(main())
