"""A run launcher that can tell whether the process of a run is still alive.

It is Dagster's own run launcher, which starts a process for each run, with a health check. Dagster's daemon asks for
the health (`run_monitoring` in dagster.yaml), fails the runs whose process is gone, and starts them again
(`run_retries`). Dagster's own launcher cannot answer: with it, a run that ended together with its code server, for
example in a reboot, stays "started" for ever. dagster.yaml names this class, so every Dagster process imports the
module.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

import dagster as dg
import psutil

# These parts of a run launcher are not in Dagster's public interface, so pyproject.toml holds Dagster to one minor
# version.
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

if TYPE_CHECKING:
    from dagster._grpc.client import DagsterGrpcClient

#: The tag of runs that no code server started, such as those of `refinery optimize`. It names the machine of the run.
HOST_TAG = "refinery/host"
#: The clocks of the process table and of the event log may differ by this much.
_CLOCK_SECONDS = 2.0
#: The time for one answer of a code server on another machine, and the time without an answer after which its runs
#: count as dead.
_ANSWER_SECONDS = 5
_PATIENCE_SECONDS = 20.0
_LOOPBACK = ("localhost", "127.0.0.1")
_RUNNING = CheckRunHealthResult(WorkerStatus.RUNNING)


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """Dagster's DefaultRunLauncher with `check_run_worker_health`."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Return whether Dagster's daemon may call `check_run_worker_health`."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return NOT_FOUND if the run's process is gone. A process that this machine cannot see counts as running."""
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            here = run.tags.get(HOST_TAG) == socket.gethostname()
            return self._alive_here(run) if here else _RUNNING
        if client.socket is not None or client.host in _LOOPBACK:
            # The code server itself is not asked, because `dagster dev` puts a proxy before it. After the definitions
            # were reloaded, that proxy does not know the runs that began before.
            return self._alive_here(run)
        return self._alive_there(run, client)

    def _alive_here(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return the health of a run on this machine.

        The run's log names the processes that work on the run. The run is healthy if one of them lives, or if the log
        names none.
        """
        said = list(self.processes(run.run_id))
        if not said or any(self._lives(pid, seen) for pid, seen in said):
            return _RUNNING
        numbers = ", ".join(sorted({str(pid) for pid, _ in said}))
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"process {numbers} is gone")

    def _lives(self, pid: int, seen: float) -> bool:
        """Return whether the process lives.

        The first call for a process uses `is_alive`. Later calls ask the process object itself: if the machine's clock
        was set forward, every process would otherwise seem to have begun after the time `seen`.
        """
        process = self._found.get((pid, seen))
        if process is None:
            if not is_alive(pid, seen):
                return False
            with suppress(psutil.NoSuchProcess):
                self._found[pid, seen] = psutil.Process(pid)
            return True
        with suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    def _alive_there(self, run: dg.DagsterRun, client: DagsterGrpcClient) -> CheckRunHealthResult:
        """Return the health of a run whose code server is on another machine.

        The run is healthy if the code server has a process for it. A code server that does not answer gets some time.
        """
        request = CanCancelExecutionRequest(run_id=run.run_id)
        try:
            answer = client.can_cancel_execution(request, timeout=_ANSWER_SECONDS)
        except DagsterUserCodeUnreachableError:
            since = self._silent.setdefault(run.run_id, time.monotonic())
            if time.monotonic() - since < _PATIENCE_SECONDS:
                return _RUNNING
            why = f"its code server at {client.host} has not answered for {_PATIENCE_SECONDS:g} s"
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, why)
        self._silent.pop(run.run_id, None)
        if deserialize_value(answer, CanCancelExecutionResult).can_cancel:
            return _RUNNING
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"the code server at {client.host} has no process for it")

    @cached_property
    def _silent(self) -> dict[str, float]:
        """The runs whose code server does not answer, and since when."""
        return {}

    @cached_property
    def _found(self) -> dict[tuple[int, float], psutil.Process]:
        """The processes that were alive, by their number and the time at which the run's log named them."""
        return {}

    def processes(self, run_id: str) -> Iterator[tuple[int, float]]:
        """Yield the number of each process that the run's log names, and the entry's time in seconds since 1970."""
        for entry in self._instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
            pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
            if pid is not None and str(pid.value).isdigit():
                yield int(str(pid.value)), entry.timestamp


def is_alive(pid: int, seen: float) -> bool:
    """Return whether the process that had this number at the time `seen` (in seconds since 1970) still runs.

    A process that began later is another one, to which the system has given the same number.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= seen + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
