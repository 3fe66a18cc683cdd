"""Jobs that roll back, promote, remove and check releases, and that clean up the artifact stores.

A job for releases records what it did as an observation of the release's asset.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from orchestration.automation.garbage_collection import clean_stores, oldest_run_under_way, summary
from resources.report.tables import size_text
from resources.settings.workspace import Workspace
from resources.tracking import Tracker


class Which(dg.Config):
    """The model and the target whose releases a job handles."""

    model: str
    target: str = "cpu"


class Rollback(Which):
    """The settings of the job `rollback`.

    Args:
        to: The number of the release to serve. 0 means the release before the current one.
    """

    to: int = 0


class Retention(Which):
    """The settings of the job `retain`.

    Args:
        keep: The number of newest releases that stay.
    """

    keep: int = 3


class Cleaning(dg.Config):
    """The settings of the job `gc`.

    Args:
        keep_days: Artifacts that were used within this many days stay.
        dry_run: Whether to report what would be removed, and remove nothing.
    """

    keep_days: float = 7.0
    dry_run: bool = False


class Verification(Which):
    """The settings of the job `verify`.

    Args:
        release: The number of the release to check. 0 means the one that serves.
    """

    release: int = 0


@dg.op(description="Serve an older release again, once a real server has answered with it.")
def roll_back_release(context: dg.OpExecutionContext, config: Rollback, workspace: dg.ResourceParam[Workspace]) -> None:
    """Serve an older release again, once a real server has answered with it."""
    # This is imported late because definitions are loaded again for every step.
    from resources.triton.rollback import roll_back

    repository = workspace.repository(config.target)
    log = workspace.log(config.model, f"triton-{config.target}")
    done = roll_back(repository, config.model, workspace.triton, to=config.to or None, log=log)
    _seen(context, config, {"rolled_back_to": done.release.number, "before": done.before or 0})


@dg.op(description="Serve the newest release: one that waits for its proof, or one that a rollback left behind.")
def promote_release(
    context: dg.OpExecutionContext,
    config: Which,
    workspace: dg.ResourceParam[Workspace],
    tracker: dg.ResourceParam[Tracker],
) -> None:
    """Serve the newest release: one that waits for its proof, or one that a rollback left behind."""
    from resources.steps.promote import promote

    log = workspace.log(config.model, f"triton-{config.target}")
    done = promote(workspace, tracker, config.model, config.target, dagster_run=context.run_id, log=log)
    _seen(context, config, {"promoted": done.release.number, "before": done.before or 0})


@dg.op(description="Remove old releases, except those that are pointed to, served, or the champion in MLflow.")
def retain_releases(
    context: dg.OpExecutionContext,
    config: Retention,
    workspace: dg.ResourceParam[Workspace],
    tracker: dg.ResourceParam[Tracker],
) -> None:
    """Remove old releases, except those that are pointed to, served, or the champion in MLflow."""
    from resources.triton.retain import retain

    champion = tracker.champion_release(config.model, config.target)
    done = retain(
        workspace.repository(config.target),
        config.model,
        keep=config.keep,
        wanted={} if champion is None else {champion: "the champion in MLflow"},
        settings=workspace.triton,
    )
    kept = {str(number): why for number, why in done.kept.items()}
    _seen(context, config, {"kept": dg.MetadataValue.json(kept), "removed": dg.MetadataValue.json(list(done.removed))})


@dg.op(description="Compare a release with its published files, and have a real server answer with it.")
def verify_one_release(
    context: dg.OpExecutionContext, config: Verification, workspace: dg.ResourceParam[Workspace]
) -> None:
    """Compare a release with its published files, and have a real server answer with it."""
    from resources.triton.verify import verify_release

    repository = workspace.repository(config.target)
    log = workspace.log(config.model, f"verify-{config.target}")
    release, server = verify_release(repository, config.model, workspace.triton, config.release or None, log=log)
    _seen(context, config, {"verified": release.number, "files": len(release.files), "asked": server})


@dg.op(description="Remove the artifacts that no release, run or recent step needs.")
def collect_garbage(context: dg.OpExecutionContext, config: Cleaning, workspace: dg.ResourceParam[Workspace]) -> None:
    """Remove the artifacts that no release, run or recent step needs."""
    under_way = oldest_run_under_way(context.instance, but=context.run_id)
    cleaned = clean_stores(workspace, config.keep_days, under_way, dry_run=config.dry_run)
    freed = sum(done.freed_bytes for done in cleaned.values())
    context.log.info(f"{'would free' if config.dry_run else 'freed'} {size_text(freed)}: {summary(cleaned)}")
    context.add_output_metadata({"freed_bytes": freed, "removed": dg.MetadataValue.json(summary(cleaned))})


def _seen(context: dg.OpExecutionContext, config: Which, metadata: Mapping[str, Any]) -> None:
    key = dg.AssetKey(["triton_repository", config.target])
    context.log_event(dg.AssetObservation(asset_key=key, partition=config.model, metadata=metadata))


@dg.job(description="Point a model to an older release; see `refinery rollback`.", executor_def=dg.in_process_executor)
def rollback() -> None:
    """Point a model to an older release; see `refinery rollback`."""
    roll_back_release()


@dg.job(description="Serve a model's newest release; see `refinery promote`.", executor_def=dg.in_process_executor)
def promote() -> None:
    """Serve a model's newest release; see `refinery promote`."""
    promote_release()


@dg.job(description="Remove a model's old releases; see `refinery retain`.", executor_def=dg.in_process_executor)
def retain() -> None:
    """Remove a model's old releases; see `refinery retain`."""
    retain_releases()


@dg.job(description="Check a model's release; see `refinery verify`.", executor_def=dg.in_process_executor)
def verify() -> None:
    """Check a model's release; see `refinery verify`."""
    verify_one_release()


@dg.job(description="Clean up the artifact stores; see `refinery gc`.", executor_def=dg.in_process_executor)
def gc() -> None:
    """Clean up the artifact stores; see `refinery gc`."""
    collect_garbage()


JOBS = [rollback, promote, retain, verify, gc]
