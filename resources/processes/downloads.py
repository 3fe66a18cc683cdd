"""Downloads by libraries that have no overall time limit, each in a process that can be ended.

A thread cannot be ended, and the program waits for the threads of huggingface_hub when it ends. The process runs
`python -m resources.processes.downloads`. It gets its job on its standard input, passwords included, so that they are
neither on its command line nor in its environment.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from resources.boundary.deadlines import Pace
from resources.errors import RefineryError, first_line
from resources.storage.atomic import write_whole

T = TypeVar("T")

#: The limit for any download, however fast it is.
LONGEST_SECONDS = 24 * 3600.0
_POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def download_apart(function: Callable[..., T], *args: Any, folder: Path, variables: Mapping[str, str]) -> T:
    """Run a module-level function in a process of its own, and return what it returns.

    Args:
        function: The function, which downloads into `folder`.
        args: The function's arguments. They are pickled.
        folder: The folder that receives the download. The process is ended if too little arrives; see
            resources.boundary.deadlines.
        variables: The environment of the process.

    Raises:
        RefineryError: The function raised it.
        TimeoutError: The download was too slow.
        ConnectionError: The process ended without an answer, or the function raised another error.
    """
    with tempfile.TemporaryDirectory(prefix="refinery-download-") as scratch:
        answer = Path(scratch) / "answer"
        process = subprocess.Popen(
            [sys.executable, "-m", "resources.processes.downloads", str(answer)],
            env=dict(variables),
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as stream:
                stream.write(pickle.dumps((function, args)))
            _watch(process, folder)
            good, value = pickle.loads(answer.read_bytes())  # noqa: S301 - from our own child
        except FileNotFoundError:
            raise ConnectionError(f"the download process ended with exit code {process.returncode}") from None
        finally:
            process.kill()
            process.wait()
    if good:
        result: T = value
        return result
    raise value if isinstance(value, RefineryError) else ConnectionError(value)


def _watch(process: subprocess.Popen[bytes], folder: Path) -> None:
    pace, deadline = Pace(_size(folder)), time.monotonic() + LONGEST_SECONDS
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pace.require(_size(folder))
            if time.monotonic() > deadline:
                raise TimeoutError(f"the download did not finish within {LONGEST_SECONDS:g} s") from None


def _size(folder: Path) -> int:
    """Return the bytes of all files below the folder, unfinished ones included."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # it was renamed meanwhile
                total += (Path(root) / name).lstat().st_size
    return total


def _has_descriptor(stream: Any) -> bool:
    """Return whether the stream is a real file. Tests and notebooks replace it with other objects."""
    try:
        stream.fileno()
    except (OSError, AttributeError, ValueError):
        return False
    return True


def main() -> None:
    """Run the one job that standard input holds, and write its answer to the file that the command line names."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    data = sys.stdin.buffer.read()
    answer: tuple[bool, Any]
    try:
        function, args = pickle.loads(data)  # noqa: S301 - from our own parent
        answer = (True, function(*args))
    except RefineryError as error:
        answer = (False, error)
    except Exception as error:
        answer = (False, first_line(error, 1000))
    write_whole(Path(sys.argv[1]), pickle.dumps(answer))


if __name__ == "__main__":
    main()
