"""The check `up_to_date`: whether a release is of its model's newest checkpoint, and was confirmed lately.

Dagster's own freshness looks at the newest materialization of any partition. A partition here is a model, so one
model's run would hide that another model is never run. This check judges each model by itself.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime

import dagster as dg

from assets.checkpoint import checkpoint
from assets.executor_tags import placement
from assets.partitions import PARTITION_TAG, models
from resources.artifacts.records import Checkpoint
from resources.artifacts.store import ArtifactStore
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.triton.layout import current_release
from resources.triton.release import Release

CHECK = "up_to_date"
#: The tag of a run that was requested because a source holds a new revision. Its value is the revision.
REVISION_TAG = "refinery/revision"
#: How many of a model's newest runs are searched for one with that tag.
_MOST_RUNS = 20


def release_key(target: str) -> dg.AssetKey:
    """Return the key of the asset that stands for a target's releases."""
    return dg.AssetKey(["triton_repository", target])


def release_check(target: str, limit_days: float) -> dg.AssetChecksDefinition:
    """Return the check of a target's releases.

    Args:
        target: The target.
        limit_days: The last run through the checkpoint and the release may be this many days ago.
    """

    @dg.asset_check(asset=release_key(target), name=CHECK, partitions_def=models, op_tags=placement(target))
    def up_to_date(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """The release is of the checkpoint that its source holds. A run confirmed that within REFINERY_FRESH_DAYS."""
        return judge(context.instance, workspace, context.partition_key, target, limit_days)

    return up_to_date


def judge(
    instance: dg.DagsterInstance, workspace: Workspace, model: str, target: str, limit_days: float
) -> dg.AssetCheckResult:
    """Return the verdict on a model's release, which is based on records alone.

    The last run through the model's checkpoint and release may be `limit_days` ago.

    Raises:
        ReleaseError: The repository cannot be read.
        StorageError: A store in object storage does not answer.
    """
    release = current_release(workspace.repository(target), model)
    collected = workspace.store.known(Checkpoint, f"{CHECKPOINT.name}/{model}")
    wanted = _wanted(instance, model, collected.revision if collected is not None else "")
    confirmed = confirmed_at(instance, model, [target])
    age_days = (time.time() - confirmed) / 86400
    wrong = []
    if release is None:
        wrong.append(f"nothing serves; optimize it: refinery optimize {model}")
    elif collected is not None and not _is_of(workspace.store, release, collected):
        wrong.append(
            f"release {release.number} serves revision {release.revision}, and revision {collected.revision} was "
            f"collected since; look at its last run, or, after a rollback: refinery promote {model}"
        )
    if wanted:
        wrong.append(f"its source holds revision {wanted}, and the run that was to take it did not; look at that run")
    if confirmed and age_days > limit_days:
        wrong.append(
            f"no run has confirmed it since {datetime.fromtimestamp(confirmed, UTC):%Y-%m-%d %H:%M} UTC, for more than "
            f"{limit_days:g} days; see that the schedule reoptimize is on, and that its runs succeed"
        )
    metadata: dict[str, str | int | float] = {
        "release_number": release.number if release is not None else 0,
        "revision_that_serves": release.revision if release is not None else "none",
        "revision_collected": collected.revision if collected is not None else "none",
        "revision_not_taken": wanted or "none",
        "limit_days": limit_days,
        **({"days_since_confirmed": round(age_days, 3)} if confirmed else {}),
    }
    return dg.AssetCheckResult(
        passed=not wrong,
        severity=dg.AssetCheckSeverity.WARN,  # the release goes on serving
        description=f"{model}: {'; '.join(wrong)}." if wrong else "the release is made from the newest checkpoint",
        metadata=metadata,
    )


def confirmed_at(instance: dg.DagsterInstance, model: str, targets: Sequence[str]) -> float:
    """Return when runs last confirmed the model's checkpoint and all its releases, in seconds since 1970.

    The result is the time of the asset whose last materialization is the oldest. It is 0 if one of the assets was never
    materialized.
    """
    return min(_materialized_at(instance, key, model) for key in (checkpoint.key, *map(release_key, targets)))


def _materialized_at(instance: dg.DagsterInstance, key: dg.AssetKey, model: str) -> float:
    which = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[model])
    return next((record.timestamp for record in instance.fetch_materializations(which, limit=1).records), 0.0)


def _wanted(instance: dg.DagsterInstance, model: str, collected: str) -> str:
    """Return the revision that a run was requested for and did not collect, or an empty text if there is none.

    Only the newest run with REVISION_TAG counts. Its revision is returned if the run was created after the checkpoint
    was last collected, and if it is not the revision that was collected.
    """
    for record in instance.get_run_records(dg.RunsFilter(tags={PARTITION_TAG: model}), limit=_MOST_RUNS):
        revision = record.dagster_run.tags.get(REVISION_TAG)
        if revision is not None:
            later = record.create_timestamp.timestamp() > _materialized_at(instance, checkpoint.key, model)
            return revision if later and revision != collected else ""
    return ""


def _is_of(store: ArtifactStore, release: Release, collected: Checkpoint) -> bool:
    """Return whether the release was made of that checkpoint. Another revision of the same files counts as the same."""
    if release.checkpoint_digest == collected.digest or release.revision == collected.revision:
        return True
    served = store.record(Checkpoint, release.checkpoint_digest)
    return served is not None and served.content_digest == collected.content_digest
