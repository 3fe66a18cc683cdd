"""The documents of a checkpoint's folder, read within bounds, and the errors for what is wrong with them."""

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
#: What peft writes beside an adapter's weights.
ADAPTER = "adapter_config.json"
IS_ADAPTER = "it is an adapter: merge it first"
MERGE_REMEDY = (
    "Load it with peft, call merge_and_unload(), save the model and its tokenizer into one folder with "
    "save_pretrained, and give that"
)
_REPLACE = "Put the file itself there, or remove it"


def refuse(entry: ModelEntry, why: str, remedy: str) -> CheckpointError:
    """The error for a checkpoint that cannot be used."""
    # What a foreign file says may be as long as the file.
    return CheckpointError(f"{entry.name}: {why:.1000}. {remedy}. (source: {entry.source})")


def refuse_file(entry: ModelEntry, error: ForeignError) -> CheckpointError:
    """The error for a file that is none of the checkpoint's own."""
    return refuse(entry, str(error), _REPLACE)


def whole_remedy(entry: ModelEntry) -> str:
    """The remedy for a folder that lacks something."""
    if is_hub_id(entry.source):
        return "Fetch it again with the network on, after removing that folder, or ask its author for the file"
    return "Give the folder that save_pretrained wrote, whole"


def has_file(entry: ModelEntry, folder: Path, name: str) -> bool:
    """Whether the checkpoint has that file. Raises CheckpointError where it is a link to elsewhere, or no file."""
    try:
        return is_file_below(folder, name)
    except ForeignError as error:
        raise refuse_file(entry, error) from None


def read_document(entry: ModelEntry, folder: Path, name: str) -> Any:
    """A JSON document of the checkpoint. Raises CheckpointError."""
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
    """The same, of a document that holds an object."""
    data = read_document(entry, folder, name)
    if not isinstance(data, dict):
        raise refuse(entry, f"{folder / name} holds no JSON object", "Copy the checkpoint again")
    return data
