"""What a command tells while it works, on standard error.

On a terminal: one live table of its stages, the running bar with n of N and what is left, an estimate for the whole.
Elsewhere (a pipe, a log): a plain line now and then, for work that takes long.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 30.0
"""Without a terminal a bar says how far it is this often."""
SURE = 0.03
"""Share of all work after which the whole command's time is estimated."""
BAR_WIDTH = 24


def duration(seconds: float) -> str:
    """Seconds for people: 4 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"


class Bar:
    """Work of `total` units under a name; a context manager.

    Args:
        done: units that were done before (a resumed run).
        main: this bar, and not those inside it, is how far the stage is.
        hidden: nothing is shown.
    """

    def __init__(self, total: int, name: str, *, done: int = 0, main: bool = False, hidden: bool = False) -> None:
        self.total, self.name, self.main, self.hidden = max(total, 1), name, main, hidden
        self.done = self._first = done
        self.words = ""
        self._start = self._told = time.perf_counter()

    def __enter__(self) -> Self:
        self._start = self._told = time.perf_counter()
        if not self.hidden:
            _DISPLAY.push(self)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.hidden:
            _DISPLAY.pop(self)

    def update(self, n: int = 1, *, shown: Mapping[str, str] | None = None) -> None:
        """`n` more units are done; `shown`: what stands beside the bar, name -> text."""
        self.done += n
        if shown is not None:
            self.words = ", ".join(f"{name} {text}" for name, text in shown.items())
        if not self.hidden and not _DISPLAY.live and time.perf_counter() - self._told >= LINE_SECONDS:
            self._told = time.perf_counter()
            print(f"{self.name}: {self}", file=sys.stderr, flush=True)

    @property
    def share(self) -> float:
        """How much of the work is done."""
        return min(self.done / self.total, 1.0)

    def __str__(self) -> str:
        made = self.done - self._first
        left = (time.perf_counter() - self._start) / made * (self.total - self.done) if made else None
        parts = [f"{self.done}/{self.total}", f"{duration(left)} left" if left is not None else "", self.words]
        return ", ".join(part for part in parts if part)


class Stages:
    """The stages of a command, in order; a context manager around all of them.

    Args:
        work: stage -> how much work it is beside the others, in any unit; what the estimate of the whole goes by.

    Attributes:
        seconds: stage -> how long it took.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self.work = dict(work)
        self.seconds: dict[str, float] = {}
        self.current: str | None = None
        self.skipped: set[str] = set()
        self._begun = time.perf_counter()
        self._start = self._begun

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        _DISPLAY.open(self)
        return self

    def __exit__(self, *_: object) -> None:
        _DISPLAY.close()

    @contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Inside, the stage is the one at work."""
        self.work.setdefault(stage, 0.0)
        self.current, self._start = stage, time.perf_counter()
        try:
            yield
        finally:
            self.current = None
        self.seconds[stage] = round(time.perf_counter() - self._start, 2)

    def finished_before(self, stage: str, seconds: float) -> None:
        """The stage need not be done again."""
        self.seconds[stage] = seconds
        self.skipped.add(stage)

    def left(self, share: float) -> float | None:
        """Estimated seconds to the end, while `share` of the current stage is done; None before it can be told."""
        ours = {stage: work for stage, work in list(self.work.items()) if stage not in self.skipped}
        done = sum(work for stage, work in ours.items() if stage in self.seconds)
        done += ours.get(self.current or "", 0.0) * share
        total = sum(ours.values())
        if not total or done < SURE * total:
            return None
        return (time.perf_counter() - self._begun) * (total - done) / done


class _Display:
    """The one place on the terminal where stages and bars are drawn."""

    def __init__(self) -> None:
        self.stages: Stages | None = None
        self.bars: list[Bar] = []
        self.live: Live | None = None

    def open(self, stages: Stages) -> None:
        self.stages = stages
        self._draw()

    def close(self) -> None:
        self.stages = None
        self._erase()

    def push(self, bar: Bar) -> None:
        self.bars.append(bar)
        self._draw()

    def pop(self, bar: Bar) -> None:
        with suppress(ValueError):
            self.bars.remove(bar)
        if not self.bars and self.stages is None:
            self._erase()

    def _draw(self) -> None:
        if self.live is not None or not sys.stderr.isatty():
            return
        console = Console(stderr=True)
        self.live = Live(
            get_renderable=self.render,
            console=console,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=False,
        )
        self.live.start()

    def _erase(self) -> None:
        live, self.live = self.live, None
        if live is not None:
            live.stop()

    def render(self) -> Any:
        """What stands on the terminal now."""
        rows: list[Any] = []
        share = next((bar.share for bar in list(self.bars) if bar.main), 0.0)
        if self.stages is not None:
            rows.append(_stage_table(self.stages))
        for bar in list(self.bars):
            line = Table.grid(padding=(0, 1))
            line.add_row(Text(bar.name), ProgressBar(bar.total, bar.done, width=BAR_WIDTH), Text(str(bar)))
            rows.append(line)
        if self.stages is not None and (left := self.stages.left(share)) is not None:
            rows.append(Text(f"about {duration(left)} left in all"))
        return Group(*rows)


def _stage_table(stages: Stages) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for stage in list(stages.work):  # drawn by a thread of its own, while stages may be added
        if stage in stages.skipped:
            table.add_row(Text(f"✓ {stage}"), Text("before"))
        elif stage in stages.seconds:
            table.add_row(Text(f"✓ {stage}"), Text(duration(stages.seconds[stage])))
        else:
            mark = "▸" if stage == stages.current else " "
            table.add_row(Text(f"{mark} {stage}", style="bold" if mark == "▸" else "dim"), "")
    return table


_DISPLAY = _Display()
