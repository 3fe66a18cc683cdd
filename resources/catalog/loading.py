"""The reader of the models file, and of the files that the command line adds to it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from resources.artifacts.hashes import signature
from resources.boundary.foreign import ForeignError, open_regular, read_whole
from resources.catalog.entries import ModelEntry, Strict, explain
from resources.errors import CatalogError
from resources.storage.atomic import write_whole


class Catalog(Strict):
    """All models of the models file and of the additions to it.

    Args:
        models: The entries.
        refused: Why an addition could not be used, by the name of its file without `.yaml`.
    """

    models: Annotated[tuple[ModelEntry, ...], Field(strict=False)] = ()
    refused: dict[str, str] = Field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return [entry.name for entry in self.models]

    def get(self, name: str) -> ModelEntry:
        """Return the entry of that name.

        Raises:
            CatalogError: There is none, or its addition was refused. The error lists the names of all models, or says
                why the addition was refused.
        """
        for entry in self.models:
            if entry.name == name:
                return entry
        if name in self.refused:  # `write_entry` names a file after its model
            raise CatalogError(self.refused[name])
        known = ", ".join(self.names) or "none"
        raise CatalogError(
            f"There is no model named {name!r} in the catalog (there: {known}). "
            "Add it to the models file, or give `refinery optimize` a folder or a Hub id."
        )


def _parse_entry(data: Any, path: Path, position: int) -> ModelEntry:
    label = data.get("name") if isinstance(data, dict) else None
    where = f"{path}: model {label!r}" if isinstance(label, str) else f"{path}: model number {position}"
    if not isinstance(data, dict):
        raise CatalogError(f"{where}: is not a mapping of fields; write '- name: ...' and the fields below it")
    try:
        return ModelEntry.model_validate(data)
    except ValidationError as error:
        raise CatalogError(f"{where}: {explain(error, ModelEntry)}") from None


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a mapping in which a key is there twice.

    PyYAML's own loader silently takes the last of two equal keys, and one of them is a mistake.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # The keys are checked as written, before `<<` merges another mapping. Merged fields may be overridden.
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the field {key.value!r} is there twice; remove one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


#: The most bytes of a models file. Thousands of models take less.
_MOST_BYTES = 16 * 2**20


def _read(path: Path) -> tuple[ModelEntry, ...]:
    try:
        now = tuple(signature(path))
    except OSError:
        now = ()
    return _parse(path, now)


@lru_cache(maxsize=1024)
def _parse(path: Path, _signature: tuple[int, ...]) -> tuple[ModelEntry, ...]:
    """Return the entries of the file.

    The signature is part of the cache's key, so a file that has changed is read again.
    """
    try:
        with open_regular(path) as stream:
            text = read_whole(stream, _MOST_BYTES)
        if text is None:
            raise CatalogError(f"The models file {path} is larger than {_MOST_BYTES // 2**20} MB")
        data = yaml.load(text.decode(), _UniqueKeys)  # noqa: S506 - a SafeLoader
    except FileNotFoundError:
        raise CatalogError(f"The models file {path} does not exist. Set REFINERY_CATALOG to the right one.") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CatalogError(f"{path}{line}: {error.problem}. Correct that line or the one before it.") from None
    # PyYAML raises ValueError for a text such as 2026-13-01, which looks like a date and is none. Text that is not
    # UTF-8 raises it too.
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CatalogError(f"The models file {path} cannot be read: {error}. Write it as YAML in UTF-8.") from None
    except ForeignError as error:
        raise CatalogError(f"The models file cannot be read: {error}") from None
    except RecursionError:
        raise CatalogError(f"The models file {path} cannot be read: it is nested too deeply") from None
    if not isinstance(data, dict) or set(data) != {"models"} or not isinstance(data["models"], list):
        raise CatalogError(f"{path}: the file must hold one field, 'models', with a list of models")
    entries = [_parse_entry(item, path, number) for number, item in enumerate(data["models"], start=1)]
    return tuple(_anchored(entry, path) for entry in entries)


def _anchored(entry: ModelEntry, path: Path) -> ModelEntry:
    """Make the entry's paths absolute. They are relative to the folder of the models file."""
    changed = {}
    for field in ("source", "evaluation", "sample"):
        value = getattr(entry, field)
        # A source that does not begin with `.` or `~` may be a Hub id. The other two fields always name files.
        if value is None or not (field != "source" or value.startswith((".", "~"))):
            continue
        try:
            changed[field] = str((path.resolve().parent / Path(value).expanduser()).resolve())
        except RuntimeError as error:  # expanduser raises it for a user that does not exist
            raise CatalogError(
                f"{path}: model {entry.name!r}: {field}: {value!r}: {error}; write the whole path"
            ) from None
    return entry.model_copy(update=changed)


def load_catalog(path: Path, additions: Path | None = None) -> Catalog:
    """Read the models file and the additions of the command line.

    A mistake in an addition affects only the models of that addition; see `Catalog.refused`.

    Args:
        path: The models file.
        additions: The folder with the models files that the command line wrote.

    Raises:
        CatalogError: The models file has a mistake. The error names the file, the model, the field and the remedy.
    """
    models: dict[str, tuple[ModelEntry, Path]] = {}
    refused: dict[str, str] = {}
    _add(path, _read(path), models)
    for file in sorted(additions.glob("*.yaml")) if additions and additions.is_dir() else []:
        try:
            _add(file, _read(file), models)
        except CatalogError as error:
            refused[file.stem] = f"{error}. Correct that file, or remove it; other models are not affected."
    return Catalog(models=tuple(entry for entry, _ in models.values()), refused=refused)


def _add(file: Path, entries: tuple[ModelEntry, ...], models: dict[str, tuple[ModelEntry, Path]]) -> None:
    """Add all entries of a file to `models`, or none of them.

    Raises:
        CatalogError: A name is there already.
    """
    fresh: dict[str, tuple[ModelEntry, Path]] = {}
    for entry in entries:
        # Names become folders, and some file systems do not distinguish `M` from `m`.
        key = entry.name.casefold()
        known, first = models.get(key) or fresh.get(key) or (None, None)
        if known is not None:
            as_what = "" if known.name == entry.name else f" as {known.name!r}"
            raise CatalogError(
                f"{file}: model {entry.name!r}: name: a model of that name is already in {first}{as_what}; rename one"
            )
        fresh[key] = (entry, file)
    models.update(fresh)


def entry_text(entry: ModelEntry) -> str:
    """Return the text that `write_entry` writes. A file with any other text has been edited."""
    return yaml.safe_dump({"models": [entry.fields()]}, sort_keys=False)


def write_entry(entry: ModelEntry, folder: Path) -> Path:
    """Write one entry as a models file of its own that is named after the model. The write is atomic."""
    path = folder / f"{entry.name}.yaml"
    write_whole(path, entry_text(entry))
    return path
