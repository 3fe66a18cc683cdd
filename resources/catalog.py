"""The models file: which checkpoints are optimized, for which shapes, and what counts as accurate and as best.

Strict on purpose: a field that is misspelled or of the wrong type stops everything, with the file, the model, the
field and the remedy named, before any work begins.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from resources.addresses import holds_login
from resources.artifacts.hashes import signature
from resources.errors import CatalogError
from resources.foreign import ForeignError, open_regular, read_whole
from resources.storage.atomic import write_whole
from resources.tasks import TASKS, Gates, Options
from resources.trust import Trust

#: Triton's folder names and Dagster's partition keys both have to take a model's name: no `/`, no `|`, no `...`, and
#: nothing that looks like one of our own immutable parts (`minilm__r3__engine`). No dot at the end: Dagster writes a
#: range of partitions as `first...last`.
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RESERVED_NAME = re.compile(r"__r\d+__|\.\.\.|\.$")
SHAPE_PATTERN = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,4})")


class Shape(BaseModel):
    """A batch of `batch` rows of `sequence` tokens each. Written `8x128` in the models file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    batch: int
    sequence: int

    @classmethod
    def parse(cls, text: object) -> Shape:
        """Read `8x128`; raises ValueError on anything else."""
        if isinstance(text, Shape):
            return text
        match = SHAPE_PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            read = " (YAML reads 0x16 as the number 22)" if isinstance(text, int) else ""
            raise ValueError(f"{text!r} is not a shape{read}; write batch x tokens, both from 1 up, such as 8x128")
        return cls(batch=int(match[1]), sequence=int(match[2]))

    def __str__(self) -> str:
        return f"{self.batch}x{self.sequence}"


ShapeField = Annotated[Shape, BeforeValidator(Shape.parse)]
DEFAULT_SHAPES = tuple(Shape.parse(text) for text in ("1x16", "1x128", "8x128", "32x128"))

#: What "best" means, by the figure that is compared; each is a ratio to PyTorch, combined over the shapes by the
#: geometric mean. `p50`: median latency; `p90`: its tail; `memory`: peak memory; `size`: bytes on disk.
Objective = Literal["p50", "p90", "memory", "size"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BenchmarkSettings(_Strict):
    """How long and with what each candidate is timed."""

    seconds: float = Field(default=45.0, gt=0, le=3600, description="Bound for one candidate, all in all.")
    threads: int | None = Field(
        default=None, ge=1, le=512, description="Of PyTorch, and the most an engine may use; default: all cores."
    )


class LadderSettings(_Strict):
    """How much a builder may try to rescue a reduced-precision engine that misses a gate."""

    trials: int = Field(default=48, ge=0, le=1000, description="Of engines, beyond the first; 0: no rescue.")
    seconds: float = Field(default=300.0, gt=0, le=36000, description="Bound for all trials of one engine.")


class TensorRtSettings(_Strict):
    """How TensorRT builds its engines, and how much it may take for that."""

    optimization_level: int = Field(
        default=3, ge=0, le=5, description="0: the first kernels that run, and no timing cache; 5: every kernel tried."
    )
    workspace_gb: float = Field(default=4.0, gt=0, le=1024, description="GPU memory for what kernels work in.")
    profiles: int = Field(default=4, ge=1, le=16, description="At most; each is tuned for lengths of its own.")


class RateLimiter(_Strict):
    """What an engine's instance takes of Triton's rate limiter, which works across the models of a server."""

    resources: dict[str, Annotated[int, Field(ge=1, le=10**6)]] = Field(
        default_factory=dict, description="Copies that one execution holds, by name."
    )
    priority: int = Field(
        default=1, ge=1, le=1000, description="Where resources are scarce, of turns it gets 1 / priority."
    )


class ServingSettings(_Strict):
    """How the release is served, and what may be spent on finding that out on a real server."""

    p99_ms: float | None = Field(default=None, gt=0, description="Limit of latency under that load.")
    clients: int = Field(default=16, ge=1, le=1024, description="Of the load; each asks when it has its answer.")
    search_seconds: float = Field(default=40.0, ge=0, le=36000, description="Bound for finding what follows; 0: none.")
    instances: int | None = Field(default=None, ge=1, le=64, description="Of the engine; default: by measuring.")
    queue_delay_us: int | None = Field(default=None, ge=0, le=10**7, description="The same.")
    benchmark_seconds: float = Field(default=15.0, ge=0, le=36000, description="For measuring the release; 0: not.")
    response_cache: bool = Field(
        default=False, description="Answers that were given once come from the server's cache."
    )
    rate_limiter: RateLimiter | None = None


class LimitSettings(_Strict):
    """What one request may ask for. One that asks for more is refused, and nothing else is.

    resources.pipelines.limits has the same fields, for the released models, and a test compares them.
    """

    # The least is what a release is proven with.
    text_bytes: int = Field(default=4 * 2**20, ge=4096, le=2**30, description="Of one text, in UTF-8.")
    request_bytes: int = Field(default=32 * 2**20, ge=2**17, le=2**30, description="Of all its texts together.")
    labels: int = Field(default=1000, ge=10, le=1000, description="Of one row (zero-shot classification).")
    masks: int = Field(default=100, ge=2, le=100, description="Of one row (fill-mask).")
    engine_rows: int = Field(
        default=1024, ge=1, le=2**20, description="Of all its rows, windows, labels and masks together."
    )


class ModelEntry(_Strict):
    """One model of the models file."""

    name: str
    source: str = Field(min_length=1, description="See resources.checkpoints.")
    task: str
    shapes: Annotated[tuple[ShapeField, ...] | None, Field(strict=False)] = Field(
        default=None, min_length=1, description="Default: those of the sample, else resources.evaluation.shapes."
    )
    max_batch_size: int = Field(default=32, ge=1, le=1024, description="Largest batch that is served.")
    gates: dict[str, float] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict, description="The task's, see resources.tasks.")
    evaluation: str | None = Field(default=None, min_length=1, description="A JSON Lines file of requests.")
    sample: str | None = Field(default=None, min_length=1, description="The same, for the lengths of requests alone.")
    objective: Objective = "p50"
    benchmark: BenchmarkSettings = BenchmarkSettings()
    ladder: LadderSettings = LadderSettings()
    tensorrt: TensorRtSettings = TensorRtSettings()
    serving: ServingSettings = ServingSettings()
    limits: LimitSettings = LimitSettings()
    engines: Annotated[tuple[str, ...] | None, Field(strict=False)] = Field(
        default=None, min_length=1, description="Only these engines compete; default: all."
    )
    allow_pickle: bool = False
    trust_remote_code: bool = False
    unused_weights: Literal["refuse", "allow"] = Field(
        default="refuse", description="What becomes of a checkpoint that has weights which nothing reads."
    )

    @model_validator(mode="after")
    def _check(self) -> ModelEntry:
        from resources.engines import BASELINE, ENGINES

        check_name(self.name)
        if holds_login(self.source):  # as a mistake of the whole entry, so that it is not repeated
            raise ValueError("source: it holds a name or password; give credentials by the variables of that store")
        if self.task not in TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(sorted(TASKS))}")
        self.accuracy_gates()
        self.task_options()
        known = [spec.name for spec in ENGINES if spec.name != BASELINE]
        for engine in self.engines or ():
            if engine not in known:
                raise ValueError(f"engines: {engine!r} is not one of {', '.join(known)}")
        if self.limits.engine_rows < self.max_batch_size:
            raise ValueError(
                f"limits.engine_rows: {self.limits.engine_rows} is less than max_batch_size ({self.max_batch_size}); a "
                "batch needs a row of the engine for each of its own"
            )
        if len(set(self.shapes or ())) != len(self.shapes or ()):
            raise ValueError("shapes: one shape is listed twice")
        for shape in self.shapes or ():
            if shape.batch > self.max_batch_size:
                raise ValueError(
                    f"shapes: {shape} is a larger batch than is served (max_batch_size {self.max_batch_size}); raise "
                    "max_batch_size, or list the shapes that matter without it"
                )
        return self

    @property
    def trust(self) -> Trust:
        """What loading its checkpoint may do."""
        return Trust(self.allow_pickle, self.trust_remote_code, self.unused_weights == "allow")

    def accuracy_gates(self) -> Gates:
        """The task's gates, with this entry's own values in place of the defaults. Raises ValueError."""
        gates = TASKS[self.task].gates
        try:
            return gates.model_validate(self.gates)
        except ValidationError as error:
            raise ValueError(explain(error, gates, prefix="gates.")) from None

    def task_options(self) -> Options:
        """The task's options, with this entry's own values in place of the defaults. Raises ValueError."""
        options = TASKS[self.task].options
        try:
            return options.model_validate(self.options)
        except ValidationError as error:
            raise ValueError(explain(error, options, prefix="options.")) from None

    def fields(self) -> dict[str, Any]:
        """What a models file would say of it, defaults left out: the same entry, once it is read again."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        if self.shapes is not None:
            data["shapes"] = [str(shape) for shape in self.shapes]
        return data

    def competes(self, engine: str) -> bool:
        """Whether the engine of that name is a candidate here. The PyTorch baseline is always measured."""
        return self.engines is None or engine in self.engines or engine == "torch"


#: Fields of an entry that have fields of their own.
_PARTS: dict[str, type[BaseModel]] = {
    "benchmark": BenchmarkSettings,
    "ladder": LadderSettings,
    "tensorrt": TensorRtSettings,
    "serving": ServingSettings,
    "limits": LimitSettings,
    "rate_limiter": RateLimiter,
}


class Catalog(_Strict):
    """All models, by name. refused: why an addition was not read, by its file's name without `.yaml`."""

    models: Annotated[tuple[ModelEntry, ...], Field(strict=False)] = ()
    refused: dict[str, str] = Field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.models]

    def get(self, name: str) -> ModelEntry:
        """The entry of that name. Raises CatalogError with the names there are."""
        for entry in self.models:
            if entry.name == name:
                return entry
        if name in self.refused:  # `write_entry` names files as their models
            raise CatalogError(self.refused[name])
        known = ", ".join(self.names) or "none"
        raise CatalogError(
            f"There is no model named {name!r} in the catalog (there: {known}). "
            "Add it to the models file, or give `refinery optimize` a folder or a Hub id."
        )


def check_name(name: str) -> None:
    """Raise ValueError where Triton or Dagster could not take the name."""
    if not NAME_PATTERN.fullmatch(name) or RESERVED_NAME.search(name):
        raise ValueError(
            f"name: {name!r} cannot be used by Triton and Dagster; use up to 100 of A-Z a-z 0-9 . _ - beginning "
            "with a letter or digit, not ending with a dot, without '...' and without '__r<number>__'"
        )


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line a mistake in a `model`: the field, what was given, what is right."""
    lines: list[str] = []
    for item in error.errors():
        field = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "too_short" and lines:
            continue  # a list is short because what was in it was wrong, and that is said
        if item["type"] == "extra_forbidden":
            there = model
            for part in item["loc"][:-1]:
                there = _PARTS.get(str(part), there)
            message = f"no such field; there are {', '.join(there.model_fields) or 'none'}"
        elif item["type"] == "missing":
            message = "is required"
        elif item["type"] == "tuple_type":
            message = f"must be a list, in brackets or one item a line (given: {item['input']!r})"
        elif item["type"] in ("model_type", "dict_type"):
            message = f"must be fields with values, in braces or one a line (given: {item['input']!r})"
        elif item["type"] == "string_type":
            message = f"must be text, and YAML reads it as {item['input']!r}; put it in quotes"
        elif not isinstance(item["input"], dict):
            message += f" (given: {item['input']!r})"
        lines.append(f"{field}: {message}" if field.strip(".") else message)
    return "; ".join(lines)


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
    """YAML's own loader takes the last of two equal keys in silence; one of them is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            # As written, before `<<` brings in another mapping's fields: those may be given anew.
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the field {key.value!r} is there twice; remove one", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


#: Of a models file; thousands of models take less.
_MOST_BYTES = 16 * 2**20


def _read(path: Path) -> tuple[ModelEntry, ...]:
    try:
        now = tuple(signature(path))
    except OSError:
        now = ()
    return _parse(path, now)


@lru_cache(maxsize=1024)
def _parse(path: Path, _signature: tuple[int, ...]) -> tuple[ModelEntry, ...]:
    """Return the entries of the file. The signature makes the cache forget them when the file changes."""
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
        raise CatalogError(f"{path}{line}: {error.problem}. Mend that line or the one before it.") from None
    # ValueError: what looks like a date or a number and is none, such as 2026-13-01; and text that is not UTF-8.
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
    """The entry with its paths made absolute: `./x` in a models file means beside that file."""
    changed = {}
    for field in ("source", "evaluation", "sample"):
        value = getattr(entry, field)
        # What begins otherwise may be a Hub id; the others are always files.
        if value is None or not (field != "source" or value.startswith((".", "~"))):
            continue
        try:
            changed[field] = str((path.resolve().parent / Path(value).expanduser()).resolve())
        except RuntimeError as error:  # ~nobody
            raise CatalogError(
                f"{path}: model {entry.name!r}: {field}: {value!r}: {error}; write the whole path"
            ) from None
    return entry.model_copy(update=changed)


def load_catalog(path: Path, additions: Path | None = None) -> Catalog:
    """Read the models file, and what the command line added beside it (`additions`, a folder of models files).

    Raises CatalogError with file, model, field and remedy for a mistake in the models file. An addition that cannot be
    used costs its own models alone: see Catalog.refused.
    """
    models: dict[str, tuple[ModelEntry, Path]] = {}
    refused: dict[str, str] = {}
    _add(path, _read(path), models)
    for file in sorted(additions.glob("*.yaml")) if additions and additions.is_dir() else []:
        try:
            _add(file, _read(file), models)
        except CatalogError as error:
            refused[file.stem] = f"{error}. Mend that file, or remove it; other models are not affected."
    return Catalog(models=tuple(entry for entry, _ in models.values()), refused=refused)


def _add(file: Path, entries: tuple[ModelEntry, ...], models: dict[str, tuple[ModelEntry, Path]]) -> None:
    """Add the file's entries by name, all or none. Raises CatalogError where a name is there already."""
    fresh: dict[str, tuple[ModelEntry, Path]] = {}
    for entry in entries:
        # Names become folders, and on some disks `M` and `m` are one.
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
    """What `write_entry` writes. A file with any other text has been edited."""
    return yaml.safe_dump({"models": [entry.fields()]}, sort_keys=False)


def write_entry(entry: ModelEntry, folder: Path) -> Path:
    """Write one entry as a models file of its own, named as the model; whole or not at all."""
    path = folder / f"{entry.name}.yaml"
    write_whole(path, entry_text(entry))
    return path
