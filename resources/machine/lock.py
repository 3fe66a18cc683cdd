"""The machine's lock, which keeps benchmarks apart from all other work that computes."""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from resources.errors import LockError
from resources.storage.locks import file_lock, open_lock

#: The machine has one lock, and not one for each project folder: two projects on one machine disturb each other's
#: timing just the same. The path does not follow TMPDIR, which differs between users and jobs.
MACHINE_LOCK = Path("/tmp/transformer-refinery.lock")  # noqa: S108
_LOG = logging.getLogger(__name__)
#: The locks that this process uses in place of the machine's, and has already warned about.
_TOLD: set[Path] = set()


def building(waiting: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
    """Hold the machine's lock together with other builds, but never beside a benchmark.

    Raises:
        LockError: The lock cannot be held.
    """
    return _at_the_machine(waiting, shared=True)


def benchmarking(waiting: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
    """Hold the machine's lock alone, for a benchmark.

    Beside one busy neighbour, latencies were seen to rise fortyfold.

    Raises:
        LockError: The lock cannot be held.
    """
    return _at_the_machine(waiting, shared=False)


@contextmanager
def _at_the_machine(waiting: Callable[[str], None] | None, *, shared: bool) -> Iterator[None]:
    """Hold the machine's lock.

    Each process takes a second lock, the gate, on its way to the machine's lock, and keeps the gate while it waits.
    Without the gate, builds that overlap one after the other would keep a benchmark waiting for ever.
    """
    unsaid = [waiting or _say_work]

    def announce(who: str) -> None:
        if unsaid:  # one announcement is enough for both locks
            unsaid.pop()(who)

    with ExitStack() as held:
        lock = _usable_machine_lock()
        try:
            with file_lock(_gate_of(lock), shared=shared, waiting=announce):
                held.enter_context(file_lock(lock, shared=shared, waiting=announce))
        except OSError as error:
            raise LockError(
                f"{error.filename or lock}: the lock that keeps benchmarks on this machine apart cannot be held: "
                f"{error.strerror or error}. Check that its folder can be written and has room."
            ) from error
        yield


def _say_work(who: str) -> None:
    _LOG.warning("waiting for other work on this machine to end: %s", who)


def _gate_of(lock: Path) -> Path:
    return lock.with_suffix(".gate")


def _usable_machine_lock() -> Path:
    """Return the machine's lock, or a lock of this user's own if the machine's lock cannot be opened.

    Everybody may write in the folder of the machine's lock, so the first user may put a link, a folder or a file there
    that nobody else may open. That must not stop the work of others. The lock of the user's own no longer keeps their
    benchmarks apart from ours.
    """
    for path in (MACHINE_LOCK, _gate_of(MACHINE_LOCK)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(open_lock(path))
        except OSError as error:
            own = _own_lock()
            if own not in _TOLD:
                _TOLD.add(own)
                _LOG.warning(
                    "%s cannot be used as a lock (%s; it belongs to %s), so benchmarks of other users of this machine "
                    "may disturb ours. Have it removed. Until then, %s is used.",
                    *(path, error.strerror or error, _owner(path), own),
                )
            return own
    return MACHINE_LOCK


def _own_lock() -> Path:
    try:
        home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # containers may run as a user without a name
        home = Path.cwd()
    return home / ".cache" / "transformer-refinery" / "machine.lock"


def _owner(path: Path) -> str:
    with suppress(OSError, KeyError):
        return f"the user {pwd.getpwuid(path.lstat().st_uid).pw_name}"
    return "another user"
