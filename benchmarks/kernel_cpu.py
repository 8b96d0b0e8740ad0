"""One bf16 matrix on the CPU: the fused optimizer step (passes A and B, refresh) against the unfused parametrization.

    python -m benchmarks.kernel_cpu --threads 2 --output record.json

    lcdd        gate_values, pass A, gate_logits_grad, pass B (AdamW, writes W_eff), and a refresh of W_eff on top;
                once with bf16 and once with fp32 moments
    unfused     W = W_base + (r ⊗ c) ∘ Δ under autograd, gates from their logits, and its backward: no optimizer
    +adamw      that, then torch.optim.AdamW on Δ (bf16 moments, as torch keeps them for a bf16 parameter)
    compiled    the unfused forward and backward under torch.compile; +adamw: with PyTorch's fused AdamW

Correctness comes first: gradients of θ, first moments and W_eff against float64, an error at most twice the unfused
one. Then rounds in which every lane runs once, in rotating order; ratios are medians of the rounds' own. Memory last:
what the peak of the resident set rises by during a step. Freed blocks stay in the process while lanes are timed.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcdd_kernels as k
from benchmarks.harness import CPUClock, Workload, peak_resident_bytes, relative_error, reset_peak, retain_freed_memory
from benchmarks.harness import resident_bytes as resident
from benchmarks.harness import rounds as timed_rounds
from benchmarks.records import Environment
from benchmarks.unfused import DeltaMask, UnfusedGates
from lcdd_kernels.reference.gates import gate_noise_ref

KIND: dict[str, Any] = {"kind": "hard_concrete", "seed": 7, "training": True}
ADAMW: dict[str, Any] = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
CPU = torch.device("cpu")


class Problem:
    """Inputs of one matrix: base, Δ and G in `dtype`, θ in fp32 with about `density` of the gates open."""

    def __init__(self, rows: int, cols: int, density: float, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix(scale: float) -> Tensor:
            return (scale * torch.randn(rows, cols, generator=generator)).to(dtype)

        self.base, self.delta, self.grad = matrix(0.02), matrix(1e-3), matrix(1e-4)
        self.theta = torch.where(torch.rand(rows + cols, generator=generator) < density, 2.5, -5.0)
        self.rows, self.cols = rows, cols


class Fused:
    """What `LCDDOptimizer` does for this matrix between two steps."""

    def __init__(self, problem: Problem, moments: torch.dtype) -> None:
        self.p, self.delta, self.weight = problem, problem.delta.clone(), torch.empty_like(problem.base)
        self.exp_avg, self.exp_avg_sq = (torch.zeros_like(self.delta, dtype=moments) for _ in range(2))
        self.maps = [k.GateMap(row_start=0, col_start=problem.rows, head_dim=1, repeat=1)]
        self.d_theta = torch.empty(0)

    def step(self) -> None:
        p, deltas = self.p, [self.delta]
        gate, _ = k.gate_values(p.theta, step=1, **KIND)
        d_gate, sq_norm = k.delta_grad_stats([p.grad], deltas, gate, self.maps)
        self.d_theta = k.gate_logits_grad(p.theta, d_gate, step=1, **KIND)
        new_gate, _ = k.gate_values(p.theta, step=2, **KIND)
        scale = min(1.0, 1e9 / (float(sq_norm) ** 0.5 + 1e-6))
        k.delta_adamw_(
            [self.weight], [p.base], deltas, [self.exp_avg], [self.exp_avg_sq], [p.grad], gate, new_gate, self.maps,
            step=1, grad_scale=scale, **ADAMW,
        )  # fmt: skip
        k.weight_eff_([self.weight], [p.base], deltas, new_gate, self.maps)


class Unfused:
    """The parametrization's forward and backward, from G; `optimizer`: then AdamW on Δ."""

    def __init__(self, problem: Problem, *, compiled: bool = False, optimizer: bool = False) -> None:
        self.p, self.delta = problem, problem.delta.clone().requires_grad_(True)
        self.gates = UnfusedGates(
            problem.theta.to(torch.promote_types(problem.theta.dtype, self.delta.dtype)), KIND["kind"]
        )
        self.gates.logits.requires_grad_(True)
        n = problem.theta.numel()
        self.gates.noise = gate_noise_ref(n, seed=7, step=1, offset=0, dtype=self.gates.logits.dtype, device=CPU)
        rows, cols = torch.arange(problem.rows), torch.arange(problem.rows, n)
        forward = DeltaMask(problem.base, self.gates, rows, cols)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(forward) if compiled else forward
        self.optimizer = None
        if optimizer:
            betas = (ADAMW["beta1"], ADAMW["beta2"])
            settings = {name: ADAMW[name] for name in ("lr", "eps", "weight_decay")}
            self.optimizer = torch.optim.AdamW([self.delta], betas=betas, fused=compiled, **settings)

    def step(self) -> None:
        self.delta.grad = self.gates.logits.grad = None
        self.forward(self.delta).backward(self.p.grad)
        if self.optimizer is not None:
            self.optimizer.step()


def check(dtype: torch.dtype) -> list[str]:
    """Both against float64, on a smaller matrix; a line per result. Raises `SystemExit` where ours is worse."""
    problem, lines = Problem(509, 1790, 0.5, dtype), []
    exact_problem = Problem(509, 1790, 0.5, dtype)
    for name in ("base", "delta", "grad", "theta"):
        setattr(exact_problem, name, getattr(problem, name).double())
    exact, plain, ours = Unfused(exact_problem, optimizer=True), Unfused(problem, optimizer=True), Fused(problem, dtype)
    for lane in (exact, plain, ours):
        lane.step()
    n = problem.theta.numel()
    for lane in (exact, plain):
        lane.gates.noise = gate_noise_ref(n, seed=7, step=2, offset=0, dtype=lane.gates.logits.dtype, device=CPU)
    results: dict[str, tuple[Any, Any, Any]] = {
        "gradient of theta": (ours.d_theta, plain.gates.logits.grad, exact.gates.logits.grad),
        "first moment": (ours.exp_avg, _state(plain), _state(exact)),
        "delta": (ours.delta, plain.delta, exact.delta),
        "next W_eff": (ours.weight, plain.forward(plain.delta), exact.forward(exact.delta)),
    }
    for name, (got, other, truth) in results.items():
        error, unfused = relative_error(got, truth), relative_error(other, truth)
        lines.append(f"{name}: error {error:.2e}, unfused {unfused:.2e}")
        if not error <= 2 * unfused + torch.finfo(got.dtype).eps:
            raise SystemExit(f"wrong result, nothing is timed: {lines[-1]}")
    return lines


def _state(lane: Unfused) -> Tensor:
    assert lane.optimizer is not None
    return lane.optimizer.state[lane.delta]["exp_avg"]


def extra_bytes(step: Callable[[], None]) -> int:
    """What the peak of the resident set rises by during a step (Linux), once buffers that stay have been made."""
    step()
    before = resident(CPU)
    reset_peak()
    step()
    return max(0, peak_resident_bytes() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=14336)
    parser.add_argument("--density", type=float, default=0.5, help="share of gates that are open")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=45.0, help="seconds of timing")
    parser.add_argument("--output", type=Path, help="where the JSON record goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    checks = check(torch.bfloat16)
    print(*checks, sep="\n")
    problem, parameters = Problem(args.rows, args.cols, args.density), args.rows * args.cols
    lanes: dict[str, Any] = {
        "lcdd moments=bf16": Fused(problem, torch.bfloat16),
        "lcdd moments=fp32": Fused(problem, torch.float32),
        "unfused": Unfused(problem),
        "unfused+adamw": Unfused(problem, optimizer=True),
        "compiled": Unfused(problem, compiled=True),
        "compiled+adamw": Unfused(problem, compiled=True, optimizer=True),
    }
    memory = {name: extra_bytes(lane.step) / parameters for name, lane in lanes.items()}
    retain_freed_memory()
    load = os.getloadavg()[0]
    times = timed_rounds(
        {name: Workload(run=lane.step) for name, lane in lanes.items()}, CPUClock(), budget_s=args.budget
    )
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {
            "lane": name,
            "median_s": statistics.median(seconds),
            "min_s": min(seconds),
            "rounds": len(seconds),
        }
        row["extra_bytes_per_parameter"] = memory[name]
        for moments in ("bf16", "fp32"):
            pairs = zip(seconds, times[f"lcdd moments={moments}"], strict=True)
            row[f"over_lcdd_{moments}"] = statistics.median(a / b for a, b in pairs)
        rows.append(row)
        print(
            f"{name:18} {1e3 * row['median_s']:8.1f} ms   {row['over_lcdd_bf16']:5.2f}x lcdd (bf16 moments)   "
            f"{row['over_lcdd_fp32']:5.2f}x lcdd (fp32 moments)   +{memory[name]:.2f} bytes a parameter"
        )
    record = {
        "benchmark": "kernel_cpu", "shape": [args.rows, args.cols], "weights": "bfloat16", "density": args.density,
        "backend": {op: k.available(op)["native"] or "native" for op in ("delta_grad_stats", "delta_adamw_")},
        "load_before": load, "load_after": os.getloadavg()[0], "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "checks": checks, "environment": asdict(Environment.here(CPU)), "lanes": rows,
    }  # fmt: skip
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
