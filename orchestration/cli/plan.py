"""`refinery plan`: a preview of what optimizing would do, with the reasons."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from orchestration.settings import read_workspace
from orchestration.terminal.output import print_refused, print_table, table_console
from resources.plan import ModelPlan, PlannedStep, State, plan_model

if TYPE_CHECKING:
    from rich.console import Console

_SAID: dict[State, str] = {
    "reused": "reused",
    "found": "taken from the store",
    "run": "would run",
    "follows": "may run",
    "retry": "would retry",
    "elsewhere": "unknown here",
}


def plan(options: Namespace) -> int:
    """Print the plan of each model as soon as it is known.

    Returns:
        1 if a run of one of the models would fail, else 0.
    """
    workspace = read_workspace(os.environ)
    if options.target is not None:
        workspace = replace(workspace, targets=(options.target,))
    catalog = workspace.catalog()
    entries = [catalog.get(name) for name in dict.fromkeys(options.models or catalog.names)]
    console, wrong = table_console(), False
    for entry in entries:
        found = plan_model(workspace, entry)
        wrong = wrong or bool(found.error)
        if options.json:
            print(json.dumps(as_json(found)), flush=True)
        else:
            print_plan(console, found)
    if not options.models:
        print_refused(catalog)
    if not entries and not options.json:
        print("The catalog holds no model.")
    return 1 if wrong else 0


def as_json(found: ModelPlan) -> dict[str, Any]:
    """Return a plan as a document: its fields, its digest, and the names of the steps that would or may run."""
    return {**asdict(found), "digest": found.digest, "differing": [step.step for step in found.differing]}


def print_plan(console: Console, found: ModelPlan) -> None:
    """Print a table of the steps that are not reused, with the number of the steps that are."""
    rows = [_row(step) for step in found.steps if step.state != "reused"]
    reused = sum(step.state == "reused" for step in found.steps)
    title = f"{found.model}: {len(found.differing)} of {len(found.steps)} steps would or may run, {reused} are reused"
    if rows:
        print_table(console, title, ("step", "", "why", "took"), rows)
    elif not found.error:
        console.print(f"{title}: nothing differs.", highlight=False)
    if found.error:
        console.print(f"{found.model}: a run would fail: {found.error}", highlight=False)


def _row(step: PlannedStep) -> tuple[str, str, str, str]:
    took = f"{step.seconds:.1f} s" if step.seconds >= 0.05 else "–"
    return step.step, _SAID[step.state], "; ".join(step.reasons), took
