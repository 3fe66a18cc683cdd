"""The processes that run a server's Python models.

Triton starts one such process, a stub, for each instance, and does not replace one that dies.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

#: How often new stubs are searched for. A check of the known stubs takes microseconds; a search through all processes
#: of the machine takes some milliseconds.
_SEARCH_SECONDS = 5.0
#: The text for a process that ended without a signal.
_ENDED = "ended"
_PROGRAM = "triton_python_backend_stub"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux has shared memory


@dataclass(frozen=True)
class Stub:
    """One stub.

    Args:
        model: The Triton model that the stub runs.
        region: The name of the stub's shared memory.
    """

    process: psutil.Process
    model: str
    region: str


class Stubs:
    """The stubs of one server.

    Args:
        leader: The id of the process that the server descends from.
    """

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._known: dict[psutil.Process, Stub] = {}
        self._ending: set[psutil.Process] = set()
        self._searched = 0.0
        self.search()

    def search(self) -> None:
        """Find new stubs. A known stub stays known until it has ended, see `lost`."""
        self._searched = time.monotonic()
        with suppress(psutil.Error):
            for process in psutil.Process(self._leader).children(recursive=True):
                if process not in self._known and (stub := _read(process)) is not None:
                    self._known[process] = stub

    def lost(self) -> dict[str, str]:
        """Return the models whose stubs have died since the last call, each with how the stub ended.

        Triton waits for the stubs that it ends itself when it unloads a model, so nothing is left of them. A stub that
        died by itself stays a zombie until then.
        """
        died = {}
        for process, stub in list(self._known.items()):
            if _is_alive(process):
                continue
            how = _how_it_died(process)
            if how == _ENDED and process not in self._ending:
                self._ending.add(process)  # Triton may be about to wait for it
                continue
            self._forget(stub)
            if how is not None:
                died[stub.model] = how
        if time.monotonic() - self._searched > _SEARCH_SECONDS:
            self.search()
        return died

    def kill(self, model: str) -> None:
        """Kill the stubs of a model, which may ignore any other signal. `lost` does not report them."""
        for stub in [stub for stub in self._known.values() if stub.model == model]:
            with suppress(psutil.Error):
                stub.process.kill()
                stub.process.wait(1.0)
            self._forget(stub)

    def _forget(self, stub: Stub) -> None:
        del self._known[stub.process]
        self._ending.discard(stub.process)
        with suppress(OSError):  # Triton itself removes the segment only when the server ends
            (_SHARED_MEMORY / stub.region).unlink()


def _read(process: psutil.Process) -> Stub | None:
    """Return the stub that the process is, or None for any other process.

    A stub's command line holds the program, the model's file, the name of its shared memory, sizes and more.
    """
    with suppress(psutil.Error, IndexError):
        words = process.cmdline()
        if words and Path(words[0]).name == _PROGRAM:
            return Stub(process, Path(words[1]).parents[1].name, Path(words[2]).name)
    return None


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def _how_it_died(process: psutil.Process) -> str | None:
    """Return how a process ended, or None if its parent has waited for it already and nothing is left of it."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # proc(5)
        if fields[0] == "Z":
            status = int(fields[-1])
            return f"{_ENDED} by {signal_text(status & 0x7F)}" if status & 0x7F else _ENDED
    return None


def signal_text(number: int) -> str:
    """Return a text with a signal's number and its name."""
    with suppress(ValueError):
        return f"signal {number} ({signal.Signals(number).name})"
    return f"signal {number}"
