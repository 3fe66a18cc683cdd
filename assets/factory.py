"""A factory for Dagster assets. The step says what is made; the factory's arguments say what Dagster shows of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import dagster as dg

from assets.executor_tags import placement
from assets.materialization import OWNERS, closing_tracking, materialized
from assets.partitions import models
from resources.artifacts.fingerprint import code_version
from resources.artifacts.records import Record
from resources.artifacts.store import Made
from resources.settings.workspace import Workspace
from resources.steps.step import Node, Step, Work
from resources.tracking import Tracker

R = TypeVar("R", bound=Record)

#: The metadata of a materialization, by the names that Dagster shows.
Metadata = Mapping[str, object]


@dataclass(frozen=True)
class Done(Generic[R]):
    """A step that was just done, for the function that makes its metadata."""

    context: dg.AssetExecutionContext
    work: Work
    tracker: Tracker
    made: Made[R]

    @property
    def record(self) -> R:
        """The record that the step made."""
        return self.made.record

    @property
    def run_id(self) -> str:
        """The id of the Dagster run."""
        return self.context.run.run_id


@dataclass(frozen=True)
class Look:
    """The appearance of an asset in Dagster.

    Args:
        description: What the asset is. orchestration.definitions adds how it is made; see assets.asset_docs.
    """

    group: str
    kinds: frozenset[str]
    description: str
    tags: Mapping[str, str]

    @classmethod
    def of(cls, group: str, kinds: set[str], description: str, **tags: str) -> Self:
        """Return the look, with the tags given as keywords."""
        return cls(group, frozenset(kinds), description, tags)


def artifact_asset(
    step: Step[R],
    look: Look,
    show: Callable[[Done[R]], Metadata],
    *,
    before: Callable[[dg.AssetExecutionContext, Work], None] | None = None,
    accept: Callable[[Done[R]], None] | None = None,
    nothing: Callable[[Work], str] | None = None,
    tracked: bool = True,
) -> dg.AssetsDefinition:
    """Return the asset of a step that makes an artifact.

    Args:
        step: The step that makes the artifact.
        look: The asset's appearance in Dagster.
        show: A function that returns the metadata of the artifact that was made.
        before: A function that is called before the step.
        accept: A function that is called once the artifact is there, before it becomes the current one. It may raise
            an error.
        nothing: A function that returns why the step has nothing to make. A step that may have no recipe needs it.
        tracked: Whether the step writes to MLflow, so that its failure ends the run there.
    """

    def materialize(context: dg.AssetExecutionContext, work: Work, tracker: Tracker) -> dg.MaterializeResult:
        if before is not None:
            before(context, work)
        recipe = step.recipe(work)
        if recipe is None:
            assert nothing is not None, f"{step.name} always makes something"
            work.store.forget(work.pointer(step))
            reused = dg.MetadataValue.bool(True)
            return dg.MaterializeResult(metadata={"status": "skipped", "reason": nothing(work), "reused": reused})
        done = Done(context, work, tracker, work.follow(step, recipe))
        if accept is not None:
            accept(done)
        for name, record in recipe.points.items():
            work.store.point(work.pointer(name), record)
        folder = _keep(work, step, done.made)
        return materialized(done.made, folder, show(done))

    return asset(step, look, materialize, tracked=tracked)


def asset(
    node: Node,
    look: Look,
    materialize: Callable[[dg.AssetExecutionContext, Work, Tracker], dg.MaterializeResult],
    *,
    tracked: bool = True,
) -> dg.AssetsDefinition:
    """Return the asset of a step, which the given function materializes."""
    target = getattr(node, "target", None)

    def body(
        context: dg.AssetExecutionContext,
        workspace: dg.ResourceParam[Workspace],
        tracker: dg.ResourceParam[Tracker],
    ) -> dg.MaterializeResult:
        return materialize(context, Work(workspace, workspace.entry(context.partition_key)), tracker)

    made: dg.AssetsDefinition = dg.asset(
        key=node.name.split("/"),
        deps=[dg.AssetKey(before.name.split("/")) for before in node.after],
        partitions_def=models,
        group_name=look.group,
        kinds=set(look.kinds),
        owners=OWNERS,
        description=look.description,
        tags={**({"target": target} if target else {}), **look.tags},
        op_tags=placement(target or "cpu"),
        code_version=code_version(*node.code),
    )(closing_tracking(body) if target and tracked else body)
    return made


def _keep(work: Work, step: Step[R], made: Made[R]) -> Path:
    """Make the artifact the step's current one, and return its folder.

    If files were damaged, the step's log names them.
    """
    name, folder = work.pointer(step), work.folder(made.record)
    work.store.point(name, made.record)
    if made.damaged:
        done = "fetched" if made.reused else "made"
        dg.get_dagster_logger().warning(f"{name}: {', '.join(made.damaged)} in {folder} was damaged: {done} again")
    return folder
