"""What a task is: the exportable module, the checks of a checkpoint, and what "the same answer" means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from resources.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import torch


class Gates(BaseModel):
    """Thresholds a candidate must keep to be eligible. Every task has its own; the models file can change them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class CheckpointFiles:
    """The parts of a checkpoint that tasks read without loading it."""

    name: str
    folder: Path
    config: dict[str, Any]

    @property
    def architecture(self) -> str:
        """The class transformers saved it from, `BertForSequenceClassification` say; empty where not recorded."""
        return str((self.config.get("architectures") or [""])[0])

    def refuse(self, why: str, remedy: str) -> CheckpointError:
        """The error for a checkpoint that the task cannot take."""
        return CheckpointError(f"{self.name}: {why}. {remedy}")


class Task(ABC):
    """One task. Instances hold no state; heavy libraries are imported inside the methods that need them."""

    name: ClassVar[str]
    output: ClassVar[str]
    gates: ClassVar[type[Gates]]

    @abstractmethod
    def check(self, files: CheckpointFiles) -> None:
        """Raise CheckpointError where the checkpoint cannot do this task. Reads no weights."""

    @abstractmethod
    def labels(self, files: CheckpointFiles) -> tuple[str, ...]:
        """What the columns of the output are called, in order; empty where they have no names."""

    @abstractmethod
    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        """The module that is exported: token ids in, this task's answer out, fp32 `[batch, width]`.

        `load` goes to `from_pretrained`. Pooling, normalization and softmax are part of the module and stay in fp32:
        in half precision `clamp(min=1e-9)` is 0 and a row of padding alone becomes NaN.
        Its `forward` takes `input_ids`, `attention_mask` and, where the model knows them, `token_type_ids`.
        """

    @abstractmethod
    def scores(self, reference: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """How alike two answers to each text are, fp64 `[texts]`; 1 is equal, lower is worse. For finding the worst."""

    @abstractmethod
    def compare(self, reference: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        """The task's metrics of `answers` `[texts, width]` against PyTorch's."""

    @abstractmethod
    def misses(self, metrics: dict[str, float], gates: Gates) -> list[str]:
        """The gates that the metrics miss, each as a sentence. NaN misses every gate."""

    def broken(self, reference: np.ndarray, answers: np.ndarray) -> str:
        """Why the answers cannot be compared at all (wrong shape, NaN, infinity); empty where they can."""
        import numpy as np

        if answers.shape != reference.shape:
            return f"answers of shape {answers.shape} where PyTorch gives {reference.shape}"
        if not reference.size:
            return "no answers to compare"
        for whose, values in (("the", answers), ("PyTorch's", reference)):
            rows = int((~np.isfinite(values)).any(axis=1).sum())
            if rows:
                return f"NaN or infinity in {whose} answers to {rows} of {len(values)} texts"
        return ""

    def verdict(self, reference: np.ndarray, answers: np.ndarray, gates: Gates) -> tuple[dict[str, float], list[str]]:
        """Metrics and missed gates. Answers that cannot be compared miss before anything else is looked at."""
        broken = self.broken(reference, answers)
        if broken:
            return {}, [broken]
        metrics = self.compare(reference, answers)
        return metrics, self.misses(metrics, gates)


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
