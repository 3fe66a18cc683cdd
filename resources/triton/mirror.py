"""A copy on this machine of what a repository in object storage serves, for the embedded server, which reads no other.

The copy is a model repository like any other: whole releases first, then the pointer, replaced at once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from resources.boundary.foreign import ForeignError, local_path
from resources.errors import ReleaseError, StorageError
from resources.storage.atomic import sync_tree
from resources.storage.locations import Location
from resources.storage.locks import file_lock
from resources.storage.objects import RemotePath
from resources.triton.files import clear_staging, copy_tree, replace_file, staging_folder
from resources.triton.layout import (
    CONFIG,
    internal_names,
    is_whole,
    named_internals,
    parse_internal,
    pinned_number,
    public_models,
    read_release,
)


def served_folder(
    repository: Location, root: Path, *, prune: bool = False, say: Callable[[str], None] | None = None
) -> Path:
    """Return a folder that the embedded server can read: the repository's own, or an up-to-date copy below `root`.

    Args:
        prune: Whether releases are removed from the copy that nothing points to.
        say: Called with the reason where the copy cannot be brought up to date. The copy is used as it is then.

    Raises:
        ReleaseError: A release could not be copied, and there is no `say`, or nothing was copied before.
        StorageError: The store could not be asked, and there is no `say`, or nothing was copied before.
    """
    if not isinstance(repository, RemotePath):
        return repository
    mirror = Mirror(repository, root)
    try:
        mirror.refresh()
        if prune:
            mirror.prune()
    except (OSError, ReleaseError, StorageError) as error:
        if say is not None and public_models(mirror.folder):
            say(f"{error} Until then, what is here is served.")
        elif isinstance(error, ReleaseError | StorageError):
            raise
        else:
            raise ReleaseError(_uncopied(repository, mirror.folder, error)) from error
    return mirror.folder


def _uncopied(what: object, folder: Path, error: OSError) -> str:
    return (
        f"{what} could not be copied to {folder}: {error.strerror or error}. Mend it, or set REFINERY_HOME elsewhere."
    )


class Mirror:
    """folder: the copy, below `root`. Made and followed by whoever serves or asks; they may be several at once."""

    def __init__(self, repository: RemotePath, root: Path) -> None:
        digest = hashlib.sha256(str(repository).encode()).hexdigest()[:16]
        self._repository, self.folder = repository, root / digest / repository.name

    def refresh(self) -> None:
        """Download the releases that are pointed to and not here yet. What is wrong with one model costs no other.

        Models that somebody else put into the repository are not copied.

        Raises:
            ReleaseError: Not every release could be copied.
            StorageError: The store could not be asked which models there are.
            OSError: The copy could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        failed = []
        with file_lock(self.folder.parent / "lock"):
            clear_staging(self.folder)  # somebody was killed
            models = public_models(self._repository)
            for model in models:
                try:
                    self._copy(model)
                except (ReleaseError, StorageError) as error:
                    failed.append(str(error))
                except OSError as error:
                    failed.append(_uncopied(self._repository / model, self.folder, error))
            for model in public_models(self.folder):
                if model not in models:
                    shutil.rmtree(self.folder / model)
        if failed:
            raise ReleaseError(" ".join(failed))

    def prune(self) -> None:
        """Remove the copies of releases that nothing points to any more."""
        with file_lock(self.folder.parent / "lock"):
            configs = [(self.folder / model / CONFIG).read_text("utf-8") for model in public_models(self.folder)]
            named = {name for config in configs for name in named_internals(config)}
            for path in self.folder.iterdir():
                if parse_internal(path.name) is not None and path.name not in named:
                    shutil.rmtree(path)

    def _copy(self, model: str) -> None:
        try:
            local_path(self.folder, model)  # a store takes any key, `..` too
        except ForeignError as error:
            raise ReleaseError(f"{self._repository}: {error}. Remove that model.") from None
        config, pointer = (self._repository / model / CONFIG).read_bytes(), self.folder / model / CONFIG
        number = pinned_number(config.decode("utf-8", errors="replace"))
        release = read_release(self._repository, model, number) if number is not None else None
        if release is None:
            return
        # Sizes alone do not tell whether the number is another release's by now, of a repository that was made anew.
        here = is_whole(self.folder, release) and read_release(self.folder, model, release.number) == release
        if here and pointer.is_file() and pointer.read_bytes() == config:
            return
        with staging_folder(self.folder) as scratch:
            names = [*internal_names(release), f"{model}/{release.number}"]
            for name in names:
                copy_tree(self._repository / name, scratch / name)
            if not is_whole(scratch, release):
                raise ReleaseError(f"{self._repository}: release {release.number} of {model} is not there whole.")
            (scratch / model / CONFIG).write_bytes(config)
            sync_tree(scratch)
            if not (self.folder / model).exists():
                names[-1] = model
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (scratch / name).rename(self.folder / name)
            if names[-1] != model:
                replace_file(scratch / model / CONFIG, pointer)
