"""Making a checkpoint an artifact: found, checked, copied, and its tokenizer made to stand alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.artifacts.fingerprint import code_version, digest_of_files, fingerprint, library_versions
from resources.artifacts.records import Checkpoint, sha256_file
from resources.artifacts.store import ArtifactStore, Made
from resources.catalog import ModelEntry
from resources.checkpoints.sources import locate
from resources.checkpoints.validation import TOKENIZER, validate
from resources.errors import CheckpointError
from resources.isolation import Limits, run_isolated
from resources.locks import building
from resources.tasks import TASKS, CheckpointFiles

ENCODER_FILE = "encoder.json"
#: Fields of config.json that say nothing about what the model computes; labels have a digest of their own.
_NOT_WEIGHTS = ("id2label", "label2id", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class _Signature:
    inputs: tuple[str, ...]
    pad_id: int


def collect_checkpoint(
    entry: ModelEntry, store: ArtifactStore, limits: Limits, log: Path | None = None
) -> Made[Checkpoint]:
    """The checkpoint of a catalog entry, copied into the store. Raises CheckpointError.

    Copied, never linked: a folder that is trained into goes on changing, and what was measured must be what serves.
    """
    try:
        located = locate(entry.source, allow_pickle=entry.allow_pickle, trust_remote_code=entry.trust_remote_code)
    except CheckpointError as error:
        raise CheckpointError(f"{entry.name}: {error}") from error
    found = validate(entry, located.folder)
    hashes = {name: sha256_file(located.folder / name) for name in found.files}
    content = digest_of_files(hashes.items())
    digest = fingerprint(
        "checkpoint",
        model=entry.name,
        source=entry.source,
        revision=located.revision,
        content=content,
        task=entry.task,
        allow_pickle=entry.allow_pickle,
        trust_remote_code=entry.trust_remote_code,
        code=code_version("resources.checkpoints", "resources.tasks", "resources.tokenization"),
        libraries=library_versions("transformers", "tokenizers"),
    )

    def make(folder: Path) -> Checkpoint:
        for name in found.files:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(located.folder / name, place)
        with building():
            signature, peak = run_isolated(
                _prepare_tokenizer,
                folder,
                entry.name,
                entry.trust_remote_code,
                limits=limits,
                what=f"{entry.name}: reading the checkpoint's tokenizer",
                log=log,
            )
        settings = {"max_tokens": found.max_tokens, "inputs": list(signature.inputs), "pad_id": signature.pad_id}
        (folder / ENCODER_FILE).write_text(json.dumps(settings), encoding="utf-8")
        files = CheckpointFiles(entry.name, folder, found.config, found.tensors)
        labels = TASKS[entry.task].labels(files)
        return Checkpoint(
            digest=digest,
            model=entry.name,
            source=entry.source,
            revision=located.revision or content[:12],
            task=entry.task,
            architecture=files.architecture,
            model_type=str(found.config.get("model_type", "")),
            weights_digest=_weights_digest(folder, found.config, found.files, hashes),
            weights_bytes=sum((folder / name).stat().st_size for name in found.weights),
            tokenizer_digest=digest_of_files((name, sha256_file(folder / name)) for name in (TOKENIZER, ENCODER_FILE)),
            labels_digest=fingerprint("labels", labels=labels, problem=found.config.get("problem_type")),
            labels=labels,
            max_tokens=found.max_tokens,
            allow_pickle=entry.allow_pickle,
            trust_remote_code=entry.trust_remote_code,
            peak_memory_bytes=peak,
        )

    return store.get_or_make(Checkpoint, digest, make)


def _weights_digest(folder: Path, config: dict[str, Any], names: tuple[str, ...], hashes: dict[str, str]) -> str:
    """Of everything that decides what the model computes: weights, configuration, pooling, its own code."""
    computing = {key: value for key, value in config.items() if key not in _NOT_WEIGHTS}
    parts = [("config.json", hashlib.sha256(json.dumps(computing, sort_keys=True).encode()).hexdigest())]
    pooling = (
        {"modules.json", *(name for name in names if "/" in name)} if (folder / "modules.json").is_file() else set()
    )
    parts += [
        (name, hashes[name])
        for name in names
        if name.endswith((".safetensors", ".bin", ".index.json", ".py")) or name in pooling
    ]
    return digest_of_files(parts)


def _prepare_tokenizer(folder: Path, model: str, trust_remote_code: bool) -> _Signature:
    """In the child: write tokenizer.json where only older files are there, and find which arrays the model takes."""
    import inspect

    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if not (folder / TOKENIZER).is_file():
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ValueError("transformers has no fast tokenizer for it")
            backend.save(str(folder / TOKENIZER))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{model}: transformers cannot read its tokenizer: {first[:300]}. Save it again, as a fast tokenizer "
            "(tokenizer.json), with tokenizer.save_pretrained."
        ) from error
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # On the meta device nothing is allocated: only the signature is wanted.
    import torch

    try:
        with torch.device("meta"):
            architecture = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{model}: transformers cannot make a model of its config.json: {first[:300]}") from error
    accepted = inspect.signature(architecture.forward).parameters
    inputs = tuple(
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in accepted and (name != "token_type_ids" or name in tokenizer.model_input_names)
    )
    pad = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
    return _Signature(inputs=inputs, pad_id=int(pad or 0))


def checkpoint_files(record: Checkpoint, folder: Path) -> CheckpointFiles:
    """What tasks read of a stored checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return CheckpointFiles(record.model, folder, config, frozenset())


def load_arguments(record: Checkpoint) -> dict[str, Any]:
    """What `from_pretrained` gets beyond the folder: pickles and remote code only where the catalog allowed them."""
    return {"trust_remote_code": record.trust_remote_code, "use_safetensors": None if record.allow_pickle else True}
