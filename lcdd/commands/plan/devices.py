"""What `lcdd plan` takes devices to be able to do: data sheets, assumptions, and this CPU measured on the spot.

No figure here but `measured_cpu`'s was measured.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MATRIX_EFFICIENCY, BANDWIDTH_EFFICIENCY = 0.7, 0.85
"""Shares of a data sheet's peak that large operations are assumed to reach; --flops and --bandwidth replace them."""
LAUNCH_SECONDS = 6e-6
"""Assumed for an operation that PyTorch starts eagerly: a phase takes at least that for each of its operations."""
LAYER_LAUNCHES = (45, 80)
"""Operations of a decoder layer that are no views, forward and backward (34 to 54 and 62 to 94, by architecture)."""
MASK_LAUNCHES = (15, 25)
"""Of one parametrized weight: its gates, mask, product and sum."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """tflops: matrix rate by dtype, dense; bandwidth and link: GB/s, link each way to another GPU; memory: GB (1e9).

    source: "data sheet" (peaks), "measured here" or "given" (rates that are reached).
    """

    name: str
    tflops: dict[str, float]
    bandwidth: float
    link: float
    memory: float
    source: str

    def rate(self, dtype: str) -> float:
        """FLOP/s assumed to be reached."""
        return self.tflops[dtype] * 1e12 * (MATRIX_EFFICIENCY if self.source == "data sheet" else 1.0)

    def bytes_per_second(self) -> float:
        """Assumed to be reached."""
        return self.bandwidth * 1e9 * (BANDWIDTH_EFFICIENCY if self.source == "data sheet" else 1.0)


def _sheet(name: str, bfloat16: float, float32: float, bandwidth: float, link: float, memory: float) -> Device:
    rates = {"bfloat16": bfloat16, "float32": float32}
    return Device(name=name, tflops=rates, bandwidth=bandwidth, link=link, memory=memory, source="data sheet")


# Makers' data sheets: dense bfloat16 with float32 sums, float32 without TF32.
DEVICES = {
    "h200": _sheet("H200 SXM", 989, 67, 4800, 450, 141),
    "h100": _sheet("H100 SXM", 989, 67, 3350, 450, 80),
    "a100-80gb": _sheet("A100 SXM 80GB", 312, 19.5, 2039, 300, 80),
    "l40s": _sheet("L40S", 362, 91.6, 864, 32, 48),
    "rtx-4090": _sheet("GeForce RTX 4090", 165, 82.6, 1008, 32, 24),
}


def measured_cpu(dtype: str) -> Device:
    """This machine with the threads torch uses now: a product and a copy, about a second. `link` is of no use here."""
    kind = getattr(torch, dtype)
    a, b = torch.randn(512, 512).to(kind), torch.randn(512, 512).to(kind)
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    product = _fastest(lambda: torch.mm(a, b))
    copy = _fastest(lambda: target.copy_(source))
    rate = 2 * 512**3 / product / 1e12
    bandwidth = 2 * source.numel() * source.element_size() / copy / 1e9
    name = f"this CPU, {torch.get_num_threads()} threads"
    return Device(name=name, tflops={dtype: rate}, bandwidth=bandwidth, link=bandwidth, memory=_host_memory(),
                  source="measured here")  # fmt: skip


def _fastest(run: Callable[[], object], budget: float = 0.2) -> float:
    """Seconds of the fastest run within the budget, and of at least one after the first."""
    run()
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _host_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
