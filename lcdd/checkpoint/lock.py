"""One process at a time on an output directory: two that resume the same run would sweep away each other's files."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcdd.errors import InputError

logger = logging.getLogger(__name__)


@contextmanager
def only_writer(output_dir: str | Path | None) -> Iterator[None]:
    """Hold `output_dir` (None: nothing) for this process, by a lock on `.NAME.lock` beside it, which its end removes.

    The lock dies with the process, so a killed one leaves nothing to clear up. On several ranks the first holds it.
    Where the file system has no locks, or nothing may be written beside the directory, it is a warning.

    Raises:
        InputError: another process holds the directory.
    """
    if output_dir is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(output_dir).absolute()
    file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(file)
    except OSError as error:
        logger.warning("output_dir: not locked against other runs (%s)", error)
        yield
        return
    if descriptor is None:
        raise InputError(
            f"output_dir: expected a directory that no other run writes to, got {str(output_dir)!r}, "
            "which another lcdd process holds"
        )
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(file: Path) -> int | None:
    """A descriptor that holds the lock on `file`; None if another process does."""
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return _locked(file)  # its holder ended in between and took the name away: that lock would keep nobody out
