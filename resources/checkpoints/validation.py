"""The checks before a checkpoint is copied.

It must be complete, loadable without running foreign code, and fit for its task. This module does not import torch,
transformers or tokenizers, because plans and the sensor use it too. resources.checkpoints.collect makes the checks that
need these libraries, in a child process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from resources.boundary.foreign import ForeignError, check_name
from resources.catalog.entries import ModelEntry
from resources.checkpoints.configuration import CONFIG, check_config, check_tokenizer_config, length_of
from resources.checkpoints.kinds import head_of, why_of_no_use
from resources.checkpoints.reading import (
    ADAPTER,
    IS_ADAPTER,
    MERGE_REMEDY,
    TOKENIZER,
    has_file,
    read_document,
    read_object,
    refuse,
)
from resources.checkpoints.sources.wanted import WANTED, WANTED_CODE, WANTED_PICKLE, WANTED_WEIGHTS
from resources.checkpoints.weights import INDEX, PICKLE_INDEX, check_whole, find_weights
from resources.errors import CheckpointError
from resources.tasks import TASKS, CheckpointFiles
from resources.tasks.base import UNUSED_REMEDY
from resources.tasks.sentence_transformers import length_limits, transformer_config

#: Sets of files, as patterns, from which transformers can make a fast tokenizer.
SLOW_TOKENIZERS = (("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))
#: Tokenizers of transformers that exist only in Python. The tokenizers library, which releases use, does not have them.
ONLY_IN_PYTHON = (
    "BertJapaneseTokenizer",
    "BertweetTokenizer",
    "BioGptTokenizer",
    "ByT5Tokenizer",
    "CanineTokenizer",
    "CTRLTokenizer",
    "EsmTokenizer",
    "FSMTTokenizer",
    "FlaubertTokenizer",
    "PerceiverTokenizer",
    "PhobertTokenizer",
    "ProphetNetTokenizer",
    "RoCBertTokenizer",
    "TapasTokenizer",
    "XLMTokenizer",
)
#: The model types with such tokenizers, for checkpoints whose files name no tokenizer class.
_ONLY_IN_PYTHON_TYPES = ("biogpt", "canine", "ctrl", "esm", "flaubert", "fsmt", "roc_bert", "tapas", "xlm")
ONLY_IN_PYTHON_REMEDY = (
    f"Give the checkpoint with a {TOKENIZER} that gives the same tokens, or use a model with such a tokenizer"
)
#: Model types whose first token has the position pad id + 1, so that the first rows of the position table are never
#: used. Their pad id is 1 if config.json has none. MPNet's is always 1, and config.json does not change it.
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
#: transformers writes "no limit" as 1e30. No encoder takes a million tokens.
_MOST_TOKENS = 10**6
#: Tasks for which the limits in sentence-transformers' files apply.
_OF_SENTENCE_TRANSFORMERS = ("embedding", "reranking")
#: The least limit of tokens. A row has special tokens before and behind its texts, and between the texts of a pair.
_FEWEST_TOKENS = 4
#: The largest files beside weights are vocabularies, which have some ten megabytes.
_MOST_OTHER_BYTES = 256 * 2**20
#: Saved checkpoints have some ten files, and the output folder of a training run has a hundred.
_MOST_FILES = 10_000
_MOST_MODULES = 100


@dataclass(frozen=True)
class Validated:
    """The files of a checkpoint, relative to its folder, and the facts that were read from them.

    Args:
        files: All files.
        weights: The files of the weights alone, without an index.
        config: The content of config.json. If it names no architecture, one is added from the weights.
        max_tokens: The checkpoint's limit of tokens for a text.
    """

    files: tuple[str, ...]
    weights: tuple[str, ...]
    config: dict[str, Any]
    max_tokens: int


def validate(entry: ModelEntry, folder: Path) -> Validated:
    """Check a checkpoint's folder without loading weights.

    Raises:
        CheckpointError: A check failed. The error names the model, the file and the remedy.
    """
    if has_file(entry, folder, ADAPTER):
        raise refuse(entry, f"{IS_ADAPTER} ({folder / ADAPTER})", MERGE_REMEDY)
    config = _read_config(entry, folder)
    tokenizer_config = check_tokenizer_config(entry, folder)
    stored = find_weights(entry, folder)
    weights = tuple(name for name in stored if not name.endswith(".json"))
    names = [name for file in weights if file.endswith(".safetensors") for name in check_whole(entry, folder, file)]
    if not config.get("architectures") and names:
        config = {**config, "architectures": [f"{config['model_type']} {head_of(names)}"]}
    files = {*stored, *_files(entry, folder)}
    _check_tokenizer(entry, folder, config, tokenizer_config)
    TASKS[entry.task].check(CheckpointFiles(entry.name, folder, config))
    _refuse_weights_of_modules(entry, folder)
    return Validated(
        files=tuple(sorted(files)),
        weights=weights,
        config=config,
        max_tokens=_max_tokens(entry, folder, config, tokenizer_config),
    )


def _read_config(entry: ModelEntry, folder: Path) -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        CheckpointError: The file is missing or wrong, or no task here fits the model's family.
    """
    # Models of such families may have no config.json, or one that transformers does not know.
    if not has_file(entry, folder, CONFIG) and (why := why_of_no_use(folder, {})):
        raise refuse(entry, *why.rsplit(". ", 1))
    config = check_config(entry, folder)
    if why := why_of_no_use(folder, config):
        raise refuse(entry, *why.rsplit(". ", 1))
    return config


def _files(entry: ModelEntry, folder: Path) -> list[str]:
    """Return the files other than weights, relative to the folder.

    Raises:
        CheckpointError: A file is a link that leads out of the folder, no regular file, or too large.
    """
    found = []
    for name in _names(entry, folder):
        if not has_file(entry, folder, name):
            continue
        if (folder / name).stat().st_size > _MOST_OTHER_BYTES:
            raise refuse(
                entry, f"{folder / name} is larger than {_MOST_OTHER_BYTES // 2**20} MB", "Remove it from the folder"
            )
        found.append(name)
    return found


def _names(entry: ModelEntry, folder: Path) -> list[str]:
    """Return the names that files other than weights may have.

    Of the sub-folders, only those that modules.json names are searched, because the output folder of a training run is
    full of intermediate states.
    """
    patterns = [name for name in (*WANTED, *(WANTED_CODE if entry.trust_remote_code else ())) if name.startswith("*")]
    indices = {INDEX, PICKLE_INDEX}  # find_weights adds an index if the weights need it
    names: list[str] = []
    for place in ("", *_module_folders(entry, folder)):
        with os.scandir(folder / place) as entries:
            for one in entries:
                if one.name.startswith(".") or not any(fnmatch(one.name, pattern) for pattern in patterns):
                    continue
                name = (Path(place) / one.name).as_posix()
                if name not in indices:
                    names.append(name)
                if len(names) > _MOST_FILES:
                    raise refuse(
                        entry,
                        f"{folder} holds more than {_MOST_FILES} files",
                        "Give a folder that holds only the checkpoint",
                    )
    return names


def candidate_files(entry: ModelEntry, folder: Path) -> list[str]:
    """Return the files that may belong to a checkpoint, which need not be complete.

    The sensor watches these files for changes.
    """
    weights = [*WANTED_WEIGHTS, INDEX, *((*WANTED_PICKLE, PICKLE_INDEX) if entry.allow_pickle else ())]
    names = [path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in weights)]
    try:
        return [*names, *_names(entry, folder)]
    except CheckpointError:  # modules.json is incomplete, or names folders outside the checkpoint
        return [*names, "modules.json"]


def _module_folders(entry: ModelEntry, folder: Path) -> list[str]:
    """Return the existing sub-folders that sentence-transformers' modules.json names."""
    if not has_file(entry, folder, "modules.json"):
        return []
    modules = read_document(entry, folder, "modules.json")
    if (
        not isinstance(modules, list)
        or len(modules) > _MOST_MODULES
        or not all(isinstance(module, dict) for module in modules)
    ):
        raise refuse(entry, f"{folder / 'modules.json'} holds no list of modules", "Copy the checkpoint again")
    places = set()
    for module in modules:
        place = module.get("path") or ""
        if place in ("", "."):
            continue
        try:
            places.add(check_name(place))
        except ForeignError as error:
            raise refuse(
                entry,
                f"{folder / 'modules.json'} names a folder outside the checkpoint: {error}",
                "Give a checkpoint whose folder holds all of its files",
            ) from None
    return sorted(place for place in places if (folder / place).is_dir())


def _refuse_weights_of_modules(entry: ModelEntry, folder: Path) -> None:
    """Check that no sentence-transformers module has weights, because the modules that can be served have none.

    Raises:
        CheckpointError: A module has weights, and the entry does not allow unused weights.
    """
    if entry.unused_weights == "allow":
        return
    for place in _module_folders(entry, folder):
        for one in sorted(path.name for path in (folder / place).iterdir()):
            if one.endswith((".safetensors", ".bin")):
                raise refuse(
                    entry, f"nothing reads the weights in {folder / place / one}", f"Remove that file. {UNUSED_REMEDY}"
                )


def _check_tokenizer(entry: ModelEntry, folder: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> None:
    if not has_file(entry, folder, TOKENIZER):
        _require_a_convertible(entry, config, tokenizer_config)
        if slow_tokenizer(folder) is None:
            raise refuse(
                entry,
                f"there is no tokenizer ({TOKENIZER}) in {folder}",
                "Save it there too (tokenizer.save_pretrained)",
            )
        return
    largest = largest_token_id(read_object(entry, folder, TOKENIZER))
    vocabulary = config.get("vocab_size")
    if largest is None:
        raise refuse(entry, f"{folder / TOKENIZER} holds no vocabulary", "Save the tokenizer again with transformers")
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise refuse(
            entry,
            f"{TOKENIZER} does not match the model: it gives ids up to {largest}, and the model's embedding has "
            f"{vocabulary} rows (config.json, vocab_size)",
            "Give the tokenizer this checkpoint was trained with",
        )


def only_in_python(name: str) -> str:
    """Return why a tokenizer of a class that exists only in Python is not served."""
    return (
        f"its tokenizer ({name}) exists only in Python, but releases cut text with the tokenizers library, which "
        "does not have it"
    )


def _require_a_convertible(entry: ModelEntry, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> None:
    """Check that the tokenizer's class can be converted to a tokenizer.json.

    Raises:
        CheckpointError: It exists only in Python.
    """
    named = tokenizer_config.get("tokenizer_class") or config.get("tokenizer_class")
    if named in ONLY_IN_PYTHON or (named is None and config["model_type"] in _ONLY_IN_PYTHON_TYPES):
        raise refuse(entry, only_in_python(str(named or config["model_type"])), ONLY_IN_PYTHON_REMEDY)


def slow_tokenizer(folder: Path) -> str | None:
    """Return the first file of an older tokenizer whose files are all there, or None without such a tokenizer."""
    for patterns in SLOW_TOKENIZERS:
        found = [sorted(folder.glob(pattern)) for pattern in patterns]
        if all(found):
            return found[0][0].name
    return None


def largest_token_id(tokenizer: dict[str, Any]) -> int | None:
    """Return the largest id that a tokenizer.json can give, added tokens included.

    The result is None if the tokenizer has no vocabulary or its ids are not numbers of 32 bits.
    """
    try:
        vocabulary = tokenizer["model"]["vocab"]
        ids = [token["id"] for token in tokenizer.get("added_tokens") or []]
    except (TypeError, LookupError):
        return None
    if not vocabulary or not isinstance(vocabulary, dict | list):
        return None
    # The vocabulary of WordPiece, BPE and WordLevel is a table of ids. Unigram's is a list, and the position is the id.
    ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    # tokenizers holds ids in 32 bits.
    return max(ids) if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < 2**32 else None


def _max_tokens(entry: ModelEntry, folder: Path, config: dict[str, Any], tokenizer_config: dict[str, Any]) -> int:
    """Return the checkpoint's limit of tokens for a text.

    It is sentence-transformers' limit, else the tokenizer's, and never more than the model has positions.
    """
    limits = []
    positions = length_of(config.get("max_position_embeddings"), _MOST_TOKENS)
    if positions is not None:
        limits.append(positions - _positions_before_the_first(config))
    files = CheckpointFiles(entry.name, folder, config)
    # The pipelines of transformers ignore sentence-transformers' files, so the limits in them apply to two tasks only.
    own = transformer_config(files)[1] if entry.task in _OF_SENTENCE_TRANSFORMERS else {}
    said = (*length_limits(own), tokenizer_config.get("model_max_length"))
    limits += [length for length in (length_of(value, _MOST_TOKENS) for value in said) if length is not None][:1]
    if not limits:
        raise refuse(
            entry,
            "neither sentence_bert_config.json, tokenizer_config.json nor config.json limits the length of a text",
            "Write model_max_length into tokenizer_config.json",
        )
    if min(limits) < _FEWEST_TOKENS:
        raise refuse(
            entry,
            f"a limit of {min(limits)} tokens is too low (max_position_embeddings, max_seq_length or model_max_length)",
            "Correct those fields",
        )
    return min(limits)


def _positions_before_the_first(config: dict[str, Any]) -> int:
    """Return the number of rows at the start of the position table that no token uses."""
    kind, pad = config["model_type"], config.get("pad_token_id")
    if kind not in POSITIONS_AFTER_PAD:
        return 0
    return 2 if kind == "mpnet" or not isinstance(pad, int) else pad + 1
