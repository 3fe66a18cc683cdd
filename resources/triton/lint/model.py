"""One model of a repository, as the rules look at it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from resources.triton.layout import CONFIG
from resources.triton.lint.findings import Finding

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

#: What Triton tells a backend from, where the configuration names none.
_TELLING = {"model.py": "python", "model.onnx": "onnxruntime", "model.plan": "tensorrt", "model.xml": "openvino"}


@dataclass(frozen=True)
class Model:
    """One folder of the repository. config: None where there is none or it cannot be read."""

    root: Path
    folder: Path
    config: ModelConfig | None
    text: str
    versions: tuple[int, ...]

    @cached_property
    def lines(self) -> list[str]:
        """The configuration without its comments."""
        return [line.split("#")[0] for line in self.text.splitlines()]

    @property
    def name(self) -> str:
        """What Triton calls it."""
        return self.folder.name

    @property
    def backend(self) -> str:
        """Backend, or the platform that means one, or what Triton completes it to from the files."""
        named = (self.config.backend or self.config.platform) if self.config is not None else ""
        there = (name for number in self.versions for name in _TELLING if (self.folder / str(number) / name).exists())
        return named or _TELLING.get(next(there, ""), "")

    @property
    def served(self) -> tuple[int, ...]:
        """The versions that the policy lets Triton load; the newest alone by default."""
        policy = self.config.version_policy if self.config is not None else None
        if policy is not None and policy.HasField("specific"):
            return tuple(number for number in self.versions if number in policy.specific.versions)
        if policy is not None and policy.HasField("all"):
            return self.versions
        count = policy.latest.num_versions if policy is not None and policy.HasField("latest") else 1
        return self.versions[-max(1, count) :]

    @property
    def is_ensemble(self) -> bool:
        """Whether it is made of other models."""
        return self.config is not None and (
            self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling")
        )

    def at(self, rule: str, message: str, *, near: str = "", nth: int = 0, path: Path | None = None) -> Finding:
        """A finding in the configuration, at the line that holds `near` for the nth time; or in another file."""
        place = path or self.folder / CONFIG
        line = 0
        if path is None and near:
            found = [number for number, text in enumerate(self.lines, 1) for _ in range(text.count(near))]
            line = found[min(nth, len(found) - 1)] if found else 0
        return Finding(rule, place.relative_to(self.root).as_posix(), message, line)
