"""Being told to stop: SIGTERM, as schedulers send it before they take a machine away."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcdd.runlog import TrainingStopped


class Terminated(TrainingStopped):
    """The process was asked to end; a checkpoint of the last step was written."""


@contextmanager
def termination(*, listen: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process, so that a step or a save is never cut in two.

    A second SIGTERM ends the process at once, as without us. Outside the main thread, or without `listen`, signals
    do what they did before.
    """
    event = threading.Event()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(_number: int, _frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
