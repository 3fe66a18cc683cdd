"""Checks of config.json and tokenizer_config.json.

transformers trusts both files. Some of their fields make it run or fetch code, read other files than those that were
checked, or allocate as much memory as they name. docs/security.md, "Checkpoints", lists these fields.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resources.boundary.foreign import values_of
from resources.catalog.entries import ModelEntry
from resources.checkpoints.reading import TOKENIZER, has_file, read_object, refuse
from resources.tasks.base import MOST_LABELS

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
#: The implementations of attention and experts that are part of transformers. Every other name makes it look for a
#: package or for native code on the Hub. A name with a slash means that repository. Without a slash, transformers takes
#: its own repository for flash attention.
_OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")
#: Fields that make transformers read other files of the folder than those that are checked here.
_OTHER_FILES = ("configuration_files", "fast_tokenizer_files", "transformers_weights", "gguf_file")
#: Fields that describe quantized weights. The loaders of such weights fetch native code from the Hub.
_QUANTIZED = ("quantization_config", "compression_config")
#: Fields that name a second model, which transformers or timm fetches.
_SECOND_MODEL = ("backbone", "backbone_config", "use_timm_backbone", "use_pretrained_backbone")
_TIMM = ("timm_wrapper", "timm_backbone")
#: Paths on the machine where a tokenizer was saved. transformers ignores their values.
_STALE_PATHS = ("special_tokens_map_file", "tokenizer_file", "added_tokens_file")
#: transformers reads only labels from these tables.
_LABEL_TABLES = ("id2label", "label2id")
#: Torch's names of the number types that weights may have.
_DTYPE = re.compile(r"(torch\.)?(auto|float|half|double|b?float16|float32|float64)")

_MOST_LABEL_CHARACTERS = 1000
#: The largest numbers for fields, by patterns of their names. The first pattern that fits a name counts. The bounds are
#: far beyond any real model, and small enough for a number of modules or a length.
_MOST = (
    # transformers takes 3 ms to make a layer, even without weights. If several of these numbers are multiplied, such as
    # ALBERT's groups and their layers, the limits of the child process bound the product.
    (re.compile("(^|_)(layers?|groups?|group_num|blocks?|networks)$"), 512),
    (re.compile("layer|depth|group|block"), 10_000),
    (re.compile("size|dim|hidden|head|position|length"), 2**24),
)
_MOST_ANYWHERE = 10**15


def check_config(entry: ModelEntry, folder: Path) -> dict[str, Any]:
    """Read and check config.json.

    Raises:
        CheckpointError: A field asks for something that is not allowed, or has an impossible value.
    """
    config = read_object(entry, folder, CONFIG)
    for _ in _values(entry, folder / CONFIG, config):
        pass  # the iteration raises if the document is nested too deeply
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise refuse(
            entry, f"{folder / CONFIG} has no model_type", "Give the complete folder that save_pretrained wrote"
        )
    architectures = config.get("architectures")
    if architectures is not None and not _is_texts(architectures):
        raise refuse(entry, f"{CONFIG}, architectures: it is not a list of names", "Copy the checkpoint again")
    # The tables of labels are left out, because a label may have the name of a field.
    for key, value in values_of({name: value for name, value in config.items() if name not in _LABEL_TABLES}):
        _refuse_number(entry, key, value)
        _refuse_code(entry, CONFIG, key, value)
    _check_labels(entry, config)
    vocabulary = config.get("vocab_size")
    if vocabulary is not None and (not _is_count(vocabulary) or vocabulary < 1):
        raise refuse(entry, f"{CONFIG}, vocab_size: {vocabulary!r:.60} is not a number of tokens", "Correct it")
    return config


def check_tokenizer_config(entry: ModelEntry, folder: Path) -> dict[str, Any]:
    """Read and check tokenizer_config.json. The result is empty if there is none.

    Raises:
        CheckpointError: A field asks for something that is not allowed.
    """
    if not has_file(entry, folder, TOKENIZER_CONFIG):
        return {}
    config = read_object(entry, folder, TOKENIZER_CONFIG)
    for key, value in _values(entry, folder / TOKENIZER_CONFIG, config):
        _refuse_code(entry, TOKENIZER_CONFIG, key, value)
    if has_file(entry, folder, TOKENIZER):
        return config
    # Without tokenizer.json, transformers would make a tokenizer from the file that such a field names.
    for key, value in config.items():
        if key.endswith("_file") and key not in _STALE_PATHS and isinstance(value, str) and "/" in value:
            raise refuse(
                entry,
                f"{TOKENIZER_CONFIG}, {key}: it names {value!r:.100}, a file in another folder",
                "Remove that field",
            )
    return config


def _values(entry: ModelEntry, path: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        yield from values_of(config)
    except ValueError as error:
        raise refuse(entry, f"{path} cannot be read: {error}", "Copy the checkpoint again") from None


def _refuse_code(entry: ModelEntry, file: str, key: str, value: Any) -> None:
    """Check that a field does not lead transformers to code or files that are not checked.

    Raises:
        CheckpointError: It does.
    """
    if not value:
        return
    if key == "auto_map" and not entry.trust_remote_code:
        raise refuse(
            entry,
            f"{file} names the checkpoint's own Python code (auto_map)",
            "If you trust its author, set trust_remote_code: true in its catalog entry. The code runs on this machine",
        )
    if key.removesuffix("_internal").endswith(("attn_implementation", "experts_implementation")):
        named = value.values() if isinstance(value, dict) else [value]
        if not all(one is None or one in _OWN_IMPLEMENTATIONS for one in named):
            raise refuse(
                entry,
                f"{file}, {key}: {value!r:.100} makes transformers fetch native code from the Hub and run it",
                "Remove that field, because graphs are exported with transformers' own attention",
            )
    elif key in _OTHER_FILES:
        raise refuse(
            entry,
            f"{file}, {key}: it makes transformers read other files than those that are checked and copied",
            f"Remove that field, and use the standard file names ({CONFIG}, {TOKENIZER}, model.safetensors)",
        )
    elif key in _QUANTIZED:
        raise refuse(
            entry,
            f"{file}, {key}: the weights are quantized, and transformers fetches native code from the Hub to load them",
            "Give the checkpoint in full precision; engines of reduced precision are built from it",
        )
    elif key in _SECOND_MODEL or (key == "model_type" and value in _TIMM):
        raise refuse(
            entry,
            f"{file}, {key}: {value!r:.100} makes transformers fetch a second model",
            "Use a text model whose folder holds all of its files",
        )
    elif key in ("dtype", "torch_dtype") and not (isinstance(value, str) and _DTYPE.fullmatch(value)):
        raise refuse(entry, f"{file}, {key}: {value!r:.100} is not a type of weights", "Write float32")


def _refuse_number(entry: ModelEntry, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    most = next((most for names, most in _MOST if names.search(key)), _MOST_ANYWHERE)
    size = abs(value)
    # The value of an attention mask may be minus infinity, but a size may not.
    if size <= most or (most == _MOST_ANYWHERE and isinstance(value, float)):
        return
    shown = repr(value) if isinstance(value, float) or size < 10**20 else "a number of more than 20 digits"
    raise refuse(entry, f"{CONFIG}, {key}: {shown} is more than {most}, the largest accepted value", "Correct it")


def _check_labels(entry: ModelEntry, config: dict[str, Any]) -> None:
    count = config.get("num_labels")
    if count is not None and (not _is_count(count) or count > MOST_LABELS):
        raise refuse(
            entry,
            f"{CONFIG}, num_labels: {count!r:.60} is not a number of labels from 0 to {MOST_LABELS}",
            "Write the number of the head's outputs, or remove the field and name them in id2label",
        )
    table = config.get("id2label")
    if table is None:
        return
    if not isinstance(table, dict) or len(table) > MOST_LABELS:
        raise refuse(
            entry,
            f"{CONFIG}, id2label: it is not a table of at most {MOST_LABELS} labels",
            'Write it as {"0": "the first label", "1": ...}',
        )
    for label in table.values():
        if isinstance(label, list | dict) or len(str(label)) > _MOST_LABEL_CHARACTERS:
            raise refuse(
                entry,
                f"{CONFIG}, id2label: {label!r:.60} is not the name of a label",
                f"Write names of at most {_MOST_LABEL_CHARACTERS} characters",
            )


def length_of(value: Any, most: int) -> int | None:
    """Return the value as a length if it is a number from 1 to `most`, or None otherwise.

    transformers writes some lengths as floats, and "no limit" as 1e30.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # The comparison is false for NaN and for integers that are too large for a float.
    return int(value) if 1 <= value <= most else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
