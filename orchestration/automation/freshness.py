"""Looking between runs at whether releases are up to date: what is forgotten is in no run that could say so.

A sensor cannot report a partition's check itself: Dagster 1.13 stores one report without a run for each partition, ever
(a unique index over asset, check, run and partition), and a second one fails the tick. So where the verdict is another
than the last one told, a run of the check alone is asked for.
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
#: Nothing here changes faster, and repositories in object storage are asked over the network.
INTERVAL_SECONDS = 300


class Told(BaseModel):
    """What a run of the check was asked to tell of a model. wrong: empty where all is well. at: when, since 1970."""

    wrong: str = ""
    at: float = 0.0


class Cursor(BaseModel):
    """By model, as far as something was told."""

    told: dict[str, Told] = {}

    @classmethod
    def read(cls, text: str | None) -> Cursor:
        """An empty one where there is none yet, or one of another version: then all is told once more."""
        try:
            return cls.model_validate_json(text or "{}")
        except ValidationError:
            return cls()


def freshness_job(targets: Sequence[str]) -> dg.UnresolvedAssetJobDefinition:
    """The check of a model's releases alone."""
    keys = [dg.AssetCheckKey(release_key(target), CHECK) for target in targets]
    return dg.define_asset_job(
        JOB,
        selection=dg.AssetSelection.checks(*keys),
        description=(
            "Tells whether a model's releases are of its newest checkpoint, and were confirmed lately. Started by the "
            f"sensor `{SENSOR}`."
        ),
    )


def freshness_sensor(limit_days: float) -> dg.SensorDefinition:
    """The sensor. limit_days: how long ago the last run through a model's checkpoint and release may be."""

    @dg.sensor(
        name=SENSOR,
        job_name=JOB,
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Looks whether every model's release is of its newest checkpoint, and was confirmed lately. Where that is "
            f"not what was told last, it has the check `{CHECK}` tell it."
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
        # Where there is no time for all of them, others come first the next time.
        turn = int(time.time() / INTERVAL_SECONDS) % max(1, len(names))
        for name in (*names[turn:], *names[:turn]):
            if name in busy:  # its run says it when it is done
                continue
            if time.monotonic() > began + TICK_SECONDS or len(requests) == MOST_RUNS:
                break
            try:
                verdicts = [judge(instance, workspace, name, target, limit_days) for target in workspace.targets]
            except RefineryError as error:  # one repository that cannot be read hides nothing of the others
                context.log.warning(f"{name}: {first_line(error)}")
                continue
            looked += 1
            wrong = "\n".join(verdict.description or "" for verdict in verdicts if not verdict.passed)
            before = told.get(name, Told())
            if wrong == before.wrong:
                continue
            told[name] = Told(wrong=wrong, at=time.time())
            # A run that mended it has said so itself.
            if wrong or confirmed_at(instance, name, workspace.targets) < before.at:
                # A job of checks alone has no partitions in Dagster 1.13; the tag is what a step reads.
                requests.append(dg.RunRequest(partition_key=name, tags={PARTITION_TAG: name}))
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else f"{looked} of {len(names)} models looked at, nothing else to tell",
            cursor=Cursor(told={name: told[name] for name in names if name in told}).model_dump_json(),
        )

    return release_freshness
