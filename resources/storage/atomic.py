"""Writes of files and folders that are whole or absent afterwards, also after a power failure."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to a system error that has none.

    Writing and syncing know only a descriptor, so their errors have no name.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(root: Path) -> None:
    """Flush a whole folder to the disk, the contents of every folder before the folder itself."""
    for path in sorted(root.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(root)


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that readers see all of it or its previous content.

    Text is written as UTF-8. The bytes reach the disk before the name does, and the name reaches it before the function
    returns. Otherwise a file system may keep the name after a power failure and lose the bytes. A draft that could not
    be written is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with naming(path):
            draft.write_bytes(data.encode() if isinstance(data, str) else data)
        sync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def move_whole(folder: Path, place: Path) -> None:
    """Flush a newly filled folder to the disk, then move it to its place on the same file system."""
    sync_tree(folder)
    folder.rename(place)
    sync(place.parent)
