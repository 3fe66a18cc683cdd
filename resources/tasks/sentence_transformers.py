"""What sentence-transformers writes beside a checkpoint, as far as it changes answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from resources.foreign import (
    MOST_CONFIG_BYTES,
    ForeignError,
    check_name,
    is_file_below,
    parse_json,
    read_below,
    values_of,
)
from resources.tasks.base import CheckpointFiles

T = TypeVar("T")


def refuse_prompts(files: CheckpointFiles) -> None:
    """Raise CheckpointError where sentence-transformers would change the text before its tokenizer sees it."""
    name = "config_sentence_transformers.json"
    config = optional_json(files, name)
    default, prompts = config.get("default_prompt_name"), config.get("prompts")
    if prompts and not isinstance(prompts, dict):
        raise files.refuse(f"{name}, prompts: it is no table of prompts", "Copy the checkpoint again, whole")
    if isinstance(default, str) and prompts and prompts.get(default):
        raise files.refuse(
            f"{name} puts the prompt {default!r} before every text, which is not served",
            "Set its default_prompt_name to null, and let the caller write the prompt before the text",
        )
    name = "sentence_bert_config.json"
    config = optional_json(files, name)
    if config.get("do_lower_case") and not _lowers(files):
        raise files.refuse(
            f"{name} turns every text into lower case (do_lower_case) before the tokenizer, which is not served",
            "Set do_lower_case to false there, and let the tokenizer do it (tokenizer.json, normalizer) or the caller",
        )


def optional_json(files: CheckpointFiles, name: str) -> dict[str, Any]:
    """A file of the checkpoint that holds an object; empty where there is no such file. Raises CheckpointError."""
    return read_json(files, name, dict) if _has(files, name) else {}


def read_modules(files: CheckpointFiles, served: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Kind and entry of each module that sentence-transformers runs; none where it saved none.

    Raises CheckpointError for one that is not of its own and of a kind that is served.
    """
    if not _has(files, "modules.json"):
        return []
    found = []
    for module in read_json(files, "modules.json", list):
        if not isinstance(module, dict):
            raise files.refuse("modules.json holds no list of modules", "Copy the checkpoint again, whole")
        package, _, kind = str(module.get("type", "")).rpartition(".")
        if not package.startswith("sentence_transformers.") or kind not in served:
            raise files.refuse(
                f"modules.json names a module {module.get('type')!s:.100}, and of sentence-transformers' own only "
                f"{', '.join(served)} are served",
                "Use a checkpoint without it",
            )
        found.append((kind, module))
    return found


def module_file(files: CheckpointFiles, module: dict[str, Any], name: str) -> str:
    """The path of a module's own file below the checkpoint's folder. Raises CheckpointError."""
    place = module.get("path") or ""
    if place in ("", "."):
        return name
    try:
        return f"{check_name(place)}/{check_name(name)}"
    except ForeignError as error:
        raise files.refuse(f"modules.json: {error}", "Give a checkpoint that is whole in its own folder") from None


def _lowers(files: CheckpointFiles) -> bool:
    """Whether the tokenizer turns text into lower case by itself."""
    name = "tokenizer_config.json"
    return bool(optional_json(files, name).get("do_lower_case"))


def _has(files: CheckpointFiles, name: str) -> bool:
    try:
        return is_file_below(files.folder, name)
    except ForeignError as error:
        raise files.refuse(str(error), "Put the file itself there, or remove it") from None


def read_json(files: CheckpointFiles, name: str, kind: type[T]) -> T:
    """A file of the checkpoint that holds a value of that kind. Raises CheckpointError."""
    try:
        data = parse_json(read_below(files.folder, name, MOST_CONFIG_BYTES))
        for _ in values_of(data):
            pass
    except (OSError, ValueError, ForeignError) as error:
        raise files.refuse(f"{name} cannot be read ({error})", "Copy the checkpoint again, whole") from None
    if not isinstance(data, kind):
        raise files.refuse(f"{name} holds no JSON {kind.__name__}", "Copy the checkpoint again, whole")
    return data
