"""Advisory file locks, released by the kernel however their holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

#: One a machine, not one a project folder: two projects on one machine disturb each other's timing just the same.
#: Nor does it follow TMPDIR, which differs between users and jobs.
MACHINE_LOCK = Path("/tmp/transformer-refinery.lock")  # noqa: S108


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
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    started = time.monotonic()
    announced = False
    descriptor = _open(path)
    try:
        while True:
            try:
                fcntl.flock(descriptor, operation)
                if _is_at(descriptor, path):
                    break
                # Whoever tidied up removed the file while we waited: others lock the one that is there now.
                stale, descriptor = descriptor, _open(path)
                os.close(stale)
                continue
            except BlockingIOError:
                pass
            if not announced and waiting is not None:
                waiting()
            announced = True
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise TimeoutError(f"{path} is held by another process")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """The file's descriptor; made if it is not there, and then for every user: who came first locks nobody out."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        # Without O_CREAT, which Linux refuses for another user's file in /tmp (proc_sys_fs(5), protected_regular).
        return os.open(path, flags)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, 0o666)
    with suppress(PermissionError):  # another user made it in the meantime, and did the same
        os.fchmod(descriptor, 0o666)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def building(waiting: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """Several builds may work at once, but never beside a benchmark."""
    return _at_the_machine(waiting, shared=True)


def benchmarking(waiting: Callable[[], None] | None = None) -> AbstractContextManager[None]:
    """A benchmark is alone on its machine: beside one busy neighbour latencies were seen to rise fortyfold."""
    return _at_the_machine(waiting, shared=False)


@contextmanager
def _at_the_machine(waiting: Callable[[], None] | None, *, shared: bool) -> Iterator[None]:
    """Hold the machine's lock. Everyone passes a gate on the way to it, and who waits for the lock keeps the gate: or
    builds that overlap, one after the other, would keep a benchmark waiting for ever.
    """
    unsaid = [waiting] if waiting is not None else []

    def announce() -> None:
        if unsaid:  # at the gate or at the lock, once
            unsaid.pop()()

    with ExitStack() as held:
        with file_lock(MACHINE_LOCK.with_suffix(".gate"), shared=shared, waiting=announce):
            held.enter_context(file_lock(MACHINE_LOCK, shared=shared, waiting=announce))
        yield
