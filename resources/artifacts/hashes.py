"""Digests of files that are outside the store, computed again only where a file is another than before."""

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

#: A file that changed so recently may change again without another time of change: file systems' clocks are coarse.
_SETTLED_SECONDS = 2.0
#: Digests of larger files are written down one by one: whoever is stopped then has not read them for nothing.
_LARGE_BYTES = 2**28


def signature(path: Path) -> list[int]:
    """Size, times and number of a file: what changes with its bytes, unless somebody forges the clock."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def write_json(path: Path, data: object) -> None:
    """Write what JSON can say, whole or not at all."""
    write_whole(path, json.dumps(data))


def hash_below(folder: Path, name: str) -> str:
    """Hex SHA-256 of a file of somebody else's folder. Raises OSError, and ForeignError where it is no file of it."""
    with open_below(folder, name) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(folder: Path, names: Iterable[str], memory: Path) -> dict[str, str]:
    """Hex SHA-256 of files of somebody else's folder, by name. Raises OSError and ForeignError.

    memory: a folder for what was found, which is taken as it is where a file's size and times are as they were.
    """
    # Names may be any bytes.
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
    with suppress(OSError):  # it saves work, and nothing rests on it
        write_json(path, data)
