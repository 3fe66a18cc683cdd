"""The directory entries of a folder, which tell whether its content has to be read again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from resources.artifacts.fingerprint import fingerprint
from resources.catalog.entries import ModelEntry
from resources.checkpoints.reading import TOKENIZER
from resources.checkpoints.sources.local import package_version
from resources.checkpoints.sources.reference import PACKAGE_PREFIX
from resources.checkpoints.sources.wanted import WANTED, WANTED_PICKLE
from resources.checkpoints.validation import candidate_files
from resources.errors import CheckpointError

#: Names of files that are still being copied by rsync or downloaded. Their writers rename them when they are whole.
_ON_THEIR_WAY = (
    *(f".{pattern}.*" for pattern in (*WANTED, *WANTED_PICKLE)),
    *(f"*.{ending}" for ending in ("incomplete", "part", "partial", "filepart", "crdownload", "tmp")),
)
#: The sub-folder in which `hf download --local-dir` keeps such files.
_DOWNLOADS = ".cache/huggingface/download"


@dataclass(frozen=True)
class FolderStat:
    """A summary of a folder's directory entries.

    Args:
        digest: The digest of names, sizes and times.
        newest: The newest change time (st_ctime) of the files, in seconds since 1970.
        on_its_way: The time of the last write to a file that is still being copied or downloaded into the folder, in
            seconds since 1970. It is 0 if there is no such file.
        size_bytes: The size of all files.
        tokenizer_bytes: The size of tokenizer.json, or 0 if there is none.
    """

    digest: str
    newest: float
    on_its_way: float
    size_bytes: int
    tokenizer_bytes: int


def stat_folder(entry: ModelEntry, folder: Path) -> FolderStat:
    """Summarize the directory entries of every file that may belong to the checkpoint.

    Only modules.json is opened. The digest includes the change times (st_ctime), because a copy cannot take them over
    from its original as it can take over modification times.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    stats = {}
    try:
        for name in candidate_files(entry, folder):
            with suppress(FileNotFoundError):  # the file is being replaced
                stats[name] = (folder / name).stat()
        newest = max((stat.st_ctime for stat in stats.values()), default=folder.stat().st_ctime)
        on_its_way = _on_its_way(folder)
    except OSError as error:
        raise CheckpointError(f"{entry.name}: {folder} cannot be read: {error}. Make it readable.") from error
    options = entry.task_options().model_dump()
    digest = fingerprint(
        "stat",
        files=sorted((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats.items()),
        # These fields too decide whether the folder holds a whole checkpoint.
        entry=[entry.source, entry.task, entry.allow_pickle, entry.trust_remote_code, options],
        version=package_version(entry.source) if entry.source.startswith(PACKAGE_PREFIX) else "",
    )
    sizes = {name: stat.st_size for name, stat in stats.items()}
    return FolderStat(digest[:16], newest, on_its_way, sum(sizes.values()), sizes.get(TOKENIZER, 0))


def _on_its_way(folder: Path) -> float:
    paths = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in _ON_THEIR_WAY)]
    paths += (folder / _DOWNLOADS).rglob("*.incomplete")
    times = [0.0]
    for path in paths:
        with suppress(FileNotFoundError):  # the file was renamed meanwhile
            times.append(path.stat().st_mtime)
    return max(times)
