"""The processes that run a server's Python models: Triton starts one for each instance and does not replace it."""

from __future__ import annotations

import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

#: A look at the processes that are known costs microseconds, one at all of the machine's some milliseconds.
_SEARCH_SECONDS = 5.0
_PROGRAM = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has shared memory


@dataclass(frozen=True)
class Stub:
    """One of them. `model`: the Triton model that it runs; `region`: the name of its shared memory."""

    process: psutil.Process
    model: str
    region: str


class Stubs:
    """Those of one server. leader: the process that the server runs below."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._known: list[Stub] = []
        self._searched = 0.0
        self.search()

    def search(self) -> None:
        """Find those that there are now."""
        self._searched = time.monotonic()
        self._known = []
        with suppress(psutil.Error):
            for process in psutil.Process(self._leader).children(recursive=True):
                if (stub := _read(process)) is not None:
                    self._known.append(stub)

    def lost(self) -> dict[str, str]:
        """Return the models that have fewer processes than at the last call, each with how one of them ended.

        A model that was loaded anew has other processes, but not fewer.
        """
        ended = [stub for stub in self._known if not _is_alive(stub.process)]
        if not ended:
            if time.monotonic() - self._searched > _SEARCH_SECONDS:
                self.search()
            return {}
        before = Counter(stub.model for stub in self._known)
        how = {stub.model: _how_it_ended(stub.process) for stub in ended}
        self.search()
        for stub in ended:  # Triton does not remove it, as long as it runs
            with suppress(OSError):
                (_SHARED_MEMORY / stub.region).unlink()
        now = Counter(stub.model for stub in self._known)
        return {model: words for model, words in how.items() if now[model] < before[model]}

    def kill(self, model: str) -> None:
        """End the processes of a model, which do not heed anything else."""
        for stub in self._known:
            if stub.model == model:
                with suppress(psutil.Error):
                    stub.process.kill()
                    stub.process.wait(1.0)


def _read(process: psutil.Process) -> Stub | None:
    """Read a stub's command line: the program, the model's file, the name of its shared memory, sizes and more."""
    with suppress(psutil.Error, IndexError):
        words = process.cmdline()
        if words and Path(words[0]).name == _PROGRAM:
            return Stub(process, Path(words[1]).parents[1].name, Path(words[2]).name)
    return None


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def _how_it_ended(process: psutil.Process) -> str:
    """Name the signal that ended a child of another process, as far as the kernel still says."""
    with suppress(OSError, ValueError, IndexError):
        status = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(None, 1)[1])  # proc(5): exit_code
        if status & 0x7F:
            return f"ended by {signal_text(status & 0x7F)}"
    return "ended"


def signal_text(number: int) -> str:
    """Return a signal's number with its name."""
    with suppress(ValueError):
        return f"signal {number} ({signal.Signals(number).name})"
    return f"signal {number}"
