"""Paths in object storage (`s3://`, `gs://`, `as://`) that behave as those of `pathlib.Path` do.

`RemotePath` has the part of `Path` that this project uses, over fsspec. universal_pathlib's UPath would not do:
fsspec's `isfile` and `exists` answer False if the store cannot be asked, and this project removes folders on the
strength of that answer. Nothing is cached between two requests, so the changes of other processes are seen.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from resources.boundary.deadlines import Pace
from resources.boundary.foreign import MOST_DOCUMENT_BYTES
from resources.errors import FULL, RefusedError, StorageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: The limit for one question or small file. A store that does not answer is reported as dead after about this time.
ANSWER_SECONDS = 15.0
#: The limit for the names of everything below a place. A thousand names come at a time, about ten times a second.
LISTING_SECONDS = 3600.0
TRIES = 2
#: The limits for a whole file of any size, from any store. A transfer must not take for ever, but a slow line does not
#: mean that the store is dead.
_POLL_SECONDS = 0.2
_FILE_SECONDS = 60.0
_FILE_BYTES_PER_SECOND = 1e6

#: For each protocol of fsspec, the extra of this project that installs it, and the variables that Triton reads too.
_EXTRAS = {
    "s3": ("s3", "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"),
    "gs": ("gs", "GOOGLE_APPLICATION_CREDENTIALS"),
    "abfs": ("as", "AZURE_STORAGE_KEY"),
}
#: The wording of S3's, Google's and Azure's answers.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|specified (bucket|container) does not exist")
_REFUSED = re.compile(
    r"\b40[13]\b|AccessDenied|Access Denied|Forbidden|Unauthorized|AuthorizationFailure|AuthenticationFailed|"
    r"InvalidAccessKeyId|SignatureDoesNotMatch|[Cc]redentials"
)
#: The wording of HTTP's status 416.
_NO_RANGE = re.compile(r"InvalidRange|\b416\b|[Rr]ange [Nn]ot [Ss]atisfiable")


@dataclass(frozen=True)
class Listed:
    """A store's description of an object.

    Args:
        tag: The object's ETag, which differs if the bytes differ.
        modified: The time of the last change in seconds since 1970, or 0 if the store does not say.
    """

    size_bytes: int
    tag: str
    modified: float


@dataclass(frozen=True)
class LeaseTimes:
    """The times of a lease, all in seconds; see resources.storage.lease.

    Args:
        life: How long a claim may stay unchanged and still counts as alive.
        margin: How much sooner its holder stops. The margin covers the answer to the change that the holder has just
            begun, and as long again for a store that carries out a change after the caller has stopped waiting for the
            answer.
        renewal: How often the holder rewrites its claim. It does so several times in the rest of the claim's life,
            because otherwise one lost write would end the lease.
        look: How often a waiting process looks, on average.
        patience: How long a process waits. Several releases are published in that time.
    """

    life: float = 60.0
    margin: float = 2 * ANSWER_SECONDS
    renewal: float = 5.0
    look: float = 1.0
    patience: float = 1800.0


class Held(Protocol):
    """The part of a lease that a store asks before it changes the repository."""

    def require(self) -> None:
        """Check that no other process can have the lease by now.

        Raises:
            StorageError: Another process may have the lease.
        """


@dataclass(eq=False)
class Store:
    """One object storage service with its buckets.

    Args:
        protocol: fsspec's name of the service.
        shown: The part before the bucket's name in a path as a person writes it.
        scratch: A folder on this machine where releases are made and inspected.
        options: The options of fsspec's file system. They may hold keys.
        leases: The leases that are held at the moment, each by the key at or below which its holder changes objects.
        setting: The setting that holds the address, for error messages.
        rights: The rights that the credentials have to grant, for error messages.
    """

    protocol: str
    shown: str
    scratch: Path
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # it may hold keys
    leases: dict[str, Held] = field(default_factory=dict)
    setting: str = "REFINERY_TRITON_REPOSITORIES"
    rights: str = "list, read, write and delete"
    lease_times: LeaseTimes = LeaseTimes()

    def filesystem(self) -> AbstractFileSystem:
        """Return fsspec's file system, which fsspec keeps for each process and thread.

        Raises:
            StorageError: The package for the protocol is missing.
        """
        extra, _ = _EXTRAS.get(self.protocol, (self.protocol, ""))
        try:
            import fsspec

            files = fsspec.filesystem(self.protocol, **self.options)
        except ImportError as error:
            remedy = f"Run: pip install 'transformer-refinery[{extra}]'."
            raise StorageError(f"{self.shown}... cannot be used: {first_line(error)}. {remedy}") from error
        if self.protocol == "s3":
            files.retries = TRIES  # s3fs retries by itself, around botocore's retries
        files.invalidate_cache()  # adlfs keeps listings whatever its options say
        return files

    @property
    def variables(self) -> str:
        """The environment variables in which credentials are looked for."""
        return _EXTRAS.get(self.protocol, ("", "the store's variables"))[1]


class RemotePath:
    """A place in a bucket, whether or not anything is there.

    Every method that asks the store raises StorageError if the store does not answer or refuses.

    Args:
        store: The service that has the bucket.
        key: The path from the bucket's name on, without a slash at either end.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key = store, key

    def __str__(self) -> str:
        return f"{self.store.shown}{self.key}"

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return self.key < other.key

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def parent(self) -> RemotePath:
        """The place one level up."""
        return RemotePath(self.store, str(PurePosixPath(self.key).parent))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """Return the key relative to that of another place."""
        return PurePosixPath(self.key).relative_to(other.key)

    def exists(self) -> bool:
        """Return whether an object is there, or any object lies below."""
        return self._kind() != ""

    def is_file(self) -> bool:
        """Return whether an object is there."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether any object lies below, because stores know no empty folders."""
        return self._kind() == "directory"

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the places directly below. If the place does not exist, yield nothing."""
        try:
            with self._asking("list") as (files, bound):
                found = files.ls(self.key, detail=True, **bound)
        except FileNotFoundError:
            return
        for name in sorted({str(one["name"]).strip("/") for one in found} - {self.key}):
            yield RemotePath(self.store, name)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files, but not the folders, that match a pattern in which `*` does not match `/`."""
        depth = pattern.count("/")
        for name in self.sizes():
            if name.count("/") == depth and PurePosixPath(name).match(pattern):
                yield self / name

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file below, by its path from here.

        The store is asked once, however many files there are.
        """
        return {name: one.size_bytes for name, one in self.listing().items()}

    def listing(self, *, timeout_s: float | None = None) -> dict[str, Listed]:
        """Return the size, tag and time of every file below, by its path from here.

        Args:
            timeout_s: The limit for the whole answer. The default is the limit of any other question, which is enough
                for about a hundred thousand files.
        """
        try:
            with self._asking("list") as (files, bound):
                given = bound if timeout_s is None or not bound else {"timeout": timeout_s}
                found = files.find(self.key, detail=True, **given)
        except FileNotFoundError:
            return {}
        # Some tools create an empty object that stands for a folder.
        names = {name.strip("/").removeprefix(f"{self.key}/"): one for name, one in found.items()}
        return {
            name: Listed(int(one["size"]), _tag(one), _modified(one))
            for name, one in sorted(names.items())
            if one["type"] == "file" and name != self.key and not str(one["name"]).endswith("/")
        }

    def read_bytes(self) -> bytes:
        """Return the bytes of a document. `download` gets larger files.

        Raises:
            FileNotFoundError: No object is there.
            StorageError: The object has more than `MOST_DOCUMENT_BYTES`, or the store does not answer or refuses.
        """
        with self._asking("read") as (files, bound):
            try:
                data = bytes(files.cat_file(self.key, start=0, end=MOST_DOCUMENT_BYTES + 1, **bound))
            except Exception as error:
                if not _NO_RANGE.search(" ".join(_chain(error))):
                    raise
                data = b""  # an empty object has no range
        if len(data) > MOST_DOCUMENT_BYTES:
            raise StorageError(
                f"{self} is larger than {MOST_DOCUMENT_BYTES // 2**20} MB, which is too large for a record, manifest "
                "or configuration. Remove it, and check who can write there."
            )
        return data

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text of a document.

        Raises:
            FileNotFoundError: No object is there.
            UnicodeDecodeError: The bytes are no text in this encoding.
        """
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Write the object so that readers see all of it or its previous content."""
        with self._changing("write") as (files, bound):
            files.pipe_file(self.key, data, **bound)

    def mkdir(self, *, parents: bool, exist_ok: bool) -> None:
        """Check that the bucket is there and answers, because object stores have no folders."""
        del parents, exist_ok
        list(self.iterdir())

    def upload(self, source: Path) -> None:
        """Upload a local file, whole or not at all."""
        with self._changing("write", source) as (files, _):
            files.put_file(str(source), self.key, **_whole(files, source.stat().st_size))
        self._require_lease()  # the upload may have outlasted the lease

    def download(self, target: Path, size_bytes: int) -> None:
        """Download the file.

        Args:
            target: The local file. Its folder is created.
            size_bytes: The file's size, which sets the time limit.

        Raises:
            FileNotFoundError: No object is there.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._asking("read", target) as (files, _):
            if files.async_impl:
                self._download_apace(files, target, _whole(files, size_bytes)["timeout"])
            else:
                files.get_file(self.key, str(target))

    def _download_apace(self, files: AbstractFileSystem, target: Path, seconds: float) -> None:
        """Download as fsspec's `get_file` does, and also require a minimum speed.

        `get_file` limits the whole transfer alone, so gigabytes may drip for hours before it ends.
        """
        pace, deadline = Pace(), time.monotonic() + seconds
        future = asyncio.run_coroutine_threadsafe(files._get_file(self.key, str(target)), files.loop)
        try:
            while not wait([future], timeout=_POLL_SECONDS).done:
                pace.require(target.stat().st_size if target.exists() else 0)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the download was not complete within {seconds:.0f} s")
            future.result()
        finally:
            future.cancel()

    def remove(self, names: Sequence[str]) -> None:
        """Remove the named files below, in their order, and ignore those that are already gone.

        The files are removed one by one. fsspec's `rm` takes stars and brackets in a key for a pattern, and that of
        s3fs does not check the errors in S3's answer to the removal of many objects.
        """
        for name in names:
            with suppress(FileNotFoundError), (self / name)._changing("remove") as (files, bound):
                files.rm_file(f"{self.key}/{name}", **bound)

    def _kind(self) -> str:
        try:
            with self._asking("read") as (files, bound):
                return str(files.info(self.key, **bound)["type"])
        except FileNotFoundError:
            return ""

    @contextmanager
    def _changing(self, what: str, local: Path | None = None) -> Iterator[tuple[AbstractFileSystem, dict[str, float]]]:
        self._require_lease()
        with self._asking(what, local) as asked:
            yield asked

    def _require_lease(self) -> None:
        for key, lease in [*self.store.leases.items()]:
            if f"{self.key}/".startswith(f"{key}/"):
                lease.require()

    @contextmanager
    def _asking(self, what: str, local: Path | None = None) -> Iterator[tuple[AbstractFileSystem, dict[str, float]]]:
        """Yield fsspec's file system and the time limit of one of its answers, and raise its errors as StorageError.

        FileNotFoundError is raised unchanged, unless it means that the bucket is missing. Errors of the file or the
        disk on this machine are raised unchanged, too.
        """
        try:
            files = self.store.filesystem()
            yield files, {"timeout": ANSWER_SECONDS} if files.async_impl else {}
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and local is not None and error.filename in (local, str(local)):
                raise
            self._explain(error, what)
            raise

    def _explain(self, error: Exception, what: str) -> None:
        said = " ".join(_chain(error))
        gone = isinstance(error, FileNotFoundError)
        if _NO_BUCKET.search(said) or (gone and what == "write"):
            raise StorageError(
                f"{self.store.shown}{self.key.split('/')[0]} does not exist. Create the bucket, or correct "
                f"{self.store.setting}."
            ) from error
        if gone or getattr(error, "errno", None) in FULL:
            return
        if isinstance(error, PermissionError) or _REFUSED.search(said):
            raise RefusedError(
                f"{self}: the store refuses to {what} it: {first_line(error)}. Set {self.store.variables}, as for "
                f"Triton, to credentials that may {self.store.rights} there."
            ) from error
        reason = first_line(error) if str(error) else "no answer in time"
        raise StorageError(
            f"{self}: the request to {what} it failed: {reason}. Check the store's address and that the store can be "
            "reached, and run again. The release that served before goes on serving."
        ) from error


def _whole(files: AbstractFileSystem, size_bytes: int) -> dict[str, float]:
    """Return the time limit for the transfer of a whole file."""
    return {"timeout": _FILE_SECONDS + size_bytes / _FILE_BYTES_PER_SECOND} if files.async_impl else {}


def _tag(one: Mapping[str, Any]) -> str:
    """Return the ETag, under the names that the file systems of S3, Google and Azure use for it."""
    return str(one.get("ETag") or one.get("etag") or one.get("md5Hash") or "").strip('"')


def _modified(one: Mapping[str, Any]) -> float:
    said = one.get("LastModified") or one.get("last_modified") or one.get("mtime") or one.get("updated")
    with suppress(ValueError):
        said = datetime.fromisoformat(said) if isinstance(said, str) else said
    return said.timestamp() if isinstance(said, datetime) else 0.0


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__
