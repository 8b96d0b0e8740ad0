"""Two commits side by side: `python -m benchmarks.run --base REV`.

The other commit is checked out in a worktree of its own, its native library built there, and today's benchmarks run
against its packages; the two run in turns, so that a drift of the machine meets both.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.records import ROOT, Record, load

TURNS = 2


def compare(arguments: argparse.Namespace) -> int:
    """Prints every lane's median time at both commits and their ratio; 1 where a run failed."""
    with tempfile.TemporaryDirectory(prefix="lcdd-base-") as temporary:
        tree = Path(temporary) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), arguments.base], cwd=ROOT, check=True)
        try:
            bring_benchmarks(tree)
            if not _built(tree):
                print(f"benchmarks: no native library at {arguments.base}; the reference serves there", file=sys.stderr)
            rows: dict[str, list[Record]] = {"base": [], "here": []}
            for turn in range(TURNS):
                for name, place in (("base", tree), ("here", ROOT)):
                    output = Path(temporary) / f"{name}-{turn}"
                    if _run(arguments, place, output):
                        return 1
                    rows[name] += [row for path in output.glob("*/records.csv") for row in load(path)]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    _print(rows["base"], rows["here"])
    return 0


def bring_benchmarks(tree: Path) -> None:
    """Today's benchmarks, and what they share with the tests, in the place of another commit's."""
    for name in ("benchmarks", "fixtures"):
        shutil.rmtree(tree / name, ignore_errors=True)
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("results", "__pycache__"))


def _built(tree: Path) -> bool:
    """Build the native library of a tree in place; whether that went well."""
    steps = (["-S", ".", "-B", "build/native", "-DCMAKE_BUILD_TYPE=Release"], ["--build", "build/native"])
    cmake = shutil.which("cmake")
    return bool(cmake) and not any(
        subprocess.run([str(cmake), *step], cwd=tree, capture_output=True).returncode for step in steps
    )


def _run(arguments: argparse.Namespace, tree: Path, output: Path) -> int:
    command = [sys.executable, "-m", "benchmarks.run", "--device", arguments.device, "--results", str(output)]
    command += ["--threads", str(arguments.threads), "--effort", str(arguments.effort)]
    command += ["--time-limit", str(arguments.time_limit)]
    for name in ("list", "size"):
        if getattr(arguments, name):
            command += [f"--{name}", getattr(arguments, name)]
    if arguments.cases:
        command += ["--cases", *arguments.cases]
    return subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}).returncode


def _print(base: list[Record], here: list[Record]) -> None:
    def medians(rows: list[Record], metric: str) -> dict[tuple[str, ...], float]:
        found: dict[tuple[str, ...], list[float]] = {}
        for row in rows:
            if row.metric == metric:
                found.setdefault((row.case, row.params, row.provider, row.lane), []).append(row.p50)
        return {lane: statistics.median(values) for lane, values in found.items()}

    (before, now), (floor_before, floor_now) = ([medians(rows, m) for rows in (base, here)] for m in ("time", "ratio"))
    commits = [rows[0].commit if rows else "nothing" for rows in (base, here)]
    print(f"\n{commits[0]} (base) against {commits[1]} (here). A floor's own time that differs is the machine's doing;")
    print("the last two columns, each run's times over its own floor, are free of that.")
    print(f"\n{'base ms':>12} {'here ms':>12} {'here/base':>10} {'base/floor':>11} {'here/floor':>11}")
    for lane in [lane for lane in before if lane in now]:
        over = "".join(f"{of[lane]:12.3f}" if lane in of else " " * 12 for of in (floor_before, floor_now))
        print(f"{1e3 * before[lane]:12.3f} {1e3 * now[lane]:12.3f} {now[lane] / before[lane]:10.3f}{over}   "
              f"{' '.join(lane)}")  # fmt: skip
