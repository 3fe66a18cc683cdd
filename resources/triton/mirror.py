"""A local copy of the releases that a repository in object storage serves.

The embedded server needs it, because it reads only local folders. The copy is a model repository like any other. A
complete release is copied first, and then its pointer is replaced at once.
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
        repository: The repository to serve.
        root: The folder for copies.
        prune: Whether to remove releases from the copy that no pointer names.
        say: Called with the reason if the copy cannot be brought up to date. The copy is then used as it is.

    Raises:
        ReleaseError: A release could not be copied, and there is no `say`, or nothing was copied before.
        StorageError: The store did not answer, and there is no `say`, or nothing was copied before.
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
            say(f"{error} Until then, the local copy is served.")
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
    """The local copy of one repository in object storage. Several processes may use and refresh it at once.

    The attribute `folder` is the copy, which lies below `root`.
    """

    def __init__(self, repository: RemotePath, root: Path) -> None:
        digest = hashlib.sha256(str(repository).encode()).hexdigest()[:16]
        self._repository, self.folder = repository, root / digest / repository.name

    def refresh(self) -> None:
        """Download the releases that pointers name and that are not here yet.

        A failure of one model does not keep the others from being copied. Models that are not from this project are not
        copied.

        Raises:
            ReleaseError: Not every release could be copied.
            StorageError: The store did not list its models.
            OSError: The copy could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        failed = []
        with file_lock(self.folder.parent / "lock"):
            clear_staging(self.folder)  # a killed process may have left files
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
        """Remove the copies of releases that no pointer names any more."""
        with file_lock(self.folder.parent / "lock"):
            configs = [(self.folder / model / CONFIG).read_text("utf-8") for model in public_models(self.folder)]
            named = {name for config in configs for name in named_internals(config)}
            for path in self.folder.iterdir():
                if parse_internal(path.name) is not None and path.name not in named:
                    shutil.rmtree(path)

    def _copy(self, model: str) -> None:
        try:
            local_path(self.folder, model)  # a store accepts any key, even with `..`
        except ForeignError as error:
            raise ReleaseError(f"{self._repository}: {error}. Remove that model.") from None
        config, pointer = (self._repository / model / CONFIG).read_bytes(), self.folder / model / CONFIG
        number = pinned_number(config.decode("utf-8", errors="replace"))
        release = read_release(self._repository, model, number) if number is not None else None
        if release is None:
            return
        # The sizes of files are not enough. In a repository that was made again, the number may be another release's.
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
