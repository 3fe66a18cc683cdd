"""The engines that compete, by name: what each is, and where it can be built.

Light on purpose: the lineage is made from this list, and it is read wherever definitions are. What builds and runs an
engine is the module of its runtime, reached through `build` and `load` below, inside child processes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from resources.device import why_not_here
from resources.engines.presence import why_no_tensorrt
from resources.errors import EngineError
from resources.targets import Device, device_of
from resources.trust import Trust

if TYPE_CHECKING:
    import numpy as np

    from resources.artifacts.records import Checkpoint, Engine, OnnxGraph
    from resources.evaluation.goal import Goal

Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

#: What candidates are compared with: PyTorch as transformers loads it, fp32. Measured like them, never eligible.
BASELINE = "torch"
#: What serves now, measured again beside the candidates: the name of that benchmark, and of the engine while it stays.
SERVED = "served"
#: Runtimes whose threads can be told to sleep while they wait for the next operator.
SPINNING: tuple[Runtime, ...] = ("onnxruntime",)


@dataclass(frozen=True)
class EngineSpec:
    """One way to run a model. `devices`: what it can run on.

    quantization: whether the scales of int8 activations are computed as they come (dynamic) or beforehand (static).
    provider: what computes inside ONNX Runtime, where that is neither the processor nor CUDA.
    """

    name: str
    runtime: Runtime
    precision: Precision
    devices: tuple[Device, ...]
    description: str
    quantization: Literal["", "dynamic", "static"] = ""
    provider: Literal["", "tensorrt"] = ""

    @property
    def examined(self) -> bool:
        """Whether its builder has to know the accuracy gates: it leaves in fp32 what would miss them otherwise."""
        return self.precision != "fp32"

    @property
    def tuned(self) -> bool:
        """Whether its builder has to know the shapes that are served: TensorRT tunes an engine to them."""
        return "tensorrt" in (self.runtime, self.provider)


ENGINES: tuple[EngineSpec, ...] = (
    EngineSpec(BASELINE, "torch", "fp32", ("cpu", "cuda"), "The baseline: PyTorch, eager, fp32, inference mode."),
    EngineSpec(
        "onnxruntime_fp32",
        "onnxruntime",
        "fp32",
        ("cpu", "cuda"),
        "ONNX Runtime: embeddings, attention, normalization and pooling fused; on GPUs with CUDA graphs.",
    ),
    EngineSpec(
        "onnxruntime_int8",
        "onnxruntime",
        "int8",
        ("cpu",),
        "The fused graph with matrices in int8, as many as the gates allow; scales of activations as they come.",
        "dynamic",
    ),
    EngineSpec(
        "onnxruntime_int8_static",
        "onnxruntime",
        "int8",
        ("cpu",),
        "The fused graph with matrices in int8, as many as the gates allow; scales of activations from real text.",
        "static",
    ),
    EngineSpec("openvino_fp32", "openvino", "fp32", ("cpu",), "OpenVINO: the exported graph, fused by its own rules."),
    EngineSpec(
        "onnxruntime_fp16",
        "onnxruntime",
        "fp16",
        ("cuda",),
        "The fused graph in half precision, as much of it as stays finite and keeps the gates, with CUDA graphs.",
    ),
    EngineSpec(
        "onnxruntime_bf16",
        "onnxruntime",
        "bf16",
        ("cuda",),
        "The fused graph in bfloat16, which cannot overflow, as much of it as keeps the gates, with CUDA graphs.",
    ),
    EngineSpec(
        "onnxruntime_tensorrt_fp16",
        "onnxruntime",
        "fp16",
        ("cuda",),
        "ONNX Runtime over its TensorRT provider, which chooses by itself what runs in half precision.",
        provider="tensorrt",
    ),
    EngineSpec("tensorrt_fp16", "tensorrt", "fp16", ("cuda",), "A strongly typed TensorRT engine in half precision."),
    EngineSpec("tensorrt_bf16", "tensorrt", "bf16", ("cuda",), "A strongly typed TensorRT engine in bfloat16."),
    EngineSpec("tensorrt_int8", "tensorrt", "int8", ("cuda",), "A TensorRT engine with symmetric int8 Q/DQ."),
    EngineSpec("tensorrt_fp8", "tensorrt", "fp8", ("cuda",), "A TensorRT engine with fp8 Q/DQ."),
)


def engine_spec(name: str) -> EngineSpec:
    """The engine of that name. Raises EngineError."""
    for spec in ENGINES:
        if spec.name == name:
            return spec
    raise EngineError(f"There is no engine named {name!r}; there are {', '.join(spec.name for spec in ENGINES)}.")


def unsupported_reason(spec: EngineSpec, target: str) -> str | None:
    """Why the engine cannot be built for the target on this machine; None where it can."""
    device = device_of(target)
    if device not in spec.devices:
        where = "an NVIDIA GPU; the target 'cpu' has none" if device == "cpu" else f"a CPU; {target!r} is a GPU"
        return f"{spec.name} needs {where}."
    if spec.runtime == "openvino" and find_spec("openvino") is None:
        return f"{spec.name} needs OpenVINO, which is not installed: pip install 'transformer-refinery[openvino]'."
    return why_not_here(target) or (why_no_tensorrt(spec, target) if spec.tuned else None)


@dataclass(frozen=True)
class Sources:
    """What engines are built from and run with. Every runtime takes the parts it needs.

    trust: what loading the checkpoint may do. By default it runs no code of the checkpoint's.
    """

    checkpoint: Checkpoint
    checkpoint_folder: Path
    graph: OnnxGraph
    graph_folder: Path
    trust: Trust = field(default_factory=Trust)


@dataclass(frozen=True)
class Built:
    """What a build left in its folder.

    parameters: the knobs it was built with; operators: nodes by type; kept: operators left in higher precision than the
    spec's; steps: what was tried to find those, a sentence each. kept_nodes: the nodes of the fused graph that `kept`
    stands for; given as Goal.kept_nodes they give the same engine without a search. documents: files for people alone.
    """

    entry_file: str
    parameters: dict[str, str]
    operators: dict[str, int]
    kept: tuple[str, ...] = ()
    steps: tuple[str, ...] = ()
    kept_nodes: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()


class Runner(Protocol):
    """An engine, loaded. `run` takes int64 arrays `[batch, sequence]` by input name, and answers fp32 `[batch, width]`,
    or `[batch, sequence, width]` where the task is one of tokens.
    """

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray: ...


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None = None, device: Device = "cpu") -> Built:
    """Build an engine for the device into an empty folder. Runs in a child process; raises EngineError.

    goal: what it has to reach, for specs that are `examined`.
    """
    built: Built = _module(spec.runtime, spec.provider).build(sources, spec, folder, goal, device)
    return built


def load(engine: Engine, folder: Path, sources: Sources, threads: int, *, spinning: bool = True) -> Runner:
    """Load a built engine to run with so many threads. Runs in a child process; raises EngineError.

    spinning: see ThreadSetting; only runtimes that are among `SPINNING` can do without.
    """
    choice = {} if spinning else {"spinning": False}
    module = _module(engine.runtime, engine.parameters.get("provider", ""))
    runner: Runner = module.load(engine, folder, sources, threads, **choice)
    return runner


def _module(runtime: str, provider: str) -> Any:
    return import_module("resources.engines." + "_".join(filter(None, (runtime, provider))))
