"""Find a checkpoint, check it, copy it, and make its tokenizer stand alone."""

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

#: What a stored checkpoint depends on, beside its source.
CODE = ("resources.checkpoints", "-resources.checkpoints.watch", "resources.tasks", "resources.pipelines")
ENCODER_FILE = "encoder.json"
#: A larger sample says nothing more about lengths.
_MOST_SAMPLED = 20_000
_COPIED_AT_ONCE = 2**20
#: Many times what reading the largest tokenizer takes; a step's own limits are for building engines.
_READING = Limits(timeout_s=300.0, memory_bytes=16 * 10**9)
#: How names of weights end.
_WEIGHTS = (".safetensors", ".bin")
#: Fields of config.json that say nothing about what the model computes; labels have a digest of their own.
_NOT_WEIGHTS = ("id2label", "label2id", "_name_or_path", "transformers_version")


def content_hashes(entry: ModelEntry, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Hex SHA-256 of each of the checkpoint's files. Raises CheckpointError."""
    try:
        return {name: hash_below(folder, name) for name in names}
    except (OSError, ForeignError) as error:
        raise _unreadable(entry, error) from error


def _unreadable(entry: ModelEntry, error: OSError | ForeignError) -> CheckpointError:
    return CheckpointError(f"{entry.name}: {error}. Make the file readable. (source: {entry.source})")


def content_revision(hashes: Mapping[str, str]) -> str:
    """The revision of a source that has no name for its own: its content's."""
    return digest_of_files(hashes.items())[:12]


@dataclass(frozen=True)
class Collected:
    """A checkpoint that was found and checked, and is not copied yet.

    Args:
        revision: The source's own name of it; None where the content names itself.
        hashes: Hex SHA-256 of each of its files.
        weights: The digest of the weights.
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
        caches: Where digests of the source's files are kept.
        fetch: Whether it may be downloaded.

    Raises:
        CheckpointError: It cannot be found, or is of no use.
        UnfetchedError: It may not be downloaded, and would have to be.
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
        if not fetch and located.revision is not None:  # of the Hub, and perhaps not whole yet
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
    """Copy the checkpoint into an empty folder, add what is served of it, and describe it. Raises CheckpointError."""
    for name in source.found.files:
        copy_unchanged(entry.name, source.folder, name, folder / name, source.hashes[name])
    signature, peak = _read_isolated(entry, folder, source.found.weights, limits, log)
    task, options = TASKS[entry.task], entry.task_options()
    files = CheckpointFiles(entry.name, folder, source.found.config, allow_unused=entry.trust.allow_unused)
    if signature.truncation_side != "right" and pipeline_class(entry.task).structured:
        raise files.refuse(
            f"tokenizer_config.json says truncation_side: {signature.truncation_side}, and task {entry.task!r} cuts "
            "texts at their end",
            "Set truncation_side to right there",
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
    """Write what stands before and behind an engine of the checkpoint. Returns the lengths of the entry's sample."""
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
    """Raise ArtifactError where the stored copy says of itself that it holds other files than the source.

    The digest of a checkpoint is that of its source's files. A record with other files under it was written by
    somebody else, who may have put code or weights of their own in their place.
    """
    ours = (ENCODER_FILE, PIPELINE_FILE)  # written into the copy, over files of those names
    stored = {name: file.sha256 for name, file in record.files.items()}
    foreign = [name for name, sha256 in hashes.items() if name not in ours and stored.get(name) != sha256]
    foreign += sorted(stored.keys() - {*hashes, *ours, TOKENIZER})
    if foreign:
        store.reject(record)
        raise ArtifactError(
            f"{record.model}: {foreign[0]} of the stored copy in {store.folder(record)} is not the source's, although "
            "the copy lies under the source's digest. Somebody else wrote it, and it was removed. See who can write to "
            "the artifact store, and optimize again."
        )


def _made_of(entry: ModelEntry, revision: str | None, weights: str, files: Mapping[str, str]) -> Fingerprint:
    """What a checkpoint of the entry is made of. files: digests of all but its weights."""
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
    """What the checkpoint would be made of whose source is not on this machine, where `known` was copied from the same
    revision: another machine did that, or the copy was tidied up. None where it says nothing about this one.
    """
    parts = known.made_of
    same = {
        "source": entry.source,
        "revision": revision,
        # They decide which files are fetched at all.
        "allow_pickle": entry.allow_pickle,
        "trust_remote_code": entry.trust_remote_code,
    }
    if not parts or any(parts.get(name) != value for name, value in same.items()):
        return None
    # Those options are in the weights' digest, which only the files themselves tell.
    options, before = entry.task_options().model_dump(), parts.get("options", {})
    if any(options.get(name) != before.get(name) for name in TASKS[entry.task].computing):
        return None
    return _made_of(entry, revision, parts["weights"], parts["files"])


def expected_checkpoint(made_of: Fingerprint, now: Checkpoint) -> Checkpoint:
    """What will be known of a checkpoint before it is made, told from the one that is there now. Digests that depend on
    what its tokenizer will be like are pending.
    """
    parts, before = made_of.parts, now.made_of
    changed = {name for name in parts if parts[name] != before.get(name)}
    record = now.model_copy(update={"digest": made_of.digest, "weights_digest": parts["weights"], "made_of": parts})
    if changed <= {"weights", "source", "revision", "allow_pickle"}:
        return record
    unknown = ["labels_digest", "pipeline_digest"]
    # Of the configuration everything else is in the weights' digest: what is left are labels' names.
    if not (changed <= {"files", "source", "revision"} and _changed_files(parts, before) == {"config.json"}):
        unknown += ["tokenizer_digest", "ids_digest"]
    return record.model_copy(update=dict.fromkeys(unknown, pending("checkpoint")))


def _changed_files(parts: dict[str, Any], before: dict[str, Any]) -> set[str]:
    now, then = parts["files"], before.get("files", {})
    return {name for name in {*now, *then} if now.get(name) != then.get(name)}


def _profile(folder: Path, model: str, items: list[dict[str, str]], max_tokens: int) -> LengthProfile:
    """In the child, because of numpy and of samples of any size."""
    from resources.checkpoints.lengths import profile_lengths
    from resources.pipelines import open_pipeline

    pipeline = open_pipeline(str(folder))
    require_answers(model, "sample", pipeline, items)
    return profile_lengths(pipeline, items, max_tokens)


def _require_requests(entry: ModelEntry) -> None:
    """Raise CatalogError where the evaluation requests are not there: they are read long after this."""
    if entry.evaluation is not None and not Path(entry.evaluation).exists():
        raise CatalogError(
            f"{entry.name}: evaluation: {entry.evaluation} does not exist. Give a JSON Lines file in UTF-8."
        )


def _content_of(entry: ModelEntry) -> str | None:
    """Digest of the sample's bytes; None without a sample. Raises CatalogError."""
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
    """What transformers makes of the copy, and the memory that took, found out in a child process: its libraries may
    crash or take all memory for a file that looks right. Raises CheckpointError.
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
    """Copy a file that was hashed before. Raises CheckpointError where it has changed since: someone is writing it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_below(folder, name) as source, place.open("wb") as target:
            shutil.copyfileobj(source, target, _COPIED_AT_ONCE)
    except (OSError, ForeignError) as error:
        raise CheckpointError(
            f"{model}: {folder / name} cannot be copied: {error}. Try again when it is whole."
        ) from None
    if sha256_file(place) != sha256:
        raise CheckpointError(
            f"{model}: {folder / name} changed while the checkpoint was being copied. Try again when whatever writes "
            "it is done, or give a copy of the folder."
        )


def _weights_digest(entry: ModelEntry, found: Validated, hashes: dict[str, str]) -> str:
    """Hash everything that decides what the model computes: weights, configuration, pooling, its own code, and what the
    models file says about these.
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
    """Return what tasks read of a stored checkpoint. Raises CheckpointError."""
    files = CheckpointFiles(record.model, folder, {})
    config = read_json(files, CONFIG, dict)
    if not config.get("architectures"):  # told from its weights when it was collected
        config = {**config, "architectures": [record.architecture]}
    return CheckpointFiles(record.model, folder, config, record.settings, trust.allow_unused)
