"""`refinery gc`: the removal of unneeded artifacts from the artifact stores."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

import dagster as dg

from orchestration.automation.garbage_collection import clean_stores, oldest_run_under_way
from orchestration.runs.instance import instance_folder, prepare_instance
from orchestration.settings import read_workspace
from orchestration.terminal.output import print_table, table_console
from resources.artifacts.gc import Collected
from resources.errors import RefineryError, disk_trouble, first_line
from resources.report.tables import size_text
from resources.settings.workspace import Workspace


def collect_garbage(options: Namespace) -> int:
    """Remove unneeded artifacts, and print what was removed."""
    workspace = read_workspace(os.environ)
    under_way = _run_under_way(workspace)
    cleaned = clean_stores(workspace, options.keep_days, under_way, dry_run=options.dry_run)
    if under_way is not None:
        print(
            f"Run {under_way.dagster_run.run_id} has been under way since {under_way.create_timestamp:%Y-%m-%d %H:%M} "
            "UTC. Artifacts that were used since then are kept. If its process is gone, cancel the run in Dagster."
        )
    for place, done in cleaned.items():
        rows = [[kind.replace("_", " "), *_counts(done, kind)] for kind in sorted({*done.removed, *done.kept})]
        title = f"{'Would free' if options.dry_run else 'Freed'} {size_text(done.freed_bytes)} in {place}"
        print_table(table_console(), title, ("kind", "removed", "size", "kept", "size"), rows)
    return 0


def _run_under_way(workspace: Workspace) -> dg.RunRecord | None:
    """Return the oldest run under way, or None.

    On a full disk, even reading Dagster's runs may fail. The result is None then, so that room is made all the same.
    """
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
            f"refinery: Dagster's runs cannot be read: {first_line(error)}. Artifacts that were used within the "
            "days of --keep-days are kept, but runs that began before that are not taken into account.",
            file=sys.stderr,
        )
        return None


def _counts(done: Collected, kind: str) -> list[str]:
    cells = []
    for amounts in (done.removed, done.kept):
        amount = amounts.get(kind)
        cells += [str(amount.count), size_text(amount.size_bytes)] if amount is not None else ["–", "–"]
    return cells
