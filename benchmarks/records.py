"""Records: a long table, one row a metric, in results/<device>/records.csv; and where and when it was measured.

Rows are replaced by newer ones of the same (case, params, provider, lane, metric) and are otherwise kept, so a run that
was cut short, or that measured one case, leaves the rest. Every row carries its own commit, date and versions.
"""

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Lane, Sample

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row. params, lane: JSON objects as text. clock_mhz: of the processor when the case began, 0 where unknown.
    n: rounds; 1 for what is measured once (memory, compile time)."""

    case: str
    params: str
    provider: str
    lane: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    n: int
    device: str
    threads: int
    clock_mhz: float
    torch: str
    triton: str
    python: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.case, self.params, self.provider, self.lane, self.metric)

    def lane_value(self, name: str) -> Any:
        return json.loads(self.lane).get(name)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where a run takes place."""

    device: str
    threads: int
    torch: str
    triton: str
    python: str
    commit: str

    @classmethod
    def here(cls, device: torch.device) -> "Environment":
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        return cls(
            device=name,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton=_version("triton"),
            python=platform.python_version(),
            commit=_commit(),
        )

    def row(self, case: Case, lane: Lane, sample: Sample, *, clock_mhz: float) -> Record:
        texts = {"params": json.dumps(dict(case.params)), "lane": json.dumps(dict(lane.params))}
        return Record(
            case=case.name, provider=lane.provider, date=timestamp(), clock_mhz=clock_mhz, **texts, **asdict(sample),
            **asdict(self),
        )  # fmt: skip


def cpu_environment() -> dict[str, Any]:
    """Where a run on the CPU takes place, as records have it."""
    return asdict(Environment.here(torch.device("cpu")))


def timestamp() -> str:
    """Now, in UTC; its first ten characters are the date."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ")


def clock_mhz(device: torch.device) -> float:
    """Clock of the processor now, MHz: of the SM (CUDA), the mean over cores as Linux tells it (CPU); 0: unknown."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
        except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
            return 0.0
    found = re.findall(r"^cpu MHz\s*: ([\d.]+)", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    return round(sum(map(float, found)) / len(found), 1) if found else 0.0


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "lcdd", "lcdd_kernels")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+changes" if changed else "")


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A committed record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_of(environment: Environment, *, results: Path = RESULTS) -> Path:
    """results/<device>: the device's name in letters, digits and dashes."""
    return results / re.sub(r"[^a-z0-9]+", "-", environment.device.lower()).strip("-")


def load(path: Path) -> list[Record]:
    """The rows of a records.csv; none where there is no file."""
    if not path.exists():
        return []
    numbers = {"p20": float, "p50": float, "p80": float, "n": int, "threads": int, "clock_mhz": float}
    with open(path, newline="", encoding="utf-8") as stream:
        return [Record(**{k: numbers.get(k, str)(v) for k, v in row.items()}) for row in csv.DictReader(stream)]


def save(path: Path, rows: Iterable[Record]) -> None:
    """Merge rows into the file (newer replaces older), at once and atomically: a run that is cut short loses
    nothing."""
    new = {row.key: row for row in rows}
    stale = {(row.case, row.params) for row in new.values()}
    kept = [row for row in load(path) if (row.case, row.params) not in stale]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [f.name for f in fields(Record)])
        writer.writeheader()
        writer.writerows(_rounded(asdict(row)) for row in [*kept, *new.values()])
    os.replace(temporary, path)


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
