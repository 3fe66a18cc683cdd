"""The parent run of an optimization, which is made with its first child and closed with its verdict and report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from resources.artifacts.records import BenchmarkReport, Checkpoint
from resources.report.plots import length_plot
from resources.tracking.candidates import remembered_as, speedups
from resources.tracking.names import NOTE, PARENT, TAG, checkpoint_tags, run_name
from resources.tracking.store import RunLink, TrackingStore

# resources.report is imported in the functions that write a report, because Dagster loads the definitions, and with
# them this module, again for every step.
if TYPE_CHECKING:
    from mlflow.entities import Run

    from resources.report.optimization import Before, OptimizationReport


def parent_query(dagster_run: str, target: str | None) -> str:
    """Return the query for a Dagster run's parent run for the target, or for its parents of all targets without one."""
    ours = f"tags.`{TAG}parent` = 'true' and tags.`{TAG}dagster_run` = '{dagster_run}'"
    return f"{ours} and tags.`{TAG}target` = '{target}'" if target is not None else ours


def begin(store: TrackingStore, checkpoint: Checkpoint, report: BenchmarkReport, tags: Mapping[str, str]) -> RunLink:
    """Make the parent run of an optimization.

    Args:
        store: The tracking store.
        checkpoint: The checkpoint that is optimized.
        report: The report on the first candidate.
        tags: The tags that all runs of the optimization have.
    """
    from resources.report.page import LENGTHS

    said = {
        f"{TAG}parent": "true",
        f"{TAG}kind": "optimization",
        f"{TAG}target": report.target,
        f"{TAG}device": report.device,
        **checkpoint_tags(checkpoint),
        **tags,
    }
    name = run_name("optimization", checkpoint.revision, report.target)
    run = store.client.create_run(store.experiment(checkpoint.model), run_name=name, tags=said)
    lengths, metrics = checkpoint.lengths, {"checkpoint_bytes": float(checkpoint.weights_bytes)}
    if lengths is not None:
        metrics |= {
            "tokens_p50": float(lengths.percentile(0.5)),
            "tokens_p95": float(lengths.percentile(0.95)),
            "padding_share": lengths.padding,
        }
        title = f"{checkpoint.model}: rows of {lengths.requests} sampled requests"
        pictures = {LENGTHS: length_plot(lengths, title), "lengths.json": lengths.model_dump_json().encode()}
        store.log_files(run.info.run_id, pictures)
    parameters = {
        "revision": checkpoint.revision,
        "source": checkpoint.source,
        "task": checkpoint.task,
        "architecture": checkpoint.architecture,
        "max_tokens": checkpoint.max_tokens,
    }
    store.log(run.info.run_id, parameters, metrics)
    return store.link(run)


def adopt(store: TrackingStore, parent: RunLink, reports: Sequence[BenchmarkReport]) -> None:
    """Move the candidates' runs from parents that did not finish to this parent, where the candidates now compete."""
    for report in reports:
        link = store.recall(remembered_as(report))
        child = store.run(link.run_id) if link is not None else None
        former = child.data.tags.get(PARENT) if child is not None else None
        if child is None or former is None or former == parent.run_id:
            continue
        owner = store.run(former)
        if owner is None or owner.info.status != "FINISHED":
            store.client.set_tag(child.info.run_id, PARENT, parent.run_id)


def unite(store: TrackingStore, parent: RunLink, model: str, query: str) -> None:
    """Merge all parent runs that the query finds into this one.

    Two machines that begin at the same time make one parent run each. The children of the other parents move to this
    one, and the other parents are deleted.
    """
    for other in store.search(model, query):
        if other.info.run_id != parent.run_id:
            for child in _children(store, other):
                store.client.set_tag(child.info.run_id, PARENT, parent.run_id)
            store.client.delete_run(other.info.run_id)


def close(
    store: TrackingStore,
    parent: RunLink,
    report: OptimizationReport,
    pictures: Mapping[str, bytes],
    tags: Mapping[str, str],
) -> None:
    """Write the verdict and the report, and end the parent run.

    Args:
        store: The tracking store.
        parent: The parent run.
        report: The data of the report.
        pictures: The pictures of the report that are drawn already, by name.
        tags: The tags to add to the parent run.
    """
    from resources.report.page import LENGTHS, render

    client, champion = store.client, report.champion
    best = next(one for one in report.reports if one.engine == champion.engine)
    lengths = store.read_file(parent.run_id, LENGTHS) if report.lengths is not None else None
    known = {**pictures, **({LENGTHS: lengths} if lengths is not None else {})}
    files = render(report.model_copy(update={"before": _before(store, report)}), known)
    files["verdicts.json"] = json.dumps({"verdicts": [one.model_dump() for one in champion.verdicts]}).encode()
    store.log_files(parent.run_id, files)
    metrics = {"champion_score": champion.score, **speedups(best)}
    store.log(parent.run_id, {"objective": champion.objective}, metrics)
    for name, value in {f"{TAG}champion": champion.engine, **tags}.items():
        client.set_tag(parent.run_id, name, value)
    client.set_terminated(parent.run_id)


def amend(store: TrackingStore, parent: RunLink, **known: Any) -> None:
    """Add facts that became known later to the parent's report, if it has one.

    Args:
        store: The tracking store.
        parent: The parent run.
        **known: Fields of OptimizationReport with their new values.
    """
    from resources.report.page import LATENCY, LENGTHS, LOAD, PARETO, render

    report = _read(store, parent.run_id)
    if report is None:
        return
    drawn = {name: store.read_file(parent.run_id, name) for name in (LATENCY, PARETO, LENGTHS)}
    if "load" not in known:
        drawn[LOAD] = store.read_file(parent.run_id, LOAD)
    there = {name: png for name, png in drawn.items() if png is not None}
    files = render(report.model_copy(update=known), there)
    store.log_files(parent.run_id, {name: content for name, content in files.items() if name not in there})


def report_address(parent: RunLink) -> RunLink:
    """Return the link to the page that shows the parent's report."""
    from resources.report.page import PAGE

    return RunLink(parent.run_id, f"{parent.url}/artifacts/{PAGE}")


def fail(store: TrackingStore, parent: RunLink, note: Mapping[str, str], *, finished: bool) -> None:
    """Close a parent run as failed, and end those of its children that still run, because nothing writes to them.

    Args:
        store: The tracking store.
        parent: The parent run.
        note: The tag with the reason, which becomes the parent's description.
        finished: Whether a parent that is closed already becomes failed too.
    """
    run = store.run(parent.run_id)
    if run is None or (run.info.status != "RUNNING" and not finished):
        return
    for child in _children(store, run):
        if child.info.status == "RUNNING":
            store.client.set_terminated(child.info.run_id, "KILLED")
    store.client.set_tag(parent.run_id, NOTE, note[NOTE])
    store.client.set_terminated(parent.run_id, "FAILED")


def reopen(store: TrackingStore, parent: RunLink, note: Mapping[str, str]) -> None:
    """Mark a failed parent run as finished if it has a champion.

    Such a run failed only after its choice. It becomes valid once a later run chooses the same champion.
    """
    run = store.run(parent.run_id)
    if run is not None and run.info.status == "FAILED" and f"{TAG}champion" in run.data.tags:
        store.client.set_tag(parent.run_id, NOTE, note[NOTE])
        store.client.set_terminated(parent.run_id)


def _children(store: TrackingStore, parent: Run) -> list[Run]:
    query = f"tags.`{PARENT}` = '{parent.info.run_id}'"
    return list(store.client.search_runs([parent.info.experiment_id], query))


def _before(store: TrackingStore, report: OptimizationReport) -> Before | None:
    """Return the latest finished parent run of the same model and target, with the differences from it."""
    from resources.report.changes import changes
    from resources.report.optimization import Before

    query = (
        f"tags.`{TAG}parent` = 'true' and tags.`{TAG}target` = '{report.target}' and attributes.status = 'FINISHED' "
        f"and tags.`{TAG}dagster_run` != '{report.dagster_run}'"
    )
    run = store.find(report.model, query, by="end_time")
    if run is None:
        return None
    link, earlier = store.link(run), _read(store, run.info.run_id)
    changed = changes(earlier, report) if earlier is not None else None
    return Before(run_id=link.run_id, url=link.url, changes=changed)


def _read(store: TrackingStore, run_id: str) -> OptimizationReport | None:
    """Return the data of a run's report, or None if it has none or one of another version of this project."""
    from resources.report.optimization import OptimizationReport
    from resources.report.page import DATA

    data = store.read_file(run_id, DATA)
    try:
        return OptimizationReport.model_validate_json(data) if data is not None else None
    except ValidationError:
        return None
