"""Untrustworthy work (exporters, builders, runtimes) in child processes with a time and a memory limit.

A segmentation fault, an out-of-memory kill or an endless loop in a native library then costs one result, not the run.
Children are forked from a server that has already imported the heavy modules. Each child therefore starts in
milliseconds, instead of the ten seconds that the imports of torch, transformers and onnxscript take. The server is a
fresh process: it has nothing of the parent's state, and no thread of ours.
"""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from resources.errors import IsolationError, RefineryError, first_line
from resources.processes.memory import available_bytes, descendants, tree_bytes
from resources.processes.variables import COMPUTE, HUGGING_FACE, PROGRAM, PYTHON, inherited

T = TypeVar("T")

#: The server imports this once, before it forks. It imports the modules that children import anyway.
PRELOAD = ("resources.processes.preload",)
#: How often the parent checks a child's memory. A child can exceed its limit for this long.
POLL_SECONDS = 0.1
#: How often the parent checks the processes that the child has started, too, which takes longer.
_TREE_POLL_SECONDS = 1.0
_MEMORY_SHARE = 0.8
_PR_SET_PDEATHSIG = 1
#: The largest value that proc_pid_oom_score_adj(5) allows.
_FIRST_VICTIM = "1000"
_main_lock = threading.Lock()
_start_lock = threading.Lock()
_SERVERS: list[subprocess.Popen[bytes]] = []


def default_memory_bytes() -> int:
    """Return the memory that a child may take by default: most of the memory there is, but not all of it."""
    return int(_MEMORY_SHARE * available_bytes())


@dataclass(frozen=True)
class Limits:
    """The time and memory that one child process may take.

    Args:
        timeout_s: The longest time of one call.
        memory_bytes: The largest resident memory of the child, modules included, and of the processes that it starts.
    """

    timeout_s: float = 1800.0
    memory_bytes: int = field(default_factory=default_memory_bytes)


class Worker:
    """One child process that holds one object, made there by `factory(*args)`.

    `call` runs the object's methods, one at a time. While no call is under way, the child is blocked on a pipe and
    takes no processor time. Arguments and results are pickled, so functions and classes must be importable. They cannot
    be defined in the script that was started. The child's output is added to `log`. A worker is a context manager:
    leaving it ends the child.

    Every error is an IsolationError, the RefineryError that was raised in the child, or the OSError of a log that
    cannot be written.
    """

    def __init__(
        self, factory: Callable[..., Any], *args: Any, limits: Limits, what: str, log: Path | None = None
    ) -> None:
        if multiprocessing.current_process().daemon:
            raise IsolationError(
                f"{what}: this process belongs to a pool and may not start processes, but every step has to. Start "
                "Celery's workers with `worker_pool: solo`, one worker for each step that is to run at the same time."
            )
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._what, self._limits = what, limits
        self.peak_memory_bytes = 0
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self._connection, theirs = context.Pipe()
        # Nothing is ever sent through this pipe. The child ends when the parent's end is closed; see _end_with.
        their_lifeline, self._lifeline = context.Pipe(duplex=False)
        arguments = (theirs, their_lifeline, str(log or os.devnull))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        try:
            with _server_of_children(), _no_main_module():
                self._process.start()
        except (EOFError, ConnectionError) as error:
            self._connection.close()
            self._lifeline.close()
            raise IsolationError(
                f"{what}: no child process could be started ({type(error).__name__}). The cause was printed above. It "
                "is often a broken installation of torch or onnxruntime, or too little memory."
            ) from None
        finally:
            theirs.close()
            their_lifeline.close()
        try:
            self._request(factory, args)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the held object, and return what it returns."""
        return self._request(method, args)

    def close(self) -> None:
        """End the child, whatever it is doing, and the processes that it has started."""
        # The id of a child that has ended may belong to another process by now.
        if self._process.is_alive() and descendants(self.pid):
            self._kill()
        self._connection.close()
        self._process.join(timeout=0.5)  # an idle child sees the closed pipe and leaves by itself
        if self._process.is_alive():
            self._kill()
            self._process.join()
        self._lifeline.close()

    def _kill(self) -> None:
        """Kill the child and all processes that it has started.

        These are the process group that the child leads, and the descendants that left the group.
        """
        for pid in descendants(self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # the child does not lead a group yet
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, function: Callable[..., Any] | str, args: tuple[Any, ...]) -> Any:
        try:
            request = ForkingPickler.dumps((function, args))
        except Exception as error:
            raise IsolationError(f"{self._what}: its arguments cannot be sent to a child process: {error}") from error
        try:
            self._connection.send_bytes(request)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        ok, value, peak = self._wait()
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)
        if ok:
            return value
        if isinstance(value, RefineryError | OSError):
            raise value
        raise IsolationError(f"{self._what}: {value}")

    def _wait(self) -> tuple[bool, Any, int]:
        import psutil  # imported here, because every step loads the definitions

        deadline = time.monotonic() + self._limits.timeout_s
        tree_at = 0.0
        while True:
            ready = wait([self._connection, self._process.sentinel], timeout=POLL_SECONDS)
            if self._connection in ready:
                return self._receive()
            if ready:
                raise self._died()
            if time.monotonic() > deadline:
                self._kill()
                raise IsolationError(
                    f"{self._what}: stopped after its limit of {self._limits.timeout_s:g} s. "
                    "Raise REFINERY_STEP_SECONDS if the model needs longer."
                )
            try:
                if time.monotonic() > tree_at:
                    resident = tree_bytes(self.pid, self._limits.memory_bytes)
                    tree_at = time.monotonic() + _TREE_POLL_SECONDS
                else:
                    resident = psutil.Process(self.pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue
            if resident > self._limits.memory_bytes:
                self._kill()
                raise IsolationError(
                    f"{self._what}: stopped at {resident / 1e9:.2f} GB of memory, over its limit of "
                    f"{self._limits.memory_bytes / 1e9:.2f} GB. Raise REFINERY_STEP_MEMORY_GB if the machine has more."
                )

    def _receive(self) -> tuple[bool, Any, int]:
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError):  # OSError: the child ended in the middle of its answer
            raise self._died() from None
        try:
            answer: tuple[bool, Any, int] = pickle.loads(data)  # noqa: S301 - from our own child
        except Exception as error:
            raise IsolationError(f"{self._what}: its answer cannot be read: {_text(error)}") from error
        return answer

    def _died(self) -> IsolationError:
        self._process.join(timeout=5)
        # The processes that the child has started stay in its group. The group's id is free again once they have ended.
        import psutil

        if self._process.exitcode is not None and not psutil.pid_exists(self.pid):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = "; the kernel often does this when memory runs out" if name == "SIGKILL" else ""
            return IsolationError(f"{self._what}: its process was ended by {name}{hint}.")
        return IsolationError(f"{self._what}: its process ended with exit code {code} and without an answer.")


def run_isolated(
    function: Callable[..., T], *args: Any, limits: Limits, what: str, log: Path | None = None
) -> tuple[T, int]:
    """Run one module-level function in a child, and return its result and the child's peak memory in bytes."""
    with Worker(_Once, function, args, limits=limits, what=what, log=log) as worker:
        return worker.call("run"), worker.peak_memory_bytes


class _Once:
    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._function, self._args = function, args

    def run(self) -> Any:
        return self._function(*self._args)


def _serve(connection: Connection, lifeline: Connection, log: str) -> None:
    """Run the child's loop: make an object, then call its methods until the pipe closes."""
    os.setpgid(0, 0)  # a group of this process and all that it starts, so that they end together
    with suppress(OSError):  # if memory runs out, the kernel ends this process before those that serve
        Path("/proc/self/oom_score_adj").write_text(_FIRST_VICTIM)
    _end_with(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:  # a full disk, for instance. The parent reports it, because the work did not fail.
        with suppress(EOFError, OSError):
            connection.recv_bytes()
            connection.send_bytes(ForkingPickler.dumps((False, error, peak_memory_bytes())))
        return
    os.dup2(output, 1)
    os.dup2(output, 2)
    held: Any = None
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            function, args = pickle.loads(request)  # noqa: S301 - from our own parent
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
        except Exception as error:  # the result cannot be pickled
            data = ForkingPickler.dumps((False, _portable(error), peak_memory_bytes()))
        try:
            connection.send_bytes(data)
        except BrokenPipeError:
            return


def _end_with(lifeline: Connection) -> None:
    """Have the kernel kill this process's group when its parent ends, which closes the parent's end of the pipe.

    The kernel has to do it (fcntl(2), O_ASYNC), because no thread of ours would run while native code holds the
    interpreter. PR_SET_PDEATHSIG is for the case that the server is killed. Alone it would not be enough: the server
    forks all children, and lives as long as any of them.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if lifeline.poll():  # the parent had ended before the lines above took effect
        os.killpg(0, signal.SIGKILL)


@contextmanager
def _server_of_children() -> Iterator[None]:
    """Ensure that the server runs that children are forked from, and that neither it nor its children react to Ctrl-C.

    Ctrl-C reaches the whole process group. multiprocessing's server ignores it only after it has imported the preloaded
    modules. Until then, for up to ten seconds, the server would answer it with the traceback of an import.
    """
    with _only_what_children_need():
        resource_tracker.ensure_running()  # otherwise the server starts it, which unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield


@contextmanager
def _only_what_children_need() -> Iterator[None]:
    """Give the server only the environment variables that its children need, if this thread starts the server now.

    Children load the checkpoints of others. multiprocessing passes on all of this process's environment, and has no
    setting for that.
    """
    thread = threading.get_ident()

    def start_with_less(path: Any, args: Any, passfds: Any) -> int:
        if threading.get_ident() != thread:
            return start(path, args, passfds)
        names = [os.fsdecode(argument) for argument in args]
        variables = inherited(PROGRAM, PYTHON, COMPUTE, HUGGING_FACE)
        process = subprocess.Popen(
            names, executable=os.fsdecode(path), pass_fds=passfds, env=variables, restore_signals=False
        )
        _SERVERS.append(process)  # multiprocessing waits for it. A Popen without a reference would, too.
        return process.pid

    with _start_lock:
        start = util.spawnv_passfds
        util.spawnv_passfds = start_with_less
        try:
            yield
        finally:
            util.spawnv_passfds = start


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Start a child that does not run the parent's script again.

    multiprocessing makes every child import the parent's `__main__`. Under the `dagster` command that takes a second
    for each child (0.07 s without the import), and a script without `if __name__ == "__main__"` would start children of
    its own.
    """
    with _main_lock:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _portable(error: BaseException) -> RefineryError | str:
    """Return the error itself if the parent can unpickle it, else its type and text."""
    if isinstance(error, RefineryError):
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
            return error
        except Exception:
            return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    return _text(error)


def _text(error: BaseException) -> str:
    """Return the error's type and its first line, because libraries put whole graphs into the other lines."""
    name, said = type(error).__name__, first_line(error, 500)
    return name if said == name else f"{name}: {said}"


def peak_memory_bytes() -> int:
    """Return this process's peak resident memory (`VmHWM`) since its start or the last `reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory() -> None:
    """Reset the peak to the memory that is resident now (Linux, proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
