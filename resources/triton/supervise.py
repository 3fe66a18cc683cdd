"""A program, started by launch.py, that runs a command and ends all of its processes with it or with the caller.

    supervise.py CALLER SECONDS FOLDER PREFIX COMMAND...

The processes of Triton's Python models stay, blocked, when their server is killed. A server that waits for a hanging
model ignores SIGTERM for ever. So the supervisor kills the command's whole process group when the command has ended,
or if it has not ended SECONDS after SIGTERM. The kernel also sends that signal when the process CALLER ends. FOLDER
belongs to the command, and is removed at the end.

The names of the command's shared memory segments begin with PREFIX; it is empty if the command has none. Triton makes
such segments readable for all users, whatever the umask, and the texts of requests pass through them. So the
supervisor closes each segment to other users as soon as it is there, and removes the segments that the command leaves
behind.
"""

import ctypes
import fcntl
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_WATCHED = (signal.SIGTERM, signal.SIGCHLD)
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has shared memory
#: Suffix of a file beside the segments of a prefix. The file is locked as long as their supervisor lives.
_LOCK = ".lock"
_PRIVATE = 0o600
#: From inotify(7). A segment's mode is set again just after the segment was made, so both events are watched.
_IN_ATTRIB, _IN_CREATE = 0x4, 0x100
#: How often new segments are looked for if inotify is not available.
_LOOK_SECONDS = 0.05


def supervise(caller: int, seconds: float, prefix: str, command: list[str]) -> int:
    """Run the command until it or its caller ends, and return its exit status as a shell states it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _end_with_parent()
    if os.getppid() != caller:  # the caller ended before the kernel was asked for the signal
        return 1
    segments = Segments(prefix) if prefix and _SHARED_MEMORY.is_dir() else None
    process = subprocess.Popen(command, preexec_fn=_prepare, process_group=0)
    if segments is not None:
        threading.Thread(target=segments.close_on, daemon=True).start()
    while process.poll() is None:
        if signal.sigwait(_WATCHED) == signal.SIGTERM:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    if segments is not None:
        remove_segments(prefix)
    return 128 - status if status < 0 else status


class Segments:
    """The shared memory of one command, known by the prefix of its names."""

    def __init__(self, prefix: str) -> None:
        remove_left_over()
        self._prefix = prefix
        # The file gets its name only once it is locked. Otherwise another supervisor might take it for a leftover.
        draft = _SHARED_MEMORY / f"{prefix}.new"
        self._lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, _PRIVATE)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(_SHARED_MEMORY / f"{prefix}{_LOCK}")
        libc = ctypes.CDLL(None)
        self._events = libc.inotify_init1(os.O_CLOEXEC)
        # Both calls fail if the user's inotify instances or watches are used up.
        if self._events >= 0:
            watch = libc.inotify_add_watch(self._events, bytes(_SHARED_MEMORY), _IN_CREATE | _IN_ATTRIB)
            if watch < 0:
                os.close(self._events)
                self._events = -1

    def close_on(self) -> None:
        """Close each segment to other users as soon as it is there, for ever."""
        while True:
            with suppress(OSError):
                for path in _segments(self._prefix):
                    with suppress(OSError):
                        _close(path)
            if self._events >= 0:
                os.read(self._events, 65536)
            else:
                time.sleep(_LOOK_SECONDS)


def _close(path: Path) -> None:
    # Links are not followed, because other users may make them under the same prefix.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid == os.geteuid() and stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) != _PRIVATE:
            os.fchmod(descriptor, _PRIVATE)
    finally:
        os.close(descriptor)


def _segments(prefix: str) -> list[Path]:
    return [path for path in _SHARED_MEMORY.iterdir() if path.name.startswith(prefix)]


def remove_segments(prefix: str) -> None:
    """Remove the segments of a command that has ended.

    The lock file is removed last, so that another supervisor goes on if this one is killed.
    """
    for path in sorted(_segments(prefix), key=lambda path: path.suffix == _LOCK):
        with suppress(OSError):
            path.unlink()


def remove_left_over() -> None:
    """Remove the segments of commands whose supervisors were killed."""
    for path in _segments("refinery-"):
        if path.suffix == _LOCK:
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its supervisor lives
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        remove_segments(path.stem)
                finally:
                    os.close(descriptor)


def _prepare() -> None:
    """Prepare the new process: it ends with the supervisor, and receives the signals that the supervisor blocks."""
    _end_with_parent()
    # A core file of a server that a request killed would hold the texts of other requests, and the key.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    try:
        status = supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[4], sys.argv[5:])
    finally:
        shutil.rmtree(sys.argv[3], ignore_errors=True)
    sys.exit(status)
