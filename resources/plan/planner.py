"""What optimizing a model would do now, and why, found out without doing it.

The steps are asked as in a run, each for what it would make, by the same functions and so by the same fingerprints, and
with a store that makes nothing. What is not there would be made; what follows from that is told as far as it is known.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

from resources.accuracy.evaluation_set import make_evaluation_set
from resources.accuracy.reference import make_reference
from resources.artifacts.fingerprint import Fingerprint, is_pending, pending
from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    OnnxGraph,
    Record,
    Reference,
    ServingConfiguration,
    ServingReport,
)
from resources.artifacts.store import Made
from resources.benchmark.champion import Served, make_champion
from resources.benchmark.measuring import make_benchmark
from resources.catalog.entries import ModelEntry
from resources.checkpoints.collect import collect_checkpoint, expected_checkpoint, unfetched_fingerprint
from resources.engines.interface import Sources
from resources.engines.make import make_engine
from resources.engines.specs import BASELINE, ENGINES, SERVED
from resources.errors import RefineryError, UnfetchedError
from resources.export.make import make_graph
from resources.machine.device import why_not_here
from resources.plan.reasons import NEVER, after, differences, failure_of, reasons_of
from resources.plan.steps import ModelPlan, PlannedStep, State
from resources.plan.store import PlanningStore, WouldMakeError
from resources.settings.workspace import Workspace
from resources.triton.environment import is_installed
from resources.triton.layout import current_release
from resources.triton.make import is_provable, plan_release
from resources.triton.publish import unchanged_release, waiting_release
from resources.triton.release import ReleasePlan, content_of
from resources.triton.search import make_serving_configuration
from resources.triton.served import find_incumbent
from resources.triton.serving_report import make_serving_report

R = TypeVar("R", bound=Record)

#: Steps that no target has for itself.
_COMMON = ("checkpoint", "evaluation_set", "reference", "onnx_graph")


def plan_model(workspace: Workspace, entry: ModelEntry) -> ModelPlan:
    """What optimizing the entry's model for the workspace's targets would do. Builds and downloads nothing."""
    with tempfile.TemporaryDirectory(prefix="refinery-plan-") as scratch:
        planner = _Planner(workspace, entry, Path(scratch))
        error = ""
        try:
            planner.plan()
        except RefineryError as failure:
            error = str(failure)
        return ModelPlan(entry.name, tuple(planner.steps), error)


class _UnknownError(Exception):
    """What the named step would make is not known before it is made."""


@dataclass(frozen=True)
class _PlanningWorkspace(Workspace):
    scratch_folder: Path = field(default=Path(), kw_only=True)

    @property
    def store(self) -> PlanningStore:
        return PlanningStore(super().store, self.scratch_folder)


class _Planner:
    """Asks one step after the other."""

    def __init__(self, workspace: Workspace, entry: ModelEntry, scratch: Path) -> None:
        given = {one.name: getattr(workspace, one.name) for one in fields(Workspace)}
        self._workspace = _PlanningWorkspace(**given, scratch_folder=scratch)
        self._store, self._entry = self._workspace.store, entry
        self.steps: list[PlannedStep] = []

    def plan(self) -> None:
        """Fill `steps`. Raises RefineryError where a run would fail."""
        checkpoint = self._checkpoint()
        if checkpoint is None:
            self._whole_run()
            return
        workspace, entry = self._workspace, self._entry
        evaluation = self._ask(
            "evaluation_set",
            EvaluationSet,
            lambda: make_evaluation_set(workspace, entry, checkpoint),
            lambda digest: EvaluationSet.model_construct(digest=digest, model=entry.name),
        )
        self._ask(
            "reference",
            Reference,
            lambda: make_reference(workspace, entry, checkpoint, evaluation),
            lambda digest: Reference.model_construct(digest=digest, model=entry.name),
        )
        graph = self._ask(
            "onnx_graph",
            OnnxGraph,
            lambda: make_graph(workspace, entry, checkpoint),
            lambda digest: OnnxGraph.model_construct(digest=digest, model=entry.name, inputs=(), output="", width=0),
        )
        for target in workspace.targets:
            self._target(target, checkpoint, evaluation, graph)

    def _checkpoint(self) -> Checkpoint | None:
        """What the checkpoint would be, as far as it is known; None where nothing is known of it."""
        now = self._store.known(Checkpoint, f"checkpoint/{self._entry.name}")
        unlike: list[Fingerprint] = []

        def collect() -> Made[Checkpoint]:
            try:
                return self._collected(now)
            except WouldMakeError as would:
                unlike.append(would.made_of)
                raise

        try:
            return self._ask(
                "checkpoint", Checkpoint, collect, lambda _: expected_checkpoint(unlike[0], _told(now)), known=True
            )
        except UnfetchedError as error:
            was = now.revision[:12] if now is not None else ""
            self._note("checkpoint", "run", (f"revision {was} -> {error.revision[:12]}" if was else NEVER,), now)
        except _UnknownError:
            pass
        return None

    def _collected(self, now: Checkpoint | None) -> Made[Checkpoint]:
        """The checkpoint that the source holds. Raises UnfetchedError where nothing here tells what that is."""
        try:
            return collect_checkpoint(
                self._entry, self._store, self._workspace.limits, settings=self._workspace.sources, fetch=False
            )
        except UnfetchedError as error:
            made_of = unfetched_fingerprint(self._entry, error.revision, now) if now is not None else None
            if made_of is None:
                raise
            return self._store.get_or_make(Checkpoint, made_of, lambda _: _told(now))

    def _whole_run(self) -> None:
        """Nothing is known but that there is another checkpoint."""
        first = self.steps[0].reasons == (NEVER,)
        of_targets = [name for target in self._workspace.targets for name in _steps_of(target)]
        for name in (*_COMMON[1:], *of_targets):
            self._note(name, "run" if first else "follows", (NEVER,) if first else after("checkpoint"))

    def _target(self, target: str, checkpoint: Checkpoint, evaluation: EvaluationSet, graph: OnnxGraph) -> None:
        workspace, entry, store = self._workspace, self._entry, self._store
        elsewhere, baseline = why_not_here(target), store.known(Engine, f"engines/{target}/{BASELINE}/{entry.name}")
        if elsewhere is not None and baseline is not None and baseline.status == "built":
            changed = [step.step for step in self.steps if step.state != "reused" and step.step in _COMMON]
            for name in _steps_of(target):
                self._note(name, "follows" if changed else "elsewhere", after(*changed) if changed else (elsewhere,))
            return
        there = store.known(Checkpoint, f"checkpoint/{entry.name}")
        # Where the files of a checkpoint are that is not copied yet: those of the one before say what is asked here.
        folder = store.folder(checkpoint if there is None or store.folder(checkpoint).is_dir() else there)
        sources = Sources(checkpoint, folder, graph, store.folder(graph), entry.trust)
        engines, reports, unknown = dict[str, Engine](), list[BenchmarkReport](), list[str]()
        for spec in ENGINES:
            like = partial(
                Engine.model_construct,
                model=entry.name,
                name=spec.name,
                target=target,
                runtime=spec.runtime,
                precision=spec.precision,
                status="built",
            )
            engines[spec.name] = self._ask(
                f"engines/{target}/{spec.name}",
                Engine,
                partial(make_engine, workspace, entry, spec, target, sources, evaluation),
                lambda digest, like=like: like(digest=digest),  # type: ignore[misc]
            )
        for spec in ENGINES:
            step = f"benchmarks/{target}/{spec.name}"
            asked = (workspace, entry, engines[spec.name], engines[BASELINE], evaluation, sources)
            try:
                reports.append(self._ask(step, BenchmarkReport, partial(make_benchmark, *asked), None))
            except _UnknownError:
                unknown.append(step)
        incumbent = find_incumbent(workspace, entry.name, target, checkpoint, list(engines.values()))
        step, measured_again = f"benchmarks/{target}/{SERVED}", incumbent.engine
        made_anew = [
            made.step for made in self.steps if made.state == "run" and made.step.startswith(f"engines/{target}/")
        ]
        if measured_again is None:
            self._note(step, "reused")
        elif made_anew:
            # One of them may turn out to be what serves, byte for byte.
            self._note(step, "follows", after(*made_anew))
            unknown.append(step)
        else:
            engines[SERVED] = measured_again
            beside = [one.digest for name, one in engines.items() if name != SERVED and one.status == "built"]
            again = partial(
                make_benchmark, workspace, entry, measured_again, engines[BASELINE], evaluation, sources, beside
            )
            try:
                reports.append(self._ask(step, BenchmarkReport, again, None))
            except _UnknownError:
                unknown.append(step)
        self._serving(target, checkpoint, evaluation, engines, reports, unknown, incumbent.served)

    def _serving(
        self,
        target: str,
        checkpoint: Checkpoint,
        evaluation: EvaluationSet,
        engines: Mapping[str, Engine],
        reports: list[BenchmarkReport],
        unknown: list[str],
        served: Served | None,
    ) -> None:
        workspace, entry = self._workspace, self._entry
        champion_step, repository = f"champion/{target}", f"triton_repository/{target}"
        configuration_step, load_step = f"serving_configuration/{target}", f"serving_benchmark/{target}"
        if unknown:
            sure = any(step.state == "run" for step in self.steps if step.step in unknown)
            self._note(champion_step, "run" if sure else "follows", after(*unknown))
            for step in (configuration_step, repository, load_step):
                self._note(step, "follows", after(champion_step))
            return
        champion = self._ask(
            champion_step, Champion, lambda: make_champion(workspace, entry, target, reports, evaluation, served), None
        )
        engine = engines[champion.engine]
        try:
            configuration = self._ask(
                configuration_step,
                ServingConfiguration,
                lambda: make_serving_configuration(workspace, entry, checkpoint, engine, evaluation, champion),
                None,
            )
        except _UnknownError:
            self._note(repository, "follows", after(configuration_step))
            self._note(load_step, "follows", after(repository))
            return
        released = self._release(
            repository, plan_release(workspace, entry, checkpoint, engine, champion, configuration, {})
        )
        if not released:
            self._note(load_step, "follows", after(repository))
            return
        try:
            self._ask(
                load_step,
                ServingReport,
                lambda: make_serving_report(workspace, entry, target, checkpoint, evaluation),
                None,
            )
        except _UnknownError:
            return

    def _release(self, step: str, plan: ReleasePlan) -> bool:
        """Whether what serves, or waits, is what the plan would release."""
        repository, settings = self._workspace.repository(plan.target), self._workspace.triton
        content = content_of(plan)
        if content.awaits:
            self._note(step, "follows", after(*content.awaits), digest=content.digest)
            return False
        waiting = waiting_release(repository, plan.model)
        if unchanged_release(plan, repository, waiting, provable=is_provable(settings)) is not None:
            self._note(step, "reused", digest=content.digest)
            return True
        reasons = list(self._release_reasons(plan))
        if is_provable(settings) and not settings.driven and not is_installed(settings.environment):
            reasons.append("refinery setup has to come first: the embedded Triton is not what is wanted")
        self._note(step, "run", tuple(reasons), digest=content.digest)
        return False

    def _release_reasons(self, plan: ReleasePlan) -> Iterator[str]:
        release = current_release(self._workspace.repository(plan.target), plan.model)
        if release is None:
            yield "nothing is published"
            return
        there = {
            "engine": release.engine,
            "flavour": release.flavour,
            "max_batch_size": release.max_batch_size,
            "serving": "" if release.serving is None else str(release.serving),
            "labels": list(release.labels),
        }
        wanted = {
            "engine": plan.engine.name,
            "flavour": plan.flavour,
            "max_batch_size": plan.max_batch_size,
            "serving": str(plan.serving),
            "labels": list(plan.checkpoint.labels),
        }
        said = list(differences(there, wanted))
        if release.engine_digest != plan.engine.digest and release.engine == plan.engine.name:
            said.append(f"{plan.engine.name} was built anew")
        yield from said or [f"the tokenizer, or the code that serves, is another than in release {release.number}"]

    def _ask(
        self,
        step: str,
        kind: type[R],
        make: Callable[[], Made[R]],
        expected: Callable[[str], R] | None,
        *,
        known: bool = False,
    ) -> R:
        """The step's record, as it is or as it would be.

        expected: makes one of its digest; None: what comes after needs more of it. known: `expected` says itself what
        is not known. Raises _UnknownError where there is no record.
        """
        name = f"{step}/{self._entry.name}"
        now = self._store.known(kind, name)
        try:
            record = make().record
        except WouldMakeError as would:
            made_of = would.made_of
            reasons = tuple(reasons_of(now, made_of, would.damaged))
            self._note(step, "run" if reasons else "follows", reasons or after(*made_of.awaits), now, made_of.digest)
            digest = pending(step) if made_of.awaits else made_of.digest
            if would.record is not None:
                assert isinstance(would.record, kind), "a step makes records of its own kind"
                return would.record.model_copy(update={"digest": digest})
            if expected is None or (known and (now is None or not now.made_of)):
                raise _UnknownError(step) from None
            return expected(digest)
        if not record.reusable:
            self._note(step, "retry", (f"failed before: {failure_of(record)}",), record, record.digest)
        elif self._store.pointed(name) != record.digest:
            said = tuple(reasons_of(now, Fingerprint(kind.kind, record.digest, record.made_of), ()))
            self._note(step, "found", said, record, record.digest)
        else:
            self._note(step, "reused", (), record, record.digest)
        return record

    def _note(
        self, step: str, state: State, reasons: tuple[str, ...] = (), now: Record | None = None, digest: str = ""
    ) -> None:
        seconds = now.build_seconds if now is not None else 0.0
        self.steps.append(PlannedStep(step, state, reasons, "" if is_pending(digest) else digest, seconds))


def _steps_of(target: str) -> list[str]:
    """All steps that are a target's own."""
    engines = [f"{kind}/{target}/{spec.name}" for kind in ("engines", "benchmarks") for spec in ENGINES]
    kinds = ("champion", "serving_configuration", "triton_repository", "serving_benchmark")
    return [*engines, f"benchmarks/{target}/{SERVED}", *(f"{kind}/{target}" for kind in kinds)]


def _told(now: Checkpoint | None) -> Checkpoint:
    assert now is not None, "nothing is expected of a checkpoint that never was there"
    return now
