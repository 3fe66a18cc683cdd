"""Going back: pointing to a release that the repository still holds, once a real server has answered with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from resources.errors import ReleaseError, ServerError, StorageError
from resources.settings.triton import TritonSettings
from resources.storage.locations import Location
from resources.storage.objects import RemotePath
from resources.triton.files import (
    clear_disk_errors,
    on_this_machine,
    replace_file,
    repository_lock,
    staging_folder,
    sync,
)
from resources.triton.fleet import Fleet
from resources.triton.layout import (
    CONFIG,
    current_number,
    is_published_here,
    list_releases,
    named_internals,
)
from resources.triton.pointer import current_problem, points_as_published
from resources.triton.publish import sweep
from resources.triton.release import Release
from resources.triton.verify import ask_embedded, find_release, require_unchanged


@dataclass(frozen=True)
class Moved:
    """The release that is pointed to now, and the number of the one that was; None: the pointer named none."""

    release: Release
    before: int | None

    @property
    def instead(self) -> str:
        """What has changed, as the end of a sentence on what is pointed to."""
        if self.before is None:
            return ""
        return ", as it was published" if self.before == self.release.number else f", not to {self.before} any more"


def roll_back(repository: Location, model: str, settings: TritonSettings, *, to: int | None = None, log: Path) -> Moved:
    """Point the public model to an older release, or to any by its number.

    to: its number, also that of the one that the pointer names, if somebody has changed the pointer; None: the newest
    before that one. A server is asked first; where some are configured, they have to take it up and answer with it, or
    the pointer is put back. Publishing the same again does not undo it. Raises ReleaseError or ServerError; then what
    served before serves on.
    """
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    with clear_disk_errors(model, repository, 0), repository_lock(repository):
        before = current_number(repository, model)
        release = _target(repository, model, before, to)
        with on_this_machine(repository, release) as copy, Fleet(settings) as fleet:
            require_unchanged(copy, release, repository)
            fleet.require_ready()
            # Not finishing what a killed publisher began: that would go forward.
            fleet.retire(sweep(repository, finish=False))
            if fleet:
                _switch(repository, release, fleet)
            else:
                if points_as_published(repository, release):
                    raise ReleaseError(f"{model}: release {before} is what is pointed to already.")
                ask_embedded(copy, release, settings, log)
                _point(repository, release)
        return Moved(release, before)


def _target(repository: Location, model: str, current: int | None, to: int | None) -> Release:
    if to is not None:
        return find_release(repository, model, to)
    if current is None:
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    older = [release for release in list_releases(repository, model) if release.number < current]
    if not older:
        there = ", ".join(str(release.number) for release in list_releases(repository, model)) or "none"
        raise ReleaseError(f"{model}: there is no release before {current} in {repository} (there: {there}).")
    return older[-1]


def _point(repository: Location, release: Release) -> None:
    """Replace the pointer by the release's own, whole."""
    with _prepared(repository, (repository / release.model / str(release.number) / CONFIG).read_bytes()) as new:
        _replace(repository, release.model, new)


@contextmanager
def _prepared(repository: Location, config: bytes) -> Iterator[Path]:
    """A pointer that is on the disk and only has to be moved to its place."""
    with staging_folder(repository) as scratch:
        (scratch / CONFIG).write_bytes(config)
        sync(scratch / CONFIG)
        yield scratch / CONFIG


def _replace(repository: Location, model: str, new: Path) -> None:
    try:
        replace_file(new, repository / model / CONFIG)
    except StorageError as error:  # a store need not have answered to have done so
        raise ReleaseError(
            f"{error} The pointer may have moved all the same, or do so yet: refinery releases {model} shows it."
        ) from error
    sync(repository / model)


def _put_back(repository: Location, model: str, back: Path | None, fleet: Fleet) -> list[str]:
    """Point to what was pointed to, None: nothing, and have the servers serve that; what failed, a sentence each."""
    failed, pointer = [], repository / model / CONFIG
    try:
        if back is not None:
            _replace(repository, model, back)
        elif isinstance(pointer, RemotePath):
            pointer.parent.remove([pointer.name])
        else:
            pointer.unlink()
    except (OSError, ReleaseError, StorageError) as error:
        failed.append(f"The pointer was not put back: {error}")
    try:
        return failed + fleet.go_back(repository, model)
    except (OSError, ReleaseError, StorageError) as error:
        return [*failed, f"The servers were not told to go back: {error}"]


def _switch(repository: Location, release: Release, fleet: Fleet) -> None:
    """On running servers: asked under another name first, then pointed to and taken up; what it replaces is left."""
    model = release.model
    if points_as_published(repository, release) and {*fleet.served(model)} == {release.number}:
        raise ReleaseError(f"{model}: release {release.number} is what is pointed to and served already.")
    try:
        old = (repository / model / CONFIG).read_bytes()
    except FileNotFoundError:  # somebody has removed it
        old = None
    internals = named_internals((repository / model / str(release.number) / CONFIG).read_text(encoding="utf-8"))
    try:
        fleet.ask_aside(repository, release)
        with _prepared(repository, old or b"") as back:
            _point(repository, release)
            try:
                fleet.take_up(repository, release)
            except BaseException as error:
                failed = _put_back(repository, model, back if old is not None else None, fleet)
                if isinstance(error, ServerError | ReleaseError | StorageError):
                    raise type(error)(
                        f"{model}: release {release.number} was not taken up: {error} "
                        f"{' '.join(failed) or 'What served before serves again.'}"
                    ) from error
                raise
    except BaseException:
        # Not what serves: going back may have failed too.
        if release.number not in fleet.served(model):
            fleet.retire(internals)
        raise
    before = named_internals((old or b"").decode("utf-8", errors="replace"))
    fleet.leave([name for name in before if name not in internals])
