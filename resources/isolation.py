"""Running untrustworthy work (exporters, builders, runtimes) in a child process with a time and a memory limit.

A segmentation fault, an out-of-memory kill or an endless loop in a native library then costs one result, not the run.
Children are forked from a server that has imported the heavy modules already, so that each starts in milliseconds
instead of the ten seconds that torch, transformers and onnxscript take to import. The server is a fresh process: it
has no threads, and none of the parent's state.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil

from resources.errors import IsolationError, RefineryError

T = TypeVar("T")

#: Imported once, by the server, before it forks. Modules that children import anyway.
PRELOAD = ("resources.preload",)
#: How often the parent looks at a child's memory. A child can overshoot its limit for this long.
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Limits:
    """What one child process may take.

    `timeout_s` bounds one call; `memory_bytes` the resident memory of the child, modules included.
    """

    timeout_s: float = 1800.0
    memory_bytes: int = 64 * 1024**3


class Worker:
    """One child process that holds one object, made there by `factory(*args)`; `call` runs its methods, one at a time.

    While no call is under way the child is blocked on a pipe and takes no processor time. Arguments and results are
    pickled. What the child prints goes to `log`. A context manager: leaving it ends the child.
    Every error is an IsolationError, or the RefineryError that was raised in the child.
    """

    def __init__(
        self, factory: Callable[..., Any], *args: Any, limits: Limits, what: str, log: Path | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._what, self._limits = what, limits
        self.peak_memory_bytes = 0
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log or os.devnull)), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._request(factory, args)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the held object and return what it returns."""
        return self._request(method, args)

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._connection.close()
        self._process.join(timeout=0.5)  # an idle child sees the closed pipe and leaves by itself
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, function: Callable[..., Any] | str, args: tuple[Any, ...]) -> Any:
        try:
            self._connection.send((function, args))
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        ok, value, peak = self._wait()
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        if ok:
            return value
        if isinstance(value, RefineryError):
            raise value
        raise IsolationError(f"{self._what}: {value}")

    def _wait(self) -> tuple[bool, Any, int]:
        deadline = time.monotonic() + self._limits.timeout_s
        process = psutil.Process(self.pid) if psutil.pid_exists(self.pid) else None
        while True:
            ready = wait([self._connection, self._process.sentinel], timeout=POLL_SECONDS)
            if self._connection in ready:
                try:
                    return self._connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._died() from None
            if ready:
                raise self._died()
            if time.monotonic() > deadline:
                self._process.kill()
                raise IsolationError(
                    f"{self._what}: stopped after its limit of {self._limits.timeout_s:g} s. "
                    "Raise REFINERY_STEP_SECONDS if the model needs longer."
                )
            try:
                resident = process.memory_info().rss if process else 0
            except psutil.NoSuchProcess:
                continue
            if resident > self._limits.memory_bytes:
                self._process.kill()
                raise IsolationError(
                    f"{self._what}: stopped at {resident / 1e9:.2f} GB of memory, over its limit of "
                    f"{self._limits.memory_bytes / 1e9:.2f} GB. Raise REFINERY_STEP_MEMORY_GB if the machine has more."
                )

    def _died(self) -> IsolationError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = "; often the kernel's answer to too little memory" if name == "SIGKILL" else ""
            return IsolationError(f"{self._what}: its process was ended by {name}{hint}.")
        return IsolationError(f"{self._what}: its process ended with exit code {code} and without an answer.")


def run_isolated(
    function: Callable[..., T], *args: Any, limits: Limits, what: str, log: Path | None = None
) -> tuple[T, int]:
    """Run one module-level function in a child; return its result and the child's peak memory in bytes."""
    with Worker(_Once, function, args, limits=limits, what=what, log=log) as worker:
        return worker.call("run"), worker.peak_memory_bytes


class _Once:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args

    def run(self) -> Any:
        return self._function(*self._args)


def _serve(connection: Connection, log: str) -> None:
    """The child's loop: an object first, then calls of its methods, until the pipe closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    held: Any = None
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if isinstance(function, str):
                reply: Any = getattr(held, function)(*args)
            else:
                held, reply = function(*args), None
            answer = (True, reply, peak_memory_bytes())
        except BaseException as error:
            traceback.print_exc()
            answer = (False, _portable(error), peak_memory_bytes())
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            data = ForkingPickler.dumps(answer)
        except Exception as error:  # the result cannot travel
            data = ForkingPickler.dumps((False, _portable(error), peak_memory_bytes()))
        try:
            connection.send_bytes(data)
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """Kill this process when the one that wanted it is gone.

    PR_SET_PDEATHSIG would not do: the parent of a forked child is the server, and that lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def _portable(error: BaseException) -> RefineryError | str:
    """The error itself where the parent can understand it, else its type and text."""
    if isinstance(error, RefineryError):
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
            return error
        except Exception:
            return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[0][:500]}"


def peak_memory_bytes() -> int:
    """This process's peak resident memory (`VmHWM`) since its start or the last `reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory() -> None:
    """Let the peak begin again at what is resident now (Linux, proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
