"""`refinery optimize`: one run of the job, with live progress and a table at its end."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import dagster as dg

from orchestration.cli.model_argument import find_or_add
from orchestration.definitions import defs, make_definitions
from orchestration.runs.instance import prepare_instance
from orchestration.runs.run_launcher import HOST_TAG
from orchestration.settings import read_workspace, tracker_of
from orchestration.terminal.output import print_candidates, table_console
from resources.errors import CatalogError, EngineError, TrackingError, database_trouble, disk_remedy
from resources.machine.device import why_not_here
from resources.settings.workspace import Workspace
from resources.storage.locations import parse_location

if TYPE_CHECKING:
    from dagster import ExecuteInProcessResult
    from dagster_shared.error import SerializableErrorInfo

    from resources.catalog.entries import ModelEntry

#: Dagster writes this before the text of an error of this project.
_OURS = "resources.errors."
#: The errors that SQLite reports if its files cannot be written.
_DATABASE = re.compile(
    r"sqlite3\.OperationalError\)?:? "
    "(disk I/O error|database or disk is full|unable to open database file|attempt to write a readonly database)"
)
#: The form in which Dagster writes an error of the system: its number, its text and the file.
_SYSTEM = re.compile(r"^\w*(?:Error|Exception): \[Errno (\d+)\] (.*)", re.MULTILINE)

#: The name of the code location in workspace.yaml.
LOCATION = "transformer-refinery"


def optimize(options: Namespace) -> int:
    """Add the model to the catalog if it is not there, run the job, and print the result."""
    workspace = _workspace(options)
    missing = [why_not_here(target) for target in workspace.targets]
    if all(missing):  # if this machine has only some of the targets, others make the rest
        raise EngineError(" ".join(filter(None, missing)))
    entry = find_or_add(workspace, options)
    print(f"{entry.name}: {entry.task}, {entry.source}")
    prepare_instance(workspace)
    # The definitions for the environment's own workspace were made when their module was imported.
    definitions = defs if workspace == read_workspace(os.environ) else make_definitions(workspace)
    job = definitions.resolve_job_def("optimize")
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", [entry.name])
        result = job.execute_in_process(
            partition_key=entry.name,
            instance=instance,
            run_config={"loggers": {"progress": {}}},
            raise_on_error=False,
            tags={
                # With this tag, the job's page lists the run beside those that were started there.
                ".dagster/repository": f"__repository__@{LOCATION}",
                # With this tag, Dagster's daemon, if one runs, sees that this process was killed. It does not start the
                # run again, because that is left to the user who started it.
                HOST_TAG: socket.gethostname(),
                "dagster/max_retries": "0",
            },
        )
    if not result.success:
        messages = failures(result)
        for message in messages:
            print(f"refinery: {message}", file=sys.stderr)
        with suppress(TrackingError):  # people have to read why the run failed, and nothing after it
            tracker_of(workspace).abandon(result.run_id, entry.name, " ".join(messages) or "interrupted")
        if not messages:
            raise KeyboardInterrupt
        return 1
    for target in workspace.targets:
        _summarize(workspace, entry, target)
    return 0


def _workspace(options: Namespace) -> Workspace:
    workspace = read_workspace(os.environ)
    if options.target is not None:
        workspace = replace(workspace, targets=(options.target,))
    if options.output is not None:
        try:
            repositories = parse_location(options.output, workspace.scratch, os.environ)
        except ValueError as error:
            raise CatalogError(f"--output: {error}.") from None
        workspace = replace(workspace, triton=replace(workspace.triton, repositories=repositories))
    return workspace


def failures(result: ExecuteInProcessResult) -> list[str]:
    """Return the message of each failed step, or none if the run was ended by Ctrl-C.

    The message of this project's own errors is their text. The message of a defect includes its type.
    """
    messages = []
    for event in result.all_events:
        if event.event_type is dg.DagsterEventType.RUN_FAILURE and _is_interrupt(event.job_failure_data.error):
            return []
        if event.event_type is not dg.DagsterEventType.STEP_FAILURE:
            continue
        if _is_interrupt(event.step_failure_data.error):
            return []
        chain = _chain(event.step_failure_data.error)
        text = next((text for text in chain if text.startswith(_OURS)), chain[-1])
        kind, _, rest = text.partition(": ")
        if kind.endswith(".DagsterAssetCheckFailedError"):
            messages += _failed_checks(result)
        elif kind.startswith(_OURS):
            messages.append(rest)
        else:
            step = str(event.step_key).replace("__", "/")
            said = _of_the_system(chain)
            messages.append(
                f"{step}: {said}" if said else f"{step}: {text} (a defect; Dagster has the full traceback, `make ui`)"
            )
    return messages or ["the run failed before its first step. Dagster's page has its log (`make ui`)."]


def _of_the_system(texts: list[str]) -> str:
    """Return what is wrong with a disk, with the remedy, or an empty text if none of the texts tells of that."""
    for text in texts:
        found = _SYSTEM.search(text)
        remedy = disk_remedy(int(found[1])) if found else ""
        if found and remedy:
            return f"{found[2]}. {remedy}"
        if found := _DATABASE.search(text):
            return database_trouble(found[1])
    return ""


def _is_interrupt(error: SerializableErrorInfo | None) -> bool:
    """Return whether the error is Dagster's form of Ctrl-C, in a step or between two steps."""
    return error is not None and error.cls_name in ("KeyboardInterrupt", "DagsterExecutionInterruptedError")


def _chain(error: SerializableErrorInfo | None) -> list[str]:
    """Return the error's text, followed by the texts of its causes.

    The causes are often errors of libraries, while the errors of this project say what to do.
    """
    texts = []
    while error is not None:
        texts.append(error.message.strip())
        error = error.cause
    return texts or ["failed without a message"]


def _failed_checks(result: ExecuteInProcessResult) -> list[str]:
    return [
        f"{'/'.join(check.asset_key.path)}: {check.check_name}: {check.description}"
        for check in result.get_asset_check_evaluations()
        if not check.passed and check.severity is dg.AssetCheckSeverity.ERROR
    ]


def _summarize(workspace: Workspace, entry: ModelEntry, target: str) -> None:
    from assets.triton_repository import query_command, serve_command
    from resources.steps.graph import steps_of
    from resources.steps.step import Work
    from resources.triton.layout import current_release, list_releases
    from resources.triton.publish import unverified_root

    console = table_console()
    model, work, step = entry.name, Work(workspace, entry), steps_of(target).champion
    champion, reports = work.get(step), step.reports(work)
    title = f"{model} on {target} ({reports[0].device}): p50 / p99 (times faster than PyTorch)"
    print_candidates(console, title, reports, champion.verdicts, champion.engine)
    repository = workspace.repository(target)
    release = current_release(repository, model)
    console.print(f"{champion.reason}", highlight=False)
    for waiting in list_releases(unverified_root(repository, model), model):
        console.print(f"Release {waiting.number} waits for its proof in {unverified_root(repository, model)}.")
        console.print("To prove it, point REFINERY_TRITON_GRPC to a Triton server that can load it, and run again.")
    if release is None:
        console.print(f"No release of {model} is served from {repository}.")
        return
    console.print(f"Release {release.number} of {model} serves {release.engine} from {repository}.", highlight=False)
    # The commands are printed so that they can be pasted. The environment's own folder is rarely on the path.
    program = "refinery" if shutil.which("refinery") else os.path.relpath(sys.argv[0])
    for title, command in (
        ("Ask it:  ", query_command(work, target)),
        ("Serve it:", serve_command(workspace, target)),
    ):
        console.print(f"{title}  {command.replace('refinery ', f'{program} ', 1)}", highlight=False)
