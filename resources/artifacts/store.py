"""A content-addressed store: one folder an artifact, named by the digest of everything that made it.

    <root>/<kind>/<digest>/record.json    the typed record; written last, so a folder without it is not an artifact
    <root>/<kind>/<digest>/...            its files
    <root>/current/<name>.json            what a step of the pipeline made last (kind and digest)
    <root>/staging/<random>/              work under way; renamed into place when whole

Nothing is ever edited in place, so readers need no lock, and a killed writer leaves only a staging folder behind.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from resources.artifacts.records import Record, sha256_file
from resources.errors import ArtifactError
from resources.locks import file_lock

R = TypeVar("R", bound=Record)

RECORD_FILE = "record.json"
#: A staging folder older than this belongs to nobody: no step may run that long (see isolation.Limits).
STALE_STAGING_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Made(Generic[R]):
    """A record, and whether it was there already."""

    record: R
    reused: bool


class ArtifactStore:
    """See the module's text. All methods may be used by several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, record: Record) -> Path:
        """Where the record's files lie."""
        return self._folder(record.kind, record.digest)

    def find(self, kind: type[R], digest: str) -> R | None:
        """The stored record, or None. An unreadable one (an older version's, say) counts as not there."""
        try:
            record = kind.model_validate_json((self._folder(kind.kind, digest) / RECORD_FILE).read_text())
        except (FileNotFoundError, ValidationError):
            return None
        folder = self._folder(kind.kind, digest)
        for name, file in record.files.items():
            path = folder / name
            # Sizes only: hashing gigabytes on every look would cost more than the work it saves.
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                return None
        return record

    def damaged(self, record: Record) -> list[str]:
        """Files of the artifact that are missing or not, byte for byte, what the record says."""
        folder = self.folder(record)
        return [
            name
            for name, file in sorted(record.files.items())
            if not (folder / name).is_file() or sha256_file(folder / name) != file.sha256
        ]

    def get_or_make(self, kind: type[R], digest: str, make: Callable[[Path], R]) -> Made[R]:
        """The artifact of that digest; `make` fills an empty folder and returns the record if it is not there.

        Two processes asking for the same one do the work once. If `make` raises, nothing is left behind.
        """
        found = self.find(kind, digest)
        if found is not None and found.reusable:
            return Made(found, reused=True)
        with file_lock(self.root / "locks" / f"{kind.kind}-{digest[:32]}.lock"):
            found = self.find(kind, digest)
            if found is not None and found.reusable:
                return Made(found, reused=True)
            with self.staging() as folder:
                started = time.monotonic()
                record = make(folder)
                if record.build_seconds == 0.0:
                    record = record.model_copy(update={"build_seconds": time.monotonic() - started})
                record = record.with_files(folder)
                (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1))
                self._put(folder, self.folder(record))
        return Made(record, reused=False)

    def point(self, name: str, record: Record) -> None:
        """Remember the record as the newest that the named step made."""
        path = self.root / "current" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        draft.write_text(json.dumps({"kind": record.kind, "digest": record.digest}))
        draft.replace(path)

    def current(self, kind: type[R], name: str) -> R:
        """The newest record that the named step made. Raises ArtifactError if there is none."""
        try:
            digest = json.loads((self.root / "current" / f"{name}.json").read_text())["digest"]
        except (FileNotFoundError, ValueError, KeyError):
            digest = ""
        record = self.find(kind, digest) if digest else None
        if record is None:
            raise ArtifactError(
                f"{name} has not been made yet, or its files are gone. Materialize it first: run the job "
                "'optimize' for this model, or choose the asset together with everything upstream of it."
            )
        return record

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's own file system, removed at the end whatever happens."""
        parent = self.root / "staging"
        parent.mkdir(parents=True, exist_ok=True)
        self._sweep(parent)
        folder = parent / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, kind: str, digest: str) -> Path:
        return self.root / kind / digest[:32]

    def _put(self, staged: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # not reusable, or damaged: it goes aside whole, never file by file
            place.rename(self.root / "staging" / uuid.uuid4().hex)
        staged.rename(place)

    def _sweep(self, parent: Path) -> None:
        for entry in os.scandir(parent):
            if time.time() - entry.stat().st_mtime > STALE_STAGING_SECONDS:
                shutil.rmtree(entry.path, ignore_errors=True)
