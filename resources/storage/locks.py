"""Advisory file locks, released by the kernel however their holder ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Who waits longer than that is told for whom, unless the caller says so by itself.
_PATIENCE_SECONDS = 2.0
#: Of a holder's command, which may be anybody's: so many words, and letters of each.
_WORDS, _LETTERS = 4, 40
_LOG = logging.getLogger(__name__)


@contextmanager
def file_lock(
    path: Path,
    *,
    shared: bool = False,
    timeout_s: float | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock at `path`; many holders may share it, or one have it alone.

    Polls, so that Ctrl-C works while waiting. `waiting` is called once if the lock is not free at once, with who holds
    it; without it a warning is logged after some seconds. Raises TimeoutError after `timeout_s`, and OSError where
    there can be no lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    started = time.monotonic()
    announced = False
    descriptor = open_lock(path)
    try:
        while True:
            try:
                fcntl.flock(descriptor, operation)
                if _is_at(descriptor, path):
                    break
                # Whoever tidied up removed the file while we waited: others lock the one that is there now.
                stale, descriptor = descriptor, open_lock(path)
                os.close(stale)
                continue
            except BlockingIOError:
                pass
            waited_s = time.monotonic() - started
            if timeout_s is not None and waited_s > timeout_s:
                raise TimeoutError(f"{path} is held by {holders(path)}")
            if not announced and (waiting is not None or waited_s > _PATIENCE_SECONDS):
                announced = True
                (waiting or _say(path))(holders(path))
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def holders(path: Path) -> str:
    """Say who holds the lock at `path`: process, user and command, as far as the system tells (proc(5), locks)."""
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "another process"
    found = dict.fromkeys(
        int(fields[4])
        for fields in (line.split() for line in lines)
        # The device is not compared: file systems that lie over others name the one below.
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and fields[4].isdigit()
    )
    return ", ".join(filter(None, map(_described, found))) or "another process"


def _described(pid: int) -> str:
    import psutil  # here, because definitions are loaded for every step

    try:
        process = psutil.Process(pid)
        user, words = process.username(), process.cmdline()
    except psutil.Error:
        return ""
    # Neither options nor addresses, which may hold secrets.
    plain = [word for word in words if not word.startswith("-") and "=" not in word and "://" not in word]
    command = " ".join(Path(word).name[:_LETTERS] for word in plain[:_WORDS]) or process.name()
    readable = "".join(letter if letter.isprintable() else "?" for letter in command)
    return f"process {pid} ({readable}) of {user}"


def _say(path: Path) -> Callable[[str], None]:
    return lambda who: _LOG.warning("waiting for %s, which is held by %s", path, who)


def open_lock(path: Path) -> int:
    """The file's descriptor; made if it is not there, and then for every user: who came first locks nobody out."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # Without O_CREAT, which Linux refuses for another user's file in /tmp (proc_sys_fs(5), protected_regular).
        return _checked(os.open(path, flags | os.O_RDWR), path)
    except PermissionError:
        return _checked(os.open(path, flags | os.O_RDONLY), path)  # enough for a lock
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):  # another user made it in the meantime, and did the same
        os.fchmod(descriptor, 0o666)
    return _checked(descriptor, path)


def _checked(descriptor: int, path: Path) -> int:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileExistsError(errno.EEXIST, "it is no regular file", str(path))


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
