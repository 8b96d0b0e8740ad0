"""Everything that is promised about long runs, measured: all robustness figures in one command.

    python -m benchmarks.robustness                      all of it (about ten minutes on one core)
    python -m benchmarks.robustness --only ranks nan     some of it

Figures go to benchmarks/results/cpu/robustness.json.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks.crash_test import write_record
from benchmarks.records import ROOT
from fixtures import ranks as work
from lcdd.trainer import loss_sum, response_tokens, to_batch


def ranks() -> dict[str, Any]:
    """One rank against two (gloo, CPU) after 50 steps: worst differences of λ, Δ and θ, and of the open gates."""
    found: dict[str, Any] = {"steps": work.STEPS}
    with tempfile.TemporaryDirectory() as folder:
        one = work.fit("one", 2)
        dcp.save({"optimizer": one.state_dict()}, checkpoint_id=f"{folder}/dcp-1", no_dist=True)
        theirs = work.summary_of(one)
        for kind in ("ddp", "fsdp2"):
            script = str(ROOT / "fixtures" / "ranks.py")
            argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
            subprocess.run([*argv, kind, folder], cwd=ROOT, env=environment, check=True, capture_output=True)
            ours = torch.load(f"{folder}/{kind}-plain-1.pt", weights_only=True)
            apart = work.differences(ours, theirs)
            differ, opened = apart.pop("gates_differ"), int((theirs["gate"] != 0).sum())
            found[kind] = {"open_gates_that_differ": differ, "open_gates": opened, **apart}
    return found


def accumulation() -> dict[str, Any]:
    """Worst relative difference of the gate gradients of one batch in 1, 2, 4 and 8 micro-batches (float32)."""
    items = work.items()[:8]
    grads: dict[int, torch.Tensor] = {}
    for parts in (1, 2, 4, 8):
        optimizer = work.attached("one")
        tokens, size = response_tokens(items), 8 // parts
        for start in range(0, 8, size):
            batch = to_batch(items[start : start + size], optimizer.model, work.PAD)
            (loss_sum(optimizer.model, batch) / tokens).backward()
        d_gate, _ = optimizer._masked.pass_a(optimizer._masked.grads(optimizer.gates), optimizer.gates)
        grads[parts] = optimizer.gates.logits_grad(d_gate, l0_weight=optimizer.dual.penalty)
    scale = float(grads[1].abs().max())
    return {str(parts): float((grad - grads[1]).abs().max()) / scale for parts, grad in grads.items()}


def nan() -> dict[str, Any]:
    """NaN and Inf in loss, gradient or θ at random steps of 200: steps hit, skipped, and after which anything moved."""
    generator = random.Random(0)
    record = {"steps": 0, "hit": 0, "skipped": 0, "lambda_or_theta_or_delta_moved": 0, "not_finite_at_the_end": 0}
    for where in ("loss", "gradient", "theta"):
        optimizer = work.attached("one", 200)
        batch = to_batch(work.items(), optimizer.model, work.PAD)
        chosen = {step: generator.choice([math.nan, math.inf, -math.inf]) for step in generator.sample(range(200), 20)}
        for step in range(200):
            loss = loss_sum(optimizer.model, batch) / response_tokens(work.items())
            loss.backward()
            before = (optimizer.gates.logits.detach().clone(), optimizer.dual.state_dict())
            deltas = [part[1].clone() for part in optimizer.masked().values()]
            value = loss.item()
            with torch.no_grad():
                if step in chosen and where == "loss":
                    value = chosen[step]
                if step in chosen and where == "gradient":
                    optimizer.param_groups[0]["params"][step % 7].grad[0, step % 16] = chosen[step]
                if step in chosen and where == "theta":
                    optimizer.gates.logits[step] = chosen[step]
            optimizer.step(value)
            optimizer.zero_grad()
            same = torch.equal(optimizer.gates.logits, before[0]) and optimizer.dual.state_dict() == before[1]
            same &= all(torch.equal(a, part[1]) for a, part in zip(deltas, optimizer.masked().values(), strict=True))
            record["lambda_or_theta_or_delta_moved"] += step in chosen and not same
        record["steps"] += 200
        record["hit"] += len(chosen)
        record["skipped"] += optimizer.skipped_steps
        tensors = [optimizer.gates.logits, *optimizer.model.parameters()]
        record["not_finite_at_the_end"] += sum(not bool(torch.isfinite(t).all()) for t in tensors)
    return record


def repeats() -> dict[str, Any]:
    """How many different results 30 repeats of a run have, in bits."""
    results = set()
    for _ in range(30):
        optimizer = work.fit("one", 1, max_steps=8)
        parts = [optimizer.gates.logits, *optimizer.model.parameters()]
        results.add(b"".join(part.detach().numpy().tobytes() for part in parts if isinstance(part, nn.Parameter)))
    return {"repeats": 30, "different_results": len(results)}


def command(module: str) -> Callable[[], None]:
    """A robustness test that is a command of its own and writes its own figures."""
    return lambda: subprocess.run([sys.executable, "-m", module], cwd=ROOT, check=True, capture_output=True) and None


PARTS: dict[str, Callable[[], dict[str, Any] | None]] = {
    "kill_9": command("benchmarks.crash_test"),
    "corrupt_files": command("benchmarks.corrupt_files"),
    "malformed_inputs": command("benchmarks.bad_inputs"),
    "ranks": ranks,
    "accumulation": accumulation,
    "nan": nan,
    "repeats": repeats,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    for name in parser.parse_args().only:
        figures = PARTS[name]()
        if figures is not None:
            write_record({name: figures})
        print(f"{name}: {figures or 'see benchmarks/results/cpu/robustness.json'}", flush=True)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
