"""The files that sentence-transformers writes beside a checkpoint, as far as they change answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from resources.boundary.foreign import (
    MOST_CONFIG_BYTES,
    MOST_TOKENIZER_BYTES,
    MOST_TOKENIZER_VALUES,
    ForeignError,
    check_name,
    is_file_below,
    parse_json,
    read_below,
    values_of,
)
from resources.tasks.base import CheckpointFiles

T = TypeVar("T")


CONFIG = "config_sentence_transformers.json"
_TOKENIZER = "tokenizer.json"
MODULES = "modules.json"
#: The names that the library has given to the configuration of its first module, in the order in which it looks.
TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
#: The prefixes of the tables of arguments that the library passes to transformers, under all names that these have had,
#: each with the arguments that are accepted in it. These arguments change nothing that is served, because everything
#: runs in fp32, on transformers' own attention and without foreign code.
_PASSED_ON = {
    "model": ("dtype", "torch_dtype", "attn_implementation", "add_pooling_layer", "use_safetensors"),
    "tokenizer": ("model_max_length", "use_fast"),
    "processor": ("model_max_length", "use_fast"),
    "config": (),
    "processing": (),
}
_HARMLESS = ("trust_remote_code", "local_files_only", "cache_dir", "token", "revision")


def transformer_config(files: CheckpointFiles) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the first module's file, in any of its layouts.

    Both are empty if there is no such file, or no modules.json. Without modules.json the library reads none.
    """
    if not _has(files, MODULES):
        return "", {}
    for name in TRANSFORMER_CONFIGS:
        if config := optional_json(files, name):
            return name, config
    return "", {}


def length_limits(config: dict[str, Any]) -> tuple[Any, ...]:
    """Return the limits of a text's length in the first module's file, in the order in which they apply.

    The first one that is present applies.
    """
    passed = (config.get(f"{part}_{kind}") for part in ("processor", "tokenizer") for kind in ("kwargs", "args"))
    inside = (part.get("model_max_length") for part in passed if isinstance(part, dict))
    return (*inside, config.get("max_seq_length"))


def refuse_changed_texts(files: CheckpointFiles) -> None:
    """Raise CheckpointError if sentence-transformers would change texts, tokens or configuration before the model."""
    config = optional_json(files, CONFIG)
    default, prompts = config.get("default_prompt_name"), config.get("prompts")
    if prompts and not isinstance(prompts, dict):
        raise files.refuse(f"{CONFIG}, prompts: it is no table of prompts", "Copy the checkpoint again, whole")
    if isinstance(default, str) and prompts and prompts.get(default):
        raise files.refuse(
            f"{CONFIG} puts the prompt {default!r} before every text, which is not served",
            "Set its default_prompt_name to null, and let the caller write the prompt before the text",
        )
    name, config = transformer_config(files)
    if config.get("do_lower_case") and not _lowers(files):
        raise files.refuse(
            f"{name} turns every text into lower case (do_lower_case) before the tokenizer, which is not served",
            "Set do_lower_case to false there, and let the tokenizer do it (tokenizer.json, normalizer) or the caller",
        )
    for part, harmless in _PASSED_ON.items():
        for kind in ("kwargs", "args"):
            given = config.get(f"{part}_{kind}")
            passed = given if isinstance(given, dict) else {}
            for key in passed:
                if passed[key] is not None and key not in (*harmless, *_HARMLESS):
                    raise files.refuse(
                        f"{name}, {part}_{kind}: {key} changes how the checkpoint is read, which is not served",
                        "Save the checkpoint with that setting in its own files, and remove it there",
                    )
    task = config.get("transformer_task", "")
    if task not in ("", "feature-extraction", "sequence-classification"):
        raise files.refuse(f"{name}, transformer_task: {task!r:.60} is not served", "Use a checkpoint for text alone")


def optional_json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of the checkpoint, or an empty one if there is no such file.

    Raises:
        CheckpointError: The file is not a regular file inside the checkpoint's folder, or holds no object.
    """
    return read_json(files, name, dict) if _has(files, name) else {}


def read_modules(files: CheckpointFiles, served: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return the kind and the entry of each module that sentence-transformers runs, in their order.

    The list is empty if the library saved none.

    Raises:
        CheckpointError: A module is not the library's own or its kind is not among `served`, or modules.json is
            invalid.
    """
    if not _has(files, MODULES):
        return []
    found: list[tuple[str, dict[str, Any]]] = []
    for module in read_json(files, MODULES, list):
        if not isinstance(module, dict):
            raise files.refuse("modules.json holds no list of modules", "Copy the checkpoint again, whole")
        package, _, kind = str(module.get("type", "")).rpartition(".")
        if not package.startswith("sentence_transformers.") or kind not in served:
            raise files.refuse(
                f"modules.json names a module {module.get('type')!s:.100}, and of sentence-transformers' own only "
                f"{', '.join(served)} are served",
                "Use a checkpoint without it",
            )
        if kind == "Transformer" and module.get("path") not in (None, "", "."):
            raise files.refuse(
                f"modules.json has the model in a folder of its own ({module['path']!s:.60}), as sentence-transformers "
                "1 did",
                "Load it with sentence-transformers and save it again: SentenceTransformer(folder).save(another)",
            )
        found.append((kind, module))
    if not found or found[0][0] != "Transformer":
        raise files.refuse("modules.json does not begin with a Transformer", "Copy the checkpoint again, whole")
    return found


def module_file(files: CheckpointFiles, module: dict[str, Any], name: str) -> str:
    """Return the path of a module's own file below the checkpoint's folder.

    Raises:
        CheckpointError: The path leads out of that folder or is invalid.
    """
    place = module.get("path") or ""
    if place in ("", "."):
        return name
    try:
        return f"{check_name(place)}/{check_name(name)}"
    except ForeignError as error:
        raise files.refuse(f"modules.json: {error}", "Give a checkpoint whose folder holds all of its files") from None


def _lowers(files: CheckpointFiles) -> bool:
    """Return whether the served tokenizer turns text into lower case by itself."""
    if _has(files, _TOKENIZER):
        data = read_below(files.folder, _TOKENIZER, MOST_TOKENIZER_BYTES)
        normalizer = parse_json(data, most_values=MOST_TOKENIZER_VALUES).get("normalizer")
        found = values_of(normalizer)
        return any((key, value) in (("type", "Lowercase"), ("lowercase", True)) for key, value in found)
    return bool(optional_json(files, "tokenizer_config.json").get("do_lower_case"))


def _has(files: CheckpointFiles, name: str) -> bool:
    try:
        return is_file_below(files.folder, name)
    except ForeignError as error:
        raise files.refuse(str(error), "Put the file itself there, or remove it") from None


def read_json(files: CheckpointFiles, name: str, kind: type[T]) -> T:
    """Return the value in a JSON file of the checkpoint.

    Raises:
        CheckpointError: The file cannot be read, or its value is not of the given kind.
    """
    try:
        data = parse_json(read_below(files.folder, name, MOST_CONFIG_BYTES))
        for _ in values_of(data):
            pass
    except (OSError, ValueError, ForeignError) as error:
        raise files.refuse(f"{name} cannot be read ({error})", "Copy the checkpoint again, whole") from None
    if not isinstance(data, kind):
        raise files.refuse(f"{name} holds no JSON {kind.__name__}", "Copy the checkpoint again, whole")
    return data
