"""One release: what it holds, what it is called by content, and how its folders are written."""

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
#: A file where Python wants to make a folder, because Triton's stub does not heed PYTHONDONTWRITEBYTECODE: a release
#: never changes, and compiled modules would carry paths of the machine that first served it.
_NO_CACHE = "__pycache__"
_TOKENIZER_FILES = ("tokenizer.json", "encoder.json", PIPELINE_FILE)
#: What every `model.py` needs beside it, and those that answer.
_BESIDE = (_PYTHON_MODELS / "aside.py", _PYTHON_MODELS / "reading.py")
_ANSWERING = (_PYTHON_MODELS / "answering.py", _PYTHON_MODELS / "lane.py")
#: What every engine of the python flavour needs beside it.
_COMMON = (_PYTHON_MODELS / "neighbours.py",)
#: What opens an engine, copied beside the `engine.py` that does, by the runtimes that can be released.
_SESSIONS = {
    "onnxruntime": ("sessions", "cuda", "tensorrt_provider"),
    "openvino": ("openvino_session",),
    "tensorrt": ("tensorrt_session",),
}
#: What a release depends on, beside what it holds and `session_modules`.
CODE = ("resources.triton.config", "resources.triton.release", "resources.triton.stage", "resources.triton.layout")
#: Packages whose files are in every release.
COPIED = ("resources.triton.python_models", "resources.pipelines")
#: What Triton's own backends open.
_NATIVE_ENTRIES = {"onnxruntime": "model.onnx", "openvino": "model.xml", "tensorrt": "model.plan"}


class Release(BaseModel):
    """The manifest of one release, `<model>/<N>/release.json`. Names no path of the machine that made it."""

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
    """What is to be released. `serving`: how the engine runs. `response_cache`: Triton may answer from its cache.
    `limits`: of one request.
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
        """What the engine's output is called."""
        return self.checkpoint.output

    @property
    def whole(self) -> bool:
        """Whether one Python model holds tokenizer and engine."""
        return self.flavour == "python"

    @property
    def structured(self) -> bool:
        """Whether answers are JSON documents, and not the engine's own numbers."""
        return pipeline_class(self.checkpoint.task).structured

    @property
    def has_label_file(self) -> bool:
        """Whether Triton's classification extension can name the public output's columns."""
        return bool(self.checkpoint.labels) and not self.structured

    @property
    def texts(self) -> tuple[str, ...]:
        """The inputs of the public model."""
        return pipeline_class(self.checkpoint.task).inputs


def check_plan(plan: ReleasePlan) -> None:
    """Raise ReleaseError where no release can be made of the plan."""
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
    """Raise ReleaseError for a release that the embedded server cannot load. remedy: the sentence on what to do."""
    if release.flavour != "python":
        raise ReleaseError(
            f"{release.model}: release {release.number} runs on Triton's own backends, which the embedded server does "
            f"not have. {remedy}."
        )


def check_copies(plan: ReleasePlan, files: dict[str, StoredFile]) -> None:
    """Raise ReleaseError where a copied file of the engine or tokenizer is not what its record says, byte for byte."""
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
    """Everything a server would do differently: not numbers, times, or where the release came from."""
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
    """The modules that open engines of those runtimes inside Triton; none named: of every runtime."""
    return tuple(
        f"resources.engines.{runtime}.{module}"
        for runtime in runtimes or _SESSIONS
        for module in _SESSIONS.get(runtime, ())
    )


def content_digest(plan: ReleasePlan) -> str:
    """The digest of `content_of`."""
    return content_of(plan).digest


def new_release(plan: ReleasePlan, number: int) -> Release:
    """The manifest of a release that is about to be staged."""
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
    """Everything in the version folder of the model that reads text, but for the engine that it may hold."""
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
    # The package is abi3: one copy serves every Python 3 that a Triton container holds.
    spec = find_spec("tokenizers")
    if spec is None or spec.origin is None:
        raise ReleaseError("The package 'tokenizers' is not installed; install transformer-refinery again.")
    package = Path(spec.origin).parent
    for path in sorted(package.rglob("*")):
        place = folder / "tokenizers" / path.relative_to(package)
        # Not by shutil.copytree: its error does not say that the disk is full.
        if path.suffix in (".py", ".so") and place.parent.name != "tools":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def write_engine(plan: ReleasePlan, folder: Path) -> None:
    """The engine's files, and, beside the `model.py` of the python flavour, what opens them."""
    if plan.whole:
        shutil.copyfile(_PYTHON_MODELS / f"{plan.engine.runtime}_engine.py", folder / "engine.py")
        runtime = plan.engine.runtime
        modules = [_RESOURCES / "engines" / runtime / f"{module}.py" for module in _SESSIONS[runtime]]
        for module in (*_COMMON, *modules):
            shutil.copyfile(module, folder / module.name)
        target = folder
    else:
        # Triton's backend takes weights beside the graph only where both lie in a folder of the graph's name.
        external = f"{plan.engine.entry_file}.data" in plan.engine.content
        target = folder / plan.engine.entry_file if external else folder
    for name in served_files(plan):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.engine_folder / name, place)


def served_files(plan: ReleasePlan) -> list[str]:
    """The engine's files that a release holds: natively without what only our own `model.py` reads."""
    stem = Path(plan.engine.entry_file).stem
    return [name for name in plan.engine.content if plan.flavour == "python" or Path(name).name.startswith(f"{stem}.")]


def stored(path: Path) -> StoredFile:
    """A file's digest and size."""
    return StoredFile(sha256=sha256_file(path), size_bytes=path.stat().st_size)


def list_files(root: Path, folders: list[str]) -> dict[str, StoredFile]:
    """Every file of the named folders below `root`, hashed."""
    return {
        path.relative_to(root).as_posix(): stored(path)
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }
