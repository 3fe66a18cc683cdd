"""Look at sources in a background process, where a look may take longer than a tick of the sensor.

Such a look digests gigabytes, or needs MLflow's client, which alone can read MLflow's databases. `python -m
resources.checkpoints.watch` is that process. Its job comes on its standard input, and its answer goes to a file below
the workspace's home, where a later tick finds it. The process waits for benchmarks, as builds do, and outlives the
process that started it.
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

#: At once, of this process: more would only wait for the same disk.
_MOST = 2
#: Processes that ended without an answer before that is said, and how long it is then left alone.
_TRIES = 3
_PAUSE_SECONDS = 3600.0
#: A problem may have been another's: a database that was locked.
PROBLEM_SECONDS = 600.0
#: A new process needs a moment until its lock says that it is there.
_START_SECONDS = 20.0
#: For gigabytes from a slow disk; MLflow answers or not.
_LONGEST_SECONDS = {"registry": 120, "folder": 2 * 3600, "package": 2 * 3600}

_NEEDS = (PROGRAM, PYTHON, COMPUTE, HUGGING_FACE)

_starting = threading.Lock()
_started: list[subprocess.Popen[bytes]] = []


class Answer(BaseModel):
    """The newest answer about one source: to which question (key), and what (revision or problem; neither: none yet).

    source: whose it is; the entry's may be another by now. asked: the newest question; so many processes (tries) were
    started for it. at: when one was started last, or has answered, in seconds since 1970.
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
    """The newest answer about the entry's source; None: there is none yet. A process is started where there is none
    for `key`, unless the last one was within `rest_s`.

    key: what the source looks like from outside. Raises CheckpointError where processes ended without an answer.
    """
    path = _answer_file(settings, entry)
    last = _read(path)
    if last.source != entry.source:
        last = Answer(source=entry.source)
    # An answer of time to come was given before the clock was put back.
    recent_s = now - last.at if last.at <= now + _START_SECONDS else math.inf
    if last.key == key and (last.revision or recent_s < PROBLEM_SECONDS):
        return last
    known = last if last.key else None
    if _is_held(path.with_suffix(".lock")):
        return known
    # A database looks otherwise each time; what ends there without an answer is one trouble all the same.
    tries = last.tries if last.asked == key or kind_of(entry.source) == "registry" else 0
    if tries >= _TRIES and _START_SECONDS <= recent_s < _PAUSE_SECONDS:
        raise CheckpointError(
            f"{entry.name}: {_TRIES} processes that looked at {entry.source} ended without an answer; their last words "
            f"are in {path.with_suffix('.log')}. Another is tried within the hour."
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
            # It reads files of others, or asks MLflow's database: it has no use for the rest.
            env=inherited(*_NEEDS, MLFLOW, secrets=DATABASE) if asks_mlflow else inherited(*_NEEDS),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as stream:  # one that ended at once is said after some tries
        stream.write(job.model_dump_json().encode())
    _started.append(process)
    threading.Thread(target=process.wait, daemon=True).start()  # so that it leaves no zombie


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
    """The process: one job, one answer."""
    job = _Job.model_validate(json.load(sys.stdin))
    lock.MACHINE_LOCK = job.machine_lock
    entry = ModelEntry.model_validate(job.entry)
    settings = SourceSettings(job.folder, Address(job.tracking_uri))
    path = _answer_file(settings, entry)
    os.nice(10)
    # Whoever asks whether the lock is held has it for a moment.
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
    """Empty where the folder is not what was asked about, or changed meanwhile: it will be asked about again."""
    if kind_of(entry.source) == "registry":
        return find_version(entry.source, settings).revision
    folder = local_folder(entry.source)
    hashes = content_hashes(entry, folder, validate(entry, folder).files)
    return content_revision(hashes) if stat_folder(entry, folder).digest == key else ""
