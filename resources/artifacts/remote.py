"""The artifacts of several machines in object storage: what one has made, the others find.

    <root>/<kind>/<digest>/record.json         the record, and which upload its files are of; written last
    <root>/<kind>/<digest>/<upload>/...        its files
    <root>/current/<name>.json                 what a step of the pipeline made last

Nothing can be renamed there, so a record is one object that names the folder of its files: readers see an artifact
whole or not at all, also where two machines have made the same one at the same time, or one of them was killed. What a
killed one had uploaded is named by nobody, and paid for until `refinery gc` removes it: see
resources.artifacts.remote_gc.
"""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from resources.artifacts.records import Record, StoredFile, sha256_file
from resources.boundary.foreign import ForeignError, local_path
from resources.storage.objects import RemotePath

R = TypeVar("R", bound=Record)
_RECORD = "record.json"
#: An artifact's record is written again when it is used and is as old: its time says when it was used last.
_USED_AGAIN_SECONDS = 12 * 3600.0


class _Entry(BaseModel):
    """What lies at `record.json`."""

    model_config = ConfigDict(frozen=True)
    upload: str
    record: str


@dataclass(frozen=True)
class RemoteArtifacts:
    """See the module's text. Every method raises StorageError where the store does not answer or refuses."""

    root: RemotePath

    def push(self, record: Record, folder: Path) -> None:
        """Bring the artifact there, in place of what was under its digest."""
        place, upload = self._place(record.kind, record.digest), uuid.uuid4().hex
        for name in record.files:
            (place / upload / name).upload(folder / name)
        entry = _Entry(upload=upload, record=record.model_dump_json())
        (place / _RECORD).write_bytes(entry.model_dump_json().encode())

    def pull(self, kind: type[R], digest: str, folder: Path) -> tuple[R | None, tuple[str, ...]]:
        """The record of that digest, its files brought into the empty folder; None where there is none, or none that
        this version reads. Or None, and the file that is not what the record says: the record is removed then, so that
        who has a copy brings it there again, and who has none makes it.
        """
        place = self._place(kind.kind, digest)
        try:
            entry = _Entry.model_validate_json((place / _RECORD).read_bytes())
            record = kind.model_validate_json(entry.record)
        except (FileNotFoundError, ValidationError):
            return None, ()
        if record.digest != digest:  # folders are named by half of the digest
            return None, ()
        if not record.fits_its_digest:
            place.remove([_RECORD])
            return None, (_RECORD,)
        for name, file in record.files.items():
            if not _fetched(place / entry.upload / name, folder, name, file):
                if upload_of(place) != entry.upload:  # another machine has just brought it again, or removed it
                    return None, ()
                place.remove([_RECORD])
                return None, (name,)
        return record, ()

    def withdraw(self, record: Record) -> None:
        """Have nobody find the artifact there any more. `refinery gc` removes its files later."""
        self._place(record.kind, record.digest).remove([_RECORD])

    def record(self, kind: type[R], digest: str) -> R | None:
        """The record of that digest without its files; None where there is none, or none that this version reads."""
        try:
            entry = _Entry.model_validate_json((self._place(kind.kind, digest) / _RECORD).read_bytes())
            record = kind.model_validate_json(entry.record)
        except (FileNotFoundError, ValidationError):
            return None
        return record if record.digest == digest and record.fits_its_digest else None

    def has(self, record: Record) -> bool:
        """Whether an artifact of that digest is there; it was used then, and is not removed for a while."""
        place = self._place(record.kind, record.digest)
        with suppress(FileNotFoundError):
            listed = place.listing().get(_RECORD)
            if listed is not None and time.time() - listed.modified > _USED_AGAIN_SECONDS:
                (place / _RECORD).write_bytes((place / _RECORD).read_bytes())
            return listed is not None
        return False

    def point(self, name: str, pointer: str) -> None:
        """Remember what the named step made last."""
        self._pointer(name).write_bytes(pointer.encode())

    def pointer(self, name: str) -> str:
        """What `point` was given last. Raises FileNotFoundError where it never was."""
        return self._pointer(name).read_text()

    def forget(self, name: str) -> None:
        """The named step made nothing this time."""
        self._pointer(name).parent.remove([self._pointer(name).name])

    def _place(self, kind: str, digest: str) -> RemotePath:
        return self.root / kind / digest[:32]

    def _pointer(self, name: str) -> RemotePath:
        return self.root / "current" / f"{name}.json"


def upload_of(place: RemotePath) -> str | None:
    """The folder of the files of the artifact there; None where there is none."""
    try:
        return _Entry.model_validate_json((place / _RECORD).read_bytes()).upload
    except (FileNotFoundError, ValidationError):
        return None


def _fetched(source: RemotePath, folder: Path, name: str, file: StoredFile) -> bool:
    """Whether the file is in the folder now, byte for byte. Else it is not there, or not what was put there."""
    try:
        source.download(local_path(folder, name), file.size_bytes)
    except (FileNotFoundError, ForeignError):
        return False
    return sha256_file(folder / name) == file.sha256
