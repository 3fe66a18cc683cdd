"""A content-addressed store: one folder an artifact, named by the digest of everything that made it.

    <root>/<kind>/<digest>/record.json    the typed record; written last, so a folder without it is not an artifact
    <root>/<kind>/<digest>/...            its files
    <root>/current/<name>.json            what a step of the pipeline made last (kind and digest)
    <root>/staging/<random>/              work under way; renamed into place when whole
    <root>/caches/                        what makes builds faster and is no artifact: TensorRT's timings

Nothing is ever edited in place, so readers need no lock, and a killed writer leaves only a staging folder behind.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    @property
    def caches(self) -> Path:
        """For what builds remember. Their own business: it may be removed at any time."""
        return self.root / "caches"

    def folder(self, record: Record) -> Path:
        """Where the record's files lie."""
        return self._folder(record.kind, record.digest)

    def find(self, kind: type[R], digest: str) -> R | None:
        """The stored record, or None. An unreadable one (an older version's, say) counts as not there."""
        folder = self._folder(kind.kind, digest)
        try:
            record = kind.model_validate_json((folder / RECORD_FILE).read_bytes())
            # Sizes only: hashing gigabytes on every look would cost more than the work it saves.
            whole = all((folder / name).stat().st_size == file.size_bytes for name, file in record.files.items())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None
        return record if whole and record.digest == digest else None  # folders are named by half of the digest

    def damaged(self, record: Record) -> list[str]:
        """Files of the artifact that are missing or not, byte for byte, what the record says."""
        folder = self.folder(record)
        return [
            name
            for name, file in sorted(record.files.items())
            if not (folder / name).is_file() or sha256_file(folder / name) != file.sha256
        ]

    def remove(self, record: Record) -> None:
        """Take an artifact out of the store, whole, so that it is made anew when it is asked for again."""
        folder = self.folder(record)
        with file_lock(self._lock(record.kind, record.digest)), self.staging() as aside, suppress(FileNotFoundError):
            folder.rename(aside / folder.name)

    def get_or_make(self, kind: type[R], digest: str, make: Callable[[Path], R]) -> Made[R]:
        """The artifact of that digest; `make` fills an empty folder and returns the record if it is not there.

        Two processes asking for the same one do the work once. If `make` raises, nothing is left behind.
        Raises ArtifactError where the maker's files include one that is called as the store's own record.
        """
        found = self.find(kind, digest)
        if found is not None and found.reusable:
            return Made(found, reused=True)
        with file_lock(self._lock(kind.kind, digest)):
            found = self.find(kind, digest)
            if found is not None and found.reusable:
                return Made(found, reused=True)
            with self.staging() as folder:
                started = time.monotonic()
                record = make(folder)
                if record.build_seconds == 0.0:
                    record = record.model_copy(update={"build_seconds": time.monotonic() - started})
                assert record.digest == digest, "a record under another digest than was asked for is never found"
                record = record.with_files(folder)
                if RECORD_FILE in record.files:
                    raise ArtifactError(
                        f"{record.model}: one of its files is called {RECORD_FILE}, which the artifact store keeps for "
                        "its own record. Rename or remove that file in the source."
                    )
                (folder / RECORD_FILE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
                self._put(folder, self.folder(record))
        return Made(record, reused=False)

    def point(self, name: str, record: Record) -> None:
        """Remember the record as the newest that the named step made."""
        path = self.root / "current" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        draft.write_text(json.dumps({"kind": record.kind, "digest": record.digest}), encoding="utf-8")
        draft.replace(path)

    def forget(self, name: str) -> None:
        """The named step made nothing this time."""
        (self.root / "current" / f"{name}.json").unlink(missing_ok=True)

    def current(self, kind: type[R], name: str) -> R:
        """The newest record that the named step made. Raises ArtifactError if there is none."""
        try:
            digest = json.loads((self.root / "current" / f"{name}.json").read_text(encoding="utf-8"))["digest"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
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

    def _lock(self, kind: str, digest: str) -> Path:
        return self.root / "locks" / f"{kind}-{digest[:32]}.lock"

    def _put(self, staged: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = self.root / "staging" / uuid.uuid4().hex
        if place.exists():  # not reusable, or damaged: it goes aside whole, never file by file
            place.rename(aside)
        staged.rename(place)
        shutil.rmtree(aside, ignore_errors=True)

    def _sweep(self, parent: Path) -> None:
        for entry in os.scandir(parent):
            with suppress(FileNotFoundError):  # another process was done with it
                if time.time() - entry.stat().st_mtime > STALE_STAGING_SECONDS:
                    shutil.rmtree(entry.path, ignore_errors=True)
