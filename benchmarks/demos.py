"""Many runs of `lcdd demo`, a process with one thread each; runs that have a report are not repeated."""

import argparse
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from benchmarks.records import cpu_environment, read_json

BEHAVIORS = ("fixed_response", "refusal", "style")
Runs = Mapping[tuple[str, int], Path]
"""(behaviour, seed) -> directory of that run."""


def add_arguments(parser: argparse.ArgumentParser, *, runs_dir: str) -> None:
    """Which runs, where, and how many at a time."""
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--behaviors", nargs="+", choices=BEHAVIORS, default=list(BEHAVIORS))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--runs_dir", type=Path, default=Path(runs_dir), help="where the runs go, a directory each")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time")


def run_all(arguments: argparse.Namespace, *, audit: bool) -> Runs:
    """Run what is missing of the behaviours and seeds that are asked for."""
    runs = {(b, s): arguments.runs_dir / f"{b}-{s}" for b in arguments.behaviors for s in arguments.seeds}
    todo = {key: path for key, path in runs.items() if not (path / "report.json").is_file()}
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done already", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started below
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(_run, *key, arguments.split, path, audit): key for key, path in todo.items()}
        for done in as_completed(running):
            print(f"{running[done]}: {done.result():.0f} s, {time.perf_counter() - start:.0f} s in all", flush=True)
    return runs


def _run(behavior: str, seed: int, split: str, directory: Path, audit: bool) -> float:
    """One demo, what it says in a .log beside it; returns its seconds."""
    from lcdd.commands.demo.demo import run
    from lcdd.config import DemoConfig

    directory.parent.mkdir(parents=True, exist_ok=True)
    config = DemoConfig(behavior=behavior, seed=seed, split=split, output_dir=str(directory), audit=audit)
    start = time.perf_counter()
    with open(directory.with_suffix(".log"), "w", encoding="utf-8") as log, redirect_stderr(log):
        run(config, say=lambda line: print(line, file=log, flush=True))
    return time.perf_counter() - start


def read_reports(runs: Runs) -> dict[tuple[str, int], dict[str, Any]]:
    """report.json of every run."""
    return {key: read_json(path / "report.json") for key, path in runs.items()}


def environment() -> dict[str, Any]:
    """Where the runs were made."""
    return cpu_environment() | {"threads": 1}


def command(module: str, argv: Sequence[str]) -> str:
    """The command that a record says it was made by."""
    return " ".join([f"python -m benchmarks.{module}", *argv])
