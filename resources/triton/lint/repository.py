"""Read a repository, and check the rules about folders, versions, files and each model's own configuration."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.boundary.foreign import ForeignError
from resources.errors import ReleaseError
from resources.triton.layout import CONFIG
from resources.triton.lint.ensembles import ensemble_findings
from resources.triton.lint.findings import Finding
from resources.triton.lint.graphs import graph_findings, type_name
from resources.triton.lint.model import Model
from resources.triton.lint.reading import (
    LARGEST_CONFIG_BYTES,
    MOST_FINDINGS,
    TooLargeError,
    is_below,
    links_out,
    read_file,
    shortened,
    why_not_below,
)
from resources.triton.lint.sources import source_findings

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

#: The model file of a version by backend, unless `default_model_filename` names another.
_FILES = {
    "python": "model.py",
    "onnxruntime": "model.onnx",
    "onnxruntime_onnx": "model.onnx",
    "tensorrt": "model.plan",
    "tensorrt_plan": "model.plan",
    "openvino": "model.xml",
    "pytorch": "model.pt",
    "pytorch_libtorch": "model.pt",
}
#: The types of token ids.
_IDS = ("TYPE_INT32", "TYPE_INT64")


def lint(root: Path) -> list[Finding]:
    """Return all findings in a repository, sorted by path and line.

    Raises:
        ReleaseError: The path is not a folder of models.
    """
    _require_repository(root)
    findings: list[Finding] = []
    models: dict[str, Model] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if not is_below(root, folder):
            findings.append(_link(root, folder))
            continue
        hidden = folder.name.startswith(".")
        if hidden or (os.access(folder, os.R_OK | os.X_OK) and not any(folder.iterdir())):
            what = "a hidden folder" if hidden else "an empty folder"
            findings.append(Finding("stray-folder", folder.name, f"{what} is polled as a model. Keep it elsewhere."))
            continue
        try:
            model, found = _read(root, folder)
        except OSError as error:
            findings.append(Finding("unreadable", folder.name, f"cannot be read: {error.strerror}."))
            continue
        models[model.name] = model
        findings += found
    for model in models.values():
        found = []
        try:
            for finding in islice(_all_findings(model, models), MOST_FINDINGS):
                found.append(finding)
        except OSError as error:
            found.append(model.at("unreadable", f"{error.filename} cannot be read: {error.strerror}."))
        findings += found
        if len(found) >= MOST_FINDINGS:
            more = f"has {MOST_FINDINGS} findings or more, and was not looked at further. Mend these first."
            findings.append(model.at("too-large", more, path=model.folder))
    findings = [replace(finding, message=shortened(finding.message)) for finding in findings]
    return sorted(findings, key=lambda finding: (finding.path, finding.line, finding.rule, finding.message))


def _all_findings(model: Model, models: Mapping[str, Model]) -> Iterator[Finding]:
    yield from (_link(model.root, path) for path in links_out(model.root, model.folder))
    yield from _model_findings(model)
    if model.is_ensemble:
        yield from ensemble_findings(model, models)


def _link(root: Path, path: Path) -> Finding:
    place = path.relative_to(root).as_posix()
    return Finding("link", place, "leads out of the repository, and was not looked at. Put what it names there itself.")


def _require_repository(root: Path) -> None:
    """Check that the folder is a model repository, because a report without findings would mean nothing otherwise.

    Raises:
        ReleaseError: The folder is not a model repository.
    """
    if not root.is_dir():
        raise ReleaseError(f"{root} is no folder. Give the folder that holds the models' folders.")
    if (root / CONFIG).is_file():
        raise ReleaseError(f"{root} is the folder of one model. Give the one that holds it: {root.parent}.")
    if not any(path.is_dir() for path in root.iterdir()):
        raise ReleaseError(f"{root} holds no model. Give the folder that holds the models' folders.")
    if not any(root.glob(f"*/{CONFIG}")):
        inside = sorted({path.parent.parent for path in root.glob(f"*/*/{CONFIG}")})
        if inside:
            raise ReleaseError(f"{root} holds repositories, and no models. Give one of them: {inside[0]}.")


def _read(root: Path, folder: Path) -> tuple[Model, list[Finding]]:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    path = folder / CONFIG
    place = path.relative_to(root).as_posix()
    findings: list[Finding] = []
    config: ModelConfig | None = None
    text = ""
    if not path.is_file():
        findings.append(Finding("no-config", folder.name, "has no config.pbtxt, so Triton makes one up. Write one."))
    elif is_below(root, path):
        try:
            text = read_file(path, LARGEST_CONFIG_BYTES).decode("utf-8")
            config = text_format.Parse(text, ModelConfig())
        except TooLargeError as error:
            findings.append(Finding("too-large", place, str(error)))
        except text_format.ParseError as error:
            # The message has the form "line:column : text".
            message = re.sub(r"^\d+:\d+ : ", "", str(error))
            findings.append(Finding("config-syntax", place, f"{message}.".replace("..", "."), error.GetLine() or 0))
        except (OSError, ForeignError, UnicodeDecodeError, RecursionError) as error:
            findings.append(Finding("config-syntax", place, f"cannot be read as UTF-8 text: {error}."))
    versions = []
    for path in sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith(".")):
        name = path.relative_to(root).as_posix()
        if re.fullmatch("[1-9][0-9]*", path.name):
            versions.append(int(path.name))
        elif re.match("[1-9]", path.name):
            number = re.match("[0-9]+", path.name)
            assert number is not None
            findings.append(
                Finding("stray-version", name, f"is read as version {number[0]}, whatever it is. Keep it elsewhere.")
            )
        elif re.match("[0-9]+$", path.name):
            findings.append(Finding("ignored-version", name, "is no version that Triton looks at. Rename it."))
    return Model(root, folder, config, text, tuple(sorted(versions))), findings


def _model_findings(model: Model) -> Iterator[Finding]:
    config = model.config
    if not model.versions:
        yield model.at(
            "no-version", "has no folder of a version: make 1/ (with a file in it, or git drops it).", path=model.folder
        )
    if config is None:
        return
    if config.name and config.name != model.name:
        yield model.at("model-name", f"says {config.name!r}, and its folder is {model.name!r}.", near="name")
    for number in config.version_policy.specific.versions:
        if number not in model.versions:
            yield model.at("version-policy", f"version {number} is not there.", near="version_policy")
    yield from _tensors(model)
    yield from _scheduling(model)
    yield from _warm_up(model)
    if model.is_ensemble:
        return
    if not model.backend:
        yield model.at("no-backend", 'names no backend: add backend: "onnxruntime", "python" or another.')
        return
    default = config.default_model_filename or _FILES.get(model.backend)
    if default is None:
        return
    names = [*config.cc_model_filenames.values()] or [default]
    for number, name in product(model.served, names):
        path = model.folder / str(number) / name
        if Path(name).name != name:
            yield model.at("model-file", f"{name!r} is no plain file name.", near=f'"{name}"')
        elif not is_below(model.root, path):
            continue  # the link that leads out is a finding of its own
        elif not path.exists() or (model.backend == "python" and not path.is_file()):
            hang = " A Python model without it hangs the whole server." if model.backend == "python" else ""
            yield model.at("model-file", f"{name} is missing.{hang}", path=path.parent)
        elif path.is_file() and path.stat().st_size == 0:
            yield model.at("empty-file", "has no bytes. Copy it again.", path=path)
        elif model.backend == "python":
            yield from source_findings(model, path)
            # `refinery serve` reads a repository with such a path through a link, but the model's own name stays.
            if shlex.quote(str(path.absolute())) != str(path.absolute()):
                hang = "has a character in its path that a shell does not take as it is; the server hangs."
                yield model.at("shell-path", hang, path=path)
        elif model.backend.startswith("onnxruntime"):
            yield from graph_findings(model, path)


def _tensors(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    kinds = [("input", item) for item in config.input] + [("output", item) for item in config.output]
    for kind, item in kinds:
        near = f'"{item.name}"'
        if not item.data_type:
            yield model.at("tensor-type", f"{kind} {item.name!r} has no data_type.", near=near)
        if not item.dims:
            yield model.at("tensor-dims", f"{kind} {item.name!r} has no dims.", near=near)
        for size in item.dims:
            if size == 0 or size < -1:
                yield model.at("tensor-dims", f"{kind} {item.name!r} has a dimension of {size}.", near=near)
    for output in config.output:
        name = output.label_filename
        why = why_not_below(model.folder, name) if name else None
        if why is not None:
            yield model.at("label-file", f"the labels are not in the model's folder: {why}.", near="label_filename")
        elif name and not (model.folder / name).is_file():
            yield model.at("label-file", f"{name} is missing.", near="label_filename")


def _scheduling(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    if config.HasField("dynamic_batching"):
        if config.max_batch_size == 0:
            yield model.at("no-batching", "batches nothing: max_batch_size is 0.", near="dynamic_batching")
        for size in config.dynamic_batching.preferred_batch_size:
            if not 1 <= size <= config.max_batch_size:
                yield model.at(
                    "batching", f"prefers {size} of at most {config.max_batch_size}.", near="preferred_batch_size"
                )
    for group in config.instance_group:
        if group.count < 0:
            yield model.at("instance-group", f"a count of {group.count}.", near="instance_group")
        if group.kind in (group.KIND_CPU, group.KIND_MODEL) and group.gpus:
            yield model.at("instance-group", f"{group.Kind.Name(group.kind)} has no gpus.", near="gpus")
        for resource in group.rate_limiter.resources:
            if not resource.name or resource.count == 0:
                yield model.at("rate-limiter", f"{resource.count} of {resource.name!r}.", near="rate_limiter")
    if config.response_cache.enable and config.model_transaction_policy.decoupled:
        yield model.at("response-cache", "is decoupled, and its answers are to be cached.", near="response_cache")


def _warm_up(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    known: dict[str, Any] = {item.name: item for item in config.input}
    required = {name for name, item in known.items() if not item.optional}
    for sample in config.model_warmup:
        near = f'"{sample.name}"' if sample.name else "model_warmup"
        for name in sorted(required - set(sample.inputs)):
            yield model.at("warm-up", f"{sample.name!r} does not give {name!r}.", near=near)
        for name, given in sorted(sample.inputs.items()):
            if name not in known:
                yield model.at("warm-up", f"{sample.name!r} gives {name!r}, which is no input.", near=near)
                continue
            if given.data_type != known[name].data_type:
                yield model.at("warm-up", f"{sample.name!r} gives {name!r} in another type.", near=near)
            if given.random_data and type_name(given.data_type) in _IDS:
                yield model.at(
                    "warm-up", f"{sample.name!r} gives {name!r} random integers: ids beyond any table.", near=near
                )
            file, folder = given.input_data_file, model.folder / "warmup"
            why = why_not_below(folder, file) if file else None
            if why is not None:
                yield model.at("warm-up", f"its data is not in warmup/: {why}.", near=file)
            elif file and not (folder / file).is_file():
                yield model.at("warm-up", f"warmup/{file} is missing.", near=file)
