"""What a task is: the exportable module, the checks of a checkpoint, and what "the same answer" means."""

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

#: Of one classifier.
MOST_LABELS = 100_000


class Gates(BaseModel):
    """Thresholds a candidate must keep to be eligible. Every task has its own; the models file can change them.

    A gate has the name of the metric that it bounds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)

    def tightened(self, share: float) -> Self:
        """These gates moved by that share of the way to perfect answers."""
        values = {}
        for name, info in type(self).model_fields.items():
            value, best = getattr(self, name), 1.0 if bound_of(info) == "least" else 0.0
            values[name] = value + share * (best - value)
        return self.model_copy(update=values)

    def for_some(self, share: float, chance: float = 0.0) -> Self:
        """These gates for a part of the items, as large a share of them all.

        All that an engine may get wrong can be among them: a rate of .99 allows 3 of 320, and 3 of 96 are one of .97.
        Means and rates are bounded by that; what the worst item has to reach stays. chance: a further share of all
        items that may be wrong; a mean has no such items.
        """
        values = {
            name: 1 - (1 - getattr(self, name) + (0.0 if info.json_schema_extra["mean"] else chance)) / share
            for name, info in type(self).model_fields.items()
            if not self.is_worst(name) and isinstance(info.json_schema_extra, dict)
        }
        return self.model_copy(update=values)

    @classmethod
    def is_worst(cls, name: str) -> bool:
        """Whether the gate's metric is that of the worst item, and not a mean or a rate over all of them."""
        extra = cls.model_fields[name].json_schema_extra
        assert isinstance(extra, dict), "every gate is made by at_least or at_most"
        return extra["bound"] == "most" or bool(extra["worst"])


def bound_of(info: FieldInfo) -> str:
    """`least` or `most`: on which side of a gate its metric has to be."""
    extra = info.json_schema_extra
    assert isinstance(extra, dict), "every gate is made by at_least or at_most"
    return str(extra["bound"])


def at_least(value: float, low: float = 0.0, *, worst: bool = False, mean: bool = False) -> Any:
    """A gate that a metric must reach. At best the metric is 1.

    worst: the metric is that of the worst item; mean: it is a mean over all; else a rate, the share that is right.
    """
    return Field(default=value, ge=low, le=1.0, json_schema_extra={"bound": "least", "worst": worst, "mean": mean})


def at_most(value: float, high: float | None = None) -> Any:
    """A gate that a metric, which is that of the worst item, must not exceed. At best the metric is 0."""
    return Field(default=value, ge=0.0, le=high, json_schema_extra={"bound": "most"})


class Options(BaseModel):
    """What a task's answers look like, where that is a matter of choice. Part of the release, not of the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a checkpoint that tasks read without loading it.

    settings: the pipeline's, once they are known. allow_unused: weights that nothing reads are no reason to refuse it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    allow_unused: bool = False

    @property
    def architecture(self) -> str:
        """The class transformers saved it from, `BertForSequenceClassification` say; empty where not recorded."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    def refuse(self, why: str, remedy: str) -> CheckpointError:
        """The error for a checkpoint that the task cannot take."""
        # What a foreign file says may be as long as the file.
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
    """What a tokenizer calls the tokens that pipelines ask for; None where it has none. clean_up: whether it removes
    spaces before punctuation when it makes text of tokens.
    """

    pad_id: int | None = None
    clean_up: bool = False
    unknown_id: int | None = None
    mask_id: int | None = None
    mask_token: str | None = None


@dataclass(frozen=True)
class Library:
    """A library that users would have used, with the checkpoint loaded.

    answer: what it says to one request, in the form of the task's pipeline; None: it takes no such request.
    """

    name: str
    answer: Callable[[Item], Any]


#: For weights that nothing reads.
UNUSED_REMEDY = (
    "If they do not matter, write unused_weights: allow into its entry of the models file, or of the file below "
    "REFINERY_HOME/models.d that is called as the model"
)

#: How far a number may lie from the library's: both compute in fp32, in another order. Numbers beyond 1 are compared
#: relative to their size.
TOLERANCE = 1e-4


def is_near(expected: float, found: float) -> bool:
    """Whether a number is the library's, but for the order in which fp32 was added up. NaN never is."""
    return abs(expected - found) <= TOLERANCE * max(1.0, abs(expected))


class Task(ABC):
    """One task. Instances hold no state; heavy libraries are imported inside the methods that need them.

    `per_token`: the engine answers each token, fp32 `[batch, sequence, width]`, and not each row `[batch, width]`.
    `extra_inputs`: inputs of the engine beside the tokenizer's, int64 `[batch, 1]`.
    `fields`: what a line of a user's file may hold.
    `computing`: the options that decide what the engine computes. The others decide how its numbers become answers.
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
        """Raise CheckpointError where the checkpoint cannot do this task. Reads no weights."""

    def example(self, settings: dict[str, Any]) -> str:
        """What `refinery query` is given for a model of this task, as it is typed into a shell."""
        return '"any text"'

    @abstractmethod
    def output(self, files: CheckpointFiles) -> str:
        """The name of the engine's output."""

    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        """What the columns of the engine's output are called, in order; empty where they have no names."""
        return ()

    @abstractmethod
    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        """The module that is exported: token ids in, what the pipeline needs out, in fp32.

        `load` goes to `from_pretrained`. Pooling, normalization and softmax are part of the module and stay in fp32:
        in half precision `clamp(min=1e-9)` is 0 and a row of padding alone becomes NaN.
        Its `forward` takes `input_ids`, `attention_mask`, where the model knows them `token_type_ids`, and the
        `extra_inputs`.
        """

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        """What the task's pipeline (resources.pipelines) is made with. Raises CheckpointError."""
        return options.model_dump()

    def assumed(self, files: CheckpointFiles, options: Options) -> tuple[str, ...]:
        """Name the choices that neither the checkpoint nor the models file makes, as a models file would write them."""
        return ()

    def max_tokens(self, limit: int, options: Options) -> int:
        """Tokens of one row, where the checkpoint takes at most `limit`."""
        return limit

    def stride(self, max_tokens: int, options: Options) -> int:
        """Tokens that neighbouring windows of a long text have in common."""
        return 0

    @abstractmethod
    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        """The library that answers are to equal, used as its documentation says.

        It reads the checkpoint's configuration by itself. Nothing of ours but the choices of the models file may reach
        it, or it shares our mistakes.

        Args:
            tokenizer: transformers' class of it, with tokenizer.json as it was trained.
            encoder: Where the models file's choices are: lengths, strides.
        """

    @abstractmethod
    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        """Say how an answer differs from the library's, `expected`. Returns an empty text where it does not."""

    @abstractmethod
    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        """The evaluation items where the user gives none. max_tokens: of one row."""

    @abstractmethod
    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        """The items of one line of a user's evaluation file, each with its right answer or None. Raises ValueError."""

    @abstractmethod
    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        """The task's usual metrics of answers against the right ones; no metric where none are known."""

    def too_little(self, settings: dict[str, Any], baseline: Sequence[Any]) -> str:
        """Why PyTorch's answers to the items say too little about an engine; empty: they say enough."""
        return ""

    def odd_items(self, settings: dict[str, Any], text: str) -> list[Item]:
        """Requests with an odd text in every place where a user may write one; each has an answer."""
        return [dict.fromkeys(pipeline_class(self.name).inputs, text)]

    def refused_items(self, settings: dict[str, Any]) -> list[Item]:
        """Requests that have no answer and are refused, each for itself."""
        return []

    @abstractmethod
    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        """How alike two answers to each item are, fp64 `[items]`; 1 is equal, lower is worse. For finding the worst."""

    @abstractmethod
    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        """The task's metrics of `answers` against PyTorch's, one answer an item."""

    def gate_names(self, settings: dict[str, Any]) -> tuple[str, ...]:
        """The gates that apply to such a checkpoint; its metrics hold every one of them."""
        return tuple(self.gates.model_fields)

    def misses(self, names: Sequence[str], metrics: Metrics, gates: Gates) -> list[str]:
        """The gates of those names that the metrics miss, each as a sentence. NaN misses every gate."""
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
        """The worst of several values of a metric: the lowest, but of errors the highest. NaN is worse than any."""
        import numpy as np

        info = self.gates.model_fields.get(name)
        error = bound_of(info) == "most" if info is not None else name.endswith("_error")
        return float(np.max(values) if error else np.min(values))


def broken_answers(baseline: Sequence[Any], answers: Sequence[Any]) -> str:
    """Why answers, one an item, cannot be compared at all (wrong shape, NaN, infinity); empty where they can."""
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
    """Answers that are numbers as fp64 `[items, width]`."""
    import numpy as np

    return np.stack([np.asarray(answer) for answer in answers]).astype(np.float64)


def load_pretrained(
    auto_class: Any, files: CheckpointFiles, *, unread: tuple[str, ...] = (), **load: Any
) -> torch.nn.Module:
    """`from_pretrained` as fp32 in evaluation mode, refusing a checkpoint that lacks weights of the model.

    transformers fills missing weights with random numbers and a warning. `unread`: the beginnings of names of weights
    that the task never reads, and that may be missing. Raises CheckpointError.
    """
    import torch

    try:
        model, info = auto_class.from_pretrained(
            files.folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name: transformers' own error names none
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
    """The weights that nothing reads, and that were trained to be read by somebody who asks for this task.

    Not poolers, not the head of a model that was trained to fill in masks where another head or none is wanted, and not
    tables that transformers computes by itself.
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
    """`id2label` of config.json in order; `LABEL_0` and so on where it has none. Raises CheckpointError.

    As transformers counts them: a whole table says how many there are, and `num_labels` only where it has gaps.
    """
    table, count = files.config.get("id2label"), files.config.get("num_labels")
    if count is not None and (type(count) is not int or not 0 <= count <= MOST_LABELS):
        raise files.refuse(
            f"config.json, num_labels: {count!r:.60} is no number of labels", "Write the number of the head's outputs"
        )
    try:
        names = {_label_number(index): str(label) for index, label in (table or {}).items()}
    except (ValueError, AttributeError):
        raise files.refuse(
            "config.json, id2label: its keys are not the numbers of the labels",
            'Write it as {"0": "the first label", "1": ...}',
        ) from None
    whole = bool(names) and names.keys() == {*range(len(names))}
    total = len(names) if whole else count or len(names) or 2  # transformers' own default
    if names and max(names) >= total:
        raise files.refuse(
            f"config.json, id2label: it names label {max(names)}, and there are {total}",
            "Name every label there, from 0 up",
        )
    return tuple(names.get(index, f"LABEL_{index}") for index in range(total))


def _label_number(text: str) -> int:
    """Raises ValueError where that is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_LABELS))):
        raise ValueError(text)
    return int(text)
