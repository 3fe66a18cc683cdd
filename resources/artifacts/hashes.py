"""Digests of files outside the store, computed again only for files that have changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from resources.boundary.foreign import open_below
from resources.storage.atomic import write_whole

#: A file that changed this recently may change again and keep its time, because file systems' clocks are coarse.
_SETTLED_SECONDS = 2.0
#: The digest of a larger file is saved at once, so that a process that is stopped has not read it for nothing.
_LARGE_BYTES = 2**28


def signature(path: Path) -> list[int]:
    """Return a file's size, times and inode number, which change with its bytes unless somebody forges the clock."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def write_json(path: Path, data: object) -> None:
    """Write a JSON value to a file, whole or not at all."""
    write_whole(path, json.dumps(data))


def hash_below(folder: Path, name: str) -> str:
    """Return the hex SHA-256 of a file of a foreign folder.

    Raises:
        OSError: The file cannot be read.
        ForeignError: It is no regular file of the folder.
    """
    with open_below(folder, name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str], memory: Path) -> dict[str, str]:
    """Return the hex SHA-256 of files of a foreign folder, by name.

    Args:
        folder: The foreign folder.
        names: The files' paths below the folder.
        memory: A folder for the digests. A known digest is used again if the file's size and times are unchanged.

    Raises:
        OSError: A file cannot be read.
        ForeignError: A name is that of no regular file of the folder.
    """
    # Names of files may hold any bytes.
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    notes = memory / f"{key}.json"
    try:
        known: dict[str, list[object]] = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found: dict[str, str] = {}
    fresh: dict[str, list[object]] = {}
    for name in names:
        path = folder / name
        now = signature(path)
        before = known.get(name)
        if before is not None and before[:-1] == now:
            found[name] = str(before[-1])
        else:
            found[name] = hash_below(folder, name)
            if time.time() - max(now[1:3]) / 1e9 < _SETTLED_SECONDS or signature(path) != now:
                continue
        fresh[name] = [*now, found[name]]
        if now[0] > _LARGE_BYTES and before != fresh[name]:
            _note(notes, {**known, **fresh})
    if fresh != known:
        _note(notes, fresh)
    return found


def _note(path: Path, data: object) -> None:
    with suppress(OSError):  # the digests only save work
        write_json(path, data)
