"""The collection of a checkpoint, which is found, checked and copied, with a tokenizer that needs no transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resources.artifacts.fingerprint import (
    Fingerprint,
    code_versions,
    digest_of_files,
    fingerprint,
    library_versions,
    pending,
)
from resources.artifacts.hashes import hash_below, hash_files
from resources.artifacts.records import Checkpoint, LengthProfile, sha256_file
from resources.artifacts.store import ArtifactStore
from resources.boundary.foreign import ForeignError, open_below
from resources.boundary.trust import Trust
from resources.catalog.entries import ModelEntry
from resources.checkpoints.configuration import CONFIG
from resources.checkpoints.reading import TOKENIZER
from resources.checkpoints.requests import require_answers, sampled_requests
from resources.checkpoints.sources.locating import locate
from resources.checkpoints.tokenizer import Signature, prepare_tokenizer
from resources.checkpoints.validation import Validated, validate
from resources.errors import ArtifactError, CatalogError, CheckpointError, IsolationError, UnfetchedError
from resources.machine.lock import building
from resources.pipelines import PIPELINE_FILE, pipeline_class
from resources.processes.isolation import Limits, run_isolated
from resources.settings.sources import SourceSettings
from resources.tasks import TASKS, CheckpointFiles
from resources.tasks.sentence_transformers import CONFIG as SENTENCE_TRANSFORMERS
from resources.tasks.sentence_transformers import read_json

#: The code that a stored checkpoint depends on, beside its source.
CODE = (
    "resources.checkpoints",
    "-resources.checkpoints.shapes",
    "-resources.checkpoints.watch",
    "resources.tasks",
    "resources.pipelines",
)
ENCODER_FILE = "encoder.json"
#: More requests would not make the length profile more accurate.
_MOST_SAMPLED = 20_000
_COPIED_AT_ONCE = 2**20
#: Many times the time and memory that the largest tokenizer needs. A step's own limits are for building engines.
_READING = Limits(timeout_s=300.0, memory_bytes=16 * 10**9)
#: Endings of the names of weights.
_WEIGHTS = (".safetensors", ".bin")
#: Fields of config.json that do not change what the model computes. Labels have a digest of their own.
_NOT_WEIGHTS = ("id2label", "label2id", "_name_or_path", "transformers_version")


def content_hashes(entry: ModelEntry, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the hex SHA-256 of each of the checkpoint's files.

    Raises:
        CheckpointError: A file cannot be read.
    """
    try:
        return {name: hash_below(folder, name) for name in names}
    except (OSError, ForeignError) as error:
        raise _unreadable(entry, error) from error


def _unreadable(entry: ModelEntry, error: OSError | ForeignError) -> CheckpointError:
    return CheckpointError(f"{entry.name}: {error}. Make the file readable. (source: {entry.source})")


def content_revision(hashes: Mapping[str, str]) -> str:
    """Return the revision of a source that names none itself. It is derived from the content."""
    return digest_of_files(hashes.items())[:12]


@dataclass(frozen=True)
class Collected:
    """A checkpoint that was found and checked, and is not copied yet.

    Args:
        folder: The folder of the source on this machine.
        revision: The source's own name of the revision. None means that the revision is derived from the content.
        found: The result of validation.
        hashes: The hex SHA-256 of each of its files.
        weights: The digest of the weights.
        made_of: The fingerprint of the checkpoint.
    """

    folder: Path
    revision: str | None
    found: Validated
    hashes: Mapping[str, str]
    weights: str
    made_of: Fingerprint


def collect(
    entry: ModelEntry, caches: Path, *, settings: SourceSettings | None = None, fetch: bool = True
) -> Collected:
    """Find the checkpoint of a catalog entry, and check it.

    Args:
        entry: The catalog entry.
        caches: The folder for cached digests of the source's files.
        settings: The addresses and credentials for sources.
        fetch: Whether the checkpoint may be downloaded.

    Raises:
        CheckpointError: The checkpoint cannot be found, or cannot be used.
        UnfetchedError: The checkpoint would have to be downloaded, and `fetch` is false.
    """
    try:
        located = locate(
            entry.source,
            allow_pickle=entry.allow_pickle,
            trust_remote_code=entry.trust_remote_code,
            settings=settings,
            fetch=fetch,
        )
    except UnfetchedError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{entry.name}: {error}") from error
    try:
        found = validate(entry, located.folder)
        hashes = hash_files(located.folder, found.files, caches / "sources")
    except CheckpointError:
        if not fetch and located.revision is not None:  # the Hub cache may hold only a part of the snapshot
            raise UnfetchedError(entry.source, located.revision) from None
        raise
    except (OSError, ForeignError) as error:
        raise _unreadable(entry, error) from error
    _require_requests(entry)
    weights = _weights_digest(entry, found, hashes)
    others = {name: sha256 for name, sha256 in hashes.items() if not name.endswith(_WEIGHTS)}
    made_of = _made_of(entry, located.revision, weights, others)
    return Collected(located.folder, located.revision, found, hashes, weights, made_of)


def complete_copy(entry: ModelEntry, source: Collected, folder: Path, limits: Limits, log: Path | None) -> Checkpoint:
    """Copy the checkpoint into an empty folder, add the files for its pipeline, and return its record.

    Raises:
        CheckpointError: A file changed meanwhile, or transformers or the task cannot use the checkpoint.
    """
    for name in source.found.files:
        copy_unchanged(entry.name, source.folder, name, folder / name, source.hashes[name])
    signature, peak = _read_isolated(entry, folder, source.found.weights, limits, log)
    task, options = TASKS[entry.task], entry.task_options()
    files = CheckpointFiles(entry.name, folder, source.found.config, allow_unused=entry.trust.allow_unused)
    if signature.truncation_side != "right" and pipeline_class(entry.task).structured:
        raise files.refuse(
            f"tokenizer_config.json has truncation_side: {signature.truncation_side}, but task {entry.task!r} cuts "
            "texts at their end",
            "Set truncation_side to right in that file",
        )
    labels, settings = task.labels(files), task.settings(files, options, signature.tokens)
    max_tokens = task.max_tokens(source.found.max_tokens, options)
    lengths = _write_pipeline(entry, folder, signature, settings, max_tokens, limits, log)
    return Checkpoint(
        digest=source.made_of.digest,
        model=entry.name,
        source=entry.source,
        revision=source.revision or content_revision(source.hashes),
        task=entry.task,
        architecture=files.architecture,
        model_type=str(source.found.config.get("model_type", "")),
        weights_digest=source.weights,
        weights_bytes=sum((folder / name).stat().st_size for name in source.found.weights),
        tokenizer_digest=digest_of_files((name, sha256_file(folder / name)) for name in (TOKENIZER, ENCODER_FILE)),
        labels_digest=fingerprint("labels", labels=labels, problem=source.found.config.get("problem_type")),
        pipeline_digest=fingerprint("pipeline", task=entry.task, settings=settings),
        ids_digest=fingerprint(
            "ids",
            inputs=signature.inputs,
            vocabulary=signature.vocabulary_size,
            pad_id=signature.pad_id,
            max_tokens=max_tokens,
            frame=(signature.frame["before"], signature.frame["after"]),
        ),
        labels=labels,
        output=task.output(replace(files, settings=settings)),
        settings=settings,
        max_tokens=max_tokens,
        lengths=lengths,
        allow_pickle=entry.allow_pickle,
        trust_remote_code=entry.trust_remote_code,
        assumed=task.assumed(files, options),
        peak_memory_bytes=peak,
    )


def _write_pipeline(
    entry: ModelEntry,
    folder: Path,
    signature: Signature,
    settings: dict[str, Any],
    max_tokens: int,
    limits: Limits,
    log: Path | None,
) -> LengthProfile | None:
    """Write the files of the pipeline, which encodes requests for an engine and turns its outputs into answers.

    Returns:
        The length profile of the entry's sample, or None without a sample.
    """
    encoder = {
        "max_tokens": max_tokens,
        "inputs": list(signature.inputs),
        "pad_id": signature.pad_id,
        "strategy": pipeline_class(entry.task).strategy,
        "stride": TASKS[entry.task].stride(max_tokens, entry.task_options()),
        **signature.frame,
        "truncation_side": signature.truncation_side,
    }
    (folder / ENCODER_FILE).write_text(json.dumps(encoder), encoding="utf-8")
    pipeline = json.dumps({"task": entry.task, "settings": settings}, ensure_ascii=False)
    (folder / PIPELINE_FILE).write_text(pipeline, encoding="utf-8")
    if entry.sample is None:
        return None
    items = sampled_requests(entry, settings, _MOST_SAMPLED)
    lengths, _ = run_isolated(
        _profile,
        folder,
        entry.name,
        items,
        max_tokens,
        limits=limits,
        what=f"{entry.name}: tokenizing the sample of requests",
        log=log,
    )
    (folder / ENCODER_FILE).write_text(json.dumps({**encoder, "buckets": lengths.buckets}), encoding="utf-8")
    return lengths


def require_source(record: Checkpoint, hashes: Mapping[str, str], store: ArtifactStore) -> None:
    """Check that the record of a stored copy lists the same files as the source, and remove the copy if it does not.

    The digest of a checkpoint is computed from its source's files. If a record under that digest lists other files,
    another writer to the store made it, and may have replaced code or weights.

    Raises:
        ArtifactError: The record lists other files.
    """
    ours = (ENCODER_FILE, PIPELINE_FILE)  # these are written into the copy, and replace source files of the same names
    stored = {name: file.sha256 for name, file in record.files.items()}
    foreign = [name for name, sha256 in hashes.items() if name not in ours and stored.get(name) != sha256]
    foreign += sorted(stored.keys() - {*hashes, *ours, TOKENIZER})
    if foreign:
        store.reject(record)
        raise ArtifactError(
            f"{record.model}: {foreign[0]} of the stored copy in {store.folder(record)} differs from the source, "
            "although the copy lies under the source's digest. Somebody else wrote the copy, and it was removed. Check "
            "who can write to the artifact store, and optimize again."
        )


def _made_of(entry: ModelEntry, revision: str | None, weights: str, files: Mapping[str, str]) -> Fingerprint:
    """Return the fingerprint of a checkpoint, from the digest of its weights and those of all other files."""
    return Fingerprint.of(
        "checkpoint",
        model=entry.name,
        source=entry.source,
        revision=revision,
        weights=weights,
        files=dict(files),
        task=entry.task,
        options=entry.task_options().model_dump(),
        sample=_content_of(entry),
        allow_pickle=entry.allow_pickle,
        trust_remote_code=entry.trust_remote_code,
        unused_weights=entry.unused_weights,
        code=code_versions(*CODE),
        libraries=library_versions("transformers", "tokenizers"),
    )


def unfetched_fingerprint(entry: ModelEntry, revision: str, known: Checkpoint) -> Fingerprint | None:
    """Return the fingerprint of a checkpoint whose source is not on this machine, from a known checkpoint.

    The source may be absent because another machine copied it, or because its files were cleaned up here.

    Args:
        entry: The catalog entry.
        revision: The revision that the source names now.
        known: The record of an earlier checkpoint of the entry.

    Returns:
        The fingerprint. It is None if `known` has another source or revision, other permissions, or other options that
        change the computation.
    """
    parts = known.made_of
    same = {
        "source": entry.source,
        "revision": revision,
        # These two fields decide which files are fetched.
        "allow_pickle": entry.allow_pickle,
        "trust_remote_code": entry.trust_remote_code,
    }
    if not parts or any(parts.get(name) != value for name, value in same.items()):
        return None
    # These options are part of the weights' digest, and only the files tell the digest for other values.
    options, before = entry.task_options().model_dump(), parts.get("options", {})
    if any(options.get(name) != before.get(name) for name in TASKS[entry.task].computing):
        return None
    return _made_of(entry, revision, parts["weights"], parts["files"])


def expected_checkpoint(made_of: Fingerprint, now: Checkpoint) -> Checkpoint:
    """Predict the record of a checkpoint that is not made yet, from the record of the present one.

    Digests that depend on the new checkpoint's tokenizer, labels or settings are pending if these may change.
    """
    parts, before = made_of.parts, now.made_of
    changed = {name for name in parts if parts[name] != before.get(name)}
    record = now.model_copy(update={"digest": made_of.digest, "weights_digest": parts["weights"], "made_of": parts})
    if changed <= {"weights", "source", "revision", "allow_pickle"}:
        return record
    unknown = ["labels_digest", "pipeline_digest"]
    # If only config.json has changed, only the names of labels can differ, because the weights' digest covers the rest.
    if not (changed <= {"files", "source", "revision"} and _changed_files(parts, before) == {"config.json"}):
        unknown += ["tokenizer_digest", "ids_digest"]
    return record.model_copy(update=dict.fromkeys(unknown, pending("checkpoint")))


def _changed_files(parts: dict[str, Any], before: dict[str, Any]) -> set[str]:
    now, then = parts["files"], before.get("files", {})
    return {name for name in {*now, *then} if now.get(name) != then.get(name)}


def _profile(folder: Path, model: str, items: list[dict[str, str]], max_tokens: int) -> LengthProfile:
    """Profile the lengths of a sample. It runs in a child process, because of numpy and of samples of any size."""
    from resources.checkpoints.lengths import profile_lengths
    from resources.pipelines import open_pipeline

    pipeline = open_pipeline(str(folder))
    require_answers(model, "sample", pipeline, items)
    return profile_lengths(pipeline, items, max_tokens)


def _require_requests(entry: ModelEntry) -> None:
    """Check early that the file of evaluation requests exists, because it is read much later.

    Raises:
        CatalogError: The file does not exist.
    """
    if entry.evaluation is not None and not Path(entry.evaluation).exists():
        raise CatalogError(
            f"{entry.name}: evaluation: {entry.evaluation} does not exist. Give a JSON Lines file in UTF-8."
        )


def _content_of(entry: ModelEntry) -> str | None:
    """Return the digest of the sample's bytes, or None without a sample.

    Raises:
        CatalogError: The sample cannot be read.
    """
    if entry.sample is None:
        return None
    try:
        return sha256_file(Path(entry.sample))
    except OSError as error:
        raise CatalogError(
            f"{entry.name}: sample: {entry.sample} cannot be read: {error}. Give a JSON Lines file in UTF-8."
        ) from None


def _read_isolated(
    entry: ModelEntry, folder: Path, weights: Sequence[str], limits: Limits, log: Path | None
) -> tuple[Signature, int]:
    """Read the copy with transformers in a child process, and return its signature and the child's peak memory.

    The libraries may crash or take all memory for a file that passed validation, so they do not run in this process.

    Raises:
        CheckpointError: The child could not read the copy within its limits.
    """
    stored = sum((folder / name).stat().st_size for name in weights)
    limits = replace(
        limits,
        timeout_s=min(limits.timeout_s, _READING.timeout_s),
        memory_bytes=min(limits.memory_bytes, _READING.memory_bytes),
    )
    try:
        with building():
            return run_isolated(
                prepare_tokenizer,
                folder,
                entry.name,
                entry.trust_remote_code,
                stored,
                limits=limits,
                what=f"{entry.name}: reading the checkpoint's config.json and tokenizer",
                log=log,
            )
    except IsolationError as error:
        raise CheckpointError(f"{error} (source: {entry.source})") from error


def copy_unchanged(model: str, folder: Path, name: str, place: Path, sha256: str) -> None:
    """Copy a file that was hashed before.

    Raises:
        CheckpointError: The file cannot be copied, or has changed since it was hashed.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_below(folder, name) as source, place.open("wb") as target:
            shutil.copyfileobj(source, target, _COPIED_AT_ONCE)
    except (OSError, ForeignError) as error:
        raise CheckpointError(
            f"{model}: {folder / name} cannot be copied: {error}. Try again when the file is complete."
        ) from None
    if sha256_file(place) != sha256:
        raise CheckpointError(
            f"{model}: {folder / name} changed while the checkpoint was being copied. Try again when nothing writes to "
            "it any more, or give a copy of the folder."
        )


def _weights_digest(entry: ModelEntry, found: Validated, hashes: dict[str, str]) -> str:
    """Hash everything that decides what the model computes.

    This is the weights, the configuration, the pooling, the checkpoint's own code, and the options of the models file
    that change the computation.
    """
    names, task, options = found.files, TASKS[entry.task], entry.task_options()
    computing = {key: value for key, value in found.config.items() if key not in _NOT_WEIGHTS}
    parts = [("config.json", hashlib.sha256(json.dumps(computing, sort_keys=True).encode()).hexdigest())]
    chosen = {name: getattr(options, name) for name in task.computing if getattr(options, name) is not None}
    if chosen:
        parts.append(("options", fingerprint("options", **chosen)))
    of_sentence_transformers = {"modules.json", SENTENCE_TRANSFORMERS, *(name for name in names if "/" in name)}
    pooling = of_sentence_transformers if "modules.json" in names else set()
    parts += [
        (name, hashes[name])
        for name in names
        if name.endswith((".safetensors", ".bin", ".index.json", ".py")) or name in pooling
    ]
    return digest_of_files(parts)


def checkpoint_files(record: Checkpoint, folder: Path, trust: Trust) -> CheckpointFiles:
    """Return the files of a stored checkpoint in the form that tasks read.

    Raises:
        CheckpointError: config.json cannot be read.
    """
    files = CheckpointFiles(record.model, folder, {})
    config = read_json(files, CONFIG, dict)
    if not config.get("architectures"):  # `validate` told the architecture from the weights
        config = {**config, "architectures": [record.architecture]}
    return CheckpointFiles(record.model, folder, config, record.settings, trust.allow_unused)
