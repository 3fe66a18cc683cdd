"""Checkpoints in object storage: `s3://bucket/prefix`, `gs://bucket/prefix`, `as://account/container/prefix`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from resources.artifacts.fingerprint import fingerprint
from resources.boundary.foreign import MOST_CONFIG_BYTES, ForeignError, check_name, local_path, parse_json
from resources.checkpoints.reading import ADAPTER, IS_ADAPTER, MERGE_REMEDY
from resources.checkpoints.sources.copies import kept, kept_copy
from resources.checkpoints.sources.wanted import UNWANTED, WANTED, WANTED_CODE, WANTED_PICKLE, WANTED_WEIGHTS
from resources.checkpoints.weights import INDEX, PICKLE_INDEX, shard_names
from resources.errors import CheckpointError, StorageError, UnfetchedError, first_line
from resources.settings.sources import SourceSettings
from resources.storage.locations import parse_location
from resources.storage.objects import Listed, RemotePath

_INDICES = (INDEX, PICKLE_INDEX)


@dataclass(frozen=True)
class Listing:
    """The objects of a checkpoint, by their names below the prefix."""

    place: RemotePath
    objects: Mapping[str, Listed]

    @property
    def revision(self) -> str:
        """The revision, a digest of names, sizes and ETags.

        Object stores have no digest of the content that is the same in all of them.
        """
        return fingerprint("objects", objects=sorted((n, o.size_bytes, o.tag) for n, o in self.objects.items()))[:12]

    @property
    def modified(self) -> float:
        """The time when the newest object was written, in seconds since 1970, or 0 without objects."""
        return max((one.modified for one in self.objects.values()), default=0.0)


def list_objects(source: str, settings: SourceSettings, *, allow_pickle: bool, trust_remote_code: bool) -> Listing:
    """List the objects below the prefix that belong to a checkpoint, by one request to the store.

    Raises:
        CheckpointError: The store cannot be asked, or an object has a name that no checkpoint's file has.
    """
    with _as_checkpoint_errors(source):
        place = _place(source, settings)
        found = place.listing()
    wanted = [*WANTED, *(WANTED_CODE if trust_remote_code else ())]
    if allow_pickle and not any(fnmatch(name, pattern) for name in found for pattern in WANTED_WEIGHTS):
        wanted += WANTED_PICKLE
    objects = {
        name: one
        for name, one in found.items()
        if any(fnmatch(name, pattern) for pattern in wanted) and not any(fnmatch(name, pattern) for pattern in UNWANTED)
    }
    for name in objects:
        try:
            check_name(name)  # a store accepts any key, and this key becomes a path
        except ForeignError as error:
            raise CheckpointError(
                f"source: {source}: the name of an object cannot be the name of a file: {error}. Remove that object."
            ) from None
    return Listing(place, objects)


def lacking(source: str, listing: Listing) -> str:
    """Return the name of the first file that the checkpoint lacks, or an empty text if it is complete.

    Raises:
        CheckpointError: The index of the weights cannot be read, or the checkpoint is an adapter, which never becomes
            complete.
    """
    if ADAPTER in listing.objects:
        raise CheckpointError(f"source: {source}: {IS_ADAPTER}. {MERGE_REMEDY}.")
    if "config.json" not in listing.objects:
        return "config.json"
    for index in _INDICES:
        if index in listing.objects:
            with _as_checkpoint_errors(source):
                if listing.objects[index].size_bytes > MOST_CONFIG_BYTES:
                    raise ValueError(f"{index} is larger than {MOST_CONFIG_BYTES // 2**20} MB")
                data = parse_json((listing.place / index).read_bytes())
                shards = shard_names(index, data.get("weight_map"))
            return next((name for name in shards if name not in listing.objects), "")
    weights = (*WANTED_WEIGHTS, *WANTED_PICKLE)
    return "" if any(fnmatch(name, pattern) for name in listing.objects for pattern in weights) else WANTED_WEIGHTS[0]


def fetch_objects(
    source: str, settings: SourceSettings, *, allow_pickle: bool, trust_remote_code: bool, fetch: bool = True
) -> tuple[Path, str]:
    """Return the folder with the local copy of the prefix's checkpoint, and its revision.

    The copy is downloaded if it does not exist.

    Raises:
        CheckpointError: The checkpoint cannot be downloaded, or changes while it is downloaded.
        UnfetchedError: `fetch` is false, and there is no copy.
    """
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    listing = list_objects(source, settings, **allowed)
    if not listing.objects:
        raise CheckpointError(f"source: there are no checkpoint files below {source}. Give the prefix of config.json.")

    if not fetch and kept(settings.folder / "objects", source, listing.revision) is None:
        raise UnfetchedError(source, listing.revision)

    def download(folder: Path) -> None:
        with _as_checkpoint_errors(source):
            for name, one in listing.objects.items():
                (listing.place / name).download(local_path(folder, name), one.size_bytes)
        if list_objects(source, settings, **allowed).revision != listing.revision:
            raise CheckpointError(
                f"source: {source} changed while it was downloaded. Try again when nothing writes to it any more."
            )

    return kept_copy(settings.folder / "objects", source, listing.revision, download), listing.revision


def _place(source: str, settings: SourceSettings) -> RemotePath:
    """Return the place in object storage that the source names.

    Raises:
        CheckpointError: The source names no place in a bucket.
    """
    key = settings.access.azure_key
    try:
        place = parse_location(source, settings.folder, {"AZURE_STORAGE_KEY": key} if key else {})
    except ValueError as error:
        raise CheckpointError(f"source: {error}.") from None
    assert isinstance(place, RemotePath), "callers pass only sources with one of OBJECT_SCHEMES"
    return RemotePath(replace(place.store, setting="its source", rights="list and read"), place.key)


@contextmanager
def _as_checkpoint_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (StorageError, ForeignError) as error:
        raise CheckpointError(f"source: {error}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"source: {source} cannot be read: {first_line(error)}. Upload the whole checkpoint again."
        ) from error
