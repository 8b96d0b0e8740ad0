"""One linear layer's forward and backward: plain `nn.Linear` against `PackedGradLinear`, at a given share of closed
gates.

    python -m benchmarks.packed_linear                          both shapes of the goal, float32 and bfloat16, 80%
    closed python -m benchmarks.packed_linear --closed 0.9 --tokens 1024 --threads 2

Forward, input gradient and weight gradient are in the time; the optimizer is not. The two are timed in turns, so that a
neighbour on the machine disturbs both alike, and the median of the pairs' ratios is the result. With `--clock cpu` (the
default with one thread) CPU seconds of the process are counted, which preemption does not change.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lcdd.packed import PackedGradLinear

SHAPES = ((4096, 14336), (3072, 1024))  # [out, in] of Llama-3-8B's down projection and of Qwen3-0.6B's gate and up
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Median milliseconds of each, and the quartiles of packed over plain across the pairs of runs."""

    plain_ms: float
    packed_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def retain_freed_memory() -> None:
    """Keep freed blocks in the process (glibc), so that page faults of fresh gradients are not what is timed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no block gets a mapping of its own
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: the heap is not given back


def measure(
    *,
    out_features: int,
    in_features: int,
    layout: str,
    dtype: torch.dtype,
    tokens: int,
    closed: float,
    pairs: int,
    clock: Callable[[], float],
) -> Result:
    """layout "block" (hard-concrete) or "panels" (Heaviside); `closed` of the rows and of the columns are closed."""
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    rows = torch.nonzero(torch.rand(out_features) >= closed).view(-1).int()
    cols = torch.nonzero(torch.rand(in_features) >= closed).view(-1).int()
    x = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, out_features, dtype=dtype)
    packed = PackedGradLinear.swap(linear)

    def run() -> float:
        linear.weight.grad = x.grad = None
        packed.zero_packed_grad()
        start = clock()
        linear(x).backward(dy)
        return 1e3 * (clock() - start)

    times: list[tuple[float, float]] = []
    for pair in range(pairs + 1):
        packed.set_plan("dense")  # an ordinary nn.Linear in every respect
        plain_ms = run()
        packed.set_plan(layout, rows, cols)
        packed_ms = run()
        if pair:  # the first pair is the warm-up
            times.append((plain_ms, packed_ms))
    ratios = sorted(b / a for a, b in times)
    low, _, high = statistics.quantiles(ratios, n=4)
    return Result(
        plain_ms=statistics.median(a for a, _ in times),
        packed_ms=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed_linear", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--closed", type=float, default=0.8, help="share of closed gates, rows and columns alike")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9, help="timed runs of each, at least 2")
    parser.add_argument("--clock", choices=("cpu", "wall"), help="default: cpu with one thread, else wall")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=("block", "panels"), default=("block", "panels"))
    arguments = parser.parse_args(argv)
    retain_freed_memory()
    torch.set_num_threads(arguments.threads)
    name = arguments.clock or ("cpu" if arguments.threads == 1 else "wall")
    clock = time.process_time if name == "cpu" else time.perf_counter
    print(f"{arguments.tokens} tokens, {arguments.closed:.0%} closed, {arguments.threads} threads, {name} time")
    print(f"{'out x in':>12} {'dtype':>9} {'layout':>7} {'plain ms':>9} {'packed ms':>9} {'ratio':>6}  quartiles")
    for out_features, in_features in SHAPES:
        for dtype in arguments.dtypes:
            for layout in arguments.layouts:
                r = measure(
                    out_features=out_features,
                    in_features=in_features,
                    layout=layout,
                    dtype=DTYPES[dtype],
                    tokens=arguments.tokens,
                    closed=arguments.closed,
                    pairs=arguments.pairs,
                    clock=clock,
                )
                print(
                    f"{f'{out_features}x{in_features}':>12} {dtype:>9} {layout:>7} {r.plain_ms:9.1f} "
                    f"{r.packed_ms:9.1f} {r.ratio:6.3f}  {r.ratio_low:.3f}-{r.ratio_high:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
