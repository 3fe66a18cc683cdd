"""Whether what serves is what its checkpoint is now, and was confirmed lately: the check `up_to_date` of a release.

Dagster's own freshness looks at the newest materialization of any partition, and a partition here is a model: one
model's run would hide that another is never run. So this is told by model; a run tells it when it has published, and
`orchestration.freshness` between runs.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

import dagster as dg

from assets.partitions import models
from assets.placement import placement
from resources.artifacts.records import Checkpoint
from resources.artifacts.store import ArtifactStore
from resources.errors import ArtifactError
from resources.triton.layout import current_release
from resources.triton.release import Release
from resources.workspace import Workspace

CHECK = "up_to_date"


@dataclass(frozen=True)
class Known:
    """What only Dagster's instance knows. Times in seconds since 1970.

    wanted: the revision that a run was asked for and did not take; empty: none. confirmed: when the last run went
    through the checkpoint and the release, 0 for never. limit_days: how long ago that may be.
    """

    wanted: str
    confirmed: float
    limit_days: float


def release_check(target: str) -> dg.AssetChecksDefinition:
    """The check, as a step of a run: of the release and the checkpoint alone, since the run itself confirms both."""

    @dg.asset_check(
        asset=dg.AssetKey(["triton_repository", target]),
        name=CHECK,
        partitions_def=models,
        op_tags=placement(target),
    )
    def up_to_date(
        context: dg.AssetCheckExecutionContext, workspace: dg.ResourceParam[Workspace]
    ) -> dg.AssetCheckResult:
        """What serves is of the checkpoint that its source holds, and a run confirmed that in REFINERY_FRESH_DAYS."""
        return judge(workspace, context.partition_key, target)

    return up_to_date


def judge(
    workspace: Workspace, model: str, target: str, known: Known | None = None, now: float = 0.0
) -> dg.AssetCheckResult:
    """The verdict on a model's release. known, now: between runs. Raises ReleaseError where it cannot be read."""
    release = current_release(workspace.repository(target), model)
    try:
        collected = workspace.store.current(Checkpoint, f"checkpoint/{model}")
    except ArtifactError:
        collected = None
    wrong = []
    if release is None:
        wrong.append(f"nothing serves; optimize it: refinery optimize {model}")
    elif collected is not None and not _is_of(workspace.store, release, collected):
        wrong.append(
            f"release {release.number} is of revision {release.revision}, and revision {collected.revision} was "
            "collected since: look at the last run, or serve the newest release again: refinery promote "
            f"{model}"
        )
    if known is not None and known.wanted:
        wrong.append(f"its source holds revision {known.wanted}, and the run that was to take it did not: look at it")
    if known is not None and known.confirmed and now - known.confirmed > known.limit_days * 86400:
        since = datetime.fromtimestamp(known.confirmed, UTC)
        wrong.append(
            f"no run has confirmed it since {since:%Y-%m-%d %H:%M} UTC, longer than {known.limit_days:g} days: is the "
            "schedule reoptimize on, and Dagster's daemon running?"
        )
    metadata: dict[str, str | int | float] = {
        "release": release.number if release is not None else 0,
        "revision_that_serves": release.revision if release is not None else "none",
        "revision_collected": collected.revision if collected is not None else "none",
    }
    if known is not None:
        metadata["revision_wanted"] = known.wanted or "none other"
        metadata["limit_days"] = known.limit_days
        if known.confirmed:
            metadata["days_since_confirmed"] = round((now - known.confirmed) / 86400, 2)
    return dg.AssetCheckResult(
        passed=not wrong,
        severity=dg.AssetCheckSeverity.WARN,  # what serves goes on serving
        description=f"{model}: {'; '.join(wrong)}" if wrong else "what serves is of the newest checkpoint",
        metadata=metadata,
    )


def _is_of(store: ArtifactStore, release: Release, collected: Checkpoint) -> bool:
    """Whether that checkpoint is what the release was made of. Another revision of the same files makes no release."""
    if release.checkpoint_digest == collected.digest or release.revision == collected.revision:
        return True
    served = store.find(Checkpoint, release.checkpoint_digest)
    return served is not None and served.content_digest == collected.content_digest
