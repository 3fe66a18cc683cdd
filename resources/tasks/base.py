"""The interface of a task: the module to export, the checks of a checkpoint, and the comparison of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from resources.errors import CheckpointError
from resources.pipelines import pipeline_class

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder

Metrics = dict[str, float]

#: The largest number of labels that one classifier may have.
MOST_LABELS = 100_000


class Gates(BaseModel):
    """The thresholds that an engine must keep to be eligible.

    Every task has its own gates, and the models file can change them. A gate has the name of the metric that it bounds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    def tightened(self, share: float) -> Self:
        """Return these gates, each moved by `share` of the way to perfect answers."""
        values = {}
        for name, info in type(self).model_fields.items():
            value, best = getattr(self, name), 1.0 if bound_of(info) == "least" else 0.0
            values[name] = value + share * (best - value)
        return self.model_copy(update=values)

    def for_some(self, share: float, chance: float = 0.0) -> Self:
        """Return these gates for a part of the items.

        All wrong answers that a gate allows may lie in that part. A rate of .99 allows 3 wrong answers of 320, and 3 of
        96 are a rate of .97. So the gates of means and rates are lowered, and the gates of the worst item stay.

        Args:
            share: The part's share of all items.
            chance: A further share of all items that may be wrong. It does not apply to means.
        """
        values = {
            name: 1 - (1 - getattr(self, name) + (0.0 if info.json_schema_extra["mean"] else chance)) / share
            for name, info in type(self).model_fields.items()
            if not self.is_worst(name) and isinstance(info.json_schema_extra, dict)
        }
        return self.model_copy(update=values)

    @classmethod
    def is_worst(cls, name: str) -> bool:
        """Return whether the gate's metric is that of the worst item, and not a mean or a rate over all items."""
        extra = cls.model_fields[name].json_schema_extra
        assert isinstance(extra, dict), "every gate is made by at_least or at_most"
        return extra["bound"] == "most" or bool(extra["worst"])


def bound_of(info: FieldInfo) -> str:
    """Return `least` if a metric must reach the gate, and `most` if it must not exceed the gate."""
    extra = info.json_schema_extra
    assert isinstance(extra, dict), "every gate is made by at_least or at_most"
    return str(extra["bound"])


def at_least(value: float, low: float = 0.0, *, worst: bool = False, mean: bool = False) -> Any:
    """Declare a gate that a metric must reach. The best value of the metric is 1.

    The metric is a rate, which is the share of right answers, unless `worst` or `mean` is set. With `worst` it is the
    metric of the worst item, and with `mean` it is a mean over all items. `low` is the lowest gate that can be set.
    """
    return Field(default=value, ge=low, le=1.0, json_schema_extra={"bound": "least", "worst": worst, "mean": mean})


def at_most(value: float, high: float | None = None) -> Any:
    """Declare a gate that the metric of the worst item must not exceed. The best value of the metric is 0.

    `high` is the highest gate that can be set.
    """
    return Field(default=value, ge=0.0, le=high, json_schema_extra={"bound": "most"})


class Options(BaseModel):
    """The choices about its answers that a task leaves to the user.

    They belong to the release and not to the engine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a checkpoint that tasks read without loading it.

    Args:
        name: The model's name.
        folder: The checkpoint's folder.
        config: The content of config.json.
        settings: The pipeline's settings, once they are known.
        allow_unused: Accept a checkpoint with weights that nothing reads.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    allow_unused: bool = False

    @property
    def architecture(self) -> str:
        """The class that transformers saved it from, such as `BertForSequenceClassification`.

        It is empty if the checkpoint does not record it.
        """
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def refuse(self, why: str, remedy: str) -> CheckpointError:
        """Return the error for a checkpoint that the task cannot take."""
        # The reason may quote a foreign file, and be as long as that file.
        return CheckpointError(f"{self.name}: {why:.1000}. {remedy}")

    def require_head(self, task: str, head: str, what: str) -> None:
        """Raise CheckpointError unless the checkpoint was saved from a class whose name ends with `head`."""
        if not self.architecture.endswith(head):
            other = "the task it was trained for" if "For" in self.architecture else "task 'embedding'"
            raise self.refuse(
                f"task {task!r} needs a checkpoint with {what}, and this one is a "
                f"{self.architecture or 'model of unknown architecture'}",
                f"Use {other}, or a checkpoint saved from ...{head}",
            )


@dataclass(frozen=True)
class SpecialTokens:
    """The tokenizer's special tokens that pipelines need. A token that the tokenizer does not have is None.

    Args:
        clean_up: Whether the tokenizer removes spaces before punctuation when it turns tokens into text.
    """

    pad_id: int | None = None
    clean_up: bool = False
    unknown_id: int | None = None
    mask_id: int | None = None
    mask_token: str | None = None


@dataclass(frozen=True)
class Library:
    """The library that users would otherwise run, with the checkpoint loaded.

    Args:
        name: The library's name and version, and the function in use.
        answer: The function that returns the library's answer to one request, in the form of the task's pipeline. It
            returns None if the library does not take the request.
    """

    name: str
    answer: Callable[[Item], Any]


#: The remedy for a checkpoint with weights that nothing reads.
UNUSED_REMEDY = (
    "If they do not matter, write unused_weights: allow into its entry of the models file, or of the file below "
    "REFINERY_HOME/models.d that is called as the model"
)

#: The largest distance of a number from the library's. Both compute in fp32, but in a different order. Numbers beyond 1
#: are compared relative to their size.
TOLERANCE = 1e-4


def is_near(expected: float, found: float) -> bool:
    """Return whether a number equals the library's, apart from the order in which fp32 was added up.

    NaN equals no number.
    """
    return abs(expected - found) <= TOLERANCE * max(1.0, abs(expected))


class Task(ABC):
    """One task. Instances hold no state, and the methods import the heavy libraries that they need.

    Attributes:
        name: The task's name in the models file.
        gates: The class of the task's gates.
        options: The class of the task's options.
        per_token: Whether the engine answers each token, fp32 `[batch, sequence, width]`, and not each row, fp32
            `[batch, width]`.
        extra_inputs: The engine's inputs beside those of the tokenizer, int64 `[batch, 1]`.
        fields: The fields that a line of a user's evaluation file may have.
        computing: The options that change what the engine computes. The other options change how its numbers become
            answers.
    """

    name: ClassVar[str]
    gates: ClassVar[type[Gates]]
    options: ClassVar[type[Options]] = Options
    per_token: ClassVar[bool] = False
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[str, ...]]
    computing: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, files: CheckpointFiles) -> None:
        """Raise CheckpointError if the checkpoint cannot do this task. The check reads no weights."""

    def example(self, settings: dict[str, Any]) -> str:
        """Return example arguments of `refinery query` for a model of this task, as a user types them into a shell."""
        return '"any text"'

    @abstractmethod
    def output(self, files: CheckpointFiles) -> str:
        """Return the name of the engine's output."""

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        """Return the names of the columns of the engine's output, in order, or nothing if they have no names."""
        return ()

    @abstractmethod
    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        """Return the module to export, which turns token ids into the numbers that the pipeline needs, in fp32.

        `load` is passed to `from_pretrained`. Pooling, normalization and softmax are part of the module and stay in
        fp32, because in half precision `clamp(min=1e-9)` is 0 and a row of only padding becomes NaN.
        The module's `forward` takes `input_ids`, `attention_mask`, `token_type_ids` if the model knows them, and the
        `extra_inputs`.
        """

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        """Return the settings of the task's pipeline in resources.pipelines.

        Raises:
            CheckpointError: The checkpoint lacks something that the pipeline needs.
        """
        return options.model_dump()

    def assumed(self, files: CheckpointFiles, options: Options) -> tuple[str, ...]:
        """Return the choices that neither the checkpoint nor the models file makes, written as in a models file."""
        return ()

    def max_tokens(self, limit: int, options: Options) -> int:
        """Return the largest number of tokens of one row, for a checkpoint that takes at most `limit`."""
        return limit

    def stride(self, max_tokens: int, options: Options) -> int:
        """Return the number of tokens that neighbouring windows of a long text have in common."""
        return 0

    @abstractmethod
    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        """Return the library whose answers the task's answers must equal, used as its documentation says.

        The library reads the checkpoint's configuration by itself. Only the choices of the models file may be passed to
        it. With anything else of this project it would share the project's mistakes.

        Args:
            files: The checkpoint.
            settings: The pipeline's settings, which hold choices of the models file.
            tokenizer: An instance of transformers' tokenizer class, with tokenizer.json as it was trained.
            encoder: The encoder, which holds the models file's choices of lengths and strides.
            **load: Arguments for `from_pretrained`.
        """

    @abstractmethod
    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        """Return how an answer differs from the library's answer `expected`, or an empty text if it does not."""

    @abstractmethod
    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        """Return the evaluation items for a user who gives none. A row has at most `max_tokens` tokens."""

    @abstractmethod
    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        """Return the items of one line of a user's evaluation file, each with its right answer or None.

        Raises:
            ValueError: A field is missing or has a wrong value.
        """

    @abstractmethod
    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        """Return the task's usual metrics of answers against the right ones, or none if no right answer is known."""

    def too_little(self, settings: dict[str, Any], baseline: Sequence[Any]) -> str:
        """Return why PyTorch's answers say too little to judge an engine, or an empty text if they suffice."""
        return ""

    def odd_items(self, settings: dict[str, Any], text: str) -> list[Item]:
        """Return requests with an odd text in every place where a user may write a text. Each request has an answer."""
        return [dict.fromkeys(pipeline_class(self.name).inputs, text)]

    def refused_items(self, settings: dict[str, Any]) -> list[Item]:
        """Return requests that have no answer. Each of them is refused on its own."""
        return []

    @abstractmethod
    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        """Return how alike the two answers to each item are, fp64 `[items]`.

        A score of 1 means equal, and lower is worse. Callers use the scores to find the worst items.
        """

    @abstractmethod
    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        """Return the task's metrics of `answers` against PyTorch's answers, with one answer for each item."""

    def gate_names(self, settings: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the gates that apply to a checkpoint with these settings.

        The metrics of its answers include every one of them.
        """
        return tuple(self.gates.model_fields)

    def misses(self, names: Sequence[str], metrics: Metrics, gates: Gates) -> list[str]:
        """Return the named gates that the metrics miss, each as a sentence. NaN misses every gate."""
        found = []
        for name in names:
            limit, value = getattr(gates, name), metrics[name]
            bound = bound_of(self.gates.model_fields[name])
            if bound == "least" and not value >= limit:
                found.append(f"{name} {value:.5f} is below {limit:g}")
            elif bound == "most" and not value <= limit:
                found.append(f"{name} {value:.5f} is above {limit:g}")
        return found

    def worse(self, name: str, values: Sequence[float]) -> float:
        """Return the worst of several values of a metric.

        It is the highest value of an error, and the lowest value of any other metric. NaN is worse than any value.
        """
        import numpy as np

        info = self.gates.model_fields.get(name)
        error = bound_of(info) == "most" if info is not None else name.endswith("_error")
        return float(np.max(values) if error else np.min(values))


def broken_answers(baseline: Sequence[Any], answers: Sequence[Any]) -> str:
    """Return why the answers cannot be compared with the baseline, or an empty text if they can.

    Reasons are a wrong number or shape of answers, NaN and infinity. There is one answer for each item.
    """
    import numpy as np

    if len(answers) != len(baseline):
        return f"{len(answers)} answers where PyTorch gives {len(baseline)}"
    if not len(baseline):
        return "no answers to compare"
    for expected, found in zip(baseline, answers, strict=True):
        if np.shape(expected) != np.shape(found) and isinstance(expected, np.ndarray):
            return f"an answer of shape {np.shape(found)} where PyTorch gives {np.shape(expected)}"
    for whose, values in (("the", answers), ("PyTorch's", baseline)):
        bad = sum(not all(np.isfinite(number).all() for number in _numbers(value)) for value in values)
        if bad:
            return f"NaN or infinity in {whose} answers to {bad} of {len(values)} texts"
    return ""


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif not isinstance(value, str):
        yield value


def stacked(answers: Sequence[Any]) -> np.ndarray:
    """Return answers that are numbers as one fp64 array `[items, width]`."""
    import numpy as np

    return np.stack([np.asarray(answer) for answer in answers]).astype(np.float64)


def load_pretrained(
    auto_class: Any, files: CheckpointFiles, *, unread: tuple[str, ...] = (), **load: Any
) -> torch.nn.Module:
    """Load a checkpoint with `from_pretrained`, in fp32 and in evaluation mode.

    Missing weights are refused here, because transformers fills them with random numbers and only warns. `unread` has
    the beginnings of the names of weights that the task never reads. These may be missing.

    Raises:
        CheckpointError: transformers cannot load the checkpoint, or its weights do not fit the model: some are missing,
            have a wrong shape, or have no place in the model.
    """
    import torch

    try:
        model, info = auto_class.from_pretrained(
            files.folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error below names the weights, and transformers' own error does not
            local_files_only=True,
            **load,
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{files.name}: transformers cannot load it as {auto_class.__name__}: {first[:300]}"
        ) from error
    if unused := _unused(files, model, info["unexpected_keys"]):
        named = ", ".join([*unused[:3], "..."] if len(unused) > 3 else unused)
        raise files.refuse(
            f"{type(model).__name__} has no place for {len(unused)} of its weights ({named}), so answers would not be "
            "this checkpoint's",
            f"Give the task that it was trained for. {UNUSED_REMEDY}",
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(unread))
    if missing:
        raise CheckpointError(
            f"{files.name}: the checkpoint lacks {len(missing)} weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); they would be random. "
            "Give the task this checkpoint was trained for, or a complete checkpoint."
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, stored, wanted = wrong[0]
        raise CheckpointError(
            f"{files.name}: {len(wrong)} weights are not of the shape that config.json asks for, the first being {key} "
            f"with {list(stored)} where {type(model).__name__} has {list(wanted)}. Give the config.json that was saved "
            "with these weights."
        )
    return model.eval()


def _unused(files: CheckpointFiles, model: Any, names: Iterable[str]) -> list[str]:
    """Return the names of the weights that nothing reads, although the task's answers may depend on them.

    Poolers and tables that transformers computes by itself are left out. So is the head of a model that was trained to
    fill in masks, because the task then wants another head or none.
    """
    if files.allow_unused:
        return []
    masked = files.architecture.endswith(("ForMaskedLM", "ForPreTraining"))
    inside = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in names
        if "pooler." not in name
        and not name.endswith(("position_ids", "inv_freq", "masked_bias"))
        and not (masked and not name.startswith(inside))
    )


def read_labels(files: CheckpointFiles) -> tuple[str, ...]:
    """Return the labels in `id2label` of config.json, in order. A label without a name is `LABEL_0` and so on.

    The labels are counted as transformers counts them: a table without gaps gives the number of labels, and
    `num_labels` is only read if there are gaps or no table.

    Raises:
        CheckpointError: `id2label` or `num_labels` is invalid.
    """
    table, count = files.config.get("id2label"), files.config.get("num_labels")
    if count is not None and (type(count) is not int or not 0 <= count <= MOST_LABELS):
        raise files.refuse(
            f"config.json, num_labels: {count!r:.60} is not a number of labels",
            "Write the number of the head's outputs",
        )
    try:
        names = {_label_number(index): str(label) for index, label in (table or {}).items()}
    except (ValueError, AttributeError):
        raise files.refuse(
            "config.json, id2label: its keys are not the numbers of the labels",
            'Write it as {"0": "the first label", "1": ...}',
        ) from None
    whole = bool(names) and names.keys() == {*range(len(names))}
    total = len(names) if whole else count or len(names) or 2  # transformers' own default is 2
    if names and max(names) >= total:
        raise files.refuse(
            f"config.json, id2label: it names label {max(names)}, and there are {total}",
            "Name every label there, from 0 up",
        )
    return tuple(names.get(index, f"LABEL_{index}") for index in range(total))


def _label_number(text: str) -> int:
    """Return the number of a label. Raise ValueError if the text is no such number."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_LABELS))):
        raise ValueError(text)
    return int(text)
