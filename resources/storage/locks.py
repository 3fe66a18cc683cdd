"""Advisory file locks, which the kernel releases when the holder ends, even by a kill."""

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

#: After this long a warning names the holder, unless the caller announces the wait itself.
_PATIENCE_SECONDS = 2.0
#: The number of words shown of a holder's command, and of letters of each word. The command may be anybody's.
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
    """Hold the lock at `path`, alone or together with other holders.

    The function polls, so that Ctrl-C works while it waits.

    Args:
        path: The lock's file, which is created if it is missing.
        shared: Whether many holders may share the lock.
        timeout_s: The longest wait. Without it, the wait has no limit.
        waiting: A function that is called once with a description of the holders if the lock is not free at once.
            Without it, a warning is logged after some seconds.

    Raises:
        TimeoutError: The lock was not free within `timeout_s`.
        OSError: There can be no lock at `path`.
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
                # Another process removed the file during the wait. Others now lock the file that took its place.
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
    """Return the process, user and command of the holders of the lock at `path`, as far as the system tells.

    The system lists the holders in `/proc/locks` (proc(5)).
    """
    try:
        inode = path.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "another process"
    found = dict.fromkeys(
        int(fields[4])
        for fields in (line.split() for line in lines)
        # The device is not compared, because a file system that lies over another names the lower one's device.
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and fields[4].isdigit()
    )
    return ", ".join(filter(None, map(_described, found))) or "another process"


def _described(pid: int) -> str:
    import psutil  # imported here, because every step loads the definitions

    try:
        process = psutil.Process(pid)
        user, words = process.username(), process.cmdline()
    except psutil.Error:
        return ""
    # Options and addresses are left out, because they may hold secrets.
    plain = [word for word in words if not word.startswith("-") and "=" not in word and "://" not in word]
    command = " ".join(Path(word).name[:_LETTERS] for word in plain[:_WORDS]) or process.name()
    readable = "".join(letter if letter.isprintable() else "?" for letter in command)
    return f"process {pid} ({readable}) of {user}"


def _say(path: Path) -> Callable[[str], None]:
    return lambda who: _LOG.warning("waiting for %s, which is held by %s", path, who)


def open_lock(path: Path) -> int:
    """Return a descriptor of the lock's file, and create the file if it is missing.

    Every user may open a new file, so that the first user does not lock the others out.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # O_CREAT is left out: Linux refuses it for another user's file in /tmp (proc_sys_fs(5), protected_regular).
        return _checked(os.open(path, flags | os.O_RDWR), path)
    except PermissionError:
        return _checked(os.open(path, flags | os.O_RDONLY), path)  # a lock needs no more
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(PermissionError):  # another user created the file in the meantime, and set its mode
        os.fchmod(descriptor, 0o666)
    return _checked(descriptor, path)


def _checked(descriptor: int, path: Path) -> int:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise FileExistsError(errno.EEXIST, "it is not a regular file", str(path))


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
