"""Dagster's own run launcher, which starts a process for each run, made able to tell whether that process still lives.

Dagster's daemon asks (`run_monitoring` in dagster.yaml), fails the runs whose process is gone, and starts them again
(`run_retries`). The launcher that Dagster brings cannot be asked: there, a run whose code server ended with it, by a
reboot say, stays "started" for ever. dagster.yaml names this class, so every process of Dagster's imports the module.
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

# What a run launcher is made of is not in Dagster's public interface; pyproject.toml holds it to one minor version.
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

if TYPE_CHECKING:
    from dagster._grpc.client import DagsterGrpcClient

#: The tag of runs that no code server started, `refinery optimize` for one: the machine on which they are.
HOST_TAG = "refinery/host"
#: Clocks of the process table and of the event log.
_CLOCK_SECONDS = 2.0
#: Of a code server on another machine: one answer, and how long it may not answer before its runs count as dead.
_ANSWER_SECONDS = 5
_PATIENCE_SECONDS = 20.0
_LOOPBACK = ("localhost", "127.0.0.1")
_RUNNING = CheckRunHealthResult(WorkerStatus.RUNNING)


class WatchedRunLauncher(dg.DefaultRunLauncher):
    """DefaultRunLauncher, and `check_run_worker_health`."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """NOT_FOUND where the run's process is gone. What cannot be looked at from here counts as running."""
        client = self._get_grpc_client_for_termination(run.run_id)
        if client is None:
            here = run.tags.get(HOST_TAG) == socket.gethostname()
            return self._alive_here(run) if here else _RUNNING
        if client.socket is not None or client.host in _LOOPBACK:
            # Not asked of the code server: `dagster dev` puts another before it, which knows nothing of the runs that
            # began before its definitions were loaded anew.
            return self._alive_here(run)
        return self._alive_there(run, client)

    def _alive_here(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a process lives that has written to the run's log that it works on it."""
        said = list(self.processes(run.run_id))
        if not said or any(self._lives(pid, seen) for pid, seen in said):
            return _RUNNING
        numbers = ", ".join(sorted({str(pid) for pid, _ in said}))
        return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"process {numbers} is gone")

    def _lives(self, pid: int, seen: float) -> bool:
        """`is_alive`, at the first look. Then by the process itself: were the machine's clock set forward, all that run
        would seem to have begun later than they said.
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
        """Whether the code server on another machine has a process for it; one that does not answer gets some time."""
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
        """Runs whose code server does not answer, and since when."""
        return {}

    @cached_property
    def _found(self) -> dict[tuple[int, float], psutil.Process]:
        """Processes that lived, by their number and when they said that they work on a run."""
        return {}

    def processes(self, run_id: str) -> Iterator[tuple[int, float]]:
        """The run's processes, and when each said that it was one, in seconds since 1970."""
        for entry in self._instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
            pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
            if pid is not None and str(pid.value).isdigit():
                yield int(str(pid.value)), entry.timestamp


def is_alive(pid: int, seen: float) -> bool:
    """Whether the process that had this number at the time `seen` (seconds since 1970) still runs: one that began later
    has been given the number anew.
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= seen + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
