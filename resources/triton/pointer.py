"""Check the pointer, which is the public model's configuration.

A person may have edited the pointer, or removed the release that it names.
"""

from __future__ import annotations

from resources.errors import ReleaseError
from resources.storage.locations import Location
from resources.triton.layout import (
    CONFIG,
    current_number,
    current_release,
    is_published_here,
    is_whole,
    list_releases,
    public_models,
    read_release,
)
from resources.triton.release import Release


def require_current(repository: Location, model: str) -> Release:
    """Return the release that serves.

    Raises:
        ReleaseError: The pointer names no release that is whole. The message states the problem and the remedy.
    """
    release = current_release(repository, model)
    if release is None or not is_whole(repository, release):
        raise ReleaseError(f"{model}: {current_problem(repository, model)}")
    return release


def current_problem(repository: Location, model: str) -> str:
    """Return why no release of the model can be served, and the remedy.

    The text is empty if the pointer names a release that is whole.
    """
    number = current_number(repository, model)
    release = read_release(repository, model, number) if number is not None else None
    if release is not None and is_whole(repository, release):
        return ""
    if number is None and not is_published_here(repository, model):
        others = ", ".join(public_models(repository)) or "none"
        remedy = command("optimize", repository, model)
        return f"no release of it is in {repository} (models there: {others}). Publish one: {remedy}."
    there = list_releases(repository, model)
    named = "no release" if number is None else f"release {number}, which is not there whole"
    remedy = command("rollback", repository, model, "--to N") if there else command("optimize", repository, model)
    numbers = ", ".join(str(release.number) for release in there) or "none"
    return f"{repository / model / CONFIG} points to {named} (whole: {numbers}). Have one that is serve: {remedy}."


def points_as_published(repository: Location, release: Release) -> bool:
    """Return whether the public model's configuration equals the release's own, byte for byte.

    Raises:
        OSError: One of the two cannot be read. If one is missing, the result is False instead.
    """
    public = repository / release.model
    try:
        return (public / CONFIG).read_bytes() == (public / str(release.number) / CONFIG).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False


def require_own_pointer(repository: Location, release: Release) -> None:
    """Raise ReleaseError if the pointer differs from the configuration that was published with the release."""
    if not points_as_published(repository, release):
        remedy = command("rollback", repository, release.model, f"--to {release.number}")
        raise ReleaseError(
            f"{release.model}: {repository / release.model / CONFIG} was changed since release {release.number} was "
            f"published. Have it say again what it said: {remedy}."
        )


def command(verb: str, repository: Location, model: str, rest: str = "") -> str:
    """Return the `refinery` command line that applies the verb to a model of the repository.

    The repository's name is its target; `cpu` is the default and is left out.
    """
    target = "" if repository.name == "cpu" else f"--target {repository.name}"
    return " ".join(filter(None, ("refinery", verb, model, rest, target)))
