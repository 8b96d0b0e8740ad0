"""A run's log: one JSON line per step in log.jsonl and, on request, TensorBoard scalars of the same numbers."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lcdd.errors import InputError


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
        self._board: Any = None
        self._boards: Any = None
        if directory is not None and report_to == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError(
                    "report_to: expected tensorboard to be installed: pip install 'lcdd[tensorboard]'"
                ) from None
            self._boards = SummaryWriter

    def _open(self, path: Path) -> IO[str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._boards is not None and self._board is None:
            self._board = self._boards(str(path.parent / "tensorboard"))
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
        if self._board is not None:
            self._write_scalars(entry)

    def _write_scalars(self, line: Mapping[str, Any]) -> None:
        step = int(line.get("step", 0))
        for key, value in line.items():
            if key in ("step", "stage", "seconds"):
                continue
            for name, number in value.items() if isinstance(value, dict) else [(None, value)]:
                if isinstance(number, int | float) and not isinstance(number, bool):
                    tag = f"{self.stage}/{key}" if name is None else f"{self.stage}/{key}/{name}"
                    self._board.add_scalar(tag, number, step)

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
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
