"""A run's log: one JSON line per step in log.jsonl and, on request, the same numbers in an experiment tracker."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lcdd.checkpoint.trackers import Tracker, require


def finite_or_null(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, replaced by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a log.jsonl; a half-written last line (the run was killed) is left out."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


class RunLog:
    """Writes the log of a run; a context manager.

    Every line has `stage` and the seconds since the log was opened. Without a directory the lines are only kept
    in `lines`, which they always are. Nothing is on disk before the first line: a run that fails before its first
    step leaves its directory as new.
    """

    def __init__(self, directory: str | Path | None, *, stage: str, report_to: str = "none") -> None:
        self.stage = stage
        self.lines: list[dict[str, Any]] = []
        self._start = time.perf_counter()
        self._path = Path(directory) / "log.jsonl" if directory is not None else None
        self._file: IO[str] | None = None
        self._report_to = report_to if directory is not None else "none"
        self._tracker: Tracker | None = None
        if self._report_to != "none":
            require(self._report_to)

    def _open(self, path: Path) -> IO[str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._report_to != "none" and self._tracker is None:
            self._tracker = Tracker(self._report_to, path.parent, self.stage)
        return open(path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, flushed at once."""
        seconds = round(time.perf_counter() - self._start, 4)
        entry: dict[str, Any] = finite_or_null({"stage": self.stage, "seconds": seconds, **line})
        self.lines.append(entry)
        if self._path is not None:
            self._file = self._file or self._open(self._path)
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._tracker is not None:
            self._tracker.write(entry)

    def rewind(self, step: int) -> None:
        """Forget this stage's lines after `step`: a run that goes on from there writes them again."""
        path = self._path
        if path is None or not path.exists():
            return
        self.close()
        kept = [line for line in read_log(path) if line.get("stage") != self.stage or line.get("step", 0) <= step]
        temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)

    def close(self) -> None:
        """Close the files; safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
