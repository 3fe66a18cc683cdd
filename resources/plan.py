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
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from resources.artifacts.fingerprint import Fingerprint, fingerprint, is_pending, pending
from resources.artifacts.records import (
    BenchmarkReport,
    Champion,
    Checkpoint,
    Engine,
    EvaluationSet,
    OnnxGraph,
    Record,
    ServingConfiguration,
    ServingReport,
)
from resources.artifacts.store import RECORD_FILE, ArtifactStore, Made
from resources.catalog import ModelEntry
from resources.checkpoints import collect_checkpoint
from resources.checkpoints.collect import expected_checkpoint
from resources.device import why_not_here
from resources.engines import BASELINE, ENGINES, SERVED, Sources
from resources.engines.make import make_engine
from resources.errors import RefineryError, UnfetchedError
from resources.evaluation.benchmark import make_benchmark
from resources.evaluation.champion import Served, make_champion
from resources.evaluation.reference import make_evaluation_set
from resources.export.make import make_graph
from resources.triton.environment import is_installed
from resources.triton.layout import current_release
from resources.triton.make import is_provable, plan_release
from resources.triton.publish import unchanged_release, waiting_release
from resources.triton.release import ReleasePlan, content_of
from resources.triton.search import make_serving_configuration
from resources.triton.served import find_incumbent
from resources.triton.serving_report import make_serving_report
from resources.workspace import Workspace

R = TypeVar("R", bound=Record)

#: `reused`: it is there, and current. `found`: it is there, and something else is current, so that a run takes it up in
#: milliseconds. `run`: it would be made. `follows`: whether it would be is known once something else is made.
#: `retry`: it failed with just these inputs before; a run tries again, and is not made for that alone.
#: `elsewhere`: it was made on a machine with another device than this one, which alone can tell.
State = Literal["reused", "found", "run", "follows", "retry", "elsewhere"]

#: Steps that no target has for itself.
_COMMON = ("checkpoint", "evaluation_set", "onnx_graph")
_NEVER = "it was never made"
#: How parts of fingerprints are called, where their names do not say it.
_WORDS = {
    "weights": "the weights or their configuration",
    "tokenizer": "the tokenizer",
    "ids": "the tokenizer's vocabulary or longest text",
    "pipeline": "how answers are made of the engine's numbers",
    "checkpoint": "the tokenizer, or how answers are made of the engine's numbers",
    "items": "the evaluation requests",
    "right": "the right answers of the evaluation requests",
    "sample": "the sample of requests",
    "graph": "onnx_graph",
    "evaluation": "evaluation_set",
    "baseline": f"PyTorch ({BASELINE})",
    "engine": "the engine",
    "profiles": "the lengths that engines are tuned to",
}
#: What the tokenizer's files are called, by how their names begin.
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
_LONGEST_VALUE = 60


@dataclass(frozen=True)
class PlannedStep:
    """One step of the pipeline: an asset, by its name in Dagster, with `/` between the parts.

    reasons: why it is not reused, each in a few words. seconds: what making the one that is there now took; 0: unknown.
    """

    step: str
    state: State
    reasons: tuple[str, ...] = ()
    digest: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelPlan:
    """What a run of one model would do. error: where it would fail, as far as that can be known; no later step is
    among the steps then.
    """

    model: str
    steps: tuple[PlannedStep, ...]
    error: str = ""

    @property
    def differing(self) -> tuple[PlannedStep, ...]:
        """The steps of which something may be another afterwards; none: there is no reason for a run."""
        return tuple(step for step in self.steps if step.state in ("found", "run", "follows"))

    @property
    def digest(self) -> str:
        """Of all that a run would begin from: the same digest, the same run."""
        return fingerprint("plan", model=self.model, steps=self.differing)


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


class _WouldMakeError(Exception):
    """Something is not in the store. record: what it would be, where making it costs nothing."""

    def __init__(self, made_of: Fingerprint, damaged: tuple[str, ...], record: Record | None) -> None:
        super().__init__(made_of.kind)
        self.made_of, self.damaged, self.record = made_of, damaged, record


class _UnknownError(Exception):
    """What a step depends on is not known before others are done."""

    def __init__(self, *steps: str) -> None:
        super().__init__(*steps)
        self.steps = steps


class PlanningStore(ArtifactStore):
    """Another store's artifacts, read without leaving a trace; nothing is ever made in it but what is light."""

    def __init__(self, root: Path, scratch: Path) -> None:
        super().__init__(root)
        self._scratch = scratch

    def get_or_make(
        self, kind: type[R], made_of: Fingerprint | str, make: Callable[[Path], R], *, light: bool = False
    ) -> Made[R]:
        """Raises _WouldMakeError for what is not there. What failed before is answered as it is."""
        assert isinstance(made_of, Fingerprint), "only what is named part by part can be planned"
        found, damaged = self.look(kind, made_of.digest)
        if found is not None:
            return Made(found, reused=True)
        made = make(self._scratch).model_copy(update={"made_of": made_of.parts}) if light else None
        raise _WouldMakeError(made_of, damaged, made)

    def known(self, kind: type[R], name: str) -> R | None:
        """The record that the named step made last, whatever became of its files; None for none that can be read."""
        digest = self.pointed(name)
        try:
            return kind.model_validate_json((self._folder(kind.kind, digest) / RECORD_FILE).read_bytes())
        except (OSError, ValidationError):
            return None

    def _touch(self, file: Path) -> None:
        """Looking is no use."""

    def _note_verified(self, folder: Path, seen: dict[str, list[int]]) -> None:
        """Nor is it written down."""


@dataclass(frozen=True)
class _PlanningWorkspace(Workspace):
    scratch_folder: Path = field(default=Path(), kw_only=True)

    @property
    def store(self) -> PlanningStore:
        return PlanningStore(super().store.root, self.scratch_folder)


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
                return collect_checkpoint(
                    self._entry, self._store, self._workspace.limits, settings=self._workspace.sources, fetch=False
                )
            except _WouldMakeError as would:
                unlike.append(would.made_of)
                raise

        try:
            return self._ask(
                "checkpoint", Checkpoint, collect, lambda _: expected_checkpoint(unlike[0], _told(now)), known=True
            )
        except UnfetchedError as error:
            was = now.revision[:12] if now is not None else ""
            self._note("checkpoint", "run", (f"revision {was} -> {error.revision[:12]}" if was else _NEVER,), now)
        except _UnknownError:
            pass
        return None

    def _whole_run(self) -> None:
        """Nothing is known but that there is another checkpoint."""
        first = self.steps[0].reasons == (_NEVER,)
        of_targets = [name for target in self._workspace.targets for name in _steps_of(target)]
        for name in (*_COMMON[1:], *of_targets):
            self._note(name, "run" if first else "follows", (_NEVER,) if first else _after("checkpoint"))

    def _target(self, target: str, checkpoint: Checkpoint, evaluation: EvaluationSet, graph: OnnxGraph) -> None:
        workspace, entry, store = self._workspace, self._entry, self._store
        elsewhere, baseline = why_not_here(target), store.known(Engine, f"engines/{target}/{BASELINE}/{entry.name}")
        if elsewhere is not None and baseline is not None and baseline.status == "built":
            changed = [step.step for step in self.steps if step.state != "reused" and step.step in _COMMON]
            for name in _steps_of(target):
                self._note(name, "follows" if changed else "elsewhere", _after(*changed) if changed else (elsewhere,))
            return
        there = store.known(Checkpoint, f"checkpoint/{entry.name}")
        # Where the files of a checkpoint are that is not copied yet: those of the one before say what is asked here.
        folder = store.folder(checkpoint if there is None or store.folder(checkpoint).is_dir() else there)
        sources = Sources(checkpoint, folder, graph, store.folder(graph))
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
            self._note(step, "follows", _after(*made_anew))
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
            self._note(champion_step, "run" if sure else "follows", _after(*unknown))
            for step in (configuration_step, repository, load_step):
                self._note(step, "follows", _after(champion_step))
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
            self._note(repository, "follows", _after(configuration_step))
            self._note(load_step, "follows", _after(repository))
            return
        released = self._release(
            repository, plan_release(workspace, entry, checkpoint, engine, champion, configuration, {})
        )
        if not released:
            self._note(load_step, "follows", _after(repository))
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
            self._note(step, "follows", _after(*content.awaits), digest=content.digest)
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
        except _WouldMakeError as would:
            made_of = would.made_of
            reasons = tuple(_reasons(now, made_of, would.damaged))
            self._note(step, "run" if reasons else "follows", reasons or _after(*made_of.awaits), now, made_of.digest)
            digest = pending(step) if made_of.awaits else made_of.digest
            if would.record is not None:
                assert isinstance(would.record, kind), "a step makes records of its own kind"
                return would.record.model_copy(update={"digest": digest})
            if expected is None or (known and (now is None or not now.made_of)):
                raise _UnknownError(step) from None
            return expected(digest)
        if not record.reusable:
            self._note(step, "retry", (f"failed before: {_why(record)}",), record, record.digest)
        elif self._store.pointed(name) != record.digest:
            said = tuple(_reasons(now, Fingerprint(kind.kind, record.digest, record.made_of), ()))
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


def _after(*steps: str) -> tuple[str, ...]:
    others = len(steps) - 1
    more = "" if not others else f" and {others} other{'' if others == 1 else 's'}"
    return (f"once {steps[0]}{more} {'are' if others else 'is'} made",)


def _why(record: Record) -> str:
    """The reason of what failed: an engine's or report's own, or what is wrong with a graph."""
    return str(getattr(record, "reason", "") or " ".join(getattr(record, "problems", ())))


def _reasons(now: Record | None, made_of: Fingerprint, damaged: tuple[str, ...]) -> Iterator[str]:
    """Why what is current is not what is wanted. None where all that may differ is not known yet."""
    if damaged:
        yield f"{', '.join(damaged)} is damaged"
        return
    if now is None:
        yield _NEVER
    elif not now.made_of:
        yield "an older version of transformer-refinery made it, and did not note of what"
    elif now.digest == made_of.digest:
        yield "its files are gone"
    else:
        yield from differences(now.made_of, made_of.parts)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What is another in a fingerprint's parts, each in a few words. What is not known yet is not told."""
    for name in sorted({*before, *now}, key=lambda part: (part == "code", part)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(new, str) and is_pending(new):
            continue
        if isinstance(new, list) and any(isinstance(one, str) and is_pending(one) for one in new):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _inner_differences(name, old, new)
        elif name == "device" and isinstance(old, str) and isinstance(new, str):
            yield _device_difference(old, new)
        elif _is_digest(old) or _is_digest(new):
            yield f"{_WORDS.get(name, name)} changed"
        else:
            yield _change(_WORDS.get(name, name), old, new)


def _inner_differences(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not (isinstance(new.get(key), str) and is_pending(new[key]))]
    if not changed:
        return
    if name == "files":
        tokenizer = [file for file in changed if file.startswith(_TOKENIZER_FILES) or file.endswith(".model")]
        others = [file for file in changed if file not in tokenizer]
        if tokenizer:
            yield f"the tokenizer's files ({', '.join(tokenizer)})"
        if others:
            yield f"the checkpoint's files ({', '.join(others)})"
    elif name in ("code", "examiner"):
        yield f"the code of {', '.join(changed)}"
    elif name == "reports":
        yield f"the reports on {', '.join(changed)}"
    else:
        prefix = "" if name in ("libraries", "tokenizers") else f"{name}."
        for key in changed:
            if _is_digest(old.get(key)) or _is_digest(new.get(key)):
                yield f"{_WORDS.get(key, prefix + key)} changed"
            else:
                yield _change(f"{prefix}{key}", old.get(key), new.get(key))


def _change(name: str, old: Any, new: Any) -> str:
    was, will = (_text(value) for value in (old, new))
    return f"{name} {was} -> {will}" if max(len(was), len(will)) <= _LONGEST_VALUE else f"{name} changed"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _device_difference(old: str, new: str) -> str:
    """Of a description's parts (name, driver or cores) only those that differ."""
    was, will = old.split(", "), new.split(", ")
    if len(was) == len(will):
        both = [pair for pair in zip(was, will, strict=True) if pair[0] != pair[1]]
        was, will = [pair[0] for pair in both], [pair[1] for pair in both]
    return f"{', '.join(was)} -> {', '.join(will)}"


def _is_digest(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_digest(one) for one in value)
    if not isinstance(value, str):
        return False
    return value.startswith("sha256:") or (len(value) == 64 and set(value) <= set("0123456789abcdef"))
