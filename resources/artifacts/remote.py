"""The artifacts of several machines in object storage: each machine finds what the others have made.

    <root>/<kind>/<digest>/record.json         the record, and the name of the upload with its files; written last
    <root>/<kind>/<digest>/<upload>/...        its files
    <root>/current/<name>.json                 the artifact that a step of the pipeline made last

Objects cannot be renamed, so a record is one object that names the folder of its files. Readers see an artifact whole
or not at all, also if two machines have made the same one at the same time, or if one of them was killed. No record
names the upload of a killed machine. It costs money until `refinery gc` removes it: see resources.artifacts.remote_gc.
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
#: The record of an artifact that is used is written again if it is this old, because its time is that of the last use.
_USED_AGAIN_SECONDS = 12 * 3600.0


class _Entry(BaseModel):
    """The content of `record.json`."""

    model_config = ConfigDict(frozen=True)
    upload: str
    record: str


@dataclass(frozen=True)
class RemoteArtifacts:
    """The artifacts below one place in object storage, in the layout that the module describes.

    Every method raises StorageError if the store does not answer or refuses.
    """

    root: RemotePath

    def push(self, record: Record, folder: Path) -> None:
        """Upload the artifact, in place of an earlier one with its digest."""
        place, upload = self._place(record.kind, record.digest), uuid.uuid4().hex
        for name in record.files:
            (place / upload / name).upload(folder / name)
        entry = _Entry(upload=upload, record=record.model_dump_json())
        (place / _RECORD).write_bytes(entry.model_dump_json().encode())

    def pull(self, kind: type[R], digest: str, folder: Path) -> tuple[R | None, tuple[str, ...]]:
        """Download the artifact of that digest into the empty folder.

        If a file is not what the record says, the record is removed. A machine that has a copy then uploads it again,
        and a machine that has none makes it.

        Returns:
            The artifact's record and no names. The record is None if there is none or this version cannot read it. If a
            file is not what the record says, the result is None and the file's name.
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
                if upload_of(place) != entry.upload:  # another machine has just uploaded it again, or removed it
                    return None, ()
                place.remove([_RECORD])
                return None, (name,)
        return record, ()

    def withdraw(self, record: Record) -> None:
        """Remove the artifact's record, so that no machine finds the artifact any more.

        `refinery gc` removes its files later.
        """
        self._place(record.kind, record.digest).remove([_RECORD])

    def record(self, kind: type[R], digest: str) -> R | None:
        """Return the record of that digest without its files, or None if there is none that this version reads."""
        try:
            entry = _Entry.model_validate_json((self._place(kind.kind, digest) / _RECORD).read_bytes())
            record = kind.model_validate_json(entry.record)
        except (FileNotFoundError, ValidationError):
            return None
        return record if record.digest == digest and record.fits_its_digest else None

    def has(self, record: Record) -> bool:
        """Return whether an artifact of that digest is there.

        The call counts as a use, so that the artifact is not removed for a while.
        """
        place = self._place(record.kind, record.digest)
        with suppress(FileNotFoundError):
            listed = place.listing().get(_RECORD)
            if listed is not None and time.time() - listed.modified > _USED_AGAIN_SECONDS:
                (place / _RECORD).write_bytes((place / _RECORD).read_bytes())
            return listed is not None
        return False

    def point(self, name: str, pointer: str) -> None:
        """Write the pointer to the artifact that the named step made last."""
        self._pointer(name).write_bytes(pointer.encode())

    def pointer(self, name: str) -> str:
        """Return the pointer that `point` wrote last.

        Raises:
            FileNotFoundError: There is none.
        """
        return self._pointer(name).read_text()

    def forget(self, name: str) -> None:
        """Remove the pointer of the named step, because the step made nothing this time."""
        self._pointer(name).parent.remove([self._pointer(name).name])

    def _place(self, kind: str, digest: str) -> RemotePath:
        return self.root / kind / digest[:32]

    def _pointer(self, name: str) -> RemotePath:
        return self.root / "current" / f"{name}.json"


def upload_of(place: RemotePath) -> str | None:
    """Return the name of the folder with the artifact's files, or None if there is no artifact."""
    try:
        return _Entry.model_validate_json((place / _RECORD).read_bytes()).upload
    except (FileNotFoundError, ValidationError):
        return None


def _fetched(source: RemotePath, folder: Path, name: str, file: StoredFile) -> bool:
    """Download the file into the folder, and return whether it is there now, byte for byte as the record says.

    The result is False if the file is missing in the store, or is not the one that was uploaded.
    """
    try:
        source.download(local_path(folder, name), file.size_bytes)
    except (FileNotFoundError, ForeignError):
        return False
    return sha256_file(folder / name) == file.sha256
