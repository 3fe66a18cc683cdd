"""One release: its manifest, the digest of its content, and the writing of its folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from resources.artifacts.fingerprint import Fingerprint, code_versions, file_versions, library_versions
from resources.artifacts.records import Checkpoint, Engine, FileName, ServingSetting, StoredFile, sha256_file
from resources.catalog.entries import LimitSettings, RateLimiter
from resources.errors import ReleaseError
from resources.pipelines import PIPELINE_FILE, pipeline_class
from resources.settings.triton import Flavour
from resources.triton.proof import Proof

_PYTHON_MODELS = Path(__file__).with_name("python_models")
_RESOURCES = Path(__file__).resolve().parents[1]
LABELS_FILE = "labels.txt"
#: The public output of structured answers.
RESULT = "RESULT"
#: A file of this name keeps Python from making a folder of this name, because Triton's stub ignores
#: PYTHONDONTWRITEBYTECODE. A release never changes, and compiled modules would hold paths of the machine that first
#: served it.
_NO_CACHE = "__pycache__"
_TOKENIZER_FILES = ("tokenizer.json", "encoder.json", PIPELINE_FILE)
#: Modules that every `model.py` needs beside it, and further ones for each `model.py` that computes answers.
_BESIDE = (_PYTHON_MODELS / "aside.py", _PYTHON_MODELS / "reading.py")
_ANSWERING = (_PYTHON_MODELS / "answering.py", _PYTHON_MODELS / "lane.py")
#: Modules that every engine of the python flavour needs beside it.
_COMMON = (_PYTHON_MODELS / "neighbours.py",)
#: Modules that open an engine, by runtime. They are copied beside `engine.py`. Other runtimes cannot be released.
_SESSIONS = {
    "onnxruntime": ("sessions", "cuda", "tensorrt_provider"),
    "openvino": ("openvino_session",),
    "tensorrt": ("tensorrt_session",),
}
#: Modules whose code determines a release, in addition to the copied files and `session_modules`.
CODE = ("resources.triton.config", "resources.triton.release", "resources.triton.stage", "resources.triton.layout")
#: Packages whose files are in every release.
COPIED = ("resources.triton.python_models", "resources.pipelines")
#: The file that Triton's own backend opens, by runtime.
_NATIVE_ENTRIES = {"onnxruntime": "model.onnx", "openvino": "model.xml", "tensorrt": "model.plan"}


class Release(BaseModel):
    """The manifest of one release, `<model>/<N>/release.json`. It holds no path of the machine that made it."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    number: int
    model: FileName
    task: str
    target: str
    flavour: Flavour
    engine: str
    engine_digest: str
    checkpoint_digest: str
    revision: str
    output: str = Field(description="Of the public model.")
    width: int = Field(description="Of the engine's output.")
    labels: tuple[str, ...]
    max_batch_size: int
    max_tokens: int
    content_digest: str
    created: str = Field(description="UTC, ISO 8601.")
    status: Literal["published", "unverified"]
    proof: Proof | None = None
    lineage: dict[str, str] = Field(default_factory=dict)
    files: dict[FileName, StoredFile] = Field(default_factory=dict, description="Of the internals, by path.")
    pointer: StoredFile | None = Field(default=None, description="The public config.pbtxt. None: an older manifest.")
    serving: ServingSetting | None = Field(default=None, description="How its engine runs. None: an older manifest.")


@dataclass(frozen=True)
class ReleasePlan:
    """The plan of one release: a checkpoint, an engine, and how Triton serves them.

    Args:
        serving: The setting that the engine runs with.
        response_cache: Whether Triton may answer from its response cache.
        limits: The limits of one request.
    """

    model: str
    target: str
    flavour: Flavour
    checkpoint: Checkpoint
    checkpoint_folder: Path
    engine: Engine
    engine_folder: Path
    max_batch_size: int
    serving: ServingSetting
    response_cache: bool = False
    rate_limiter: RateLimiter | None = None
    limits: LimitSettings = field(default_factory=LimitSettings)
    lineage: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model's inputs, in the tokenizer's order."""
        settings = json.loads((self.checkpoint_folder / "encoder.json").read_text(encoding="utf-8"))
        return tuple(settings["inputs"])

    @property
    def output(self) -> str:
        """The name of the engine's output."""
        return self.checkpoint.output

    @property
    def whole(self) -> bool:
        """Return whether one Python model holds tokenizer and engine."""
        return self.flavour == "python"

    @property
    def structured(self) -> bool:
        """Return whether answers are JSON documents instead of the engine's own numbers."""
        return pipeline_class(self.checkpoint.task).structured

    @property
    def has_label_file(self) -> bool:
        """Return whether Triton's classification extension can name the public output's columns."""
        return bool(self.checkpoint.labels) and not self.structured

    @property
    def texts(self) -> tuple[str, ...]:
        """The inputs of the public model."""
        return pipeline_class(self.checkpoint.task).inputs


def check_plan(plan: ReleasePlan) -> None:
    """Raise ReleaseError if no release can be made of the plan."""
    engine, what = plan.engine, f"{plan.model}: engine {plan.engine.name}"
    if engine.status != "built":
        raise ReleaseError(f"{what} is {engine.status} and cannot be released: {engine.reason}")
    if engine.runtime not in _SESSIONS:
        raise ReleaseError(f"{what} runs on {engine.runtime}, and only {', '.join(_SESSIONS)} can be released.")
    if plan.flavour == "native" and engine.entry_file != _NATIVE_ENTRIES[engine.runtime]:
        raise ReleaseError(
            f"{what} begins at {engine.entry_file}, and Triton's own backend opens {_NATIVE_ENTRIES[engine.runtime]} "
            "alone. Use flavour 'python' (REFINERY_TRITON_FLAVOUR)."
        )
    if plan.flavour == "native" and engine.parameters.get("flavour") == "tensorrt_rtx":
        raise ReleaseError(
            f"{what} is a plan of TensorRT-RTX {engine.parameters['tensorrt']}, and Triton's own backend reads those "
            "of TensorRT alone. Use flavour 'python' (REFINERY_TRITON_FLAVOUR), or build it with TensorRT: "
            "pip install 'transformer-refinery[tensorrt]'."
        )


def require_embeddable(release: Release, remedy: str) -> None:
    """Raise ReleaseError if the embedded server cannot load the release.

    The message ends with `remedy`, a sentence without its period.
    """
    if release.flavour != "python":
        raise ReleaseError(
            f"{release.model}: release {release.number} runs on Triton's own backends, which the embedded server does "
            f"not have. {remedy}."
        )


def check_copies(plan: ReleasePlan, files: dict[str, StoredFile]) -> None:
    """Raise ReleaseError if a copied file of the engine or tokenizer differs from its record, byte for byte."""
    copied = {file.sha256 for file in files.values()}
    records: tuple[Checkpoint | Engine, ...] = (plan.engine, plan.checkpoint)
    for record in records:
        for name, file in record.content.items():
            if (record is plan.engine or name in _TOKENIZER_FILES) and file.sha256 not in copied:
                raise ReleaseError(
                    f"{plan.model}: {name} of the {record.kind.replace('_', ' ')} is damaged in the artifact store. "
                    f"Remove the artifact {record.digest[:32]} there and optimize again."
                )


def content_of(plan: ReleasePlan) -> Fingerprint:
    """Return the fingerprint of everything in the plan that changes how a server answers.

    It leaves out the release's number, times, and lineage.
    """
    return Fingerprint.of(
        "release",
        model=plan.model,
        target=plan.target,
        flavour=plan.flavour,
        task=plan.checkpoint.task,
        engine=plan.engine.content_digest,
        entry=plan.engine.entry_file,
        tokenizer=plan.checkpoint.tokenizer_digest,
        pipeline=plan.checkpoint.pipeline_digest,
        labels=plan.checkpoint.labels,
        max_batch_size=plan.max_batch_size,
        serving=plan.serving.model_dump(),
        response_cache=plan.response_cache,
        rate_limiter=plan.rate_limiter.model_dump() if plan.rate_limiter is not None else None,
        limits=plan.limits.model_dump(),
        code={**code_versions(*CODE), **file_versions(*COPIED, *session_modules(plan.engine.runtime))},
        tokenizers=library_versions("tokenizers"),
    )


def session_modules(*runtimes: str) -> tuple[str, ...]:
    """Return the modules that open engines of the runtimes inside Triton, by default those of every runtime."""
    return tuple(
        f"resources.engines.{runtime}.{module}"
        for runtime in runtimes or _SESSIONS
        for module in _SESSIONS.get(runtime, ())
    )


def content_digest(plan: ReleasePlan) -> str:
    """Return the digest of `content_of`."""
    return content_of(plan).digest


def new_release(plan: ReleasePlan, number: int) -> Release:
    """Return the manifest of a release that is about to be staged."""
    return Release(
        number=number,
        model=plan.model,
        task=plan.checkpoint.task,
        target=plan.target,
        flavour=plan.flavour,
        engine=plan.engine.name,
        engine_digest=plan.engine.digest,
        checkpoint_digest=plan.checkpoint.digest,
        revision=plan.checkpoint.revision,
        output=RESULT if plan.structured else plan.output,
        width=plan.engine.width,
        labels=plan.checkpoint.labels,
        max_batch_size=plan.max_batch_size,
        max_tokens=plan.checkpoint.max_tokens,
        content_digest=content_digest(plan),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="unverified",
        lineage=plan.lineage,
        serving=plan.serving,
    )


def write_pipeline(plan: ReleasePlan, folder: Path) -> None:
    """Write the version folder of the model that reads text, without the engine that it may hold.

    Raises:
        ReleaseError: The package `tokenizers` is not installed.
    """
    folder.mkdir(parents=True)
    name = "served" if plan.whole else "pipeline" if plan.structured else "tokenizer"
    shutil.copyfile(_PYTHON_MODELS / f"{name}_model.py", folder / "model.py")
    for module in _BESIDE if name == "tokenizer" else (*_BESIDE, *_ANSWERING):
        shutil.copyfile(module, folder / module.name)
    (folder / _NO_CACHE).touch()
    for module in sorted((_RESOURCES / "pipelines").glob("*.py")):
        place = folder / "pipelines" / module.name
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(module, place)
    (folder / "pipelines" / _NO_CACHE).touch()
    for name in _TOKENIZER_FILES:
        shutil.copyfile(plan.checkpoint_folder / name, folder / name)
    # The package is built for the stable ABI (abi3), so one copy serves every Python 3 that a Triton container holds.
    spec = find_spec("tokenizers")
    if spec is None or spec.origin is None:
        raise ReleaseError("The package 'tokenizers' is not installed; install transformer-refinery again.")
    package = Path(spec.origin).parent
    for path in sorted(package.rglob("*")):
        place = folder / "tokenizers" / path.relative_to(package)
        # shutil.copytree is not used, because its error does not say that the disk is full.
        if path.suffix in (".py", ".so") and place.parent.name != "tools":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def write_engine(plan: ReleasePlan, folder: Path) -> None:
    """Write the engine's files and, for the python flavour, the modules that open them."""
    if plan.whole:
        shutil.copyfile(_PYTHON_MODELS / f"{plan.engine.runtime}_engine.py", folder / "engine.py")
        runtime = plan.engine.runtime
        modules = [_RESOURCES / "engines" / runtime / f"{module}.py" for module in _SESSIONS[runtime]]
        for module in (*_COMMON, *modules):
            shutil.copyfile(module, folder / module.name)
        target = folder
    else:
        # Triton's backend finds external weights only if they and the graph lie in a folder with the graph's name.
        external = f"{plan.engine.entry_file}.data" in plan.engine.content
        target = folder / plan.engine.entry_file if external else folder
    for name in served_files(plan):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.engine_folder / name, place)


def served_files(plan: ReleasePlan) -> list[str]:
    """Return the engine's files that a release holds.

    The native flavour leaves out the files that only this project's own `model.py` reads.
    """
    stem = Path(plan.engine.entry_file).stem
    return [name for name in plan.engine.content if plan.flavour == "python" or Path(name).name.startswith(f"{stem}.")]


def stored(path: Path) -> StoredFile:
    """Return the record of a file: its digest and size."""
    return StoredFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)


def list_files(root: Path, folders: list[str]) -> dict[str, StoredFile]:
    """Return the digest and size of every file in the named folders, by path relative to `root`."""
    return {
        path.relative_to(root).as_posix(): stored(path)
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
