"""What must hold before a checkpoint is copied: complete, loadable without running anybody's code, fit for its task."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from resources.catalog import ModelEntry
from resources.checkpoints.sources import (
    PICKLE_REMEDY,
    WANTED,
    WANTED_CODE,
    WANTED_PICKLE,
    WANTED_WEIGHTS,
    is_hub_id,
)
from resources.errors import CheckpointError
from resources.tasks import TASKS, CheckpointFiles

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.json"
#: Sets of files that transformers can make a fast tokenizer from, as patterns.
SLOW_TOKENIZERS = (("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))
#: Model types whose first token has position pad id + 1, so that the first rows of the table are never used. Their pad
#: id is 1 where config.json has none, and MPNet's is 1 whatever config.json says.
POSITIONS_AFTER_PAD = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
#: transformers writes "no limit" as numbers of this size.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Validated:
    """The files that make the checkpoint, relative to its folder, and what was read from them."""

    files: tuple[str, ...]
    weights: tuple[str, ...]
    config: dict[str, Any]
    max_tokens: int


def validate(entry: ModelEntry, folder: Path) -> Validated:
    """Read a checkpoint's folder without loading weights. Raises CheckpointError naming model, file and remedy."""
    config = _read_object(entry, folder, "config.json")
    if not isinstance(config.get("model_type"), str):
        raise _refuse(
            entry, f"{folder / 'config.json'} has no model_type", "Give the folder that transformers saved, whole"
        )
    if config.get("auto_map") and not entry.trust_remote_code:
        raise _refuse(
            entry,
            "config.json names Python code of the checkpoint's own (auto_map)",
            "Set trust_remote_code: true in its catalog entry if you trust its author: the code runs on this machine",
        )
    stored = _weights(entry, folder)
    weights = tuple(name for name in stored if not name.endswith(".json"))
    for file in weights:
        if file.endswith(".safetensors"):
            _check_whole(entry, folder / file)
    files = {*stored, *_files(entry, folder)}
    _check_tokenizer(entry, folder, config)
    TASKS[entry.task].check(CheckpointFiles(entry.name, folder, config))
    return Validated(
        files=tuple(sorted(files)),
        weights=weights,
        config=config,
        max_tokens=_max_tokens(entry, folder, config),
    )


def _refuse(entry: ModelEntry, why: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{entry.name}: {why}. {remedy}. (source: {entry.source})")


def _whole(entry: ModelEntry) -> str:
    """The remedy for a folder that lacks something."""
    if is_hub_id(entry.source):
        return "Fetch it again with the network on, after removing that folder, or ask its author for the file"
    return "Give the folder that save_pretrained wrote, whole"


def _read(entry: ModelEntry, folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse(entry, f"{name} is missing from {folder}", _whole(entry)) from None
    except (OSError, ValueError) as error:
        raise _refuse(entry, f"{folder / name} cannot be read: {error}", "Copy the checkpoint again") from None


def _read_object(entry: ModelEntry, folder: Path, name: str) -> dict[str, Any]:
    data = _read(entry, folder, name)
    if not isinstance(data, dict):
        raise _refuse(entry, f"{folder / name} holds no JSON object", "Copy the checkpoint again")
    return data


def _files(entry: ModelEntry, folder: Path) -> list[str]:
    """Files other than weights, relative to the folder.

    Of its sub-folders only those that modules.json names: a folder that is trained into is full of intermediate states.
    """
    patterns = [name for name in (*WANTED, *(WANTED_CODE if entry.trust_remote_code else ())) if name.startswith("*")]
    names = [
        (Path(place) / path.name).as_posix()
        for place in ("", *_module_folders(entry, folder))
        for path in (folder / place).iterdir()
        if path.is_file() and not path.name.startswith(".")
    ]
    indices = {INDEX, PICKLE_INDEX}  # they come with the weights, or not at all
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns) and name not in indices]


def candidate_files(entry: ModelEntry, folder: Path) -> list[str]:
    """Files that may belong to the checkpoint, whole or not: what is worth asking whether it has changed."""
    weights = [*WANTED_WEIGHTS, INDEX, *((*WANTED_PICKLE, PICKLE_INDEX) if entry.allow_pickle else ())]
    names = [path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in weights)]
    try:
        return [*names, *_files(entry, folder)]
    except CheckpointError:  # modules.json is half written, or names folders that are elsewhere
        return [*names, "modules.json"]


def _module_folders(entry: ModelEntry, folder: Path) -> list[str]:
    """The sub-folders that sentence-transformers' modules.json names and that are there."""
    if not (folder / "modules.json").is_file():
        return []
    modules = _read(entry, folder, "modules.json")
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise _refuse(entry, f"{folder / 'modules.json'} holds no list of modules", "Copy the checkpoint again")
    places = {str(module.get("path") or "") for module in modules} - {"", "."}
    outside = [place for place in places if Path(place).is_absolute() or ".." in Path(place).parts]
    if outside:
        raise _refuse(
            entry,
            f"{folder / 'modules.json'} names {outside[0]}, outside the checkpoint",
            "Give a checkpoint that is whole in its own folder",
        )
    return sorted(place for place in places if (folder / place).is_dir())


def _weights(entry: ModelEntry, folder: Path) -> tuple[str, ...]:
    """The weight files, all there, with their index where they are several."""
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / single).is_file():
            files = [single]
        elif (folder / index).is_file():
            files = [index, *_shards(entry, folder, index)]
        else:
            continue
        if single == PICKLE and not entry.allow_pickle:
            raise _refuse(entry, f"its weights are a pickle ({files[-1]})", PICKLE_REMEDY)
        return tuple(files)
    raise _refuse(entry, f"there are no weights ({SINGLE}) in {folder}", _whole(entry))


def _shards(entry: ModelEntry, folder: Path, index: str) -> list[str]:
    table = _read_object(entry, folder, index).get("weight_map")
    named = list(table.values()) if isinstance(table, dict) else []
    # A name with a folder in it could lead out of the checkpoint, and transformers never writes one.
    if not named or not all(isinstance(name, str) and Path(name).name == name for name in named):
        raise _refuse(entry, f"{folder / index} does not say which files hold the weights", "Copy the checkpoint again")
    names = sorted(set(named))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise _refuse(entry, f"{index} names {', '.join(missing)}, which is missing from {folder}", _whole(entry))
    return names


def _check_whole(entry: ModelEntry, path: Path) -> None:
    """Refuse a safetensors file that is not as long as its header says it is.

    The format: 8 bytes, the header's length; the header, JSON with each tensor's byte range; the tensors' bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header: Any = json.loads(stream.read(length)) if length <= size - 8 else None
            header.pop("__metadata__", None)
            expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        except (ValueError, TypeError, AttributeError, LookupError):
            raise _refuse(
                entry, f"{path} is truncated or no safetensors file ({size} bytes)", "Copy or download it again"
            ) from None
    if size != expected:
        raise _refuse(
            entry, f"{path} is damaged: {size} bytes where its header says {expected}", "Copy or download it again"
        )


def _check_tokenizer(entry: ModelEntry, folder: Path, config: dict[str, Any]) -> None:
    if not (folder / TOKENIZER).is_file():
        if slow_tokenizer(folder) is None:
            raise _refuse(
                entry,
                f"there is no tokenizer ({TOKENIZER}) in {folder}",
                "Save it there too (tokenizer.save_pretrained)",
            )
        return
    largest = largest_token_id(_read_object(entry, folder, TOKENIZER))
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


def slow_tokenizer(folder: Path) -> str | None:
    """The first file of an older tokenizer that is there whole."""
    for patterns in SLOW_TOKENIZERS:
        found = [sorted(folder.glob(pattern)) for pattern in patterns]
        if all(found):
            return found[0][0].name
    return None


def largest_token_id(tokenizer: dict[str, Any]) -> int | None:
    """The largest id that a tokenizer.json can give, added tokens included; None where it has no vocabulary."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        ids = [token["id"] for token in tokenizer.get("added_tokens") or []]
        # WordPiece, BPE and WordLevel: a table of ids. Unigram: a list, and the position is the id.
        ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max(ids) if vocabulary else None
    except (TypeError, LookupError):
        return None


def _max_tokens(entry: ModelEntry, folder: Path, config: dict[str, Any]) -> int:
    """The checkpoint's own limit: sentence-transformers', else the tokenizer's, and never beyond the positions."""
    limits = []
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - _positions_before_the_first(config))
    for name, field in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        value = _read_object(entry, folder, name).get(field) if (folder / name).is_file() else None
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


def _positions_before_the_first(config: dict[str, Any]) -> int:
    """Rows of the position table that no token ever gets."""
    kind, pad = config["model_type"], config.get("pad_token_id")
    if kind not in POSITIONS_AFTER_PAD:
        return 0
    return 2 if kind == "mpnet" or not isinstance(pad, int) else pad + 1
