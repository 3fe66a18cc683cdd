"""The sensor that checks between runs whether releases are up to date. No run could report a model that is never run.

A sensor cannot report a partition's check itself. Dagster 1.13 stores only one report without a run for each partition,
ever (a unique index over asset, check, run and partition), and a second one fails the tick. If the verdict differs from
the last one, the sensor therefore requests a run of the check alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import dagster as dg
from pydantic import BaseModel, ValidationError

from assets.freshness import CHECK, confirmed_at, judge, release_key
from assets.partitions import PARTITION_TAG, models
from orchestration.automation.sensors import MOST_RUNS, TICK_SECONDS
from orchestration.runs.under_way import models_under_way
from resources.errors import RefineryError, first_line
from resources.settings.workspace import Workspace

SENSOR = "release_freshness"
JOB = "check_releases"
#: A verdict changes no faster than this, and each look asks repositories in object storage over the network.
INTERVAL_SECONDS = 300


class Told(BaseModel):
    """The last verdict on a model that differed from the one before.

    Args:
        wrong: What is wrong with the model's releases. It is empty if nothing is.
        at: When the verdict was found, in seconds since 1970.
    """

    wrong: str = ""
    at: float = 0.0


class Cursor(BaseModel):
    """The sensor's cursor: the verdicts by model."""

    told: dict[str, Told] = {}

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """Return the cursor, or an empty one if there is none yet or it is of another version.

        With an empty cursor, the check reports every problem once more.
        """
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()


def freshness_job(targets: Sequence[str]) -> dg.UnresolvedAssetJobDefinition:
    """Return the job that runs the check of a model's releases and nothing else."""
    keys = [dg.AssetCheckKey(release_key(target), CHECK) for target in targets]
    return dg.define_asset_job(
        JOB,
        selection=dg.AssetSelection.checks(*keys),
        description=(
            "Checks whether a model's releases were made from its newest checkpoint and were confirmed lately. The "
            f"sensor `{SENSOR}` starts this job."
        ),
    )


def freshness_sensor(limit_days: float) -> dg.SensorDefinition:
    """Return the sensor.

    Args:
        limit_days: The last run through a model's checkpoint and release may be this many days ago.
    """

    @dg.sensor(
        name=SENSOR,
        job_name=JOB,
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Checks whether every model's releases were made from its newest checkpoint and were confirmed lately. If "
            f"the verdict on a model changes, the check `{CHECK}` is run to report it."
        ),
    )
    def release_freshness(
        context: dg.SensorEvaluationContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.SensorResult:
        instance, began = context.instance, time.monotonic()
        told = Cursor.read(context.cursor).told
        busy = models_under_way(instance)
        there = set(instance.get_dynamic_partitions(models.name or ""))
        names = [name for name in workspace.catalog().names if name in there]
        requests: list[dg.RunRequest] = []
        looked = 0
        # If a tick has no time for all models, the next one begins with others.
        turn = int(time.time() / INTERVAL_SECONDS) % max(1, len(names))
        for name in (*names[turn:], *names[:turn]):
            if name in busy:  # its run reports the verdict at its end
                continue
            if time.monotonic() > began + TICK_SECONDS or len(requests) == MOST_RUNS:
                break
            try:
                verdicts = [judge(instance, workspace, name, target, limit_days) for target in workspace.targets]
            except RefineryError as error:  # a repository that cannot be read must not hide the other verdicts
                context.log.warning(f"{name}: {first_line(error)}")
                continue
            looked += 1
            wrong = "\n".join(verdict.description or "" for verdict in verdicts if not verdict.passed)
            before = told.get(name, Told())
            if wrong == before.wrong:
                continue
            told[name] = Told(wrong=wrong, at=time.time())
            # If a run has mended the release, that run has reported so itself.
            if wrong or confirmed_at(instance, name, workspace.targets) < before.at:
                # In Dagster 1.13 a job of checks alone has no partitions. Its steps read the partition from the tag.
                requests.append(dg.RunRequest(partition_key=name, tags={PARTITION_TAG: name}))
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else f"{looked} of {len(names)} models looked at, nothing else to report",
            cursor=Cursor(told={name: told[name] for name in names if name in told}).model_dump_json(),
        )

    return release_freshness
