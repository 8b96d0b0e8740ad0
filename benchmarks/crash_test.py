"""kill -9 at random moments of a training run: is a checkpoint ever lost, or half of one accepted, and does the resumed
run end with the bits of one that was never interrupted?

    python -m benchmarks.crash_test      figures go to benchmarks/results/cpu/robustness.json

Each trial starts a tiny LCDD run in a process of its own, kills it after a random time, checks every checkpoint that
is there, resumes the run, and compares its files with the uninterrupted run's.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.records import RESULTS, read_json
from fixtures.checkpoints import write_run_inputs
from lcdd.checkpoint import verify_directory, write_json
from lcdd.commands import run as pipeline
from lcdd.config import DataConfig, LCDDConfig

RECORD = RESULTS / "cpu" / "robustness.json"
STEPS = 12
DDP_TIMEOUT = 30
"""Seconds. No torchrun is here, which would end a rank that waits for one that died before they met."""


def in_process(body: Callable[[], None]) -> int:
    """Start `body` in a forked process, without output; its id."""
    child = os.fork()
    if child:
        return child
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    tqdm.set_lock(threading.RLock())  # its own is one semaphore for all forks: who is killed with it blocks the others
    code = 1
    try:
        body()
        code = 0
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def train(folder: Path, output: Path, *, resume: bool, parallel: str = "ddp") -> None:
    """One run with a checkpoint every other step and two kept."""
    config = LCDDConfig(
        base_model_name_or_path=str(folder / "base"), sft_model_name_or_path=str(folder / "sft"),
        output_dir=str(output),
        max_steps=STEPS, save_steps=2, save_total_limit=2, learning_rate=1e-3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, warmup_steps=3, gate_lr=0.4, dual_lambda_init=0.02, device="cpu", resume=resume,
        parallel=parallel, ddp_timeout=DDP_TIMEOUT,
    )  # fmt: skip
    pipeline.train(config, DataConfig(dataset_name=str(folder / "data.jsonl")), say=lambda _: None)


def checkpoints(output: Path) -> dict[int, str]:
    """Step -> "whole" or what is wrong, of everything that is called a checkpoint."""
    found = {}
    for path in output.glob("checkpoint-*"):
        step = int(path.name.removeprefix("checkpoint-"))
        try:
            verify_directory(path)
            found[step] = "whole"
        except ValueError as error:
            found[step] = str(error)
    return found


def lost_checkpoint(output: Path, found: dict[int, str]) -> bool:
    """Whether a checkpoint that a killed run had written is not there any more."""
    log = output / "log.jsonl"
    logged = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    steps_done = len([line for line in logged if line.endswith("}") and '"ema"' in line])
    # a step's line is written before its checkpoint: after step N + 1 the checkpoint of N has to be there
    expected = (steps_done - 1) // 2 * 2
    return 2 <= expected < STEPS and max(found, default=0) < expected


def result_of(output: Path) -> dict[str, bytes | list[Any]]:
    """A finished run's files, and its loss curve."""
    files: dict[str, bytes | list[Any]] = {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.suffix == ".safetensors"
    }
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    files["curve"] = [(line["step"], line.get("loss"), line.get("dual_lambda"), line.get("open")) for line in lines]
    return files


def crash_test(folder: Path, *, kills: int, seed: int = 0) -> dict[str, Any]:
    """The figures of `kills` trials."""
    torch.set_num_threads(1)  # threads do not survive a fork
    inputs = folder / "inputs"
    inputs.mkdir()
    write_run_inputs(inputs)
    tqdm.monitor_interval = 0  # no thread of tqdm's, which a fork could catch with a lock
    train(inputs, folder / "first", resume=False)  # imports and self-tests, once for all the processes forked below
    start = time.monotonic()
    assert finish(in_process(lambda: train(inputs, folder / "whole", resume=False))) == 0
    duration = time.monotonic() - start
    whole = result_of(folder / "whole")
    generator = random.Random(seed)
    record: dict[str, Any] = {
        "kills": 0, "killed_before_the_first_checkpoint": 0, "killed_in_a_save": 0, "checkpoints_seen": 0,
        "half_written_accepted": 0, "lost": 0, "resumed_runs_that_differ": 0, "finished_before_the_kill": 0,
    }  # fmt: skip
    trial = 0
    while record["kills"] < kills:
        trial += 1
        output = folder / f"trial-{trial}"
        child = in_process(lambda output=output: train(inputs, output, resume=True))
        time.sleep(generator.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if finish(child) != -signal.SIGKILL:
            record["finished_before_the_kill"] += 1
            continue
        record["kills"] += 1
        found = checkpoints(output)
        record["checkpoints_seen"] += len(found)
        record["half_written_accepted"] += sum(state != "whole" for state in found.values())
        record["lost"] += lost_checkpoint(output, found)
        record["killed_before_the_first_checkpoint"] += not found
        record["killed_in_a_save"] += bool(list(output.glob(".checkpoint-*"))) if output.exists() else 0
        done = finish(in_process(lambda output=output: train(inputs, output, resume=True))) == 0
        record["resumed_runs_that_differ"] += not done or result_of(output) != whole
    return record


def write_record(figures: dict[str, Any], path: Path = RECORD) -> None:
    """Put figures into a record, beside the others of it."""
    write_json(path, {**(read_json(path) if path.exists() else {}), **figures})


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_record", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = crash_test(Path(folder), kills=arguments.kills, seed=arguments.seed)
    if not arguments.no_record:
        write_record({"kill_9": record})
    print(json.dumps(record, indent=2))
    return int(bool(record["half_written_accepted"] or record["lost"] or record["resumed_runs_that_differ"]))


if __name__ == "__main__":
    sys.exit(main())
