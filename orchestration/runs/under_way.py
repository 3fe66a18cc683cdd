"""The runs that have not ended."""

from __future__ import annotations

import dagster as dg

from assets.partitions import PARTITION_TAG

_ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
UNDER_WAY = [status for status in dg.DagsterRunStatus if status not in _ENDED]


def models_under_way(instance: dg.DagsterInstance) -> set[str]:
    """Return the models of which a run is under way, regardless of how it was started.

    A run whose process was killed counts until Dagster's run monitoring has failed it; see
    orchestration.runs.run_launcher.
    """
    runs = instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY))
    return {run.tags[PARTITION_TAG] for run in runs if PARTITION_TAG in run.tags}
