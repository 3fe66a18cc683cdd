"""Steps, and the work that takes one model through them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.records import Record
from resources.artifacts.store import ArtifactStore, Made
from resources.catalog.entries import ModelEntry
from resources.errors import ArtifactError
from resources.machine.lock import building
from resources.machine.usage import Usage, Watch
from resources.processes.isolation import run_isolated
from resources.settings.workspace import Workspace

R = TypeVar("R", bound=Record)
T = TypeVar("T")


@dataclass(frozen=True)
class Expected:
    """An artifact that a plan expects, and that was not made yet.

    Args:
        digest: The digest that it will have, or `fingerprint.pending(step)`.
    """

    digest: str

    @property
    def content_digest(self) -> str:
        """Return `digest`, because the content's own digest is not known before the artifact is made."""
        return self.digest


class NotYetKnownError(Exception):
    """A plan asks for records that the named steps have yet to make."""

    def __init__(self, *steps: str) -> None:
        super().__init__(", ".join(steps))
        self.steps = steps


@dataclass(frozen=True)
class Recipe(Generic[R]):
    """The artifact that a step would make from the current inputs.

    Args:
        made_of: The fingerprint of the inputs, under which the artifact is stored.
        make: Fill an empty folder and return the record; None in a plan that cannot make it.
        ready: The finished record, if making it takes no work. `make` returns the same then.
        confirm: Raises an error if the stored record must not be reused.
        points: Records that are kept under further names once the step is done.
    """

    made_of: Fingerprint
    make: Callable[[Path], R] | None
    ready: R | None = None
    confirm: Callable[[R], None] | None = None
    points: Mapping[str, Record] = field(default_factory=dict)

    @classmethod
    def of_ready(cls, made_of: Fingerprint, record: R) -> Recipe[R]:
        """Return the recipe of a record whose making takes no work."""
        return cls(made_of, lambda _: record, record)


class Node:
    """One asset of the pipeline, of any model.

    Args:
        name: The asset's key in Dagster, with `/` between the parts.
        after: The step's direct predecessors in the lineage. It may also read records of earlier steps.
    """

    #: Names of the modules that decide what is made; see `fingerprint.code_version`.
    code: tuple[str, ...] = ()
    #: Whether a new input record always means a new artifact.
    follows_its_inputs: ClassVar[bool] = False

    def __init__(self, name: str, after: Iterable[Node] = ()) -> None:
        self.name, self.after = name, tuple(after)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Step(Node, ABC, Generic[R]):
    """An asset that makes an artifact, described by a record."""

    #: The type of the record.
    record: type[R]

    @abstractmethod
    def recipe(self, work: Work) -> Recipe[R] | None:
        """Return what would be made now; None where there is nothing to make.

        Raises:
            NotYetKnownError: A plan asks, and the fingerprint rests on a record that is yet to be made.
        """

    def expect(self, made_of: Fingerprint, digest: str, now: R | None) -> R | Expected:
        """Return what is known of the record before it is made.

        Args:
            made_of: The fingerprint of the new record.
            digest: The fingerprint's digest, or `fingerprint.pending` of this step.
            now: The record that the step made last.
        """
        del made_of, now
        return Expected(digest)


class Work:
    """One model on its way through the steps.

    Args:
        store: The artifact store; by default the workspace's.
        made: What earlier steps made, or are expected to make, by step name. If None, the store is asked.
        fetch: Whether a checkpoint may be downloaded.
    """

    def __init__(
        self,
        workspace: Workspace,
        entry: ModelEntry,
        *,
        store: ArtifactStore | None = None,
        made: dict[str, Record | Expected] | None = None,
        fetch: bool = True,
    ) -> None:
        self.workspace, self.entry, self.made, self.fetch = workspace, entry, made, fetch
        self._store = store
        self._read: dict[str, Any] = {}

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifact store."""
        return self._store or self.workspace.store

    def pointer(self, step: Node | str) -> str:
        """Return the name under which the store remembers what the step made of this model."""
        return f"{step if isinstance(step, str) else step.name}/{self.entry.name}"

    def expected(self, step: Step[R]) -> R | Expected:
        """Return what the step made, or what a plan knows of it. Raises ArtifactError where there is nothing."""
        return self.named(step.record, step.name)

    def named(self, kind: type[R], name: str) -> R | Expected:
        """Return what is kept under a name, of a step or of another record that a step points to."""
        if self.made is None:
            return self.once(name, lambda: self.store.current(kind, self.pointer(name)))
        if name not in self.made:
            raise ArtifactError(f"{self.pointer(name)} has not been made yet.")
        found = self.made[name]
        assert isinstance(found, kind | Expected), f"{name} makes a {kind.__name__}"
        return found

    def once(self, name: str, read: Callable[[], T]) -> T:
        """Return what was read under that name first.

        Other processes may move pointers meanwhile, and a step rests on the same records from its fingerprint to what
        it shows.
        """
        if name not in self._read:
            self._read[name] = read()
        found: T = self._read[name]
        return found

    def get(self, step: Step[R]) -> R:
        """Return the record that the step made. Raises ArtifactError, and NotYetKnownError in a plan."""
        found = self.expected(step)
        if isinstance(found, Expected):
            raise NotYetKnownError(step.name)
        return found

    def found(self, step: Step[R]) -> R | Expected | None:
        """Return what the step made, or what a plan knows of it, or None where there is nothing."""
        try:
            return self.expected(step)
        except ArtifactError:
            return None

    def require_done(self, node: Node) -> None:
        """Raise NotYetKnownError where a plan says that the step is yet to be done."""
        if self.made is not None and isinstance(self.made.get(node.name), Expected):
            raise NotYetKnownError(node.name)

    def there(self, steps: Iterable[Step[R]]) -> list[R]:
        """Return the existing records of these steps. A run may have built only some engines, so others are skipped.

        Raises:
            NotYetKnownError: A plan asks, and some are yet to be made. All of them are named.
        """
        found: list[R] = []
        unknown: list[str] = []
        for step in steps:
            try:
                found.append(self.get(step))
            except NotYetKnownError as error:
                unknown += error.steps
            except ArtifactError:
                continue
        if unknown:
            raise NotYetKnownError(*unknown)
        return found

    def last(self, step: Step[R]) -> R | None:
        """Return the record that the step made last, whatever has become of its files."""
        return self.store.known(step.record, self.pointer(step))

    def folder(self, record: Record) -> Path:
        """Return the folder with the record's files."""
        return self.store.folder(record)

    def isolated(self, function: Callable[..., T], *arguments: Any, what: str, log: str) -> tuple[T, dict[str, Any]]:
        """Run a function in a child process within the workspace's limits, and never during a benchmark.

        Args:
            function: A function of a module; its arguments and its result can be pickled.
            *arguments: What it is called with.
            what: What is done, for errors.
            log: The step's name in the names of log files.

        Returns:
            The function's result, and the record's fields for memory and usage.
        """
        with building(), Watch() as watch:
            result, peak = run_isolated(
                function,
                *arguments,
                limits=self.workspace.limits,
                what=what,
                log=self.workspace.log(self.entry.name, log),
            )
        usage: Usage | None = watch.usage
        return result, {"peak_memory_bytes": peak, "usage": usage}

    def make(self, step: Step[R]) -> Made[R] | None:
        """Find or make what the step makes. None where there is nothing to make."""
        recipe = step.recipe(self)
        return self.follow(step, recipe) if recipe is not None else None

    def follow(self, step: Step[R], recipe: Recipe[R]) -> Made[R]:
        """Return the recipe's artifact from the store, or make it. `made` holds it afterwards."""
        assert recipe.make is not None, f"{step.name} is only planned"
        made = self.store.get_or_make(step.record, recipe.made_of, recipe.make)
        if made.reused and recipe.confirm is not None:
            recipe.confirm(made.record)
        found: dict[str, Record] = {step.name: made.record, **recipe.points}
        self._read |= found
        if self.made is not None:
            self.made |= found
        return made
