"""Bounded reading of the documents in a checkpoint's folder, and the errors for wrong documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resources.boundary.foreign import (
    MOST_CONFIG_BYTES,
    MOST_CONFIG_VALUES,
    MOST_TOKENIZER_BYTES,
    MOST_TOKENIZER_VALUES,
    ForeignError,
    is_file_below,
    parse_json,
    read_below,
)
from resources.catalog.entries import ModelEntry
from resources.checkpoints.sources.reference import is_hub_id
from resources.errors import CheckpointError

TOKENIZER = "tokenizer.json"
#: The file that peft writes beside an adapter's weights.
ADAPTER = "adapter_config.json"
IS_ADAPTER = "it is an adapter, which has to be merged into its base model first"
MERGE_REMEDY = (
    "Load it with peft, call merge_and_unload(), save the model and its tokenizer into one folder with "
    "save_pretrained, and give that folder"
)
_REPLACE = "Put the file itself there, or remove it"


def refuse(entry: ModelEntry, why: str, remedy: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be used."""
    # The reason may quote a foreign file, and be as long as that file.
    return CheckpointError(f"{entry.name}: {why:.1000}. {remedy}. (source: {entry.source})")


def refuse_file(entry: ModelEntry, error: ForeignError) -> CheckpointError:
    """Return the error for a file that is not the checkpoint's own."""
    return refuse(entry, str(error), _REPLACE)


def whole_remedy(entry: ModelEntry) -> str:
    """Return the remedy for a folder that lacks a file."""
    if is_hub_id(entry.source):
        return "Remove that folder and download it again with the network on, or ask its author for the file"
    return "Give the complete folder that save_pretrained wrote"


def has_file(entry: ModelEntry, folder: Path, name: str) -> bool:
    """Return whether the checkpoint has that file.

    Raises:
        CheckpointError: The name is a link that leads out of the folder, or no regular file.
    """
    try:
        return is_file_below(folder, name)
    except ForeignError as error:
        raise refuse_file(entry, error) from None


def read_document(entry: ModelEntry, folder: Path, name: str) -> Any:
    """Read a JSON document of the checkpoint.

    Raises:
        CheckpointError: The document is missing, too large, not JSON, or not the checkpoint's own file.
    """
    tokenizer = name == TOKENIZER
    try:
        data = read_below(folder, name, MOST_TOKENIZER_BYTES if tokenizer else MOST_CONFIG_BYTES)
        return parse_json(data, most_values=MOST_TOKENIZER_VALUES if tokenizer else MOST_CONFIG_VALUES)
    except FileNotFoundError:
        raise refuse(entry, f"{name} is missing from {folder}", whole_remedy(entry)) from None
    except ForeignError as error:
        raise refuse_file(entry, error) from None
    except (OSError, ValueError) as error:
        raise refuse(entry, f"{folder / name} cannot be read: {error}", "Copy the checkpoint again") from None


def read_object(entry: ModelEntry, folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON document of the checkpoint that holds an object.

    Raises:
        CheckpointError: The document cannot be read, or holds no object.
    """
    data = read_document(entry, folder, name)
    if not isinstance(data, dict):
        raise refuse(entry, f"{folder / name} holds no JSON object", "Copy the checkpoint again")
    return data
