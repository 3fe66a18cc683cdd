"""The rules, and the finding that reports a broken rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """One rule of the linter.

    Args:
        severity: An `error` means that Triton refuses the model, hangs, or answers wrongly. A `warning` means that
            it does something that nobody asked for.
        meaning: The rule in words, for reports.
    """

    severity: Severity
    meaning: str


#: The rules by their names in reports. The sources are Triton's documentation (model repository, model configuration,
#: ensembles), its model_config.proto, and the observed behaviour of the server.
RULES: dict[str, Rule] = {
    "config-syntax": Rule("error", "config.pbtxt is not what model_config.proto describes"),
    "no-config": Rule("warning", "without config.pbtxt Triton makes one up, with batch size 4 and two CPU instances"),
    "model-name": Rule("error", "a model's name has to be that of its folder"),
    "stray-folder": Rule("error", "every folder of a repository is read as a model, hidden ones too"),
    "unreadable": Rule("error", "the server has to be able to read all of it"),
    "too-large": Rule("error", "what is larger than anything of its kind is not read to its end"),
    "link": Rule("warning", "a link that leads out of the repository is not followed here, and others can change it"),
    "no-version": Rule("error", "a model needs a folder of a version, an ensemble an empty one"),
    "stray-version": Rule("error", "a folder whose name begins with a number is read as that version"),
    "ignored-version": Rule("warning", "versions are whole numbers above 0 without leading zeros; others are ignored"),
    "version-policy": Rule("error", "a specific version has to be there"),
    "no-backend": Rule("error", "a model needs a backend or a platform"),
    "model-file": Rule("error", "every version needs the file that its backend opens"),
    "empty-file": Rule("error", "a model file of 0 bytes is a copy that did not end"),
    "onnx-graph": Rule("error", "model.onnx has to be a whole ONNX graph"),
    "external-data": Rule(
        "error", "weights beside a graph have to be there, whole, in a folder named as the graph is, and in no other"
    ),
    "tensor-name": Rule("error", "inputs and outputs have to be those of the graph"),
    "tensor-type": Rule("error", "a tensor's type has to be given, and be that of the graph"),
    "tensor-dims": Rule("error", "dims have to be above 0 or -1, and fit the graph"),
    "batch-size": Rule(
        "error", "a batch size above 0 needs a graph with a free first dimension, and steps that take it"
    ),
    "batching": Rule("error", "preferred batch sizes are from 1 to the largest"),
    "no-batching": Rule("warning", "with max_batch_size 0 nothing is ever batched"),
    "instance-group": Rule("error", "counts are not below 0, and only instances on GPUs name any"),
    "warm-up": Rule("error", "warm-up has to give every input, in its type, from files that are there"),
    "label-file": Rule("error", "a label file has to be there, in the model's folder"),
    "ensemble-step": Rule("error", "steps name models and versions of the repository"),
    "ensemble-map": Rule("error", "maps name the step's tensors, and every tensor has one source"),
    "ensemble-unused": Rule("error", "what a step makes has to be read by a step or be an output"),
    "ensemble-cycle": Rule("error", "a step may not wait for what it makes itself"),
    "rate-limiter": Rule("warning", "a resource has a name, and at least one copy of it is held"),
    "response-cache": Rule("error", "models that answer as often as they like cannot be cached"),
    "shell-path": Rule("error", "Python models are started through a shell, which a path has to get through as it is"),
    "python-syntax": Rule("error", "model.py has to be Python with a class TritonPythonModel"),
    "python-import": Rule("warning", "what model.py imports has to be beside it or installed"),
}


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Args:
        rule: The name of the rule.
        path: The file or folder, relative to the repository.
        message: The problem, often with the remedy.
        line: The line, counted from 1. 0 means the whole file or folder.
    """

    rule: str
    path: str
    message: str
    line: int = 0

    @property
    def severity(self) -> Severity:
        """The severity of the broken rule."""
        return RULES[self.rule].severity

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        return f"{place}: {self.severity}: {self.message} [{self.rule}]"
