"""`refinery optimize`: one run of the job, with live progress, ending in a table."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from orchestration.definitions import make_definitions
from orchestration.entries import find_or_add
from orchestration.instance import prepare_instance
from orchestration.settings import read_workspace
from resources.artifacts.records import Champion
from resources.engines import ENGINES, TARGETS
from resources.errors import CatalogError
from resources.workspace import Workspace

if TYPE_CHECKING:
    from dagster import ExecuteInProcessResult


#: As workspace.yaml names the code location.
LOCATION = "transformer-refinery"


def optimize(options: Namespace) -> int:
    """Add the model to the catalog if need be, run the job, say what came of it."""
    workspace = _workspace(options)
    entry = find_or_add(workspace, options)
    prepare_instance(workspace)
    job = make_definitions(workspace).resolve_job_def("optimize")
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", [entry.name])
        result = job.execute_in_process(
            partition_key=entry.name,
            instance=instance,
            run_config={"loggers": {"progress": {}}},
            raise_on_error=False,
            # So that the job's page lists the run beside those that were started there.
            tags={".dagster/repository": f"__repository__@{LOCATION}"},
        )
    if not result.success:
        for message in failures(result):
            print(f"refinery: {message}", file=sys.stderr)
        return 1
    for target in workspace.targets:
        _summarize(workspace, entry.name, target)
    return 0


def _workspace(options: Namespace) -> Workspace:
    workspace = read_workspace(os.environ)
    if options.target is not None:
        if options.target not in TARGETS:
            raise CatalogError(f"--target: {options.target!r} is not one of {', '.join(TARGETS)}.")
        workspace = replace(workspace, targets=(options.target,))
    if options.output is not None:
        triton = replace(workspace.triton, repositories=Path(options.output).resolve())
        workspace = replace(workspace, triton=triton)
    return workspace


def failures(result: ExecuteInProcessResult) -> list[str]:
    """What each failed step has to say: our own error's text alone, a defect's with its type."""
    messages = []
    for event in result.all_events:
        if event.event_type is not dg.DagsterEventType.STEP_FAILURE:
            continue
        error = event.step_failure_data.error
        while error is not None and error.cause is not None:
            error = error.cause
        text = error.message.strip() if error is not None else "failed without a word"
        step = str(event.step_key).replace("__", "/")
        module, _, rest = text.partition(": ")
        own = module.startswith("resources.errors.")
        messages.append(rest if own else f"{step}: {text} (a defect; the whole trace is in Dagster, `make ui`)")
    return messages or ["the run failed before any step; Dagster's page has its log (`make ui`)."]


def _summarize(workspace: Workspace, model: str, target: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from assets.champion import current_reports
    from resources.reporting import candidate_table
    from resources.triton.layout import current_release, list_releases
    from resources.triton.publish import unverified_root

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a log has no width of its own
    champion = workspace.store.current(Champion, f"champion/{target}/{model}")
    reports = current_reports(workspace, ENGINES, target, model)
    header, rows = candidate_table(reports, champion.verdicts)
    title = f"{model} on {target} ({reports[0].device}): p50 / p99, (times faster than PyTorch)"
    table = Table(title=title, title_justify="left")
    for name in header:
        table.add_column(name, overflow="fold", justify="right" if name.endswith("ms") else "left")
    measured = {report.engine for report in reports if report.status == "measured"}
    for row in rows:
        if row[0] in measured:
            table.add_row(*row, style="bold" if row[0] == champion.engine else None)
    console.print(table)
    for row in rows:
        if row[0] not in measured:
            console.print(f"{row[0]}: {row[-1]}", highlight=False)
    repository = workspace.repository(target)
    release = current_release(repository, model)
    if release is None:
        console.print(f"No release of {model} is served from {repository}.")
        for release in list_releases(unverified_root(repository, model), model):
            console.print(f"Release {release.number} waits unverified in {unverified_root(repository, model)}.")
            console.print("Point REFINERY_TRITON_GRPC to a Triton that can load it, and run again: it is proven there.")
        return
    console.print(f"{champion.reason}", highlight=False)
    console.print(f"Release {release.number} of {model} serves {release.engine} from {repository}.", highlight=False)
    console.print(f'Ask it:    refinery query {model} "any text"', highlight=False)
    console.print("Serve it:  refinery serve", highlight=False)
