"""Every claim with a verdict, by one command a scale.

    python -m benchmarks.claims --scale demo         three behaviours × three seeds on the embedded model
    python -m benchmarks.claims --scale smollm2      on what `make real` and `lcdd run examples/smollm2/*.yaml` left

A run is made of parts, each kept as it is finished: a run that was stopped, or that `--minutes` ended, goes on where it
was, and `--collect` writes the record of what is there. One run at a time in a directory.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.claims import work
from benchmarks.claims.record import collected
from benchmarks.claims.scales import BEHAVIORS
from benchmarks.claims.work import TOGETHER, Unit, one_thread
from benchmarks.demos import command, environment
from benchmarks.records import timestamp, write_json

RESULTS = Path("benchmarks/results/claims")


def units(options: argparse.Namespace, seed: int, tier: int, until: float) -> list[Unit]:
    behaviors = [None] if TOGETHER in work.TIERS[tier] else options.behaviors
    common: dict[str, Any] = {"scale": options.scale, "prepared": options.prepared, "runs": options.runs_dir}
    return [Unit(**common, behavior=behavior, seed=seed, tier=tier, until=until) for behavior in behaviors]


def run_all(options: argparse.Namespace) -> None:
    """Tier after tier, each of a tier's units in a process with one thread."""
    start, context = time.time(), multiprocessing.get_context("spawn")
    until = start + 60 * options.minutes if options.minutes else float("inf")
    with ProcessPoolExecutor(options.processes, mp_context=context, initializer=one_thread) as pool:
        for tier in range(len(work.TIERS)):
            todo = [unit for seed in options.seeds for unit in units(options, seed, tier, until)]
            running = {pool.submit(unit.run): unit.name for unit in todo}
            for done in as_completed(running):
                name, seconds = running[done], done.result()
                print(f"tier {tier}, {name}: {seconds:.0f} s, {time.time() - start:.0f} s in all", flush=True)


def missing(options: argparse.Namespace) -> list[str]:
    """Parts that have not been made, of all seeds and behaviours."""
    found = []
    for seed, tier in itertools.product(options.seeds, range(len(work.TIERS))):
        for unit in units(options, seed, tier, 0.0):
            made = {path.stem for path in (options.runs_dir / unit.name / "parts").glob("*.json")}
            found += [f"{unit.name}: {name}" for name in unit.part_names if name not in made]
    return found


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=("demo", "smollm2"), required=True)
    parser.add_argument("--behaviors", nargs="+", choices=BEHAVIORS, default=list(BEHAVIORS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; smollm2: 0")
    parser.add_argument(
        "--prepared", type=Path, default=Path("runs/smollm2"), help="smollm2: base, data and runs of it"
    )
    parser.add_argument("--runs_dir", type=Path, help="where the parts go; default: runs/claims/SCALE")
    parser.add_argument("--processes", type=int, default=2, help="units at a time, each with one thread")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no part after this long; 0: go to the end")
    parser.add_argument("--collect", action="store_true", help="run nothing: write the record of what is there")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/claims/SCALE.json")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or ([0, 1, 2] if options.scale == "demo" else [0])
    options.runs_dir = options.runs_dir or Path("runs/claims") / options.scale
    options.output = options.output or RESULTS / f"{options.scale}.json"
    if options.scale == "smollm2" and not (options.prepared / "base" / "config.json").is_file():
        raise SystemExit(f"--prepared: expected what `make real` prepares, got {options.prepared} without base/")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    if not options.collect:
        run_all(options)
    names = [f"{name}-{seed}" for name in (*options.behaviors, TOGETHER) for seed in options.seeds]
    content = {
        "what": "claims fixed beforehand (benchmarks/claims/claims.yaml), asked of every behaviour and seed",
        "command": command("claims", sys.argv[1:] if argv is None else argv),
        "date": timestamp()[:10],
        "environment": environment(),
        "seeds": options.seeds,
        **collected([options.runs_dir / name for name in names]),
        "missing": missing(options),
    }
    write_json(options.output, content)
    for row in content["claims"]:
        print(f"{row['verdict']:>18}: {row['name']} {row['estimate'] or ''}")
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
