"""The sensor that tells, without a run, which releases are not up to date: what is forgotten runs nowhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress

import dagster as dg

from assets.checkpoint import checkpoint
from assets.freshness import CHECK, Known, judge
from orchestration import sensors
from orchestration.jobs import optimize
from orchestration.runs import PARTITION_TAG, models_under_way
from resources.artifacts.records import Checkpoint
from resources.errors import ArtifactError, RefineryError, first_line
from resources.workspace import Workspace

SENSOR = "release_freshness"
#: Nothing here changes faster, and repositories in object storage are asked over the network.
INTERVAL_SECONDS = 300


def freshness_sensor(limit_days: float) -> dg.SensorDefinition:
    """The sensor. limit_days: how long ago the last run of a model may be."""

    @dg.sensor(
        name=SENSOR,
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            f"Tells by the check `{CHECK}` of every model's release whether it is of the checkpoint that the source "
            "holds, and was confirmed by a run lately. Starts no run."
        ),
    )
    def release_freshness(
        context: dg.SensorEvaluationContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.SensorResult:
        began, now = time.monotonic(), time.time()
        told: dict[str, str] = json.loads(context.cursor or "{}")
        names, busy = workspace.catalog().names, models_under_way(context.instance)
        releases = [(name, target) for name in names for target in workspace.targets]
        events, looked = [], {}
        # Who was not reached the last time is first. What is under way tells its own verdict when it is done.
        for name, target in sorted(releases, key=lambda release: "/".join(release) in told):
            if name in busy or time.monotonic() > began + sensors.TICK_SECONDS:
                continue
            known = _known(context.instance, workspace, name, target, limit_days)
            try:
                verdict = judge(workspace, name, target, known, now)
            except RefineryError as error:  # one repository that cannot be read hides nothing of the others
                context.log.warning(f"{name} on {target}: {first_line(error)}")
                continue
            # A run's own verdict stands in between, and this one may have to be told again.
            looked[f"{name}/{target}"] = short = f"{known.confirmed:.0f} {verdict.passed} {verdict.description}"
            if told.get(f"{name}/{target}") != short:
                events.append(_event(name, target, verdict))
        return dg.SensorResult(
            skip_reason=f"{len(looked)} of {len(releases)} releases looked at, {len(events)} verdicts are new",
            cursor=json.dumps(looked),
            asset_events=events,
        )

    return release_freshness


def _event(model: str, target: str, verdict: dg.AssetCheckResult) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(["triton_repository", target]),
        check_name=CHECK,
        passed=bool(verdict.passed),
        metadata=verdict.metadata,
        severity=verdict.severity,
        description=verdict.description,
        partition=model,
    )


def _known(instance: dg.DagsterInstance, workspace: Workspace, model: str, target: str, limit_days: float) -> Known:
    """A revision that a run was asked for after the checkpoint was collected last, and did not take, is wanted."""
    wanted = collected = ""
    with suppress(ArtifactError):
        collected = workspace.store.current(Checkpoint, f"checkpoint/{model}").revision
    which = dg.RunsFilter(job_name=optimize.name, tags={PARTITION_TAG: model, sensors.SENSOR_TAG: sensors.SENSOR})
    for record in instance.get_run_records(which, limit=1):
        asked_at, revision = record.create_timestamp.timestamp(), record.dagster_run.tags[sensors.REVISION_TAG]
        if revision != collected and asked_at > _materialized_at(instance, checkpoint.key, model):
            wanted = revision
    return Known(wanted, confirmed_at(instance, model, [target]), limit_days)


def confirmed_at(instance: dg.DagsterInstance, model: str, targets: Sequence[str]) -> float:
    """When a run went last through the model's checkpoint and its releases, whichever is longer ago, in seconds since
    1970; 0: never through one of them.
    """
    keys = [checkpoint.key, *(dg.AssetKey(["triton_repository", target]) for target in targets)]
    return min(_materialized_at(instance, key, model) for key in keys)


def _materialized_at(instance: dg.DagsterInstance, key: dg.AssetKey, model: str) -> float:
    which = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[model])
    return next((record.timestamp for record in instance.fetch_materializations(which, limit=1).records), 0.0)
