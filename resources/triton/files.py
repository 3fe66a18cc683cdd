"""Files of a repository: what reaches the disk in which order, and what a full disk means to a person."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from resources.errors import ReleaseError
from resources.locks import file_lock

#: Beside the engine: the tokenizer with its library, configurations and manifest.
_BESIDE_ENGINE_BYTES = 20 * 2**20


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Files first, then folders from the deepest up: a rename must not reach the disk before what it names."""
    for path in sorted(root.rglob("*"), reverse=True):
        sync(path)
    sync(root)


def discard(path: Path, bin_folder: Path) -> None:
    """Remove a folder of a repository at once: renamed out first.

    A server that polls must not see a Python model without its `model.py`: it would wait for it for ever.
    """
    if not path.exists():
        return
    # On a full disk no folder can be made, and this is how room is made: the first to go becomes the bin.
    gone = bin_folder / uuid.uuid4().hex if bin_folder.exists() else bin_folder
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def repository_lock(repository: Path) -> AbstractContextManager[None]:
    """Held by whoever changes the repository."""
    return file_lock(repository.parent / f".{repository.name}.lock")


def staging_root(repository: Path) -> Path:
    """Beside the repository, on its file system: a dot folder inside would be polled as a model."""
    return repository.parent / f".{repository.name}.staging"


@contextmanager
def staging_folder(repository: Path) -> Iterator[Path]:
    """An empty folder there, removed at the end whatever is left in it."""
    folder = staging_root(repository) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def clear_disk_errors(model: str, repository: Path, engine_bytes: int) -> Iterator[None]:
    """Turn any OSError into a ReleaseError that says what, where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed = (engine_bytes + _BESIDE_ENGINE_BYTES) / 1e6
            remedy = f"It needs about {needed:.0f} MB there: make room, or set REFINERY_TRITON_REPOSITORIES elsewhere."
        elif error.errno == errno.EXDEV:
            remedy = (
                f"It is a file system of its own; mount it at {repository.parent}, so that folders can be moved in."
            )
        else:
            remedy = f"Mend it ({error.filename or repository}) and run again."
        raise ReleaseError(
            f"{model}: the release could not be written to {repository}: {error.strerror or error}. {remedy} "
            "What served before goes on serving."
        ) from error
