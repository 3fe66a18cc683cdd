"""Advisory file locks, released by the kernel however their holder ends."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

#: One a machine, not one a project folder: two projects on one machine disturb each other's timing just the same.
MACHINE_LOCK = Path(tempfile.gettempdir()) / "transformer-refinery.lock"


@contextmanager
def file_lock(
    path: Path,
    *,
    shared: bool = False,
    timeout_s: float | None = None,
    waiting: Callable[[], None] | None = None,
) -> Iterator[None]:
    """Hold the lock at `path`; many holders may share it, or one have it alone.

    Polls, so that Ctrl-C works while waiting; `waiting` is called once if the lock is not free at once.
    Raises TimeoutError after `timeout_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # World-writable: whoever came first must not lock other users of the machine out.
    previous = os.umask(0)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    finally:
        os.umask(previous)
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    started = time.monotonic()
    announced = False
    try:
        while True:
            try:
                fcntl.flock(descriptor, operation)
                break
            except BlockingIOError:
                if not announced and waiting is not None:
                    waiting()
                announced = True
                if timeout_s is not None and time.monotonic() - started > timeout_s:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def building(waiting: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """Several builds may work at once, but never beside a benchmark."""
    return file_lock(MACHINE_LOCK, shared=True, waiting=waiting)


def benchmarking(waiting: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """A benchmark is alone on its machine: beside one busy neighbour latencies were seen to rise fortyfold."""
    return file_lock(MACHINE_LOCK, waiting=waiting)
