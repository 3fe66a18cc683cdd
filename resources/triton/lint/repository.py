"""Reading a repository, and the rules about folders, versions, files and a model's own configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.errors import ReleaseError
from resources.triton.layout import CONFIG
from resources.triton.lint.ensembles import ensemble_findings
from resources.triton.lint.findings import Finding
from resources.triton.lint.graphs import graph_findings
from resources.triton.lint.sources import source_findings

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

#: The file of a version by backend, where `default_model_filename` names no other.
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
_INTEGERS = ("TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32")


@dataclass(frozen=True)
class Model:
    """One folder of the repository. config: None where there is none or it cannot be read."""

    root: Path
    folder: Path
    config: ModelConfig | None
    text: str
    versions: tuple[int, ...]

    @property
    def name(self) -> str:
        """What Triton calls it."""
        return self.folder.name

    @property
    def backend(self) -> str:
        """Backend, or the platform that means one."""
        return (self.config.backend or self.config.platform) if self.config is not None else ""

    @property
    def is_ensemble(self) -> bool:
        """Whether it is made of other models."""
        return self.config is not None and (
            self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling")
        )

    def at(self, rule: str, message: str, *, near: str = "", path: Path | None = None) -> Finding:
        """A finding in the configuration, at the line that holds `near`; or in another file."""
        place = path or self.folder / CONFIG
        line = 0
        if path is None and near:
            lines = self.text.splitlines()
            line = next((number for number, text in enumerate(lines, 1) if near in text), 0)
        return Finding(rule, place.relative_to(self.root).as_posix(), message, line)


def lint(root: Path) -> list[Finding]:
    """Everything that is wrong, by path and line. Raises ReleaseError where there is no folder."""
    if not root.is_dir():
        raise ReleaseError(f"{root} is no folder. Give the folder that holds the models' folders.")
    findings: list[Finding] = []
    models: dict[str, Model] = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name.startswith(".") or not any(folder.iterdir()):
            what = "a hidden folder" if folder.name.startswith(".") else "an empty folder"
            findings.append(Finding("stray-folder", folder.name, f"{what} is polled as a model. Keep it elsewhere."))
            continue
        model, found = _read(root, folder)
        models[model.name] = model
        findings += found
    for model in models.values():
        findings += _model_findings(model)
        if model.is_ensemble:
            findings += ensemble_findings(model, models)
    return sorted(findings, key=lambda finding: (finding.path, finding.line, finding.rule, finding.message))


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
    else:
        try:
            text = path.read_text(encoding="utf-8")
            config = text_format.Parse(text, ModelConfig())
        except text_format.ParseError as error:
            # "line:column : text"
            message = re.sub(r"^\d+:\d+ : ", "", str(error))
            findings.append(Finding("config-syntax", place, f"{message}.".replace("..", "."), error.GetLine() or 0))
        except (OSError, UnicodeDecodeError) as error:
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
    name = config.default_model_filename or _FILES.get(model.backend)
    if name is None:
        return
    for number in model.versions:
        path = model.folder / str(number) / name
        if not path.exists():
            hang = " A Python model without it hangs the whole server." if model.backend == "python" else ""
            yield model.at("model-file", f"{name} is missing.{hang}", path=path.parent)
        elif path.is_file() and path.stat().st_size == 0:
            yield model.at("empty-file", "has no bytes. Copy it again.", path=path)
        elif model.backend == "python":
            yield from source_findings(model, path)
        elif model.backend.startswith("onnxruntime"):
            yield from graph_findings(model, path)


def _tensors(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    for item in (*config.input, *config.output):
        kind = "input" if item in config.input else "output"
        near = f'"{item.name}"'
        if not item.data_type:
            yield model.at("tensor-type", f"{kind} {item.name!r} has no data_type.", near=near)
        if not item.dims and not item.reshape.shape and model.backend != "ensemble" and not config.max_batch_size:
            yield model.at("tensor-dims", f"{kind} {item.name!r} has no dims.", near=near)
        for size in item.dims:
            if size == 0 or size < -1:
                yield model.at("tensor-dims", f"{kind} {item.name!r} has a dimension of {size}.", near=near)
    for output in config.output:
        if output.label_filename and not (model.folder / output.label_filename).is_file():
            yield model.at("label-file", f"{output.label_filename} is missing.", near="label_filename")


def _scheduling(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    if config.HasField("dynamic_batching"):
        if config.max_batch_size == 0:
            yield model.at("no-batching", "batches nothing: max_batch_size is 0.", near="dynamic_batching")
        for size in config.dynamic_batching.preferred_batch_size:
            if size > config.max_batch_size > 0:
                yield model.at(
                    "batching", f"prefers {size} of at most {config.max_batch_size}.", near="preferred_batch_size"
                )
    for group in config.instance_group:
        if group.count < 0:
            yield model.at("instance-group", f"a count of {group.count}.", near="instance_group")
        if group.kind == group.KIND_CPU and group.gpus:
            yield model.at("instance-group", "KIND_CPU has no gpus.", near="gpus")


def _warm_up(model: Model) -> Iterator[Finding]:
    config = model.config
    assert config is not None
    known: dict[str, Any] = {item.name: item for item in config.input}
    for sample in config.model_warmup:
        near = f'"{sample.name}"' if sample.name else "model_warmup"
        for name in sorted(set(known) - set(sample.inputs)):
            if not known[name].optional:
                yield model.at("warm-up", f"{sample.name!r} does not give {name!r}.", near=near)
        for name, given in sorted(sample.inputs.items()):
            if name not in known:
                yield model.at("warm-up", f"{sample.name!r} gives {name!r}, which is no input.", near=near)
                continue
            if given.data_type != known[name].data_type:
                yield model.at("warm-up", f"{sample.name!r} gives {name!r} in another type.", near=near)
            type_ = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[given.data_type]
            if given.random_data and type_.name in _INTEGERS:
                yield model.at(
                    "warm-up", f"{sample.name!r} gives {name!r} random integers: ids beyond any table.", near=near
                )
            if given.input_data_file and not (model.folder / "warmup" / given.input_data_file).is_file():
                yield model.at("warm-up", f"warmup/{given.input_data_file} is missing.", near=given.input_data_file)
