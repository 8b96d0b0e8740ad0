"""Runs that end without a word, in one process: what kill -9 leaves on the disk, at a chosen call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Killed(BaseException):
    """Stands for a process that ends without a word."""


@contextmanager
def killed_after(calls: int, target: Any, name: str) -> Iterator[None]:
    """What is inside has to die in call number `calls` + 1 of `target.name`."""
    original, count = getattr(target, name), []

    def dies(*args: Any) -> Any:
        count.append(1)
        if len(count) > calls:
            raise Killed
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, dies)
        with pytest.raises(Killed):
            yield
