"""One harness for every benchmark: the case and its lanes, the correctness gate, clocks, interleaved rounds, memory.

A case is one question on one set of inputs; its lanes are the answers that are compared: a provider (`plain`,
`unfused`, `compiled`, `lcdd`), perhaps with a parameter such as the density of the gates. A lane is built into a
`Workload`, whose `run` is what is timed.

    1. gate      every lane's `verify` first; a lane that fails is not timed, and the case reports no ratio at all
    2. time      warm-up by time, then rounds: in each, every lane runs once, in rotating order, on fresh inputs
    3. memory    each lane alone: peak of a fresh process's resident set (CPU) or of the allocator (CUDA), and the bytes
                 of tensors held for the backward

Medians and p20/p80 of the rounds; a ratio is the median of the rounds' own ratios, so that a neighbour on the machine
who slows a round slows both. The first run, which may compile, is a metric of its own.
"""

import ctypes
import gc
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

PROVIDERS = ("plain", "unfused", "compiled", "lcdd")
MIN_ROUNDS, MAX_ROUNDS = 5, 60
SHORT_RUN = 2e-3  # seconds: on the CPU a shorter run is repeated within a sample until it takes this long


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run has to move and to compute, by the formulas in `costs.py`: bytes and floating-point operations."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(kw_only=True)
class Workload:
    """One lane, set up.

    run: what is timed. fresh: new inputs, called before every run, not timed. tokens: tokens a run trains on.
    weights: tensors that exist anyway, which are not counted as held for the backward.
    capturable: whether `run` may be captured in a CUDA graph (fixed addresses, no look from the host).
    extra: metrics that the runs measured themselves, asked for when all rounds are over.
    """

    run: Callable[[], Any]
    fresh: Callable[[], Any] = lambda: None
    cost: Cost = field(default_factory=Cost)
    tokens: int = 0
    weights: Sequence[Tensor] = ()
    capturable: bool = False
    extra: Callable[[], Sequence["Sample"]] = lambda: ()


@dataclass(frozen=True)
class Check:
    """One comparison of the gate: an error, and the largest that passes (NaN never does)."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One thing to time. verify: its gate; `exempt` says why a lane has none (a floor is not an answer to check)."""

    provider: str
    build: Callable[[], Workload]
    params: Mapping[str, Any] = field(default_factory=dict)
    verify: Callable[[], list[Check]] | None = None
    exempt: str = ""

    def __post_init__(self) -> None:
        if self.provider.split(":")[0] not in PROVIDERS:
            raise ValueError(f"provider: expected one of {PROVIDERS}, got {self.provider!r}")
        if (self.verify is None) == (not self.exempt):
            raise ValueError(f"{self.label}: expected either a verify function or the reason for having none")

    @property
    def label(self) -> str:
        return " ".join([self.provider, *(f"{k}={v}" for k, v in self.params.items())])


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question. floor: label of the lane that ratios are over. memory: also measure peak memory, lane by lane."""

    name: str
    params: Mapping[str, Any]
    lanes: Sequence[Lane]
    floor: str | None = None
    memory: bool = False
    budget_s: float = 10.0
    min_rounds: int = MIN_ROUNDS
    warmup_s: float = 0.3

    def __post_init__(self) -> None:
        labels = [lane.label for lane in self.lanes]
        if len(set(labels)) < len(labels) or (self.floor is not None and self.floor not in labels):
            raise ValueError(f"{self.name}: expected distinct lanes, the floor {self.floor!r} among them, got {labels}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A distribution of a metric: p20, median, p80 of n values."""

    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    n: int

    @classmethod
    def of(cls, metric: str, unit: str, values: Sequence[float]) -> "Sample":
        if len(values) < 2:
            return cls(metric=metric, unit=unit, p20=values[0], p50=values[0], p80=values[0], n=len(values))
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        middle = statistics.median(values)
        return cls(metric=metric, unit=unit, p20=fifths[0], p50=middle, p80=fifths[3], n=len(values))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64 (Frobenius), on the CPU; NaN or a wrong shape is infinite."""
    if got.shape != expected.shape:
        return math.inf
    a, b = got.detach().cpu().double(), expected.detach().cpu().double()
    error = float((a - b).norm() / b.norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


# --- clocks -----------------------------------------------------------------------------------------------------------


class CPUClock:
    """Wall-clock time. Short functions are repeated; `repeats` is chosen at a lane's first sample."""

    def __init__(self) -> None:
        # weakly: a workload's tensors must go when its case is over
        self._repeats: WeakKeyDictionary[Callable[[], Any], int] = WeakKeyDictionary()

    def seconds(self, run: Callable[[], Any]) -> float:
        repeats = self._repeats.get(run, 1)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        each = (time.perf_counter() - start) / repeats
        if run not in self._repeats:
            self._repeats[run] = max(1, min(1000, math.ceil(SHORT_RUN / max(each, 1e-9))))
        return each


class CUDAClock:
    """CUDA events around one run, after the L2 was overwritten (which also lets the host run ahead of the GPU)."""

    def __init__(self, device: torch.device) -> None:
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(max(4 * l2, 256 << 20) // 4, dtype=torch.int32, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)


Clock = CPUClock | CUDAClock


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as one CUDA graph: its time without the launches' cost. RuntimeError where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def retain_freed_memory() -> None:
    """Keep freed blocks in the process (glibc), so that page faults of fresh temporaries are not what is timed. That
    favours whoever allocates most, which is not us. Not called where memory is measured."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no block gets a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is not given back


def give_back_freed_memory() -> None:
    """Return what a case freed to the system (glibc): kept from case to case, the largest cases would add up."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


# --- time -------------------------------------------------------------------------------------------------------------


def rounds(
    workloads: Mapping[str, Workload],
    clock: Clock,
    *,
    budget_s: float,
    min_rounds: int = MIN_ROUNDS,
    warmup_s: float = 0.3,
) -> dict[str, list[float]]:
    """Seconds of every lane, round by round: lists of equal length, the same round at the same place.

    warmup_s: each lane runs for this long first, at least once (0: not at all). Then at least `min_rounds`, and on
    until `budget_s` is spent; the order of the lanes rotates from round to round.
    """
    for work in workloads.values():
        start = time.perf_counter()
        while warmup_s:
            work.fresh()
            clock.seconds(work.run)
            if time.perf_counter() - start >= warmup_s:
                break
    labels = list(workloads)
    times: dict[str, list[float]] = {label: [] for label in labels}
    start = time.perf_counter()
    for turn in range(MAX_ROUNDS if labels else 0):  # none: no lane fitted into memory
        if turn >= min_rounds and time.perf_counter() - start >= budget_s:
            break
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            workloads[label].fresh()
            times[label].append(clock.seconds(workloads[label].run))
    return times


def samples_of(
    times: Mapping[str, list[float]], workloads: Mapping[str, Workload], *, floor: str | None, roof: "Roof | None"
) -> dict[str, list[Sample]]:
    """Metrics of every lane: time, ratio to the floor (paired), tokens/s, GB/s, TFLOP/s and the fraction of the
    roof."""
    found = {}
    for label, seconds in times.items():
        work, each = workloads[label], [Sample.of("time", "s", seconds)]
        if floor is not None and label != floor:
            pairs = [a / b for a, b in zip(seconds, times[floor], strict=True)]
            each.append(Sample.of("ratio", "of the floor's time", pairs))
        if work.tokens:
            each.append(Sample.of("tokens_per_second", "1/s", [work.tokens / s for s in seconds]))
        if work.cost.bytes:
            each.append(Sample.of("bandwidth", "GB/s", [1e-9 * work.cost.bytes / s for s in seconds]))
        if work.cost.flops:
            each.append(Sample.of("rate", "TFLOP/s", [1e-12 * work.cost.flops / s for s in seconds]))
        if roof is not None and (work.cost.bytes or work.cost.flops):
            each.append(Sample.of("roof", "fraction", [roof.seconds(work.cost) / s for s in seconds]))
        each.extend(work.extra())
        found[label] = each
    return found


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What the device was measured to do in this run: copied bytes a second, multiply-adds' FLOP/s."""

    bandwidth: float
    rate: float

    def seconds(self, cost: Cost) -> float:
        """The least time for this work: whichever roof is reached later."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.rate)


# --- memory -----------------------------------------------------------------------------------------------------------


class _Held:
    """A tensor saved for the backward; counts while it lives."""

    def __init__(self, tensor: Tensor, tally: "_Tally") -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.tally, self.key, self.size = tensor, tally, storage.data_ptr(), storage.nbytes()
        tally.change(self.key, self.size, 1)

    def __del__(self) -> None:
        self.tally.change(self.key, self.size, -1)


class _Tally:
    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.known = {w.untyped_storage().data_ptr() for w in weights}
        self.alive: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def change(self, key: int, size: int, by: int) -> None:
        """One more, or one less, that holds this storage."""
        if key in self.known:
            return
        self.alive[key] += by
        if self.alive[key] == (1 if by > 0 else 0):  # the first, or the last of them
            self.bytes += by * size
        self.peak = max(self.peak, self.bytes)


@contextmanager
def held_for_backward(weights: Sequence[Tensor]) -> Iterator[_Tally]:
    """Inside, `.peak` grows to the most bytes of tensors that autograd held at a time, `weights` not counted; a
    storage that is saved more than once counts once."""
    tally = _Tally(weights)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(t, tally), lambda held: held.tensor):
        yield tally


def status_bytes(field_name: str, process: int | str = "self") -> int:
    """A line of Linux's /proc/PROCESS/status, bytes; -1 where there is none: it has ended, or this is no Linux.

    VmRSS: resident now. VmHWM: the most since the process started, or since `reset_peak`. Not ru_maxrss, which begins
    at the parent's.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return -1
    found = re.search(rf"^{field_name}:\s+(\d+) kB", status, flags=re.MULTILINE)
    return 1024 * int(found[1]) if found else -1


def reset_peak() -> None:
    """Start the peak anew from what is resident now (Linux; elsewhere setting up a workload stays in its peak)."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def memory_of(lane: Lane, device: torch.device, *, before: int) -> dict[str, float]:
    """Runs of a lane that is alone in this process: {"peak_memory", "extra_memory", "held_for_backward"} in bytes.

    extra_memory: what a run takes beyond what is there before and after it; the first run, which makes an optimizer's
    state, is not the one that is measured.
    before: resident bytes of the process (CPU) or bytes allocated (CUDA) when nothing of the lane existed.
    """
    work = lane.build()
    first = _peak_of(work, device)
    gc.collect()
    ready = resident_bytes(device)
    second = _peak_of(work, device)
    work.fresh()
    with held_for_backward(work.weights) as tally:
        work.run()
    return {
        "peak_memory": float(max(first, second) - before),
        "extra_memory": float(second - ready),
        "held_for_backward": float(tally.peak),
    }


def _peak_of(work: Workload, device: torch.device) -> int:
    """The most bytes in use during one run."""
    gc.collect()
    work.fresh()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        work.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device)
    reset_peak()
    work.run()
    return status_bytes("VmHWM")


def resident_bytes(device: torch.device) -> int:
    """Bytes in use now: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return status_bytes("VmRSS")
