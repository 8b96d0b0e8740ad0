"""`lcdd kernels`: which backend serves each op here, why the others do not, and how exact each is, measured now.

lcdd kernels --aot          also compiles every Triton kernel for named GPUs, with registers, spills and shared memory
"""

import argparse
import platform
from collections.abc import Iterator, Sequence

import torch

from lcdd_kernels import aot
from lcdd_kernels.backends import Row, available, report
from lcdd_kernels.cases import case_of
from lcdd_kernels.registry import OPS
from lcdd_kernels.testing import Comparison, compare, truncates_bfloat16

CPU = torch.device("cpu")


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def backend_table(rows: list[Row]) -> str:
    """A line an op and device: the backend that serves it, and the others that could; then why the rest cannot."""
    table = [["op", "device", "serves", "also there"]]
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, device in dict.fromkeys((row.op, row.device) for row in rows):
        own = [row for row in rows if (row.op, row.device) == (op, device)]
        serves = [row.backend for row in own if row.chosen]
        also = [row.backend for row in own if row.reason is None and not row.chosen]
        table.append([op, device, ", ".join(serves), ", ".join(also) or "-"])
        for row in own:
            if row.reason is not None:
                reasons.setdefault((row.backend, row.reason), []).append(op)
    n_ops = len({row.op for row in rows})
    why = [
        f"{backend} not for {'any' if len(set(ops)) == n_ops else ', '.join(dict.fromkeys(ops))}: {reason}"
        for (backend, reason), ops in reasons.items()
    ]
    return "\n".join([_table(table), "", *why])


def numerics_table(measured: list[Comparison]) -> str:
    """A line an op, backend and dtype: its worst output's error to the float64 reference, over that of PyTorch."""
    worst: dict[tuple[str, str, str], Comparison] = {}
    failed: dict[tuple[str, str, str], list[str]] = {}
    for item in measured:
        key = (item.op, item.backend, item.dtype)
        if key not in worst or item.ratio.max > worst[key].ratio.max:
            worst[key] = item
        if not item.ok:
            failed.setdefault(key, []).append(item.output)
    table = [["op", "backend", "dtype", "worst output", "max error", "PyTorch's", "ratio max", "p99", "rms", "verdict"]]
    for key, item in worst.items():
        verdict = f"FAILED: {', '.join(failed[key])}" if key in failed else "ok"
        errors = [f"{item.error.max:.1e}", f"{item.expression.max:.1e}"]
        ratios = [f"{ratio:.2f}" for ratio in item.ratio]
        table.append([*key, item.output, *errors, *ratios, verdict])
    return _table(table)


def comparisons(
    backend: str | None = None, *, device: torch.device | str = "cpu", size: int = 4
) -> Iterator[Comparison]:
    """Every op, dtype and available backend (or the named one), measured now."""
    for op in OPS:
        for dtype in case_of(op).dtypes:
            for name, reason in available(op, device, dtype).items():
                if reason is None and backend in (None, name) and not truncates_bfloat16(name, device, dtype):
                    yield from compare(op, name, dtype, device=device, size=size)


def main(argv: Sequence[str] = ()) -> int:
    """Print the report card; 0 if everything that is available passes, else 1.

    argv: `--aot` adds the table of ahead-of-time compilation (a minute or two), `--targets 80,90` names its GPUs.
    """
    parser = argparse.ArgumentParser(prog="lcdd kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--aot", action="store_true", help="also compile every Triton kernel for named GPUs")
    targets = ",".join(map(str, aot.TARGETS))
    parser.add_argument("--targets", default=targets, help="compute capabilities for --aot (default: %(default)s)")
    arguments = parser.parse_args(argv)
    devices = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    for device in devices[1:]:
        print(f"{device}: {torch.cuda.get_device_name(device)}")
    print("\nBackends\n" + backend_table(report()))
    measured = [item for device in devices for item in comparisons(device=device, size=1)]
    print(
        "\nError to the float64 reference, beside that of the same-dtype PyTorch expression\n"
        "(ratio: the one over the other, or over half an ulp where PyTorch's is smaller; up to 2 passes)"
    )
    print(numerics_table(measured))
    passed = all(item.ok for item in measured)
    if arguments.aot:
        print("\nTriton kernels, compiled ahead of time")
        passed &= aot.main(["--targets", arguments.targets]) == 0
    return 0 if passed else 1
