"""Being told to stop: SIGTERM, as schedulers send it before they take a machine away, or SIGINT, which is Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lcdd.errors import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
