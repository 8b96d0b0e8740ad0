"""Being told to stop: SIGTERM, as schedulers send it before they take a machine away, or SIGINT, which is Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcdd.runlog import TrainingStopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What a signal leaves behind: its number in `signal`, 0 while none has come."""

    signal = 0


class Terminated(TrainingStopped):
    """The process was asked to end by `signal`; a checkpoint of the last step was written."""

    def __init__(self, request: StopRequest, *, step: int, last: str) -> None:
        self.signal = request.signal or signal.SIGTERM  # another rank's signal stops this one too
        super().__init__(f"terminated after step {step}; {last}; go on with --resume")


@contextmanager
def termination(*, listen: bool) -> Iterator[StopRequest]:
    """A request that signals fill in instead of ending the process, so that a step or a save is never cut in two.

    The second signal of a kind ends the process at once, as without us. Outside the main thread, or without `listen`,
    signals do what they did before.
    """
    request = StopRequest()
    if not listen or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, _frame: Any) -> None:
        request.signal = number
        signal.signal(number, before[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
