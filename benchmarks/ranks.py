"""Several ranks against one, on gloo (CPU): what goes over the wire, whether a run is the same, and what kills leave.

    python -m benchmarks.ranks                     all of it
    python -m benchmarks.ranks --only bytes runs   some of it

Figures go to benchmarks/results/cpu/ranks.json:

    bytes_ratio   bytes of gradients that a rank hands to its collectives in a step, packed over dense, by engine, gates
                  and closed share (goal: at most .08 with hard-concrete gates, 80% closed); `bytes` has both
    runs          the run of 1 rank against those of 2 and 4 after 50 steps with accumulation and activation
                  checkpointing: worst differences of λ, θ and Δ; `gates_differ` sums the gates that differ
    kills         a random rank killed at a random moment: seconds until the others had ended, checkpoints that were
                  lost or half-written, resumed runs that are not the uninterrupted one bit for bit

Ranks are forks of this process, with the variables that torchrun gives its own.
"""

import argparse
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks import crash_test
from benchmarks.crash_test import finish, in_process, write_record
from benchmarks.records import RESULTS
from fixtures import ranks as work
from fixtures.checkpoints import make_model, write_run_inputs
from lcdd.config import LCDDConfig
from lcdd.models import Replicated, Sharding, process_group, shards
from lcdd.optimizer import LCDDOptimizer
from lcdd.trainer import loss_sum, to_batch

RECORD = RESULTS / "cpu" / "ranks.json"
ENGINES = ("ddp", "fsdp2")
CLOSED = (0.5, 0.8, 0.95)
MICRO_BATCHES = 8
"""Of a step, over all ranks."""
AT_REST = {"hard_concrete": 16.0, "heaviside_ste": 1.0}
"""|θ| of gates that are drawn open, or closed, for certain."""
HANG_SECONDS = 60.0
CONTROLLERS: dict[str, dict[str, Any]] = {
    "dual, hard_concrete": {"gate_kind": "hard_concrete"},
    "dual, heaviside_ste": {"gate_kind": "heaviside_ste"},
    "paced, hard_concrete": {"gate_controller": "paced", "gate_kind": "hard_concrete"},
}


# ---------------------------------------------------------------- ranks


def start_ranks(n: int, body: Callable[[], None]) -> list[int]:
    """`body` on n ranks, each a fork of this process; their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_of(number: int) -> Callable[[], None]:
        def run() -> None:
            os.environ |= {
                "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }  # fmt: skip
            body()

        return run

    return [in_process(rank_of(number)) for number in range(n)]


def on_ranks(n: int, body: Callable[[], Any]) -> Any:
    """What `body` gives on rank 0 of n, inside a process group; tensors, numbers and containers of them.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            with process_group("cpu", timeout=HANG_SECONDS):
                found = body()
                if shards.rank() == 0:
                    torch.save(found, f"{folder}/found.pt")

        codes = [finish(child) for child in start_ranks(n, run)]
        if any(codes):
            raise RuntimeError(f"ranks: expected exit code 0 of all {n}, got {codes}")
        return torch.load(f"{folder}/found.pt", weights_only=True)


# ---------------------------------------------------------------- bytes


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Inside: bytes of the tensors that this rank hands to all-reduces and reduce-scatters."""
    found = {"gradients": 0}

    def counting(function: Any, position: int, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = kwargs[name] if name in kwargs else args[position]
            found["gradients"] += tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return call

    taken = {"all_reduce": (0, "tensor"), "reduce_scatter_tensor": (1, "input"), "reduce_scatter_single": (1, "input")}
    with ExitStack() as stack:
        for function, place in taken.items():
            if hasattr(dist, function):  # the last is the newer torch's name of the second
                stack.enter_context(mock.patch.object(dist, function, counting(getattr(dist, function), *place)))
        yield found


def step_bytes(engine: str, gate_kind: str, closed: float, pack: str) -> int:
    """Of one step of this rank, of a small model with this share of its gates closed."""
    base, model = (make_model("qwen3", vocab_size=200, width=128, seed=seed) for seed in (0, 1))
    if engine == "fsdp2":
        base, model = Sharding().shard(base), Sharding(trained=True).shard(model)
    config = LCDDConfig(gate_kind=gate_kind, pack=pack, max_steps=10, device="cpu", gate_controller="dual")
    probe = LCDDOptimizer.attach(model, base, config, total_steps=10)
    n_gates = probe.gates.layout.n_gates
    probe.fold()
    order = torch.randperm(n_gates, generator=torch.Generator().manual_seed(0))
    logits = torch.full((n_gates,), AT_REST[gate_kind])
    logits[order[: round(closed * n_gates)]] *= -1
    optimizer = LCDDOptimizer.attach(model, base, config, total_steps=10, initial_logits=logits)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Tensor:
            return loss_sum(self.model, batch)

    module = Replicated(Loss(), average=optimizer.averaging())
    if isinstance(module.module, nn.parallel.DistributedDataParallel):
        module.module.register_comm_hook(None, allreduce_hook)  # which calls dist.all_reduce, as DDP does inside
    batch = to_batch(work.items()[shards.rank() :: 2], model, work.PAD)
    with counted_bytes() as found:
        with module.accumulating(False):
            loss = module(batch) / len(batch.labels)
            loss.backward()
        optimizer.step(loss)
    if optimizer.skipped_steps:
        raise RuntimeError("step_bytes: expected a step that is taken, got one that was skipped")
    return found["gradients"]


def wire() -> dict[str, Any]:
    """Bytes by engine, gates and closed share, packed and dense, and their ratio."""
    cases = list(itertools.product(ENGINES, AT_REST, CLOSED))

    def measure() -> dict[str, dict[str, int]]:
        return {
            f"{engine}, {kind}, {closed:g}": {
                name: step_bytes(engine, kind, closed, pack) for name, pack in (("packed", "auto"), ("dense", "never"))
            }
            for engine, kind, closed in cases
        }

    found = on_ranks(2, measure)
    ratios: dict[str, Any] = {engine: {kind: {} for kind in AT_REST} for engine in ENGINES}
    for engine, kind, closed in cases:
        case = found[f"{engine}, {kind}, {closed:g}"]
        ratios[engine][kind][f"{closed:g}"] = round(case["packed"] / case["dense"], 4)
    return {"bytes": found, "bytes_ratio": ratios}


# ---------------------------------------------------------------- the same run


def fitted(engine: str, ranks: int, changes: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """What a run comes to."""
    settings = {"gradient_checkpointing": True, "max_steps": steps, **changes}
    if changes.get("gate_controller") == "paced":
        paced = LCDDConfig()  # what the dual descent alone has, as it is by default
        settings |= {name: getattr(paced, name) for name in work.config(1).settings_of("dual")}
    found = work.summary_of(work.fit(engine, MICRO_BATCHES // ranks, **settings))
    return {name: value.detach().contiguous() for name, value in found.items()}


def runs(steps: int = work.STEPS, ranks: tuple[int, ...] = (2, 4)) -> dict[str, Any]:
    """Worst differences from the run of one rank."""
    found: dict[str, Any] = {}
    differ = 0
    for name, changes in CONTROLLERS.items():
        one = fitted("one", 1, changes, steps)
        entry: dict[str, Any] = {"closed": round(float((one["gate"] == 0).double().mean()), 4)}
        for engine, n in itertools.product(ENGINES, ranks):
            ours = on_ranks(n, lambda engine=engine, n=n, changes=changes: fitted(engine, n, changes, steps))
            apart = work.differences(ours, one)
            differ += apart["gates_differ"]
            entry[f"{engine}, {n} ranks"] = apart
            print(f"{name}, {engine}, {n} ranks: {apart}", flush=True)
        found[name] = entry
    return {"runs": {"steps": steps, "micro_batches_a_step": MICRO_BATCHES, **found}, "gates_differ": differ}


# ---------------------------------------------------------------- kills


def kills(number: int = 20, seed: int = 0) -> dict[str, Any]:
    """A random one of two ranks killed at a random moment, `number` times, the engines in turn."""
    generator = random.Random(seed)
    record: dict[str, Any] = {
        "kills": 0, "longest_seconds_to_end": 0.0, "hangs": 0, "half_written_accepted": 0, "lost": 0,
        "resumed_runs_that_differ": 0, "finished_before_the_kill": 0, "killed_after_a_checkpoint": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_run_inputs(folder)
        whole: dict[str, Any] = {}
        seconds = 0.0
        for engine in ENGINES:
            start = time.monotonic()
            if not _trained(folder, folder / f"whole-{engine}", engine):
                raise RuntimeError(f"kills: expected an uninterrupted run under {engine} to end, it failed")
            seconds = time.monotonic() - start
            whole[engine] = crash_test.result_of(folder / f"whole-{engine}")
        trial = 0
        while record["kills"] < number:
            trial += 1
            engine = ENGINES[trial % 2]
            _trial(folder, folder / f"trial-{trial}", engine, whole[engine], generator, seconds, record)
    return {"kills": record}


def _training(folder: Path, output: Path, engine: str) -> Callable[[], None]:
    return lambda: crash_test.train(folder, output, resume=True, parallel=engine)


def _trained(folder: Path, output: Path, engine: str) -> bool:
    return not any([finish(child) for child in start_ranks(2, _training(folder, output, engine))])


def _trial(
    folder: Path,
    output: Path,
    engine: str,
    whole: dict[str, Any],
    generator: random.Random,
    seconds: float,
    record: dict[str, Any],
) -> None:
    """One kill: how long the other rank lives on, what is left of the run, and whether it goes on from there."""
    children = start_ranks(2, _training(folder, output, engine))
    time.sleep(generator.uniform(0, seconds))
    victim = generator.randrange(2)
    os.kill(children[victim], signal.SIGKILL)
    start = time.monotonic()
    if finish(children[victim]) != -signal.SIGKILL:
        record["finished_before_the_kill"] += 1
        finish(children[1 - victim])
        return
    other = children[1 - victim]
    while os.waitpid(other, os.WNOHANG)[0] == 0:
        if time.monotonic() - start > HANG_SECONDS:
            record["hangs"] += 1
            os.kill(other, signal.SIGKILL)
            finish(other)
            break
        time.sleep(0.05)
    record["longest_seconds_to_end"] = max(record["longest_seconds_to_end"], round(time.monotonic() - start, 1))
    record["kills"] += 1
    found = crash_test.checkpoints(output)
    record["half_written_accepted"] += sum(state != "whole" for state in found.values())
    record["killed_after_a_checkpoint"] += bool(found)
    record["lost"] += crash_test.lost_checkpoint(output, found)
    done = _trained(folder, output, engine)
    record["resumed_runs_that_differ"] += not done or crash_test.result_of(output) != whole


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"bytes": wire, "runs": runs, "kills": kills}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    for name in parser.parse_args().only:
        figures = PARTS[name]()
        write_record(figures, RECORD)
        print(json.dumps(figures, indent=2), flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # threads do not survive a fork
    sys.exit(main())
