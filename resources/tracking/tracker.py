"""All writing to MLflow, as the steps of the pipeline ask for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    ServingConfiguration,
    ServingReport,
)
from resources.machine.usage import Usage
from resources.storage.locks import file_lock
from resources.tracking import optimizations
from resources.tracking.candidates import (
    candidate_metrics,
    candidate_parameters,
    candidate_run_name,
    candidate_tags,
    remembered_as,
)
from resources.tracking.names import PARENT, TAG, note
from resources.tracking.registry import (
    champion_version,
    register,
    release_runs,
    tag_release,
    version_address,
    version_of,
)
from resources.tracking.serving import log_load, log_trials
from resources.tracking.store import RunLink, TrackingStore
from resources.tracking.system_metrics import BATCH, system_metrics

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from resources.report.optimization import OptimizationReport


class Tracker:
    """uri: the tracking store. ui: the address of its pages. dagster_ui: that of Dagster's, where there is one to link
    to. folder: see TrackingStore. sources: names the registered models that checkpoints are taken from, which nothing
    is written to.
    """

    def __init__(
        self,
        uri: str,
        *,
        ui: str | None,
        folder: Path,
        dagster_ui: str | None = None,
        sources: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._store = TrackingStore(uri, ui=ui, folder=folder)
        self._sources = sources
        self._dagster_ui = dagster_ui.rstrip("/") if dagster_ui else None

    def prepare(self) -> None:
        """Make the store if it is not there. Two processes that open a fresh sqlite store at once crash."""
        with self._store.clear_errors():
            assert self._store.client

    def candidate(
        self, dagster_run: str, checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, missed: Sequence[str]
    ) -> RunLink | None:
        """The child run of a candidate; written, under this Dagster run's parent, unless it was before.

        An unsupported engine has none: there is nothing to compare.
        """
        if report.status == "skipped":
            return None
        known = self._store.recall(remembered_as(report))
        if known is not None and report.status == "measured":
            return known
        with self._store.clear_errors():
            # Another machine may have measured it, and have written so.
            there = self._measured(report) if report.status == "measured" else None
            link = there or self._log_candidate(dagster_run, checkpoint, engine, report, missed)
        self._store.remember(remembered_as(report), link)
        return link

    def champion(
        self,
        dagster_run: str,
        report: OptimizationReport,
        pictures: Mapping[str, bytes],
        usage: Sequence[Usage | None] = (),
        began_s: float = 0.0,
    ) -> RunLink | None:
        """Close this Dagster run's parent with its verdict and report. pictures: those of the report that are drawn
        already, by name. usage: what was seen while the candidates were built; began_s: when the run began, in seconds
        since the epoch: what was built before does not count as its own.

        The winner becomes a version of the registered model, under the alias `champion-<target>`. Without a parent,
        nothing was measured anew: where the run that measured it failed before it chose, its parent becomes this one's;
        else the answer is the run that chose this champion before, or, where a gate or objective was changed, the one
        that measured it.
        """
        store, champion = self._store, report.champion
        name, current = f"champion-{champion.digest}", _current_name(champion.model, champion.target)
        best = next(one for one in report.reports if one.engine == champion.engine)
        known, parent = store.recall(name), store.recall(_parent_name(dagster_run, champion.target))
        with store.clear_errors():
            if parent is None and known is None:
                # Written by another machine, or by a run that came no further than its candidates.
                parent = self._find_parent(dagster_run, champion.model, champion.target)
                parent = parent or self._take_over(dagster_run, best)
            if parent is not None:
                query = optimizations.parent_query(dagster_run, champion.target)
                optimizations.unite(store, parent, champion.model, query)
                optimizations.adopt(store, parent, report.reports)
                self._log_usage(parent.run_id, usage, began_s)
                whole = report.model_copy(
                    update={"dagster_run": dagster_run, "dagster_url": self._dagster_page(dagster_run)}
                )
                version = self._register(dagster_run, champion, self._measured(best) or parent)
                page = optimizations.report_address(parent)
                registered = f"version {version.version} of {version.name}"
                seen = f"[Report]({page.url}), [registered as {registered}]({version_address(store, version)})"
                tags = {f"{TAG}model_version": str(version.version), f"{TAG}registered_model": version.name}
                tags |= note(champion.reason, seen, self._by(dagster_run))
                optimizations.close(store, parent, whole, pictures, tags)
                store.remember(f"report-{champion.digest}", page)
            elif known is not None and store.recall(current, champion.digest) is not None:
                return known
            else:
                measured, known = self._measured(best), self._chosen_in(champion)
                parent = known or measured
                if parent is None:
                    return None
                self._register(dagster_run, champion, measured or parent)
                if known is not None:
                    optimizations.reopen(store, known, note(champion.reason, self._by(dagster_run)))
                    # Should a later step of this run fail, it is this one's failure.
                    store.remember(_parent_name(dagster_run, champion.target), known)
        store.remember(name, parent)
        store.remember(current, parent, champion.digest)
        return parent

    def chosen_in(self, champion: Champion) -> RunLink | None:
        """The run that chose that champion, as far as this machine knows."""
        return self._store.recall(f"champion-{champion.digest}")

    def report(self, champion: Champion) -> RunLink | None:
        """Where the report on the choice of that champion is; None where this machine wrote none."""
        return self._store.recall(f"report-{champion.digest}")

    def serving(self, dagster_run: str, champion: Champion, configuration: ServingConfiguration) -> RunLink | None:
        """A child run for each setting that was tried on a server, beside the candidates of the run that chose it; the
        link to that run.
        """
        if not configuration.trials:
            return None

        def write(parent: RunLink) -> RunLink:
            optimizations.amend(self._store, parent, serving=configuration)
            return log_trials(self._store, parent, configuration, self._like(parent, dagster_run))

        return self._once(f"serving-{configuration.digest}", dagster_run, champion, write)

    def load(self, dagster_run: str, champion: Champion, report: ServingReport) -> RunLink | None:
        """A child run with what the published release did under load, by clients; the link to it."""
        if report.status != "measured":
            return None

        def write(parent: RunLink) -> RunLink:
            optimizations.amend(self._store, parent, load=report, release=report.release)
            return log_load(self._store, parent, report, self._like(parent, dagster_run))

        return self._once(f"load-{report.digest}", dagster_run, champion, write)

    def _once(
        self, name: str, dagster_run: str, champion: Champion, write: Callable[[RunLink], RunLink]
    ) -> RunLink | None:
        known = self._store.recall(name)
        if known is not None:
            return known
        with self._store.clear_errors():
            parent = (
                self._store.recall_run(_parent_name(dagster_run, champion.target))
                or self._find_parent(dagster_run, champion.model, champion.target)
                or self._chosen_in(champion)
            )
            link = write(parent) if parent is not None else None
        if link is not None:
            self._store.remember(name, link)
        return link

    def release_runs(self, model: str, target: str) -> dict[int, RunLink]:
        """The run that measured the engine of each release, by the release's number, as far as MLflow knows them."""
        with self._store.clear_errors():
            return release_runs(self._store, model, target)

    def release(self, checkpoint: Checkpoint, champion: Champion, number: int) -> None:
        """Write its Triton release's number on the champion's registered version, on the run that measured it, and on
        that run's parent with its report.
        """
        name = _release_name(champion, number)
        if self._store.recall(name) is not None:
            return
        with self._store.clear_errors():
            link = tag_release(self._store, checkpoint, champion, number)
            parent = self._chosen_in(champion) if link is not None else None
            if parent is not None:
                self._store.client.set_tag(parent.run_id, f"{TAG}release", str(number))
                optimizations.amend(self._store, parent, release=number)
        if link is not None:
            self._store.remember(name, link)

    def released(self, champion: Champion, number: int) -> RunLink | None:
        """The page of the registered version that a release was made of; None where this machine wrote none."""
        return self._store.recall(_release_name(champion, number))

    def champion_release(self, model: str, target: str) -> int | None:
        """The Triton release of the version that has the champion's alias; None where there is none."""
        if self._store.unmade:
            return None
        with self._store.clear_errors():
            version = champion_version(self._store, model, target)
        number = version.tags.get(f"{TAG}release", "") if version is not None else ""
        return int(number) if number.isdigit() else None

    def abandon(self, dagster_run: str, model: str, why: str, target: str | None = None) -> None:
        """Close this Dagster run's parent for that target as failed, if it has one: also where it has its champion,
        which could not be released then. Without a target, those of all that are not closed. Its children go to the
        parent of the next run.
        """
        store, name = self._store, _parent_name(dagster_run, target or "")
        known = store.recall_all(name) if target is None else [store.recall(name)]
        parents = [parent for parent in known if parent is not None]
        with store.clear_errors():
            if not parents and store.shared:
                found = store.search(model, optimizations.parent_query(dagster_run, target))
                parents = [store.link(run) for run in found]
            for parent in parents:
                why_not = note(f"{model}: {why}", self._by(dagster_run))
                optimizations.fail(store, parent, why_not, finished=target is not None)
        if target is not None:
            store.forget(_current_name(model, target))  # so that a run that comes further says so

    def _log_candidate(
        self, dagster_run: str, checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, missed: Sequence[str]
    ) -> RunLink:
        store, client = self._store, self._store.client
        tags = {
            PARENT: self._parent(dagster_run, checkpoint, report).run_id,
            **candidate_tags(checkpoint, engine, report, accurate=report.status == "measured" and not missed),
            **self._dagster_tags(dagster_run),
            **note(
                report.reason or "; ".join(missed) or "Every accuracy gate is kept.",
                self._by(dagster_run),
            ),
        }
        name = candidate_run_name(checkpoint, report)
        run = client.create_run(store.experiment(checkpoint.model), run_name=name, tags=tags)
        run_id = run.info.run_id
        store.log(run_id, candidate_parameters(checkpoint, engine, report), candidate_metrics(engine, report))
        self._log_usage(run_id, [engine.usage])
        if engine.steps:
            client.log_dict(run_id, {"kept": engine.kept, "tried": engine.steps}, "precision.json")
        if report.thread_trials:
            client.log_dict(run_id, {"trials": [trial.model_dump() for trial in report.thread_trials]}, "threads.json")
        if report.accuracy is not None:
            client.log_dict(run_id, report.accuracy.model_dump(), "accuracy.json")
            client.log_dict(run_id, {"timings": [timing.model_dump() for timing in report.timings]}, "timings.json")
        client.set_terminated(run_id, "FINISHED" if report.status == "measured" else "FAILED")
        return store.link(run)

    def _measured(self, report: BenchmarkReport) -> RunLink | None:
        """The candidate's run; also one that another machine wrote."""
        known = self._store.recall_run(remembered_as(report))
        if known is not None:
            return known
        # Not one that failed, whose report has the same digest, nor one that is half written.
        query = (
            f"tags.`{TAG}kind` = 'candidate' and tags.`{TAG}report` = '{report.digest}' "
            "and attributes.status = 'FINISHED'"
        )
        run = self._store.find(report.model, query)
        return self._store.link(run) if run is not None else None

    def _take_over(self, dagster_run: str, best: BenchmarkReport) -> RunLink | None:
        """The parent under which that was measured, as this run's own; None where it has its champion."""
        measured = self._measured(best)
        child = self._store.run(measured.run_id) if measured is not None else None
        owner = self._store.run(child.data.tags.get(PARENT, "")) if child is not None else None
        if owner is None or owner.info.status == "FINISHED" or f"{TAG}champion" in owner.data.tags:
            return None
        for tag, value in self._dagster_tags(dagster_run).items():
            self._store.client.set_tag(owner.info.run_id, tag, value)
        parent = self._store.link(owner)
        self._store.remember(_parent_name(dagster_run, best.target), parent)
        return parent

    def _chosen_in(self, champion: Champion) -> RunLink | None:
        """The run that chose that champion; also one that another machine wrote."""
        known = self._store.recall_run(f"champion-{champion.digest}")
        if known is not None:
            return known
        version = version_of(self._store, champion)
        by = version.tags.get(f"{TAG}dagster_run", "") if version is not None else ""
        return self._find_parent(by, champion.model, champion.target) if by else None

    def _log_usage(self, run_id: str, usage: Sequence[Usage | None], since_s: float = 0.0) -> None:
        metrics = system_metrics(usage, since_s)
        for start in range(0, len(metrics), BATCH):
            self._store.client.log_batch(run_id, metrics=metrics[start : start + BATCH])

    def _register(self, dagster_run: str, champion: Champion, measured: RunLink) -> ModelVersion:
        by, tags = self._by(dagster_run), self._dagster_tags(dagster_run)
        return register(self._store, champion, measured, by, tags, sources=self._sources())

    def _parent(self, dagster_run: str, checkpoint: Checkpoint, report: BenchmarkReport) -> RunLink:
        """This Dagster run's parent. Steps in processes of their own must not make two."""
        name = _parent_name(dagster_run, report.target)
        with file_lock(self._store.folder / "parent.lock"):
            parent = self._store.recall_run(name) or self._find_parent(dagster_run, checkpoint.model, report.target)
            if parent is None:
                tags = {**self._dagster_tags(dagster_run), **note(self._by(dagster_run))}
                parent = optimizations.begin(self._store, checkpoint, report, tags)
            self._store.remember(name, parent)
        return parent

    def _find_parent(self, dagster_run: str, model: str, target: str) -> RunLink | None:
        run = self._store.find(model, optimizations.parent_query(dagster_run, target))
        return self._store.link(run) if run is not None else None

    def _like(self, parent: RunLink, dagster_run: str) -> dict[str, str]:
        """What a run beside the candidates has in common with its parent: of which revision it is, and with what."""
        tags = self._store.client.get_run(parent.run_id).data.tags
        shared = (f"{TAG}revision", f"{TAG}version.")
        return {**{name: tags[name] for name in tags if name.startswith(shared)}, **self._dagster_tags(dagster_run)}

    def _dagster_page(self, dagster_run: str) -> str:
        return f"{self._dagster_ui}/runs/{dagster_run}" if self._dagster_ui else ""

    def _dagster_tags(self, dagster_run: str) -> dict[str, str]:
        page = self._dagster_page(dagster_run)
        return {f"{TAG}dagster_run": dagster_run, **({f"{TAG}dagster_url": page} if page else {})}

    def _by(self, dagster_run: str) -> str:
        """The way to Dagster's run, in Markdown: MLflow shows descriptions with their links."""
        page = self._dagster_page(dagster_run)
        return f"Dagster run [{dagster_run[:8]}]({page})" if page else f"Dagster run {dagster_run}"


def _parent_name(dagster_run: str, target: str) -> str:
    """What a parent is remembered as."""
    return f"parent-{dagster_run}-{target}"


def _current_name(model: str, target: str) -> str:
    """What a target's champion is remembered as, while its alias is known to be right."""
    return f"current-{model}-{target}"


def _release_name(champion: Champion, number: int) -> str:
    return f"release-{champion.target}-{number}-{champion.digest}"
