"""What the command line was given as MODEL: a name of the catalog, or the source of a new entry."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resources.artifacts.records import Checkpoint
from resources.catalog import DEFAULT_SHAPES, ModelEntry, explain, load_catalog, write_entry
from resources.checkpoints import SourceSettings, locate
from resources.checkpoints.registry import parse_reference
from resources.errors import ArtifactError, CatalogError, CheckpointError
from resources.workspace import Workspace

#: What a checkpoint saved from such a class is for. Those for sequences may also rerank or judge labels; that only
#: their author knows.
_HEADS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
#: What the command line may say about a new entry; None: nothing.
ENTRY_OPTIONS = ("name", "task", "seq_len", "batch_size", "engines", "seconds", "serving_seconds")


def find_or_add(workspace: Workspace, options: Namespace, *, rewrite: bool = True) -> ModelEntry:
    """The catalog's entry for `options.model`, added below the workspace's home if it is a source.

    rewrite: whether an entry that was added from the same source is written anew; else it stays as it is, unless
    something is said about it. Raises CatalogError, CheckpointError.
    """
    catalog = workspace.catalog()
    given = [name for name in ENTRY_OPTIONS if getattr(options, name) is not None]
    if options.model in catalog.names:
        if given:
            raise CatalogError(
                f"{options.model} is in the catalog already, where its --{given[0].replace('_', '-')} is written: edit "
                f"{workspace.catalog_path} or its file in {workspace.additions}."
            )
        return catalog.get(options.model)
    source = _source(options.model)
    if source is None:
        return catalog.get(options.model)  # raises, naming what there is
    name = options.name or _name_from(source)
    if name in catalog.refused:  # its file is there, and nobody can tell what it holds
        raise CatalogError(catalog.refused[name])
    # Such a folder is no model, and would stay in the catalog for the sensor to look at; the Hub may answer later.
    if source.startswith("/") and not (locate(source).folder / "config.json").is_file():
        raise CheckpointError(
            f"{name}: config.json is missing from {source}. Give the folder that save_pretrained wrote, whole."
        )
    # Only the models file can hold that name for another purpose; an earlier entry of our own is written anew.
    for known in load_catalog(workspace.catalog_path).models:
        if known.name == name:
            raise CatalogError(
                f"{workspace.catalog_path} has a model named {name!r} already; give another with --name."
            )
    earlier = next((known for known in catalog.models if known.name == name), None)
    if not rewrite and earlier is not None and earlier.source == source:
        if options.task not in (None, earlier.task):
            raise CatalogError(
                f"{name!r} is in the catalog for {earlier.task}; leave --task out, or give another name with --name."
            )
        return earlier
    entry = _entry(name, source, options, workspace.sources)
    if earlier is not None and earlier.source != entry.source and _was_collected(workspace, name):
        raise CatalogError(
            f"{workspace.additions} has a model named {name!r} from {earlier.source}; give another name with --name, "
            f"or remove {workspace.additions / name}.yaml."
        )
    write_entry(entry, workspace.additions)
    return entry


def _was_collected(workspace: Workspace, name: str) -> bool:
    """Whether the name ever stood for a checkpoint that was there: a mistyped source may be put right."""
    try:
        workspace.store.current(Checkpoint, f"checkpoint/{name}")
    except ArtifactError:
        return False
    return True


def _source(model: str) -> str | None:
    """The catalog's spelling of a source; None for what can only be a name."""
    path = Path(model).expanduser()
    if model.startswith(("package:", "hub:")):
        return model
    if path.is_dir() or model.startswith(("/", "./", "../", "~")):
        return str(path.resolve())
    return model if "/" in model else None


def _name_from(source: str) -> str:
    if source.startswith("models:"):
        source = parse_reference(source).name
    last = source.split("@")[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._").lower()


def _entry(name: str, source: str, options: Namespace, settings: SourceSettings) -> ModelEntry:
    for option in ("seq_len", "batch_size"):
        for number in (getattr(options, option) or "1").split(","):
            if not number.strip().isdigit() or int(number) < 1:
                raise CatalogError(f"--{option.replace('_', '-')}: {number!r} is not a number from 1 up.")
    fields: dict[str, Any] = {"name": name, "source": source, "task": options.task or _guess_task(source, settings)}
    if options.seq_len or options.batch_size:
        lengths = (
            options.seq_len or ",".join(str(n) for n in dict.fromkeys(s.sequence for s in DEFAULT_SHAPES))
        ).split(",")
        batches = (
            options.batch_size or ",".join(str(n) for n in dict.fromkeys(s.batch for s in DEFAULT_SHAPES))
        ).split(",")
        fields["shapes"] = [f"{batch.strip()}x{length.strip()}" for batch, length in product(batches, lengths)]
    if options.engines:
        fields["engines"] = [engine.strip() for engine in options.engines.split(",")]
    if options.seconds is not None:
        fields["benchmark"] = {"seconds": options.seconds}
    if options.serving_seconds is not None:
        fields["serving"] = dict.fromkeys(("search_seconds", "benchmark_seconds"), options.serving_seconds)
    try:
        return ModelEntry.model_validate(fields)
    except ValidationError as error:
        raise CatalogError(f"{options.model}: {explain(error, ModelEntry)}") from None


def _guess_task(source: str, settings: SourceSettings) -> str:
    """By the class the checkpoint was saved from; what has no head of its own embeds."""
    folder = locate(source, allow_pickle=False, trust_remote_code=False, settings=settings).folder
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return "embedding"  # collecting the checkpoint says what is wrong with it, better than a guess could
    for head, task in _HEADS.items():
        if str(architectures[0]).endswith(head):
            return task
    return "embedding"
