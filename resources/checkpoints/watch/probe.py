"""One look at one source, which finds the revision that it holds now.

A look fetches nothing and imports no heavy libraries.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from resources.catalog.entries import ModelEntry
from resources.checkpoints.collect import content_hashes, content_revision
from resources.checkpoints.sources.local import local_folder
from resources.checkpoints.sources.objects import lacking, list_objects
from resources.checkpoints.sources.reference import Kind, kind_of
from resources.checkpoints.sources.registry import missing, parse_reference
from resources.checkpoints.validation import validate
from resources.checkpoints.watch import background as aside
from resources.checkpoints.watch.background import PROBLEM_SECONDS
from resources.checkpoints.watch.folder import stat_folder
from resources.checkpoints.watch.hub import hub_commit, is_pinned
from resources.checkpoints.watch.registry import ask_version
from resources.errors import CheckpointError, first_line
from resources.settings.sources import SourceSettings

#: The kinds of sources for which a look asks a server.
REMOTE: tuple[Kind, ...] = ("hub", "registry", "objects")
#: A look digests up to this many bytes itself and leaves larger folders to a background process. SHA-256 takes about a
#: second for a gigabyte.
SMALL_BYTES = 128 * 2**20
#: The same bound for tokenizer.json, because reading it takes several times its size of memory. RoBERTa's has 2 MB,
#: XLM-R's 17 MB.
SMALL_TOKENIZER_BYTES = 4 * 2**20
#: An incomplete folder counts as still being filled until it has been unchanged for this many intervals, because a
#: download of several files writes them one after the other.
INCOMPLETE_INTERVALS = 10
#: The least time between two reads of an MLflow database, because each takes seconds of processor time. A database that
#: does not show from outside whether it has changed is read at this interval.
REGISTRY_SECONDS = 120.0


class Seen(BaseModel):
    """The result of a look.

    Args:
        stat: The state of the source as seen from outside. It changes when the source changes.
        since: The time when this state was first seen, in seconds since 1970.
        revision: The revision that the source holds, in the form of `Checkpoint.revision`. It is empty while it cannot
            be told.
        waiting: Why there is no revision yet, if one may come without a user's help.
        problem: Why there is no revision, if a user must act.
        refused: The time when the problem was found, in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)
    stat: str
    since: float
    revision: str = ""
    waiting: str = ""
    problem: str = ""
    refused: float = 0.0

    def holds(self, now: float) -> bool:
        """Return whether the result stays valid while the state of the source is the same.

        A problem may be temporary, such as a disk that was away, so it is valid only for PROBLEM_SECONDS.
        """
        return bool(self.revision) or (bool(self.problem) and 0 <= now - self.refused < PROBLEM_SECONDS)


def look(
    entry: ModelEntry, before: Seen | None, settings: SourceSettings, *, interval_s: float, now: float | None = None
) -> Seen:
    """Look at what the entry's source holds.

    Args:
        entry: The entry whose source is looked at.
        before: The result of the last look.
        settings: The addresses and credentials for sources, and the folder for answers.
        interval_s: The time for which the source must have been unchanged, in seconds.
        now: The time in seconds since 1970. The default is the clock's.

    Raises:
        CheckpointError: The source does not exist, does not answer, or cannot be a checkpoint's source.
    """
    now = time.time() if now is None else now
    kind = kind_of(entry.source)
    if kind == "hub":
        if before is not None and before.revision and is_pinned(entry.source):
            return before
        commit = hub_commit(entry.source, settings.access)
        return before if before is not None and before.stat == commit else Seen(stat=commit, since=now, revision=commit)
    if kind == "registry":
        return _look_at_registry(entry, before, settings, now)
    if kind == "objects":
        return _look_at_objects(entry, before, settings, interval_s, now)
    return _look_at_folder(entry, before, settings, interval_s, now)


def _look_at_folder(
    entry: ModelEntry, before: Seen | None, settings: SourceSettings, interval_s: float, now: float
) -> Seen:
    folder = local_folder(entry.source)
    stat = stat_folder(entry, folder)
    same = before is not None and before.stat == stat.digest
    if before is not None and same and before.holds(now):
        return before
    seen = Seen(stat=stat.digest, since=before.since if before is not None and same else now)
    quiet_s = max(now - seen.since, now - stat.newest)
    if quiet_s < interval_s:
        return _waits(seen, f"its files changed {max(0.0, quiet_s):.0f} s ago")
    # The files beside it may still be those of the previous revision.
    if abs(now - stat.on_its_way) < INCOMPLETE_INTERVALS * interval_s:
        return _waits(seen, "a file is still being copied or downloaded into it")
    if stat.size_bytes > SMALL_BYTES or stat.tokenizer_bytes > SMALL_TOKENIZER_BYTES:
        answer = aside.ask(entry, settings, stat.digest, now=now)
        if answer is None or answer.key != stat.digest:
            return _waits(seen, "a background process is hashing its files")
        if answer.problem:
            return _incomplete(seen, answer.problem, quiet_s, interval_s, now)
        return seen.model_copy(update={"revision": answer.revision})
    try:
        hashes = content_hashes(entry, folder, validate(entry, folder).files)
    except CheckpointError as error:
        return _incomplete(seen, str(error), quiet_s, interval_s, now)
    except OSError as error:
        raise CheckpointError(f"{entry.name}: {folder} cannot be read: {error}. Make it readable.") from error
    if stat_folder(entry, folder).digest != stat.digest:
        return _waits(seen, "it changed while it was read")
    return seen.model_copy(update={"revision": content_revision(hashes)})


def _look_at_registry(entry: ModelEntry, before: Seen | None, settings: SourceSettings, now: float) -> Seen:
    reference, uri = parse_reference(entry.source), settings.tracking_uri
    if before is not None and before.revision and reference.pinned:
        return before
    if uri.startswith(("http://", "https://")):
        revision = ask_version(entry.source, settings).revision
        same = before is not None and before.revision == revision
        return before if before is not None and same else Seen(stat=revision, since=now, revision=revision)
    stat = _store_stat(uri, now)
    if stat is None:
        raise missing(reference, uri)
    if before is not None and before.stat == stat and before.revision:
        return before
    answer = aside.ask(entry, settings, stat, now=now, rest_s=REGISTRY_SECONDS)
    if answer is None:
        return before or Seen(stat="", since=now, waiting="a background process is asking MLflow")
    if answer.problem:
        raise CheckpointError(answer.problem)
    return Seen(stat=answer.key, since=now, revision=answer.revision)


def _store_stat(uri: str, now: float) -> str | None:
    """Return a text that changes when MLflow's database changes, or None if its file does not exist."""
    path = uri.removeprefix("sqlite:///")
    if path == uri:  # a database server does not show from outside whether its content has changed
        return f"{now // REGISTRY_SECONDS:.0f}"
    files = [Path(path), Path(f"{path}-wal")]
    stats = [file.stat() for file in files if file.is_file()]
    return " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats) or None


def _look_at_objects(
    entry: ModelEntry, before: Seen | None, settings: SourceSettings, interval_s: float, now: float
) -> Seen:
    listing = list_objects(
        entry.source, settings, allow_pickle=entry.allow_pickle, trust_remote_code=entry.trust_remote_code
    )
    same = before is not None and before.stat == listing.revision
    if before is not None and same and before.holds(now):
        return before
    if not listing.objects:
        raise CheckpointError(
            f"source: there are no checkpoint files below {entry.source}. Give the prefix of config.json."
        )
    seen = Seen(stat=listing.revision, since=before.since if before is not None and same else now)
    quiet_s = max(now - seen.since, now - listing.modified if listing.modified else 0.0)
    if quiet_s < interval_s:
        return _waits(seen, f"its files changed {max(0.0, quiet_s):.0f} s ago")
    lacks = lacking(entry.source, listing)
    if lacks:
        text = f"{entry.name}: {lacks} is missing from {entry.source}. Upload the whole checkpoint."
        return _incomplete(seen, text, quiet_s, interval_s, now)
    return seen.model_copy(update={"revision": listing.revision})


def _waits(seen: Seen, why: str) -> Seen:
    return seen.model_copy(update={"waiting": why})


def _incomplete(seen: Seen, why: str, quiet_s: float, interval_s: float, now: float) -> Seen:
    said = first_line(CheckpointError(why), 1000)
    if quiet_s < INCOMPLETE_INTERVALS * interval_s:
        return _waits(seen, said)
    return seen.model_copy(update={"problem": said, "refused": now})
