"""Runs the benchmarks and writes their records.

    python -m benchmarks.run                      the CPU's list (make bench)
    python -m benchmarks.run --device cuda        the GPU's list, the most telling cases first (make gpu)
    python -m benchmarks.run --cases eraser       only cases whose name contains a word
    python -m benchmarks.run --cases passes --base main~5      this tree against another commit, run in turns

Correctness first: a lane whose gate fails stops its case from being timed, no ratio is printed for it, and the exit
code is 1. Records are written after every case, so a run that is cut short keeps what it has.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness, page, plot, records
from benchmarks.cases import Place, suite
from benchmarks.harness import Case, Check, Clock, Lane, Roof, Sample, Workload

# What a case may die of without taking the rest of the run with it.
CASE_ERRORS: tuple[type[BaseException], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, subprocess.SubprocessError,
)  # fmt: skip
with contextlib.suppress(ImportError):  # compilation errors and "out of resources" have a base class of their own
    from triton.errors import TritonError

    CASE_ERRORS += (TritonError,)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--list", choices=("cpu", "gpu"), help="default: the device's own")
    parser.add_argument("--size", choices=("tiny", "cpu", "gpu"), help="default: the device's own")
    parser.add_argument("--cases", nargs="+", default=[], help="only cases whose name contains one of these")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads on the CPU")
    parser.add_argument("--time-limit", type=float, default=570.0, help="seconds after which no case is begun")
    parser.add_argument("--effort", type=float, default=1.0, help="factor of the time spent on rounds")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where records go")
    parser.add_argument("--base", help="a commit to compare this working tree with")
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "LANE"), help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.base:
        from benchmarks.compare import compare

        return compare(arguments)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda: no GPU is available", file=sys.stderr)
        return 2
    torch.set_num_threads(arguments.threads)
    place = Place(device=device, size=arguments.size or ("gpu" if device.type == "cuda" else "cpu"))
    which = arguments.list or ("gpu" if device.type == "cuda" else "cpu")
    cases = suite(place, gpu_list=which == "gpu")
    if arguments.probe:
        return probe(cases, arguments.probe, device)
    wanted = [case for case in cases if not arguments.cases or any(word in case.name for word in arguments.cases)]
    if not wanted:
        print(f"benchmarks: --cases: expected part of a name of {sorted({c.name for c in cases})}", file=sys.stderr)
        return 2
    return Runner(arguments, place, which).run(wanted)


class Runner:
    """One run over a list of cases; see the module's docstring."""

    def __init__(self, arguments: argparse.Namespace, place: Place, which: str) -> None:
        self.arguments, self.place, self.which = arguments, place, which
        self.environment = records.Environment.here(place.device)
        self.file = records.folder_of(self.environment, results=arguments.results) / "records.csv"
        cuda = place.device.type == "cuda"
        self.clock: Clock = harness.CUDAClock(place.device) if cuda else harness.CPUClock()
        self.roofs: dict[str, Roof] = {}
        self.failed: list[str] = []
        self.rows: list[records.Record] = []  # of this run

    def run(self, cases: Sequence[Case]) -> int:
        if self.place.size != "tiny":
            harness.retain_freed_memory()
        start = time.perf_counter()
        left = []
        for number, case in enumerate(cases):
            if time.perf_counter() - start > self.arguments.time_limit:
                left = [c.name for c in cases[number:]]
                break
            print(f"\n{case.name}: {plot._words(case.params)}", flush=True)
            try:
                rows = self.measure(case)
                self.rows += rows
                if rows:
                    records.save(self.file, rows)
                    if self.arguments.results == records.RESULTS:
                        plot.refresh()
            except CASE_ERRORS:
                traceback.print_exc()
                self.failed.append(f"{case.name}: {sys.exc_info()[1]}")
                continue
            finally:
                self.write_page()
                torch.compiler.reset()  # one case's compiled shapes count against the next one's limit of them
                self.release()
        if left:
            print(f"\ntime limit reached; not run: {', '.join(left)}")
        if self.which == "gpu":
            print(f"\n{page.page(self.rows, self.failed)}")
        if self.failed:
            print("\nFAILED:", *self.failed, sep="\n  ", file=sys.stderr)
            return 1
        print(f"\nwrote {self.file} in {time.perf_counter() - start:.0f} s")
        return 0

    def measure(self, case: Case) -> list[records.Record]:
        """Gate, memory, time; the case's rows (none where the gate fails), printed as they come."""
        clock_mhz = records.clock_mhz(self.place.device)
        if not self.gate(case):
            return []
        metrics: dict[str, list[Sample]] = {lane.label: [] for lane in case.lanes}
        fitting = list(case.lanes)
        if case.memory:
            for lane in case.lanes:
                found = self.memory(case, lane)
                metrics[lane.label] += found
                if any(sample.metric == "did_not_fit" for sample in found):
                    fitting.remove(lane)
        workloads: dict[str, Workload] = {}
        for lane in fitting:
            workloads[lane.label] = work = lane.build()
            if case.warmup_s:
                work.fresh()
                begun = time.perf_counter()
                self.clock.seconds(work.run)
                metrics[lane.label].append(Sample.of("first_run", "s", [time.perf_counter() - begun]))
        times = harness.rounds(
            workloads, self.clock, budget_s=case.budget_s * self.arguments.effort, min_rounds=case.min_rounds,
            warmup_s=case.warmup_s,
        )  # fmt: skip
        floor = case.floor if case.floor in workloads else None
        timed = harness.samples_of(times, workloads, floor=floor, roof=self.roof(case))
        for label, samples in timed.items():
            metrics[label] += samples
        if self.place.device.type == "cuda":
            for label, work in workloads.items():
                metrics[label] += [self.host_time(work), *self.replayed(work)]
        if case.name == "ceilings":
            self.learn_roofs(case, metrics)
        for lane in case.lanes:
            print("  " + describe(lane, metrics[lane.label]), flush=True)
        return [
            self.environment.row(case, lane, sample, clock_mhz=clock_mhz)
            for lane in case.lanes
            for sample in metrics[lane.label]
        ]

    def write_page(self) -> None:
        """What the GPU's list says about the defaults, as far as it came: a run may be cut short."""
        if self.which == "gpu":
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.with_name("defaults.md").write_text(page.page(self.rows, self.failed))

    def gate(self, case: Case) -> bool:
        """Every lane's checks; False, said loudly, where one fails."""
        problems = []
        for lane in case.lanes:
            checks: list[Check] = lane.verify() if lane.verify is not None else []
            if self.place.device.type == "cuda":
                self.release()
            if lane.verify is not None and not checks:
                problems.append(f"{lane.label}: its gate checked nothing")
            problems += [
                f"{lane.label}: {c.name}: error {c.error:.2e}, allowed {c.limit:.2e}" for c in checks if not c.ok
            ]
        for problem in problems:
            print(f"  WRONG RESULT, not timed: {problem}", file=sys.stderr)
        self.failed += [f"{case.name}: {problem}" for problem in problems]
        return not problems

    def memory(self, case: Case, lane: Lane) -> list[Sample]:
        """Peak memory and tensors held for the backward: alone on the GPU, in a process of its own on the CPU."""
        device = self.place.device
        if device.type == "cuda":
            self.release()
            before = harness.resident_bytes(device)
            try:
                found = harness.memory_of(lane, device, before=before)
            except torch.OutOfMemoryError:
                self.release()
                return [Sample.of("did_not_fit", "lane", [1.0])]
            self.release()
        else:
            arguments = ["--device", str(device), "--list", self.which, "--size", self.place.size]
            arguments += ["--threads", str(torch.get_num_threads()), "--probe", identity(case), lane.label]
            command = [sys.executable, "-m", "benchmarks.run", *arguments]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"memory of {lane.label}: {child.stderr[-2000:]}")
            found = json.loads(child.stdout.splitlines()[-1])
        return [Sample.of(name, "bytes", [value]) for name, value in found.items()]

    def host_time(self, work: Workload) -> Sample:
        """What queueing a run takes of the host's thread, which does not wait for the device to be done."""
        seconds = []
        for _ in range(5):
            work.fresh()
            torch.cuda.synchronize(self.place.device)
            begun = time.thread_time()
            work.run()
            seconds.append(time.thread_time() - begun)
        torch.cuda.synchronize(self.place.device)
        return Sample.of("host_time", "s", seconds)

    def replayed(self, work: Workload) -> list[Sample]:
        """Time as a CUDA graph, where the workload can be captured."""
        if not work.capturable:
            return []
        try:
            replay = harness.captured(work.run)
        except RuntimeError as error:
            print(f"  no CUDA graph: {str(error).splitlines()[0]}")
            return []
        seconds = [self.clock.seconds(replay) for _ in range(20)]
        return [Sample.of("graph_time", "s", seconds[2:])]

    def roof(self, case: Case) -> Roof | None:
        """The roof of the case's dtype; None until the ceilings were measured in this run."""
        return self.roofs.get(str(case.params.get("dtype", "float32")), self.roofs.get("float32"))

    def learn_roofs(self, case: Case, metrics: dict[str, list[Sample]]) -> None:
        """The fast end (p80) of what was measured is the roof."""
        found = {
            lane.params["what"]: max((1e9 if s.metric == "bandwidth" else 1e12) * s.p80
                                     for s in metrics[lane.label] if s.metric in ("bandwidth", "rate"))
            for lane in case.lanes
        }  # fmt: skip
        dtypes = {"matrix product": str(case.params["dtype"]), "matrix product, bfloat16": "bfloat16"}
        for what, dtype in dtypes.items():
            if what in found:
                self.roofs[dtype] = Roof(bandwidth=found["copy"], rate=found[what])

    def release(self) -> None:
        gc.collect()
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            harness.give_back_freed_memory()


def identity(case: Case) -> str:
    """A case by name and parameters, for the process that measures its memory."""
    return json.dumps([case.name, dict(case.params)])


def probe(cases: Sequence[Case], wanted: Sequence[str], device: torch.device) -> int:
    """In a process of its own: a lane's memory, as JSON on the last line of stdout."""
    name, label = wanted
    case = next(c for c in cases if identity(c) == name)
    lane = next(lane for lane in case.lanes if lane.label == label)
    print(json.dumps(harness.memory_of(lane, device, before=harness.resident_bytes(device))))
    return 0


def describe(lane: Lane, samples: Sequence[Sample]) -> str:
    """One line of a lane for the terminal."""
    parts = [f"{lane.label:<44}"]
    for s in samples:
        if s.metric == "time":
            parts.append(f"{1e3 * s.p50:10.3f} ms ({1e3 * s.p20:.3f}–{1e3 * s.p80:.3f}, n {s.n})")
        elif s.metric in ("peak_memory", "extra_memory", "held_for_backward"):
            parts.append(f"{s.metric.replace('_', ' ')} {s.p50 / 2**20:,.0f} MiB")
        elif s.metric == "ratio":
            parts.append(f"{s.p50:.3f} of the floor ({s.p20:.3f}–{s.p80:.3f})")
        elif s.metric == "roof":
            parts.append(f"{s.p50:.0%} of the roof")
        else:
            parts.append(f"{s.metric.replace('_', ' ')} {s.p50:,.4g} {s.unit}")
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
