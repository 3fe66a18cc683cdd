"""What sentence-transformers writes beside a checkpoint, as far as it changes answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from resources.tasks.base import CheckpointFiles

T = TypeVar("T")


def refuse_prompts(files: CheckpointFiles) -> None:
    """Raise CheckpointError where sentence-transformers would change the text before its tokenizer sees it."""
    name = "config_sentence_transformers.json"
    config = optional_json(files, name)
    default = config.get("default_prompt_name")
    if default and (config.get("prompts") or {}).get(default):
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
    return read_json(files, name, dict) if (files.folder / name).is_file() else {}


def read_modules(files: CheckpointFiles, served: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Kind and entry of each module that sentence-transformers runs; none where it saved none.

    Raises CheckpointError for one that is not of its own and of a kind that is served.
    """
    if not (files.folder / "modules.json").is_file():
        return []
    found = []
    for module in read_json(files, "modules.json", list):
        package, _, kind = str(module.get("type", "")).rpartition(".")
        if not package.startswith("sentence_transformers.") or kind not in served:
            raise files.refuse(
                f"modules.json names a module {module.get('type')}, and of sentence-transformers' own only "
                f"{', '.join(served)} are served",
                "Use a checkpoint without it",
            )
        found.append((kind, module))
    return found


def _lowers(files: CheckpointFiles) -> bool:
    """Whether the tokenizer turns text into lower case by itself."""
    name = "tokenizer_config.json"
    return bool((files.folder / name).is_file() and read_json(files, name, dict).get("do_lower_case"))


def read_json(files: CheckpointFiles, name: str, kind: type[T]) -> T:
    try:
        data = json.loads((files.folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise files.refuse(f"{name} cannot be read ({error})", "Copy the checkpoint again, whole") from None
    if not isinstance(data, kind):
        raise files.refuse(f"{name} holds no JSON {kind.__name__}", "Copy the checkpoint again, whole")
    return data
