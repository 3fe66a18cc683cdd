"""The removal of unneeded artifacts from the artifact stores, for `refinery gc` and for the job of that name."""

from __future__ import annotations

import time
from collections.abc import Mapping

import dagster as dg

from orchestration.runs.under_way import UNDER_WAY
from resources.artifacts.gc import DAY_SECONDS, Collected, collect
from resources.artifacts.remote_gc import collect_remote
from resources.report.tables import size_text
from resources.settings.workspace import Workspace
from resources.triton.layout import artifacts_of_releases


def clean_stores(
    workspace: Workspace, keep_days: float, under_way: dg.RunRecord | None, *, dry_run: bool = False
) -> dict[str, Collected]:
    """Remove the artifacts that no release, step or run needs.

    They are removed from the workspace's store, and from the object storage that it shares with other machines.

    Args:
        workspace: The workspace.
        keep_days: Artifacts that were used within this many days stay. Less than one day counts as one.
        under_way: The oldest run under way. Artifacts that were used since it was created stay.
        dry_run: Whether to report what would be removed, and remove nothing.

    Returns:
        What was removed, by the place of the store.

    Raises:
        ReleaseError: A repository cannot be read, so the needs of its releases are not known. Nothing is removed then.
    """
    used_since = time.time() - max(keep_days, 1.0) * DAY_SECONDS
    if under_way is not None:
        used_since = min(used_since, under_way.create_timestamp.timestamp())
    wanted = artifacts_of_releases(workspace.repositories)
    store, cleaned = workspace.store, dict[str, Collected]()
    if store.remote is not None:
        cleaned[str(store.remote.root)] = collect_remote(store.remote, wanted, used_since=used_since, dry_run=dry_run)
    cleaned[str(store.root)] = collect(store, wanted, used_since=used_since, dry_run=dry_run)
    return cleaned


def oldest_run_under_way(instance: dg.DagsterInstance, but: str = "") -> dg.RunRecord | None:
    """Return the oldest run that has not ended, or None. The run whose id is `but` does not count."""
    records = instance.get_run_records(dg.RunsFilter(statuses=UNDER_WAY))
    records = [record for record in records if record.dagster_run.run_id != but]
    return min(records, key=lambda record: record.create_timestamp, default=None)


def summary(cleaned: Mapping[str, Collected]) -> dict[str, dict[str, str]]:
    """Return the number and size of the artifacts that were removed, as text, by place and kind."""
    return {
        place: {kind: f"{amount.count} ({size_text(amount.size_bytes)})" for kind, amount in done.removed.items()}
        for place, done in cleaned.items()
    }
