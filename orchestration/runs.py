"""Runs that are under way, and those that only seem to be."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import dagster as dg
import psutil

PARTITION_TAG = "dagster/partition"
#: Where a run's process is, of runs that no launcher started.
HOST_TAG = "refinery/host"
#: What DefaultRunLauncher writes on the runs it starts, beside the code server and so beside the sensor.
_LAUNCHED_TAG = ".dagster/grpc_info"
#: A run says something as each step begins and ends. One that has been silent for so long is asked for its process.
_SILENT_SECONDS = 60.0
#: Where its process cannot be asked for: it is dead. Steps may wait hours for a benchmark.
_DEAD_SECONDS = 6 * 3600.0
#: Of its last events, among which one names the process.
_EVENTS = 20

ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
_UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in ENDED]


def this_host() -> dict[str, str]:
    """The tag of a run in this process."""
    return {HOST_TAG: socket.gethostname()}


def models_under_way(instance: dg.DagsterInstance, now: float) -> set[str]:
    """Models that are being optimized, whoever asked for it, or of which a part is made anew.

    A run whose process was killed is under way for ever, as its record stands, and takes one of the queue's places:
    such runs are ended here, as failed. now: seconds since 1970.
    """
    busy = set()
    for record in instance.get_run_records(dg.RunsFilter(statuses=_UNDER_WAY)):
        run = record.dagster_run
        model = run.tags.get(PARTITION_TAG)
        if model is None:
            continue
        if run.status is not dg.DagsterRunStatus.QUEUED and _is_dead(instance, record, now):
            instance.report_run_failed(run, "Its process is gone: it was killed, or its machine restarted.")
        else:
            busy.add(model)
    return busy


def _is_dead(instance: dg.DagsterInstance, record: dg.RunRecord, now: float) -> bool:
    run = record.dagster_run
    events = instance.get_records_for_run(run.run_id, limit=_EVENTS, ascending=False).records
    silent_s = now - (events[0].timestamp if events else record.update_timestamp.timestamp())
    if silent_s < _SILENT_SECONDS:
        return False
    launched_here = _LAUNCHED_TAG in run.tags and isinstance(instance.run_launcher, dg.DefaultRunLauncher)
    if launched_here or run.tags.get(HOST_TAG) == socket.gethostname():
        processes = _processes(events)
        if processes:
            return not any(_is_alive(*process) for process in processes)
    return silent_s >= _DEAD_SECONDS


def _processes(events: Sequence[dg.EventLogRecord]) -> set[tuple[int, float]]:
    """Ids of the processes that wrote the events, each with when it did last."""
    found: dict[int, float] = {}
    for record in events:
        event = record.event_log_entry.dagster_event
        if event is not None and event.pid is not None:
            found.setdefault(event.pid, record.timestamp)
    return set(found.items())


def _is_alive(pid: int, wrote: float) -> bool:
    """Whether it is that process, and not a later one of the same number."""
    try:
        return psutil.Process(pid).create_time() <= wrote
    except psutil.NoSuchProcess:
        return False
