"""What must hold before a checkpoint is copied: complete, loadable without running anybody's code, fit for its task."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from resources.catalog import ModelEntry
from resources.checkpoints.sources import UNWANTED, WANTED, WANTED_CODE, WANTED_PICKLE
from resources.errors import CheckpointError
from resources.tasks import TASKS, CheckpointFiles

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.json"
#: Files that transformers can make a fast tokenizer from.
SLOW_TOKENIZERS = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
#: Model types that number positions from the pad id on, so that two and the pad id of the table are never used.
POSITIONS_AFTER_PAD = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "xmod",
    "data2vec-text",
)
#: transformers writes "no limit" as numbers of this size.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Validated:
    """The files that make the checkpoint, relative to its folder, and what was read from them."""

    files: tuple[str, ...]
    weights: tuple[str, ...]
    config: dict[str, Any]
    tensors: frozenset[str]
    max_tokens: int


def validate(entry: ModelEntry, folder: Path) -> Validated:
    """Read a checkpoint's folder without loading weights. Raises CheckpointError naming model, file and remedy."""
    config = _read_json(entry, folder, "config.json")
    if config.get("auto_map") and not entry.trust_remote_code:
        raise _refuse(
            entry,
            "config.json names Python code of the checkpoint's own (auto_map)",
            "Set trust_remote_code: true in its catalog entry if you trust its author: the code runs on this machine",
        )
    weights, tensors = _weights(entry, folder)
    names = _files(entry, folder)
    _check_tokenizer(entry, folder, config)
    TASKS[entry.task].check(CheckpointFiles(entry.name, folder, config, tensors))
    chosen = [name for name in names if name in weights or not name.endswith((".safetensors", ".bin"))]
    return Validated(tuple(chosen), weights, config, tensors, _max_tokens(entry, folder, config))


def _refuse(entry: ModelEntry, why: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{entry.name}: {why}. {remedy}. (source: {entry.source})")


def _read_json(entry: ModelEntry, folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse(
            entry, f"{name} is missing from {folder}", "Give the folder that save_pretrained wrote, whole"
        ) from None
    except (OSError, ValueError) as error:
        raise _refuse(entry, f"{folder / name} cannot be read: {error}", "Copy the checkpoint again") from None
    if not isinstance(data, dict):
        raise _refuse(entry, f"{folder / name} holds no JSON object", "Copy the checkpoint again")
    return data


def _files(entry: ModelEntry, folder: Path) -> list[str]:
    wanted = [
        *WANTED,
        *(WANTED_PICKLE if entry.allow_pickle else ()),
        *(WANTED_CODE if entry.trust_remote_code else ()),
    ]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in wanted)
        and not any(fnmatch(name, pattern) for pattern in UNWANTED)
        and not any(part.startswith(".") for part in Path(name).parts)
    ]


def _weights(entry: ModelEntry, folder: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    """The weight files and, from safetensors, the tensors' names."""
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            files = [single]
        elif (folder / index).is_file():
            shards = _read_json(entry, folder, index).get("weight_map", {})
            files = sorted(set(shards.values()))
            missing = [name for name in files if not (folder / name).is_file()]
            if missing or not files:
                raise _refuse(
                    entry,
                    f"{index} names {', '.join(missing) or 'no file'}, which is missing",
                    "Copy all of its shards",
                )
        else:
            continue
        if single == PICKLE and not entry.allow_pickle:
            raise _refuse(
                entry,
                f"its weights are a pickle ({', '.join(files)}), and unpickling runs whatever code is in it",
                "Convert it to safetensors (save_pretrained), or set allow_pickle: true in its catalog entry if you "
                "trust its author",
            )
        tensors: set[str] = set()
        if single == SINGLE:
            for name in files:
                tensors |= _tensors(entry, folder / name)
        return tuple(files), frozenset(tensors)
    raise _refuse(entry, f"there are no weights ({SINGLE}) in {folder}", "Give the folder that save_pretrained wrote")


def _tensors(entry: ModelEntry, path: Path) -> set[str]:
    """Names in a safetensors header; the file must be as long as the header says it is.

    The format: 8 bytes, the header's length; the header, JSON with each tensor's byte range; the tensors' bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = json.loads(stream.read(length)) if length <= size - 8 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise _refuse(entry, f"{path} is truncated or no safetensors file ({size} bytes)", "Copy or download it again")
    header.pop("__metadata__", None)
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        raise _refuse(
            entry, f"{path} is damaged: {size} bytes where its header says {expected}", "Copy or download it again"
        )
    return set(header)


def _check_tokenizer(entry: ModelEntry, folder: Path, config: dict[str, Any]) -> None:
    if not (folder / TOKENIZER).is_file():
        if not any((folder / name).is_file() for name in SLOW_TOKENIZERS):
            raise _refuse(
                entry,
                f"there is no tokenizer ({TOKENIZER}) in {folder}",
                "Save it there too (tokenizer.save_pretrained)",
            )
        return
    tokenizer = _read_json(entry, folder, TOKENIZER)
    largest = largest_token_id(tokenizer)
    vocabulary = config.get("vocab_size")
    if largest is None:
        raise _refuse(entry, f"{folder / TOKENIZER} holds no vocabulary", "Save the tokenizer again with transformers")
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise _refuse(
            entry,
            f"{TOKENIZER} does not match the model: it gives ids up to {largest}, and the model's embedding has "
            f"{vocabulary} rows (config.json, vocab_size)",
            "Give the tokenizer this checkpoint was trained with",
        )


def largest_token_id(tokenizer: dict[str, Any]) -> int | None:
    """The largest id that a tokenizer.json can give, added tokens included; None where it has no vocabulary."""
    vocabulary = tokenizer.get("model", {}).get("vocab")
    ids = [token["id"] for token in tokenizer.get("added_tokens") or []]
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: the position is the id
        ids.append(len(vocabulary) - 1)
    return max(ids, default=None) if vocabulary else None


def _max_tokens(entry: ModelEntry, folder: Path, config: dict[str, Any]) -> int:
    """The checkpoint's own limit: sentence-transformers', else the tokenizer's, and never beyond the positions."""
    limits = []
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        pad = config.get("pad_token_id") or 0
        limits.append(positions - pad - 1 if config.get("model_type") in POSITIONS_AFTER_PAD else positions)
    for name, field in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        value = _read_json(entry, folder, name).get(field) if (folder / name).is_file() else None
        if isinstance(value, int | float) and 0 < value < _NO_LIMIT:
            limits.append(int(value))
            break
    if not limits:
        raise _refuse(
            entry,
            "neither sentence_bert_config.json, tokenizer_config.json nor config.json limits the length of a text",
            "Write model_max_length into tokenizer_config.json",
        )
    return min(limits)
