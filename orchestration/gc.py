"""`refinery gc`, and what the job of that name does."""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping

import dagster as dg

from orchestration.instance import instance_folder, prepare_instance
from orchestration.runs import UNDER_WAY
from orchestration.settings import read_workspace
from orchestration.terminal import print_table, table_console
from resources.artifacts.gc import DAY_SECONDS, Collected, collect
from resources.artifacts.remote_gc import collect_remote
from resources.errors import RefineryError, disk_trouble, first_line
from resources.report.tables import size_text
from resources.settings.workspace import Workspace
from resources.triton.layout import artifacts_of_releases


def collect_garbage(options: Namespace) -> int:
    """Remove, and say what went."""
    workspace = read_workspace(os.environ)
    under_way = _run_under_way(workspace)
    cleaned = clean_stores(workspace, options.keep_days, under_way, dry_run=options.dry_run)
    if under_way is not None:
        print(
            f"Run {under_way.dagster_run.run_id} is under way since {under_way.create_timestamp:%Y-%m-%d %H:%M} UTC; "
            "what was used since stays. If its process is gone, cancel it on Dagster's page."
        )
    for place, done in cleaned.items():
        rows = [[kind.replace("_", " "), *_counts(done, kind)] for kind in sorted({*done.removed, *done.kept})]
        title = f"{'Would free' if options.dry_run else 'Freed'} {size_text(done.freed_bytes)} of {place}"
        print_table(table_console(), title, ("kind", "removed", "size", "kept", "size"), rows)
    return 0


def _run_under_way(workspace: Workspace) -> dg.RunRecord | None:
    """The oldest run under way. On a full disk Dagster may not even be read, and room is made all the same."""
    if not instance_folder(workspace).is_dir():
        return None
    try:
        prepare_instance(workspace)
        with dg.DagsterInstance.get() as instance:
            return oldest_run_under_way(instance)
    except RefineryError:
        raise
    except Exception as error:
        if not disk_trouble(error):
            raise
        print(
            f"refinery: Dagster's runs cannot be read: {first_line(error)}. What was used within the days of "
            "--keep-days stays; runs that began before that are not known.",
            file=sys.stderr,
        )
        return None


def clean_stores(
    workspace: Workspace, keep_days: float, under_way: dg.RunRecord | None, *, dry_run: bool = False
) -> dict[str, Collected]:
    """Remove from the workspace's store, and from the object storage that it shares with other machines, what no
    release, step or run needs; what was done by place. Raises ReleaseError where a repository cannot be read: nobody
    knows then what its releases need, and nothing is removed.
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
    """The oldest run that is not finished, other than the one of that id."""
    records = instance.get_run_records(dg.RunsFilter(statuses=UNDER_WAY))
    records = [record for record in records if record.dagster_run.run_id != but]
    return min(records, key=lambda record: record.create_timestamp, default=None)


def summary(cleaned: Mapping[str, Collected]) -> dict[str, dict[str, str]]:
    """What was removed by place and kind, in words."""
    return {
        place: {kind: f"{amount.count} ({size_text(amount.size_bytes)})" for kind, amount in done.removed.items()}
        for place, done in cleaned.items()
    }


def _counts(done: Collected, kind: str) -> list[str]:
    cells = []
    for amounts in (done.removed, done.kept):
        amount = amounts.get(kind)
        cells += [str(amount.count), size_text(amount.size_bytes)] if amount is not None else ["–", "–"]
    return cells
