"""The schedule that plans every model again, and submits a run of a model if something would differ."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from assets.freshness import confirmed_at
from assets.partitions import PARTITION_TAG, models
from orchestration.automation.policies import FRESH_DAYS
from orchestration.runs.jobs import optimize
from orchestration.runs.under_way import UNDER_WAY
from resources.errors import CatalogError
from resources.settings.workspace import Workspace

DEFAULT_CRON = "0 3 * * *"
#: The time for all plans of one tick. Dagster gives up on a tick after 60 s.
PLAN_SECONDS = 45.0
#: After this many failed runs with the same inputs, no further run is submitted, because a person has to look.
MOST_ATTEMPTS = 2
#: The tags of the runs that the schedule submits.
PLAN_TAG, WHY_TAG = "refinery/plan", "refinery/why"
_LONGEST_TAG = 250
_COMPARED = "inputs, configuration, code, library, driver and device versions are those of the existing artifacts"


def reoptimization(cron: str, fresh_days: float = FRESH_DAYS) -> dg.ScheduleDefinition:
    """Return the schedule.

    Args:
        cron: The times at which the schedule plans the models.
        fresh_days: If no run went through a model for this many days, the schedule submits one to confirm it. That run
            finds nothing to do.

    Raises:
        CatalogError: `cron` is no cron expression.
    """
    try:
        return _reoptimization(cron, fresh_days)
    except dg.DagsterInvalidDefinitionError as error:
        raise CatalogError(f"REFINERY_SCHEDULE: {cron!r} is not a cron expression such as '{DEFAULT_CRON}'.") from error


def _reoptimization(cron: str, fresh_days: float) -> dg.ScheduleDefinition:
    @dg.schedule(
        name="reoptimize",
        job=optimize,
        cron_schedule=cron,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description=(
            "Plans every model of the catalog, and starts a run if something would differ; see `refinery plan`. A "
            f"model without a run for {fresh_days:g} days is confirmed: a run reads its files and rebuilds nothing."
        ),
    )
    def reoptimize(
        context: dg.ScheduleEvaluationContext, workspace: dg.ResourceParam[Workspace]
    ) -> list[dg.RunRequest] | dg.SkipReason:
        catalog = workspace.catalog()
        names = catalog.names
        # If a tick has no time for all models, the next one begins with others.
        turn = context.scheduled_execution_time.toordinal() % max(1, len(names))
        plans = read_plans([*names[turn:], *names[:turn]], PLAN_SECONDS)
        context.instance.add_dynamic_partitions(models.name or "", names)
        requests, said = [], [f"{name}: there was no time to plan this model" for name in names if name not in plans]
        said += catalog.refused.values()
        for name, plan in plans.items():
            if plan["error"]:
                said.append(f"{name}: a run would fail: {plan['error']}")
            request = _request(name, plan) if plan["differing"] else None
            if request is None and not plan["error"]:
                request = _confirmation(context, name, workspace.targets, fresh_days)
            why_not = _why_not(context.instance, name, request.tags[PLAN_TAG]) if request is not None else ""
            if why_not:
                said.append(f"{name}: {why_not}")
            elif request is not None:
                requests.append(request)
        for sentence in said:
            context.log.warning(sentence)
        if requests:
            return requests
        same = [name for name, plan in plans.items() if not plan["differing"] and not plan["error"]]
        unchanged = [f"nothing differs for {', '.join(same)}: {_COMPARED}"] if same else []
        return dg.SkipReason("; ".join([*unchanged, *said]) or "the catalog holds no model")

    return reoptimize


def read_plans(names: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Return the plans that `refinery plan --json` prints within the given number of seconds, by model.

    They are made in another process. This process may have begun before a library was upgraded, and would report the
    old version. If the other process ends early, the model whose turn it was gets an error, and a new process plans the
    rest.
    """
    plans: dict[str, dict[str, Any]] = {}
    left, deadline = [*names], time.monotonic() + seconds
    while left and (rest_s := deadline - time.monotonic()) > 0:
        found, wrong = _plan(left, rest_s)
        plans.update({plan["model"]: plan for plan in found})
        left = left[len(found) :]
        if wrong is None:
            break
        if left:
            model = left.pop(0)
            said = {"model": model, "error": f"the planning process ended early: {wrong}"}
            plans[model] = {**said, "steps": [], "differing": [], "digest": ""}
    return plans


def _plan(names: Sequence[str], seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """Return the plans of the first of the models, and the last line that the process wrote to standard error.

    Instead of that line the result has None if the process did not end in time.
    """
    command = [sys.executable, "-m", "orchestration.cli", "plan", "--json", *names]
    with tempfile.TemporaryDirectory(prefix="refinery-plan-") as folder:
        said, wrong = Path(folder) / "said", Path(folder) / "wrong"
        with said.open("wb") as output, wrong.open("wb") as errors:
            try:
                subprocess.run(command, stdout=output, stderr=errors, timeout=seconds, check=False)
                ended = True
            except subprocess.TimeoutExpired:
                ended = False
        # A line is incomplete if the process was writing it when the time was over.
        lines = [line for line in said.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
        last = wrong.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    return [json.loads(line) for line in lines], last if ended else None


def _why_not(instance: dg.DagsterInstance, model: str, digest: str) -> str:
    """Return why no run of the model is submitted although one is wanted. The text is empty if one is submitted."""
    of_model = {PARTITION_TAG: model}
    busy = instance.get_runs(dg.RunsFilter(job_name=optimize.name, tags=of_model, statuses=UNDER_WAY), limit=1)
    if busy:
        return f"its run {busy[0].run_id} is under way"
    failed = instance.get_runs(
        dg.RunsFilter(tags={**of_model, PLAN_TAG: digest}, statuses=[dg.DagsterRunStatus.FAILURE]), limit=MOST_ATTEMPTS
    )
    if len(failed) < MOST_ATTEMPTS:
        return ""
    return (
        f"{len(failed)} runs failed with the same plan, the last being {failed[0].run_id}; the schedule submits "
        f"another when the plan changes. Look at the run, or try by hand: refinery optimize {model}"
    )


def _request(model: str, plan: dict[str, Any]) -> dg.RunRequest:
    steps = [step for step in plan["steps"] if step["step"] in plan["differing"]]
    why = "; ".join(dict.fromkeys(reason for step in steps if step["state"] != "follows" for reason in step["reasons"]))
    return dg.RunRequest(
        partition_key=model,
        asset_selection=[dg.AssetKey(step["step"].split("/")) for step in steps],
        tags={PLAN_TAG: plan["digest"], WHY_TAG: why[:_LONGEST_TAG]},
    )


def _confirmation(
    context: dg.ScheduleEvaluationContext,
    model: str,
    targets: Sequence[str],
    fresh_days: float,
) -> dg.RunRequest | None:
    """Return the request for a whole run of a model that was last confirmed `fresh_days` ago or earlier.

    The result is None if the model was confirmed later, or never.
    """
    confirmed = confirmed_at(context.instance, model, targets)
    if not confirmed or context.scheduled_execution_time.timestamp() - confirmed < fresh_days * 86400:
        return None
    when = f"{datetime.fromtimestamp(confirmed, UTC):%Y-%m-%d %H:%M} UTC"
    # All plans in which nothing differs have the same digest. The tag therefore names the time of the last
    # confirmation, so that runs that failed before that time do not count.
    return dg.RunRequest(
        partition_key=model, tags={PLAN_TAG: f"confirmed {confirmed:.3f}", WHY_TAG: f"last confirmed {when}"}
    )
