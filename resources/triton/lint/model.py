"""One model of a repository, in the form that the rules check."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from resources.triton.layout import CONFIG
from resources.triton.lint.findings import Finding

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

#: The files that tell Triton the backend when the configuration names none.
_TELLING = {"model.py": "python", "model.onnx": "onnxruntime", "model.plan": "tensorrt", "model.xml": "openvino"}


@dataclass(frozen=True)
class Model:
    """One model folder of the repository.

    Args:
        root: The repository.
        folder: The model's folder.
        config: The configuration. None means that it is missing or cannot be read.
        text: The text of the configuration.
        versions: The numbers of the version folders, in ascending order.
    """

    root: Path
    folder: Path
    config: ModelConfig | None
    text: str
    versions: tuple[int, ...]

    @cached_property
    def lines(self) -> list[str]:
        """The lines of the configuration, without their comments."""
        return [line.split("#")[0] for line in self.text.splitlines()]

    @property
    def name(self) -> str:
        """The model's name in Triton."""
        return self.folder.name

    @property
    def backend(self) -> str:
        """The backend, or the platform that stands for one, or the backend that Triton derives from the files."""
        named = (self.config.backend or self.config.platform) if self.config is not None else ""
        there = (name for number in self.versions for name in _TELLING if (self.folder / str(number) / name).exists())
        return named or _TELLING.get(next(there, ""), "")

    @property
    def served(self) -> tuple[int, ...]:
        """The versions that the version policy lets Triton load. By default this is the newest only."""
        policy = self.config.version_policy if self.config is not None else None
        if policy is not None and policy.HasField("specific"):
            return tuple(number for number in self.versions if number in policy.specific.versions)
        if policy is not None and policy.HasField("all"):
            return self.versions
        count = policy.latest.num_versions if policy is not None and policy.HasField("latest") else 1
        return self.versions[-max(1, count) :]

    @property
    def is_ensemble(self) -> bool:
        """Return whether the model is an ensemble of other models."""
        return self.config is not None and (
            self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling")
        )

    def at(self, rule: str, message: str, *, near: str = "", nth: int = 0, path: Path | None = None) -> Finding:
        """Return a finding in the configuration or in another file.

        Args:
            rule: The broken rule.
            message: The problem, often with the remedy.
            near: A text in the configuration. The finding is at the line that contains it.
            nth: Which occurrence of `near` is meant, counted from 0.
            path: The other file or folder. None means the configuration.
        """
        place = path or self.folder / CONFIG
        line = 0
        if path is None and near:
            found = [number for number, text in enumerate(self.lines, 1) for _ in range(text.count(near))]
            line = found[min(nth, len(found) - 1)] if found else 0
        return Finding(rule, place.relative_to(self.root).as_posix(), message, line)
