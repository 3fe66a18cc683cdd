"""A program of its own, started by launch.py: runs a command and lets nothing of it outlive it, or the caller.

    supervise.py CALLER SECONDS FOLDER COMMAND...

Triton's Python models are processes that stay, blocked, when their server is killed, and a server that waits for a
model that hangs does not heed SIGTERM for ever. So the command's whole process group is killed when the command has
ended, or has not ended SECONDS after SIGTERM. That signal also comes from the kernel when the process CALLER ends.
FOLDER is the command's, and is removed at the end.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_WATCHED = (signal.SIGTERM, signal.SIGCHLD)


def supervise(caller: int, seconds: float, command: list[str]) -> int:
    """Run the command to its end, or ours; its exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _end_with_parent()
    if os.getppid() != caller:  # it ended before the kernel was told
        return 1
    process = subprocess.Popen(command, preexec_fn=_prepare, process_group=0)
    while process.poll() is None:
        if signal.sigwait(_WATCHED) == signal.SIGTERM:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _prepare() -> None:
    """In the new process: it ends with us, and hears the signals that we hold back."""
    _end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    try:
        status = supervise(int(sys.argv[1]), float(sys.argv[2]), sys.argv[4:])
    finally:
        shutil.rmtree(sys.argv[3], ignore_errors=True)
    sys.exit(abs(status))
