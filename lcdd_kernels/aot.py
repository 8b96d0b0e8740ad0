"""Compiles every Triton kernel, in every configuration that its launcher can choose, for named GPUs, without a GPU.

    python -m lcdd_kernels.aot                    the core configurations (what LCDD chooses by itself), all targets
    python -m lcdd_kernels.aot --all --targets 90 every configuration, one target
    python -m lcdd_kernels.aot --first            one configuration of every kernel

Read off each compiled kernel: registers, spills to memory, shared memory, barriers inside loops, and whether it uses
Hopper's wgmma. The exit status is 1 when a kernel does not compile, spills, needs more shared memory than the chip has,
waits at more barriers in its loops than its signature says, or lacks the wgmma that it should have. Kernels come from
the modules' `aot_signatures()`; compiler, ptxas and cuobjdump from the installed Triton, or from another one whose
folder comes first in PYTHONPATH. Compilation runs in processes of its own, so it works where the caller has
TRITON_INTERPRET set.
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
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

from lcdd_kernels.assembly import barriers_in_loops
from lcdd_kernels.triton_kernels import MODULES, AotSignature


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and the most shared memory that a block can have, in bytes (the vendors' guides)."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int

    @property
    def label(self) -> str:
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


TARGETS: dict[str, Target] = {
    "80": Target("cuda", 80, 32, 163 * 1024),
    "89": Target("cuda", 89, 32, 99 * 1024),
    "90": Target("cuda", 90, 32, 227 * 1024),
    "100": Target("cuda", 100, 32, 227 * 1024),
    "120": Target("cuda", 120, 32, 99 * 1024),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel in one configuration on one target. `problem` is None where nothing is wrong; sizes in bytes."""

    kernel: str
    label: str
    num_warps: int
    target: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    loop_barriers: int = 0
    wgmma: bool = False
    problem: str | None = None


def _start_worker() -> None:
    # Before Triton's first import: interpreted functions cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)


@functools.cache
def _signatures(stem: str) -> tuple[AotSignature, ...]:
    return tuple(importlib.import_module(f"lcdd_kernels.triton_kernels.{stem}").aot_signatures())


def _select(stems: Sequence[str], which: str) -> list[tuple[str, int]]:
    """(module, index) of the signatures: "all", the "core" ones, or the "first" of every kernel."""
    chosen, seen = [], set()
    for stem in stems:
        for index, entry in enumerate(_signatures(stem)):
            if which == "all" or (entry.core and not (which == "first" and entry.kernel.__name__ in seen)):
                chosen.append((stem, index))
                seen.add(entry.kernel.__name__)
    return chosen


def compile_signature(stem: str, index: int, target: str) -> Row:
    """Compiles signature `index` of a module for one of TARGETS; a bad kernel is a row too."""
    entry, chip = _signatures(stem)[index], TARGETS[target]
    row = functools.partial(
        Row, kernel=entry.kernel.__name__, label=entry.label, num_warps=entry.config.num_warps, target=target
    )
    names = entry.kernel.arg_names
    unknown = (set(entry.signature) | set(entry.constexprs)) - set(names)
    missing = [n for n in names if n not in entry.signature and n not in entry.constexprs]
    if unknown or missing:
        return row(problem=f"its signature names {sorted(unknown)} in vain and lacks {missing}")
    try:
        compiled = _compile(entry, chip)
    # The compiler raises types of its own, ptxas among them; each is this row's result.
    except Exception as error:
        return row(problem=f"does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    assembly = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
    registers, spilled = _usage(compiled.asm)
    found = row(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        loop_barriers=barriers_in_loops(assembly),
        wgmma="wgmma.mma_async" in assembly,
    )
    return replace(found, problem=_problem(found, entry, chip))


def _problem(row: Row, entry: AotSignature, chip: Target) -> str | None:
    if row.spilled:
        return f"spills: {row.spilled} bytes of local memory a thread"
    if row.shared > chip.shared_limit:
        return f"needs {row.shared} bytes of shared memory of {chip.shared_limit}"
    if row.loop_barriers > entry.loop_barriers:
        return f"waits at {row.loop_barriers} barriers in its loops, at most {entry.loop_barriers} expected"
    if row.target == "90" and entry.wgmma and not row.wgmma:
        return "uses no wgmma"
    return None


def _compile(entry: AotSignature, chip: Target) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    # Every argument in its place: a runtime type, or "constexpr".
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in entry.divisible_by_16}
    source = ASTSource(entry.kernel, signature, constexprs=dict(entry.constexprs), attrs=attributes)
    target = GPUTarget(chip.backend, chip.arch, chip.warp_size)
    return triton.compile(source, target=target, options=entry.config.options(chip.backend))


def _usage(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread): by the cuobjdump that Triton brings, or as AMD's compiler
    writes them into the assembly."""
    if "amdgcn" in asm:
        found = {
            name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", asm["amdgcn"], re.MULTILINE)
        }
        return found["vgpr_count"], found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = _USAGE.search(output)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {output[:300]}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local


def compile_all(
    *,
    targets: Sequence[str] = tuple(TARGETS),
    modules: Sequence[str] = MODULES,
    which: str = "core",
    jobs: int | None = None,
) -> Iterator[Row]:
    """Rows in the order of the signatures, each for all targets, as they are ready.

    targets: names out of TARGETS. modules: stems. which: the "core" configurations, "all", or the "first" of every
    kernel. jobs: processes (default: one per core, at most 8). Raises ValueError for an unknown target or module.
    """
    for name, given, known in (("targets", targets, tuple(TARGETS)), ("modules", modules, MODULES)):
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {', '.join(given) or 'none'}")
    jobs = jobs or min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        chosen = pool.submit(_select, modules, which).result()
        work = [(stem, index, target) for stem, index in chosen for target in targets]
        yield from pool.map(compile_signature, *zip(*work, strict=True), chunksize=4)


def table(rows: Sequence[Row]) -> str:
    """A readable table: one line per kernel and configuration, `registers/shared` per target; problems below."""
    targets = [target for target in TARGETS if any(row.target == target for row in rows)]
    lines: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.kernel, row.label, row.num_warps), {})[row.target] = row
    width_kernel = max(len("kernel"), *(len(k) for k, _, _ in lines))
    width_label = max(len("configuration"), *(len(label) for _, label, _ in lines))
    head = f"{'kernel':<{width_kernel}}  {'configuration':<{width_label}}  warps"
    text = [head + "".join(f"  {TARGETS[t].label:>12}" for t in targets)]
    for (kernel, label, warps), of_target in lines.items():
        cells = "".join(f"  {_cell(of_target.get(t)):>12}" for t in targets)
        text.append(f"{kernel:<{width_kernel}}  {label:<{width_label}}  {warps:>5}{cells}")
    text.append("per target: registers a thread / bytes of shared memory; b: barriers in loops; w: wgmma; !: see below")
    text += [f"{TARGETS[r.target].label} {r.kernel} [{r.label}]: {r.problem}" for r in rows if r.problem]
    return "\n".join(text)


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    barriers = f"{row.loop_barriers}b" if row.loop_barriers else ""
    return f"{row.registers}/{row.shared}{barriers}{'w' if row.wgmma else ''}{'!' if row.problem else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0 when every kernel is as it should be, else 1."""
    parser = argparse.ArgumentParser(prog="python -m lcdd_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="GPUs, e.g. 80,90,gfx942 (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every configuration, not only the core ones")
    which.add_argument("--first", action="store_true", help="one configuration of every kernel")
    parser.add_argument("--modules", default=",".join(MODULES), help="modules of triton_kernels, e.g. gates,delta_step")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, at most 8)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        rows = list(
            compile_all(
                targets=arguments.targets.split(","),
                modules=arguments.modules.split(","),
                which="all" if arguments.all else "first" if arguments.first else "core",
                jobs=arguments.jobs,
            )
        )
    except ValueError as error:
        parser.error(str(error))
    bad = [row for row in rows if row.problem]
    print(table(rows))
    seconds = time.perf_counter() - start
    print(f"Triton {version('triton')}: {len(rows)} compilations, {len(bad)} problems, {seconds:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
