"""The planner, which tells what an optimization of a model would do now, and why, without doing it.

The planner walks through the steps of a run, asks each step what it would make, and looks for that in the artifact
store. If an input of a step does not exist yet, the plan says what is known of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from resources.artifacts.fingerprint import Fingerprint, is_pending, pending
from resources.artifacts.records import Record
from resources.catalog.entries import ModelEntry
from resources.errors import RefineryError, UnfetchedError
from resources.machine.device import why_not_here
from resources.plan.model_plan import ModelPlan, PlannedStep, State
from resources.plan.reasons import NEVER, after, differences, failure_of, reasons_of
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT
from resources.steps.graph import COMMON, steps_of
from resources.steps.step import Expected, Node, NotYetKnownError, Recipe, Step, Work
from resources.steps.triton_repository import ReleaseStep
from resources.triton.environment import is_installed
from resources.triton.layout import current_release
from resources.triton.release import ReleasePlan, content_of

R = TypeVar("R", bound=Record)


def plan_model(workspace: Workspace, entry: ModelEntry) -> ModelPlan:
    """Plan the optimization of the entry's model for the workspace's targets, without building or downloading."""
    planner = _Planner(workspace, entry)
    error = ""
    try:
        planner.plan()
    except RefineryError as failure:
        error = str(failure)
    return ModelPlan(entry.name, tuple(planner.steps), error)


class _Planner:
    def __init__(self, workspace: Workspace, entry: ModelEntry) -> None:
        store = workspace.store.without_traces()
        self._made: dict[str, Record | Expected] = {}
        self._work = Work(workspace, entry, store=store, made=self._made, fetch=False)
        self.steps: list[PlannedStep] = []

    def plan(self) -> None:
        """Fill `steps`.

        Raises:
            RefineryError: A run would fail with this error.
        """
        if not self._checkpoint():
            self._whole_run()
            return
        for node in COMMON[1:]:
            self._ask(node)
        for target in self._work.workspace.targets:
            self._target(target)

    def _checkpoint(self) -> bool:
        """Plan the checkpoint step, and return whether its artifact is known well enough to plan the other steps."""
        try:
            self._step(CHECKPOINT)
        except UnfetchedError as error:
            now = self._work.last(CHECKPOINT)
            why = f"revision {now.revision[:12]} -> {error.revision[:12]}" if now is not None else NEVER
            self._note(CHECKPOINT, "run", (why,), now)
            return False
        except NotYetKnownError:
            return False
        return True

    def _whole_run(self) -> None:
        """Plan all other steps if only one thing is known: there is a new checkpoint."""
        first = self.steps[0].reasons == (NEVER,)
        of_targets = [node for target in self._work.workspace.targets for node in steps_of(target)]
        for node in (*COMMON[1:], *of_targets):
            self._note(node, "run" if first else "follows", (NEVER,) if first else after(CHECKPOINT.name))

    def _target(self, target: str) -> None:
        steps, elsewhere = steps_of(target), why_not_here(target)
        baseline = self._work.last(steps.champion.baseline)
        if elsewhere is not None and baseline is not None and baseline.status == "built":
            common = {node.name for node in COMMON}
            changed = [step.step for step in self.steps if step.state != "reused" and step.step in common]
            for node in steps:
                self._note(node, "follows" if changed else "elsewhere", after(*changed) if changed else (elsewhere,))
            return
        for node in steps:
            self._ask(node)

    def _ask(self, node: Node) -> None:
        """Plan a step, or note the other steps that must run before its plan is known."""
        try:
            if isinstance(node, ReleaseStep):
                self._release(node)
            else:
                assert isinstance(node, Step)
                self._step(node)
        except NotYetKnownError as error:
            runs = {step.step for step in self.steps if step.state == "run"}
            surely = node.follows_its_inputs and not runs.isdisjoint(error.steps)
            self._made[node.name] = Expected(pending(node.name))
            self._note(node, "run" if surely else "follows", after(*error.steps))

    def _step(self, step: Step[R]) -> None:
        recipe = step.recipe(self._work)
        if recipe is None:
            self._note(step, "reused")
            return
        now = self._work.last(step)
        found, damaged = self._work.store.here_or_there(step.record, recipe.made_of.digest)
        if found is None:
            self._made[step.name] = self._unmade(step, recipe, now, damaged)
        else:
            if recipe.confirm is not None:
                recipe.confirm(found)
            self._there(step, found, now)
            self._made[step.name] = found
        self._made |= recipe.points

    def _unmade(self, step: Step[R], recipe: Recipe[R], now: R | None, damaged: tuple[str, ...]) -> Record | Expected:
        made_of = recipe.made_of
        reasons = tuple(reasons_of(now, made_of, damaged))
        self._note(step, "run" if reasons else "follows", reasons or after(*made_of.awaits), now, made_of.digest)
        digest = pending(step.name) if made_of.awaits else made_of.digest
        if recipe.ready is not None:
            return recipe.ready.model_copy(update={"digest": digest, "made_of": made_of.parts})
        return step.expect(made_of, digest, now)

    def _there(self, step: Step[R], found: R, now: R | None) -> None:
        if not found.reusable:
            self._note(step, "retry", (f"failed before: {failure_of(found)}",), found, found.digest)
        elif self._work.store.pointed(self._work.pointer(step)) != found.digest:
            made_of = Fingerprint(step.record.kind, found.digest, found.made_of)
            self._note(step, "found", tuple(reasons_of(now, made_of, ())), found, found.digest)
        else:
            self._note(step, "reused", (), found, found.digest)

    def _release(self, step: ReleaseStep) -> None:
        """Plan a release, by comparison with the release that serves or waits."""
        plan, triton = step.plan(self._work), self._work.workspace.triton
        content = content_of(plan)
        if content.awaits:
            self._made[step.name] = Expected(pending(step.name))
            self._note(step, "follows", after(*content.awaits), digest=content.digest)
            return
        if step.unchanged(self._work, plan) is not None:
            self._note(step, "reused", digest=content.digest)
            return
        reasons = list(self._release_reasons(plan))
        if triton.provable and not triton.driven and not is_installed(triton.environment):
            reasons.append("refinery setup has to come first: the embedded Triton is not what is wanted")
        self._made[step.name] = Expected(content.digest)
        self._note(step, "run", tuple(reasons), digest=content.digest)

    def _release_reasons(self, plan: ReleasePlan) -> Iterator[str]:
        release = current_release(self._work.workspace.repository(plan.target), plan.model)
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

    def _note(
        self, node: Node, state: State, reasons: tuple[str, ...] = (), now: Record | None = None, digest: str = ""
    ) -> None:
        seconds = now.build_seconds if now is not None else 0.0
        self.steps.append(PlannedStep(node.name, state, reasons, "" if is_pending(digest) else digest, seconds))
