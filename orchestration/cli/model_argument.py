"""The argument MODEL of the command line: a name of the catalog, or the source of a new entry."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resources.artifacts.records import Checkpoint
from resources.boundary.addresses import holds_login
from resources.catalog.entries import DEFAULT_SHAPES, ModelEntry, Shape, check_name, explain
from resources.catalog.loading import Catalog, entry_text, load_catalog, write_entry
from resources.checkpoints.kinds import task_of, why_of_no_use
from resources.checkpoints.reading import ADAPTER, IS_ADAPTER, MERGE_REMEDY
from resources.checkpoints.sources.local import local_folder
from resources.checkpoints.sources.locating import locate
from resources.checkpoints.sources.reference import HUB_PREFIX, hub_reference, is_hub_id, kind_of
from resources.checkpoints.sources.registry import parse_reference
from resources.checkpoints.validation import validate
from resources.checkpoints.watch.hub import hub_commit
from resources.errors import ArtifactError, CatalogError, CheckpointError, StorageError, first_line
from resources.settings.sources import Access, SourceSettings
from resources.settings.workspace import Workspace
from resources.steps.checkpoint import CHECKPOINT

#: The options that describe a new entry. An option that was not given is None.
ENTRY_OPTIONS = ("name", "task", "seq_len", "batch_size", "engines", "seconds", "serving_seconds", "allow_pickle")
_PICKLE_WARNING = (
    "refinery: warning: --allow-pickle: weights stored as a pickle run their author's code as you, each time they are "
    "loaded. The model's entry keeps allow_pickle: true."
)


def find_or_add(workspace: Workspace, options: Namespace, *, rewrite: bool = True) -> ModelEntry:
    """Return the catalog's entry for `options.model`, added below the workspace's home if it is a source.

    An entry that was added before stays as it is. Options change their own fields of it alone, and nothing in a file
    that somebody edited.

    Args:
        workspace: The workspace with the catalog.
        options: The options of the command line. It has `model` and all of ENTRY_OPTIONS.
        rewrite: Whether options may change an entry that was added before.

    Raises:
        CatalogError: There is no such model, or its entry cannot be added or changed.
        CheckpointError: The source cannot be used as a checkpoint.
    """
    catalog = workspace.catalog()
    given = [name for name in ENTRY_OPTIONS if getattr(options, name) is not None]
    if options.model in catalog.names:
        known = catalog.get(options.model)
        if not given:
            return known
        # The same command may be given again: the folder ./bert and the Hub's bert become entries named bert, so the
        # argument is then a name of the catalog.
        if known.source not in (options.model, str(Path(options.model).resolve())):
            own = options.model in load_catalog(workspace.catalog_path).names
            raise CatalogError(
                f"{options.model} is in the catalog already, so --{given[0].replace('_', '-')} changes nothing. Edit "
                f"its entry in {workspace.catalog_path if own else workspace.additions}."
            )
        source = known.source
    else:
        _require_read(catalog, options.model)
        source = _source(options.model, catalog, workspace.access)
    name = options.name or _name_from(source)
    _require_read(catalog, name)
    # A folder without a model would stay in the catalog, and the sensor would look at it. The Hub is not asked here,
    # because it may answer later.
    if source.startswith("/") and not ((folder := locate(source).folder) / "config.json").is_file():
        if why := why_of_no_use(folder, {}):
            raise CheckpointError(f"{name}: {source}: {why}.")
        if (folder / ADAPTER).exists():
            raise CheckpointError(f"{name}: {source}: {IS_ADAPTER}. {MERGE_REMEDY}.")
        raise CheckpointError(
            f"{name}: config.json is missing from {source}. Give the complete folder that save_pretrained wrote."
        )
    if options.allow_pickle:
        print(_PICKLE_WARNING, file=sys.stderr)
    return _keep(workspace, catalog, name, source, options, rewrite=rewrite)


def _keep(
    workspace: Workspace, catalog: Catalog, name: str, source: str, options: Namespace, *, rewrite: bool
) -> ModelEntry:
    """Return the entry of that name and source: the existing one, changed as the options say, or a new one."""
    # On some disks `M` and `m` are one folder, so the catalog accepts only one of them.
    same = [known for known in catalog.models if known.name.casefold() == name.casefold()]
    own = load_catalog(workspace.catalog_path).names
    for known in same:
        if known.name in own or known.name != name:
            where = workspace.catalog_path if known.name in own else workspace.additions
            raise CatalogError(f"{where} already has a model named {known.name!r}. Give another name with --name.")
    earlier = next(iter(same), None)
    path = workspace.additions / f"{name}.yaml"
    if earlier is None:
        entry = _entry({"name": name, "source": source}, options, workspace.sources)
    elif earlier.source == source:
        entry = _entry(earlier.fields(), options, workspace.sources)
        if entry == earlier:
            return earlier
        if not rewrite:
            raise CatalogError(
                f"{name!r} is in the catalog with other settings, and this command does not change them. Leave out the "
                f"options that ask for {_differences(entry, earlier)}, or give another name with --name."
            )
    else:
        if _was_collected(workspace, name):
            raise CatalogError(
                f"{workspace.additions} already has a model named {name!r} from {earlier.source}. Give another "
                f"name with --name, or remove {path}."
            )
        entry = _entry({**earlier.fields(), "source": source}, options, workspace.sources)
    _require_unedited(path, entry, earlier)
    # An entry that cannot be used would be looked at by the sensor and by every plan. Sources elsewhere are not asked
    # here, because they may answer later.
    if kind_of(source) in ("folder", "package"):
        validate(entry, local_folder(source))
    write_entry(entry, workspace.additions)
    return entry


def _require_read(catalog: Catalog, name: str) -> None:
    """Raise CatalogError if the file of that name in the folder of additions could not be read."""
    if name in catalog.refused:
        raise CatalogError(catalog.refused[name])


def _require_unedited(path: Path, entry: ModelEntry, earlier: ModelEntry | None) -> None:
    """Refuse to replace what a user wrote.

    Raises:
        CatalogError: A user has written or edited the file. The error says what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
        if earlier is not None:  # the entry was moved into another file of that folder
            path = path.parent
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path} cannot be read: {error}. Correct or remove the file.") from None
    if earlier is None and text.strip():
        raise CatalogError(
            f"{path} exists, but holds no model named {entry.name!r}. Rename that file, or give another name with "
            "--name."
        )
    if earlier is not None and text != entry_text(earlier):
        raise CatalogError(
            f"{entry.name}: its entry in {path} was edited by hand, so this command does not rewrite it. Edit the "
            f"entry so that it has {_differences(entry, earlier)}."
        )


def _differences(entry: ModelEntry, earlier: ModelEntry) -> str:
    """Return the fields whose values differ from the earlier entry's, as text for a models file."""
    fields, before = entry.fields(), earlier.fields()
    changed = [f"{name}: {_flow(value)}" for name, value in fields.items() if before.get(name) != value]
    # A field with its default value is left out of a models file.
    return ", ".join([*changed, *(f"no {name}" for name in before if name not in fields)])


def _flow(value: object) -> str:
    """Return a value of an entry in one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _was_collected(workspace: Workspace, name: str) -> bool:
    """Return whether a checkpoint was ever collected under the name. Until then a mistyped source may be corrected."""
    try:
        workspace.store.current(Checkpoint, f"{CHECKPOINT.name}/{name}")
    except (ArtifactError, StorageError):
        return False
    return True


def _source(model: str, catalog: Catalog, access: Access) -> str:
    """Return the catalog's spelling of a source.

    Raises:
        CatalogError: The text is no source, or neither the Hub nor its cache has the model.
        CheckpointError: The text looks like a source, but is of no known kind.
    """
    if not model.strip():  # pathlib would take an unset variable of a shell for the current folder
        raise CatalogError("MODEL is empty. Give the name of a model in the catalog, a folder or a Hub id.")
    try:
        path = Path(model).expanduser()
        if path.is_dir() or model.startswith(("/", "./", "../", "~")):
            return str(path.resolve())
    except (OSError, RuntimeError) as error:  # the name is too long for the system, or is ~nobody
        raise CatalogError(f"{model[:100]} is not a folder: {error}. Give the full path of the folder.") from None
    if is_hub_id(model):
        source = model.removeprefix(HUB_PREFIX)
        if "/" not in source.split("@")[0] and source == model:
            _find_on_hub(model, catalog, access)
        return source
    if "/" not in model and ":" not in model:
        catalog.get(model)  # raises an error that names the models of the catalog
    kind_of(model)
    return model


def _find_on_hub(model: str, catalog: Catalog, access: Access) -> None:
    """Warn that the Hub's model is used, because the name may be a mistyped name of the catalog.

    Raises:
        CatalogError: Neither the Hub nor its cache on this machine has the model.
    """
    why = _absence(model, access)
    if why is not None:
        close = get_close_matches(model, catalog.names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it holds {', '.join(catalog.names) or 'none'}."
        raise CatalogError(
            f"There is no model named {model!r} in the catalog; {hint} There is no such folder here, and the "
            f"Hub's model cannot be used: {why}. Correct the name, or check the network and HF_ENDPOINT if the model "
            "is on the Hub."
        )
    print(
        f"refinery: {model} is neither in the catalog nor a folder here, so the Hub's model is used.", file=sys.stderr
    )


def _absence(model: str, access: Access) -> str | None:
    """Return why the Hub's model is not available, or None if the Hub or its cache on this machine has it."""
    try:
        hub_commit(model, access)
    except CheckpointError as error:
        with suppress(CheckpointError):
            hub_commit(model, replace(access, hub_offline=True))
            return None
        return first_line(error).removeprefix("source: ").split(". ")[0]
    return None


def _name_from(source: str) -> str:
    """Return the default name of a source's entry.

    Raises:
        CatalogError: The last part of the source makes no valid name.
    """
    kind = kind_of(source)
    if kind == "registry":
        last = parse_reference(source).name
    else:
        last = (hub_reference(source)[0] if kind == "hub" else source).rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._").lower()
    try:
        check_name(name)
    except ValueError:
        raise CatalogError(
            f"{source}: its last part cannot be made into a model name. Give a name with --name."
        ) from None
    return name


def _entry(known: Mapping[str, Any], options: Namespace, settings: SourceSettings) -> ModelEntry:
    """Return the entry with these fields, changed as the options say."""
    for option in ("seq_len", "batch_size"):
        for number in (getattr(options, option) or "1").split(","):
            if not number.strip().isdigit() or int(number) < 1:
                raise CatalogError(f"--{option.replace('_', '-')}: {number!r} is not a whole number of at least 1.")
    fields = dict(known)
    if options.allow_pickle:
        fields["allow_pickle"] = True
    fields["task"] = options.task or fields.get("task") or _guess_task(fields, settings)
    if options.seq_len or options.batch_size:
        shapes = [Shape.parse(shape) for shape in fields.get("shapes", DEFAULT_SHAPES)]
        lengths = (options.seq_len or ",".join(str(n) for n in dict.fromkeys(s.sequence for s in shapes))).split(",")
        batches = (options.batch_size or ",".join(str(n) for n in dict.fromkeys(s.batch for s in shapes))).split(",")
        fields["shapes"] = [f"{batch.strip()}x{length.strip()}" for batch, length in product(batches, lengths)]
    if options.engines:
        fields["engines"] = [engine.strip() for engine in options.engines.split(",")]
    if options.seconds is not None:
        fields["benchmark"] = {**fields.get("benchmark", {}), "seconds": options.seconds}
    if options.serving_seconds is not None:
        bounds = dict.fromkeys(("search_seconds", "benchmark_seconds"), options.serving_seconds)
        fields["serving"] = {**fields.get("serving", {}), **bounds}
    try:
        return ModelEntry.model_validate(fields)
    except ValidationError as error:
        # A source with a password in it is refused, and the error does not repeat it.
        named = fields["name"] if holds_login(options.model) else options.model
        raise CatalogError(f"{named}: {explain(error, ModelEntry)}") from None


def _guess_task(fields: Mapping[str, Any], settings: SourceSettings) -> str:
    """Return the task that the checkpoint's small files name, or `embedding` if they name none."""
    allow_pickle = bool(fields.get("allow_pickle", False))
    folder = locate(fields["source"], allow_pickle=allow_pickle, settings=settings).folder
    return task_of(folder) or "embedding"  # the checkpoint's step reports what is wrong with the checkpoint
