"""The tracker, through which the steps of the pipeline write to MLflow."""

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
    """The writer of all runs, reports and registered versions of the project in one tracking store.

    Args:
        uri: The address of the tracking store.
        ui: The address of the tracking store's pages.
        folder: The folder for links and artifacts, see TrackingStore.
        dagster_ui: The address of Dagster's pages, if there is one to link to.
        sources: Returns the names of the registered models that checkpoints are taken from. The tracker never writes to
            those.
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
        """Make the store if it does not exist, because two processes that open a fresh sqlite store at once crash."""
        with self._store.clear_errors():
            assert self._store.client

    def candidate(
        self, dagster_run: str, checkpoint: Checkpoint, engine: Engine, report: BenchmarkReport, missed: Sequence[str]
    ) -> RunLink | None:
        """Return the child run of a candidate, and write it under this Dagster run's parent if it does not exist.

        An unsupported engine has no child run, because there is nothing to compare.

        Args:
            dagster_run: The id of the Dagster run.
            checkpoint: The checkpoint's record.
            engine: The candidate's engine.
            report: The report on the engine.
            missed: The accuracy gates that the engine misses, each as a sentence.
        """
        if report.status == "skipped":
            return None
        known = self._store.recall(remembered_as(report))
        if known is not None and report.status == "measured":
            return known
        with self._store.clear_errors():
            # Another machine may have measured the candidate and written its run.
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
        """Close this Dagster run's parent run with its verdict and report, and register the champion.

        The champion becomes a version of the registered model, under the alias `champion-<target>`. If this Dagster run
        has no parent run, it measured nothing new. If the run that measured the champion failed before its choice, that
        run's parent becomes this run's parent.

        Args:
            dagster_run: The id of the Dagster run.
            report: The data of the report.
            pictures: The pictures of the report that are drawn already, by name.
            usage: The machines' usage during the builds of the candidates.
            began_s: When the run began, in seconds since the epoch. Usage before that time belongs to other runs.

        Returns:
            The parent run. Without one, the run that chose this champion before, or, if a gate or objective was
            changed, the run that measured it. None if there is no such run.
        """
        store, champion = self._store, report.champion
        name, current = f"champion-{champion.digest}", _current_name(champion.model, champion.target)
        best = next(one for one in report.reports if one.engine == champion.engine)
        known, parent = store.recall(name), store.recall(_parent_name(dagster_run, champion.target))
        with store.clear_errors():
            if parent is None and known is None:
                # Another machine may have written the parent, or a run that failed after its candidates.
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
                    # If a later step of this Dagster run fails, `abandon` then marks the reopened parent as failed.
                    store.remember(_parent_name(dagster_run, champion.target), known)
        store.remember(name, parent)
        store.remember(current, parent, champion.digest)
        return parent

    def chosen_in(self, champion: Champion) -> RunLink | None:
        """Return the run that chose the champion, or None if this machine does not know it."""
        return self._store.recall(f"champion-{champion.digest}")

    def report(self, champion: Champion) -> RunLink | None:
        """Return the link to the report on the champion's choice, or None if this machine wrote none."""
        return self._store.recall(f"report-{champion.digest}")

    def serving(self, dagster_run: str, champion: Champion, configuration: ServingConfiguration) -> RunLink | None:
        """Write a child run for each serving setting that was tried on a server, and return the link to the parent.

        The child runs are beside those of the candidates. The result is None if no setting was tried.
        """
        if not configuration.trials:
            return None

        def write(parent: RunLink) -> RunLink:
            optimizations.amend(self._store, parent, serving=configuration)
            return log_trials(self._store, parent, configuration, self._like(parent, dagster_run))

        return self._once(f"serving-{configuration.digest}", dagster_run, champion, write)

    def load(self, dagster_run: str, champion: Champion, report: ServingReport) -> RunLink | None:
        """Write a child run with the release's figures under load for each number of clients, and return its link."""
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
        """Return the run that measured each release's engine, by the release's number, as far as MLflow knows it."""
        with self._store.clear_errors():
            return release_runs(self._store, model, target)

    def release(self, checkpoint: Checkpoint, champion: Champion, number: int) -> None:
        """Write the number of a champion's Triton release to MLflow.

        The number goes to the champion's registered version, to the run that measured the champion, and to the parent
        run that chose it, with its report.
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
        """Return the page of the version that a release was made of, or None if this machine did not register it."""
        return self._store.recall(_release_name(champion, number))

    def champion_release(self, model: str, target: str) -> int | None:
        """Return the Triton release of the version that has the champion's alias, or None if there is none."""
        if self._store.unmade:
            return None
        with self._store.clear_errors():
            version = champion_version(self._store, model, target)
        number = version.tags.get(f"{TAG}release", "") if version is not None else ""
        return int(number) if number.isdigit() else None

    def abandon(self, dagster_run: str, model: str, why: str, target: str | None = None) -> None:
        """Close this Dagster run's parent run as failed, if it has one.

        The next run's parent takes over the children.

        Args:
            dagster_run: The id of the Dagster run.
            model: The model's name.
            why: The reason of the failure.
            target: The target whose parent run failed. It fails even if it has its champion, which could then not be
                released. None: the parent runs of all targets that are not closed yet.
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
            store.forget(_current_name(model, target))  # The next run that gets this far then reopens the parent.

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
        """Return the candidate's run, even if another machine wrote it."""
        known = self._store.recall_run(remembered_as(report))
        if known is not None:
            return known
        # The status excludes failed runs, whose reports have the same digest, and runs that are half written.
        query = (
            f"tags.`{TAG}kind` = 'candidate' and tags.`{TAG}report` = '{report.digest}' "
            "and attributes.status = 'FINISHED'"
        )
        run = self._store.find(report.model, query)
        return self._store.link(run) if run is not None else None

    def _take_over(self, dagster_run: str, best: BenchmarkReport) -> RunLink | None:
        """Make the parent under which the engine was measured this Dagster run's own, unless it has its champion."""
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
        """Return the run that chose the champion, even if another machine wrote it."""
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
        """Return this Dagster run's parent run, and make it if needed.

        A lock keeps steps in different processes from making two.
        """
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
        """Return the tags that a run beside the candidates shares with its parent: revision, libraries, Dagster run."""
        tags = self._store.client.get_run(parent.run_id).data.tags
        shared = (f"{TAG}revision", f"{TAG}version.")
        return {**{name: tags[name] for name in tags if name.startswith(shared)}, **self._dagster_tags(dagster_run)}

    def _dagster_page(self, dagster_run: str) -> str:
        return f"{self._dagster_ui}/runs/{dagster_run}" if self._dagster_ui else ""

    def _dagster_tags(self, dagster_run: str) -> dict[str, str]:
        page = self._dagster_page(dagster_run)
        return {f"{TAG}dagster_run": dagster_run, **({f"{TAG}dagster_url": page} if page else {})}

    def _by(self, dagster_run: str) -> str:
        """Return the link to the Dagster run in Markdown, because MLflow renders descriptions with their links."""
        page = self._dagster_page(dagster_run)
        return f"Dagster run [{dagster_run[:8]}]({page})" if page else f"Dagster run {dagster_run}"


def _parent_name(dagster_run: str, target: str) -> str:
    """Return the name under which the link to a parent run is kept."""
    return f"parent-{dagster_run}-{target}"


def _current_name(model: str, target: str) -> str:
    """Return the name under which a target's champion is kept while its alias is known to be correct."""
    return f"current-{model}-{target}"


def _release_name(champion: Champion, number: int) -> str:
    return f"release-{champion.target}-{number}-{champion.digest}"
