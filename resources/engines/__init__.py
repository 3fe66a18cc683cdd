"""The engines that compete, by name: what each is, and where it can be built.

Light on purpose: the lineage is made from this list, and it is read wherever definitions are. What builds and runs an
engine is the module of its runtime, reached through `build` and `load` below, inside child processes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from resources.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

    from resources.artifacts.records import Checkpoint, Engine, OnnxGraph
    from resources.evaluation.goal import Goal

Runtime = Literal["torch", "onnxruntime", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]

#: What candidates are compared with: PyTorch as transformers loads it, fp32. Measured like them, never eligible.
BASELINE = "torch"


@dataclass(frozen=True)
class EngineSpec:
    """One way to run a model. `needs` says what the machine must have; `cpu` is always there.

    quantization: whether the scales of int8 activations are computed as they come (dynamic) or beforehand (static).
    """

    name: str
    runtime: Runtime
    precision: Precision
    needs: Literal["cpu", "cuda"]
    description: str
    quantization: Literal["", "dynamic", "static"] = ""

    @property
    def examined(self) -> bool:
        """Whether its builder has to know the accuracy gates: it leaves in fp32 what would miss them otherwise."""
        return self.quantization != ""


ENGINES: tuple[EngineSpec, ...] = (
    EngineSpec(BASELINE, "torch", "fp32", "cpu", "The baseline: PyTorch, eager, fp32, inference mode."),
    EngineSpec("onnxruntime_fp32", "onnxruntime", "fp32", "cpu", "ONNX Runtime, attention and normalization fused."),
    EngineSpec(
        "onnxruntime_int8",
        "onnxruntime",
        "int8",
        "cpu",
        "The fused graph with matrices in int8, as many as the gates allow; scales of activations as they come.",
        "dynamic",
    ),
    EngineSpec(
        "onnxruntime_int8_static",
        "onnxruntime",
        "int8",
        "cpu",
        "The fused graph with matrices in int8, as many as the gates allow; scales of activations from real text.",
        "static",
    ),
    EngineSpec("onnxruntime_fp16", "onnxruntime", "fp16", "cuda", "ONNX Runtime on CUDA in half precision."),
    EngineSpec("tensorrt_fp16", "tensorrt", "fp16", "cuda", "A strongly typed TensorRT engine in half precision."),
    EngineSpec("tensorrt_int8", "tensorrt", "int8", "cuda", "A TensorRT engine with symmetric int8 Q/DQ."),
)

#: Deployments that can be named. GPU targets (`cuda_sm90`, ...) are not built yet.
TARGETS = ("cpu",)


def engine_spec(name: str) -> EngineSpec:
    """The engine of that name. Raises EngineError."""
    for spec in ENGINES:
        if spec.name == name:
            return spec
    raise EngineError(f"There is no engine named {name!r}; there are {', '.join(spec.name for spec in ENGINES)}.")


def unsupported_reason(spec: EngineSpec, target: str) -> str | None:
    """Why the engine cannot be built for the target; None where it can."""
    if spec.needs == "cuda" and target == "cpu":
        return f"{spec.name} needs an NVIDIA GPU; the target 'cpu' has none."
    return None


@dataclass(frozen=True)
class Sources:
    """What engines are built from and run with. Every runtime takes the parts it needs."""

    checkpoint: Checkpoint
    checkpoint_folder: Path
    graph: OnnxGraph
    graph_folder: Path


@dataclass(frozen=True)
class Built:
    """What a build left in its folder.

    parameters: the knobs it was built with; operators: nodes by type; kept: operators left in higher precision than the
    spec's; steps: what was tried to find those, a sentence each.
    """

    entry_file: str
    parameters: dict[str, str]
    operators: dict[str, int]
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()


class Runner(Protocol):
    """An engine, loaded. `run` takes int64 arrays `[batch, sequence]` by input name, and answers fp32 `[batch, width]`,
    or `[batch, sequence, width]` where the task is one of tokens.
    """

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray: ...


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None = None) -> Built:
    """Build an engine into an empty folder. Runs in a child process; raises EngineError.

    goal: what it has to reach, for specs that are `examined`.
    """
    built: Built = import_module(f"resources.engines.{spec.runtime}").build(sources, spec, folder, goal)
    return built


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> Runner:
    """Load a built engine to run with so many threads. Runs in a child process; raises EngineError."""
    runner: Runner = import_module(f"resources.engines.{engine.runtime}").load(engine, folder, sources, threads)
    return runner
