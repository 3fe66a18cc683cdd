"""The background process for looks that may take longer than a tick of the sensor.

Such a look digests gigabytes, or needs MLflow's client, because no other code can read MLflow's databases. The process
is `python -m resources.checkpoints.watch`. It reads its job from its standard input and writes its answer to a file
below the workspace's home, where a later tick finds it. Like a build, the process waits for benchmarks to end. It
outlives the process that started it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ValidationError

from resources.boundary.addresses import Address
from resources.catalog.entries import ModelEntry
from resources.checkpoints.collect import content_hashes, content_revision
from resources.checkpoints.sources.local import local_folder
from resources.checkpoints.sources.reference import kind_of
from resources.checkpoints.sources.registry import find_version
from resources.checkpoints.validation import validate
from resources.checkpoints.watch.folder import stat_folder
from resources.errors import CheckpointError, RefineryError, first_line
from resources.machine import lock
from resources.machine.lock import building
from resources.processes.variables import COMPUTE, DATABASE, HUGGING_FACE, MLFLOW, PROGRAM, PYTHON, inherited
from resources.settings.sources import SourceSettings
from resources.storage.atomic import write_whole
from resources.storage.locks import file_lock

#: The most background processes that this process starts at once. More would only wait for the same disk.
_MOST = 2
#: The number of background processes that may end without an answer before an error is raised, and the pause before the
#: next try.
_TRIES = 3
_PAUSE_SECONDS = 3600.0
#: A problem may be temporary, such as a locked database. It is looked at again after this time.
PROBLEM_SECONDS = 600.0
#: A new process needs a moment until it holds its lock.
_START_SECONDS = 20.0
#: The longest time of a background process, by the kind of its source. Folders and packages get the time for gigabytes
#: from a slow disk. MLflow answers much sooner, or not at all.
_LONGEST_SECONDS = {"registry": 120, "folder": 2 * 3600, "package": 2 * 3600}

_NEEDS = (PROGRAM, PYTHON, COMPUTE, HUGGING_FACE)

_starting = threading.Lock()
_started: list[subprocess.Popen[bytes]] = []


class Answer(BaseModel):
    """The newest answer about one source.

    Without a revision and a problem, there is no answer yet.

    Args:
        source: The source that was looked at. The entry may name another by now.
        key: The state of the source, as seen from outside, that the answer is about.
        revision: The revision that the source holds.
        problem: Why the source has no usable revision.
        asked: The newest state for which a process was started.
        tries: The number of processes that were started for `asked`.
        at: The time of the last start or of the answer, in seconds since 1970.
    """

    source: str = ""
    key: str = ""
    revision: str = ""
    problem: str = ""
    asked: str = ""
    tries: int = 0
    at: float = 0.0


class _Job(BaseModel):
    entry: dict[str, object]
    folder: Path
    tracking_uri: str
    key: str
    machine_lock: Path


def ask(entry: ModelEntry, settings: SourceSettings, key: str, *, now: float, rest_s: float = 0.0) -> Answer | None:
    """Return the newest answer about the entry's source, or None if there is none yet.

    If there is no answer for `key`, a background process is started, unless the last one was less than `rest_s` ago.

    Args:
        entry: The entry whose source is looked at.
        settings: The folder for answers, and the registry.
        key: The state of the source as seen from outside, such as a digest of file sizes and times.
        now: The time in seconds since 1970.
        rest_s: The least time between two processes for the source, in seconds.

    Raises:
        CheckpointError: Several processes ended without an answer.
    """
    path = _answer_file(settings, entry)
    last = _read(path)
    if last.source != entry.source:
        last = Answer(source=entry.source)
    # An answer from the future was given before the clock was set back, and its age is unknown.
    recent_s = now - last.at if last.at <= now + _START_SECONDS else math.inf
    if last.key == key and (last.revision or recent_s < PROBLEM_SECONDS):
        return last
    known = last if last.key else None
    if _is_held(path.with_suffix(".lock")):
        return known
    # A database may have another key at each tick, so its failed processes are counted regardless of the key.
    tries = last.tries if last.asked == key or kind_of(entry.source) == "registry" else 0
    if tries >= _TRIES and _START_SECONDS <= recent_s < _PAUSE_SECONDS:
        raise CheckpointError(
            f"{entry.name}: {_TRIES} processes that looked at {entry.source} ended without an answer. Their last "
            f"output is in {path.with_suffix('.log')}. Another process starts within the hour."
        )
    rest_s = max(rest_s, _START_SECONDS if tries else 0.0)
    with _starting:
        _started[:] = [process for process in _started if process.poll() is None]
        if recent_s >= rest_s and len(_started) < _MOST:
            asked = last.model_copy(update={"asked": key, "at": now, "tries": tries % _TRIES + 1})
            write_whole(path, asked.model_dump_json().encode())
            _start(entry, settings, key)
    return known


def _start(entry: ModelEntry, settings: SourceSettings, key: str) -> None:
    path, asks_mlflow = _answer_file(settings, entry), kind_of(entry.source) == "registry"
    job = _Job(
        entry=entry.fields(),
        folder=settings.folder.resolve(),
        tracking_uri=settings.tracking_uri.reveal() if asks_mlflow else "",
        key=key,
        machine_lock=lock.MACHINE_LOCK,
    )
    with path.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "resources.checkpoints.watch"],
            # The process reads untrusted files or MLflow's database, so it gets no variables and secrets beyond these.
            env=inherited(*_NEEDS, MLFLOW, secrets=DATABASE) if asks_mlflow else inherited(*_NEEDS),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stream:  # `ask` reports processes that end at once, after _TRIES
        stream.write(job.model_dump_json().encode())
    _started.append(process)
    threading.Thread(target=process.wait, daemon=True).start()  # waiting for it prevents a zombie


def _answer_file(settings: SourceSettings, entry: ModelEntry) -> Path:
    return settings.folder / "looks" / f"{entry.name}.json"


def _read(path: Path) -> Answer:
    try:
        return Answer.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return Answer()


def _is_held(lock: Path) -> bool:
    try:
        with file_lock(lock, timeout_s=0.0):
            return False
    except TimeoutError:
        return True


def main() -> None:
    """Read one job from standard input, look at its source, and write the answer."""
    job = _Job.model_validate(json.load(sys.stdin))
    lock.MACHINE_LOCK = job.machine_lock
    entry = ModelEntry.model_validate(job.entry)
    settings = SourceSettings(job.folder, Address(job.tracking_uri))
    path = _answer_file(settings, entry)
    os.nice(10)
    # Another process that tests whether the lock is held takes it for a moment, so this one waits for up to a second.
    with file_lock(path.with_suffix(".lock"), timeout_s=1.0), building():
        signal.alarm(_LONGEST_SECONDS[kind_of(entry.source)])
        answer = Answer(source=entry.source, key=job.key, asked=job.key, at=time.time())
        try:
            answer.revision = _revision(entry, settings, job.key)
        except (RefineryError, OSError) as error:
            answer.problem = first_line(error, 1000)
        if answer.revision or answer.problem:
            write_whole(path, answer.model_dump_json().encode())


def _revision(entry: ModelEntry, settings: SourceSettings, key: str) -> str:
    """Return the revision that the entry's source holds.

    The revision is empty if the folder no longer has the state `key`, or changed while it was read. A later tick then
    asks about its new state.
    """
    if kind_of(entry.source) == "registry":
        return find_version(entry.source, settings).revision
    folder = local_folder(entry.source)
    hashes = content_hashes(entry, folder, validate(entry, folder).files)
    return content_revision(hashes) if stat_folder(entry, folder).digest == key else ""
