"""Dagster's own run launcher, which starts a process for each run, made able to tell whether that process still lives.

Dagster's daemon asks (`run_monitoring` in dagster.yaml), fails the runs whose process is gone, and starts them again
(`run_retries`). The launcher that Dagster brings cannot be asked: there, a run whose code server ended with it, by a
reboot say, stays "started" for ever. dagster.yaml names this class, so every process of Dagster's imports the module.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import dagster as dg
import psutil

# What a run launcher is made of is not in Dagster's public interface; pyproject.toml holds it to one minor version.
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster._grpc.types import GetCurrentRunsResult
from dagster._serdes import deserialize_value

#: The tag of runs that no code server started, `refinery optimize` for one: the machine on which they are.
HOST_TAG = "refinery/host"
#: Clocks of the process table and of the event log.
_CLOCK_SECONDS = 2.0


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
            return self._alive(run) if here else CheckRunHealthResult(WorkerStatus.RUNNING)
        try:
            answer = deserialize_value(client.get_current_runs(), GetCurrentRunsResult)
        except DagsterUserCodeUnreachableError:
            if client.socket is None and client.host not in ("localhost", "127.0.0.1"):
                return _result(False, f"its code server at {client.host} does not answer")
            # The server was on this machine, and a run may outlive it.
            return self._alive(run)
        return _result(run.run_id in answer.current_runs, "its code server has no process for it")

    def _alive(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether a process lives that has written to the run's log that it works on it."""
        said = list(self.processes(run.run_id))
        alive = any(is_alive(pid, seen) for pid, seen in said)
        return _result(alive or not said, f"process {', '.join(sorted({str(pid) for pid, _ in said}))} is gone")

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


def _result(alive: bool, why_not: str) -> CheckRunHealthResult:
    if alive:
        return CheckRunHealthResult(WorkerStatus.RUNNING)
    return CheckRunHealthResult(WorkerStatus.NOT_FOUND, why_not)
