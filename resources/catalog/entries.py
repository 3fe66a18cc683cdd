"""One entry of the models file: its fields and their types.

The types are strict on purpose. A field that is misspelled or of the wrong type stops everything before any work
begins. The error names the file, the model, the field and the remedy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from resources.boundary.addresses import holds_login
from resources.boundary.trust import Trust
from resources.tasks import TASKS, Gates, Options

#: A model's name must be valid both as a folder name of Triton and as a partition key of Dagster. It therefore has no
#: `/`, no `|` and no `...`, and does not look like a part of a release (`minilm__r3__engine`). It does not end with a
#: dot, because Dagster writes a range of partitions as `first...last`.
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
        """Read a shape from a text such as `8x128`, or return it if it is a shape already.

        Raises:
            ValueError: The value is neither.
        """
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

#: The figure by which the best engine is chosen: the median latency (`p50`), the 90th percentile of latency (`p90`),
#: the peak memory (`memory`) or the bytes on disk (`size`). Each is compared as a ratio to PyTorch, and the ratios of
#: all shapes are combined by the geometric mean.
Objective = Literal["p50", "p90", "memory", "size"]


class Strict(BaseModel):
    """A base for models that are frozen, convert no types, and refuse unknown fields, infinity and NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class BenchmarkSettings(Strict):
    """The time and the threads for the benchmark of each candidate."""

    seconds: float = Field(default=45.0, gt=0, le=3600, description="Bound for one candidate, all in all.")
    threads: int | None = Field(
        default=None, ge=1, le=512, description="Of PyTorch, and the most an engine may use; default: all cores."
    )


class LadderSettings(Strict):
    """The number of trials and the time in which a builder tries to rescue a reduced-precision engine.

    A rescue begins when the engine misses an accuracy gate.
    """

    trials: int = Field(default=48, ge=0, le=1000, description="Of engines, beyond the first; 0: no rescue.")
    seconds: float = Field(default=300.0, gt=0, le=36000, description="Bound for all trials of one engine.")


class TensorRtSettings(Strict):
    """The settings with which TensorRT builds its engines, and the memory that it may use."""

    optimization_level: int = Field(
        default=3, ge=0, le=5, description="0: the first kernels that run, and no timing cache; 5: every kernel tried."
    )
    workspace_gb: float = Field(default=4.0, gt=0, le=1024, description="GPU memory for what kernels work in.")
    profiles: int = Field(default=4, ge=1, le=16, description="At most; each is tuned for lengths of its own.")


class RateLimiter(Strict):
    """The resources and the priority of an engine's instances in Triton's rate limiter.

    The rate limiter works across all models of a server.
    """

    resources: dict[str, Annotated[int, Field(ge=1, le=10**6)]] = Field(
        default_factory=dict, description="Copies that one execution holds, by name."
    )
    priority: int = Field(
        default=1, ge=1, le=1000, description="Where resources are scarce, of turns it gets 1 / priority."
    )


class ServingSettings(Strict):
    """The settings with which the release is served, and the time for finding them on a real server."""

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


class LimitSettings(Strict):
    """The largest request that a release answers. A larger request is refused, and other requests are unaffected.

    resources.pipelines.limits has the same fields, for the released models. A test compares the two.
    """

    # The lower bound of each limit is the size of the requests that prove a release.
    text_bytes: int = Field(default=4 * 2**20, ge=4096, le=2**30, description="Of one text, in UTF-8.")
    request_bytes: int = Field(default=32 * 2**20, ge=2**17, le=2**30, description="Of all its texts together.")
    labels: int = Field(default=1000, ge=10, le=1000, description="Of one row (zero-shot classification).")
    masks: int = Field(default=100, ge=2, le=100, description="Of one row (fill-mask).")
    engine_rows: int = Field(
        default=1024, ge=1, le=2**20, description="Of all its rows, windows, labels and masks together."
    )


class ModelEntry(Strict):
    """One model of the models file."""

    name: str
    source: str = Field(min_length=1, description="See resources.checkpoints.")
    task: str
    shapes: Annotated[tuple[ShapeField, ...] | None, Field(strict=False)] = Field(
        default=None, min_length=1, description="Default: those of the sample, else resources.checkpoints.shapes."
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
        from resources.engines.specs import BASELINE, ENGINES

        check_name(self.name)
        if holds_login(self.source):  # not a field's validator, because the message of a field quotes its value
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
                    f"shapes: the batch of {shape} is larger than max_batch_size {self.max_batch_size}; raise "
                    "max_batch_size, or list the shapes that matter without it"
                )
        return self

    @property
    def trust(self) -> Trust:
        """The permissions for loading the entry's checkpoint."""
        return Trust(self.allow_pickle, self.trust_remote_code, self.unused_weights == "allow")

    def accuracy_gates(self) -> Gates:
        """Return the task's gates, with this entry's own values in place of the defaults.

        Raises:
            ValueError: The entry has a gate that the task does not have, or a wrong value.
        """
        gates = TASKS[self.task].gates
        try:
            return gates.model_validate(self.gates)
        except ValidationError as error:
            raise ValueError(explain(error, gates, prefix="gates.")) from None

    def task_options(self) -> Options:
        """Return the task's options, with this entry's own values in place of the defaults.

        Raises:
            ValueError: The entry has an option that the task does not have, or a wrong value.
        """
        options = TASKS[self.task].options
        try:
            return options.model_validate(self.options)
        except ValidationError as error:
            raise ValueError(explain(error, options, prefix="options.")) from None

    def fields(self) -> dict[str, Any]:
        """Return the entry as the fields of a models file, without defaults. Reading them gives the same entry."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        if self.shapes is not None:
            data["shapes"] = [str(shape) for shape in self.shapes]
        return data

    def competes(self, engine: str) -> bool:
        """Return whether the engine of that name is a candidate. The PyTorch baseline is always measured."""
        return self.engines is None or engine in self.engines or engine == "torch"


#: The fields of an entry that have fields of their own, and their models.
_PARTS: dict[str, type[BaseModel]] = {
    "benchmark": BenchmarkSettings,
    "ladder": LadderSettings,
    "tensorrt": TensorRtSettings,
    "serving": ServingSettings,
    "limits": LimitSettings,
    "rate_limiter": RateLimiter,
}


def check_name(name: str) -> None:
    """Check that Triton and Dagster accept a model's name.

    Raises:
        ValueError: One of them does not.
    """
    if not NAME_PATTERN.fullmatch(name) or RESERVED_NAME.search(name):
        raise ValueError(
            f"name: {name!r} cannot be used by Triton and Dagster; use up to 100 of A-Z a-z 0-9 . _ - beginning "
            "with a letter or digit, not ending with a dot, without '...' and without '__r<number>__'"
        )


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """Describe the mistakes in the fields of a `model` in one line.

    Each mistake names the field, the given value and the right form. The mistakes are joined by semicolons.
    """
    lines: list[str] = []
    for item in error.errors():
        field = prefix + ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "too_short" and lines:
            continue  # pydantic drops wrong items before it counts, and those mistakes are in the list already
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
