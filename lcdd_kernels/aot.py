"""Compiles every Triton kernel, in every configuration that its launcher can choose, for named GPUs, without a GPU.

    python -m lcdd_kernels.aot                    the core configurations (what LCDD chooses by itself), all targets
    python -m lcdd_kernels.aot --all --targets 90 every configuration, one target

Read off each compiled kernel: registers, stack and local memory (a spill), shared memory, and whether it uses Hopper's
wgmma. The exit status is 1 when a kernel does not compile, spills, needs more shared memory than the chip has, or lacks
the wgmma that it should have. Kernels come from the modules' `aot_signatures()`; compiler, ptxas and cuobjdump from the
installed Triton, or from another one whose folder comes first in PYTHONPATH. Compilation runs in processes of its own,
so it works where the caller has TRITON_INTERPRET set.
"""

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

from lcdd_kernels.triton_kernels import MODULES

# Compute capability -> the most shared memory that a block can have, in bytes (CUDA programming guide).
SHARED_LIMIT: dict[int, int] = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
TARGETS: tuple[int, ...] = tuple(SHARED_LIMIT)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one target. `problem` is None where nothing is wrong; sizes in bytes."""

    kernel: str
    label: str
    num_warps: int
    target: int
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    wgmma: bool = False
    problem: str | None = None


def _start_worker() -> None:
    # Before Triton's first import: interpreted functions cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)


@functools.cache
def _signatures(stem: str) -> tuple[Any, ...]:
    return tuple(importlib.import_module(f"lcdd_kernels.triton_kernels.{stem}").aot_signatures())


def _select(stems: Sequence[str], every: bool) -> list[tuple[str, int]]:
    return [(stem, i) for stem in stems for i, entry in enumerate(_signatures(stem)) if every or entry.core]


def compile_signature(stem: str, index: int, capability: int) -> Row:
    """Compiles signature `index` of a module for one compute capability (80, 90, ...); a bad kernel is a row too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    entry = _signatures(stem)[index]
    row = functools.partial(Row, entry.kernel.__name__, entry.label, entry.config.num_warps, capability)
    names = entry.kernel.arg_names
    # Every argument in its place: a runtime type, or "constexpr".
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    unknown = (set(entry.signature) | set(entry.constexprs)) - set(names)
    missing = [n for n in names if n not in entry.signature and n not in entry.constexprs]
    if unknown or missing:
        return row(problem=f"its signature names {sorted(unknown)} in vain and lacks {missing}")
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible_by_16}
    source = ASTSource(entry.kernel, signature, constexprs=dict(entry.constexprs), attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=entry.config.options())
    # The compiler raises types of its own, ptxas among them; each is this row's result.
    except Exception as error:
        return row(problem=f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    registers, stack, local = _resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
    problem = None
    if stack or local:
        problem = f"spills: {stack} bytes of stack, {local} of local memory"
    elif shared > SHARED_LIMIT[capability]:
        problem = f"needs {shared} bytes of shared memory of {SHARED_LIMIT[capability]}"
    elif capability == 90 and entry.wgmma and not wgmma:
        problem = "uses no wgmma"
    return row(registers, stack, local, shared, wgmma, problem)


def _resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, bytes of stack, bytes of local memory), by the cuobjdump that Triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _USAGE.search(output)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {output[:300]}")
    return int(found[1]), int(found[2]), int(found[3])


def compile_all(
    *, targets: Sequence[int] = TARGETS, modules: Sequence[str] = MODULES, every: bool = False, jobs: int | None = None
) -> Iterator[Row]:
    """Rows in the order of the signatures, each for all targets, as they are ready.

    targets: compute capabilities out of TARGETS. modules: stems. every: not only the core configurations.
    jobs: processes (default: one per core, at most 8). Raises ValueError for an unknown target or module.
    """
    for name, given, known in (("targets", targets, TARGETS), ("modules", modules, MODULES)):
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name}: expected some of {known}, got {list(given)}")
    jobs = jobs or min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        chosen = pool.submit(_select, modules, every).result()
        work = [(stem, index, target) for stem, index in chosen for target in targets]
        yield from pool.map(compile_signature, *zip(*work, strict=True), chunksize=4)


def table(rows: Sequence[Row]) -> str:
    """A readable table: one line per kernel and configuration, `registers/shared` per target; problems below."""
    targets = sorted({row.target for row in rows})
    lines: dict[tuple[str, str, int], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.label, row.num_warps), {})[row.target] = row
    width_kernel = max(len("kernel"), *(len(k) for k, _, _ in lines))
    width_label = max(len("configuration"), *(len(label) for _, label, _ in lines))
    head = f"{'kernel':<{width_kernel}}  {'configuration':<{width_label}}  warps"
    text = [head + "".join(f"  {'sm_' + str(t):>12}" for t in targets)]
    for (kernel, label, warps), of_target in lines.items():
        cells = "".join(f"  {_cell(of_target.get(t)):>12}" for t in targets)
        text.append(f"{kernel:<{width_kernel}}  {label:<{width_label}}  {warps:>5}{cells}")
    text.append("per target: registers a thread / bytes of shared memory; w: wgmma; !: see below")
    text += [f"sm_{r.target} {r.kernel} [{r.label}]: {r.problem}" for r in rows if r.problem]
    return "\n".join(text)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.registers}/{row.shared}{'w' if row.wgmma else ''}{'!' if row.problem else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0 when every kernel is as it should be, else 1."""
    parser = argparse.ArgumentParser(prog="python -m lcdd_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities, e.g. 80,90")
    parser.add_argument("--all", action="store_true", help="every configuration, not only the core ones")
    parser.add_argument("--modules", default=",".join(MODULES), help="modules of triton_kernels, e.g. gates,delta_step")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, at most 8)")
    arguments = parser.parse_args(argv)
    try:
        targets = [int(target) for target in arguments.targets.split(",")]
        start = time.perf_counter()
        modules = arguments.modules.split(",")
        rows = list(compile_all(targets=targets, modules=modules, every=arguments.all, jobs=arguments.jobs))
    except ValueError as error:
        parser.error(str(error))
    bad = [row for row in rows if row.problem]
    print(table(rows))
    seconds = time.perf_counter() - start
    print(f"Triton {version('triton')}: {len(rows)} compilations, {len(bad)} problems, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
