"""Roll back: point to a release that the repository still holds, after a real server has answered with it."""

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
    """The result of a rollback.

    Args:
        release: The release that the pointer names now.
        before: The number of the release that it named before. None if it named none.
    """

    release: Release
    before: int | None

    @property
    def instead(self) -> str:
        """The change, as the end of a sentence that says where the pointer points."""
        if self.before is None:
            return ""
        return ", as it was published" if self.before == self.release.number else f", not to {self.before} any more"


def roll_back(repository: Location, model: str, settings: TritonSettings, *, to: int | None = None, log: Path) -> Moved:
    """Point the public model to an older release, or to any release by its number.

    A server has to answer with the release first. Configured servers then have to take it up and answer with it, or
    the pointer is put back. Publishing the same plan again does not undo a rollback. After an error, the release that
    served before serves on.

    Args:
        repository: The repository that holds the model.
        model: The public model.
        settings: The settings that name the servers.
        to: The number of the release. The current release's number restores a pointer that somebody has edited. None
            selects the newest release before the current one.
        log: The log file of the embedded server.

    Raises:
        ReleaseError: There is no such release, it is not what was published, it serves already, or the pointer cannot
            be written.
        ServerError: A server does not answer, or did not take up the release.
    """
    if not is_published_here(repository, model):
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    with clear_disk_errors(model, repository, 0), repository_lock(repository):
        before = current_number(repository, model)
        release = _target(repository, model, before, to)
        with on_this_machine(repository, release) as copy, Fleet(settings) as fleet:
            require_unchanged(copy, release, repository)
            fleet.require_ready()
            # A killed publisher's release is not finished here, because that would move the pointer forward.
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
    """Replace the pointer, whole, by the configuration that was published with the release."""
    with _prepared(repository, (repository / release.model / str(release.number) / CONFIG).read_bytes()) as new:
        _replace(repository, release.model, new)


@contextmanager
def _prepared(repository: Location, config: bytes) -> Iterator[Path]:
    """Yield a pointer that is durable on the disk and only has to be moved to its place."""
    with staging_folder(repository) as scratch:
        (scratch / CONFIG).write_bytes(config)
        sync(scratch / CONFIG)
        yield scratch / CONFIG


def _replace(repository: Location, model: str, new: Path) -> None:
    try:
        replace_file(new, repository / model / CONFIG)
    except StorageError as error:  # the store may have replaced the pointer without confirming it
        raise ReleaseError(
            f"{error} The pointer may have moved all the same, or do so yet: refinery releases {model} shows it."
        ) from error
    sync(repository / model)


def _put_back(repository: Location, model: str, back: Path | None, fleet: Fleet) -> list[str]:
    """Restore the former pointer, have the servers serve it, and return a sentence for each failure.

    `back` is the former pointer. If it is None, there was none, and the pointer is removed.
    """
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
    """Switch running servers to the release.

    The servers first answer with the release under another name. Then the pointer is moved, the servers take up the
    release, and at last they drop the release that it replaces.
    """
    model = release.model
    if points_as_published(repository, release) and {*fleet.served(model)} == {release.number}:
        raise ReleaseError(f"{model}: release {release.number} is what is pointed to and served already.")
    try:
        old = (repository / model / CONFIG).read_bytes()
    except FileNotFoundError:  # somebody has removed the pointer
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
        # Going back may have failed too, so the release is dropped only if no server answers with it.
        if release.number not in fleet.served(model):
            fleet.retire(internals)
        raise
    before = named_internals((old or b"").decode("utf-8", errors="replace"))
    fleet.leave([name for name in before if name not in internals])
