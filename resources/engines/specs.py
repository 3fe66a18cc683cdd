"""The names and properties of the engines that compete.

This module imports next to nothing, because the asset graph is made from it and every step loads the definitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resources.errors import EngineError
from resources.machine.targets import Device

Runtime = Literal["torch", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

#: The engine that candidates are compared with: PyTorch in fp32, as transformers loads it. It is measured like a
#: candidate and is never eligible for a release.
BASELINE = "torch"
#: The name of the benchmark of the engine that serves now, which is measured again beside the candidates. It is also
#: the name of that engine as long as it stays the best.
SERVED = "served"
#: Runtimes whose threads can sleep while they wait for the next operator.
SPINNING: tuple[Runtime, ...] = ("onnxruntime",)


#: The distributions that the engines of each runtime are built and run with.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers"),
    "onnxruntime": ("onnx", "onnx-ir", "onnxscript", "onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("onnx", "onnx-ir", "onnxruntime-gpu", "onnxruntime"),
}


@dataclass(frozen=True)
class EngineSpec:
    """One way to run a model.

    Args:
        devices: The devices that the engine can run on.
        quantization: When the scales of int8 activations are computed: for each batch (dynamic) or beforehand (static).
        provider: The execution provider of ONNX Runtime, if it is neither the CPU's nor CUDA's.
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
        """Return whether the builder needs the accuracy gates, to leave in fp32 the operators that would miss them."""
        return self.precision != "fp32"

    @property
    def tuned(self) -> bool:
        """Return whether the builder needs the shapes that are served, because TensorRT tunes an engine to them."""
        return "tensorrt" in (self.runtime, self.provider)


ENGINES: tuple[EngineSpec, ...] = (
    EngineSpec(BASELINE, "torch", "fp32", ("cpu", "cuda"), "The baseline: PyTorch, eager, fp32, inference mode."),
    EngineSpec(
        "onnxruntime_fp32",
        "onnxruntime",
        "fp32",
        ("cpu", "cuda"),
        "ONNX Runtime with fused embeddings, attention, normalization and pooling, and with CUDA graphs on GPUs.",
    ),
    EngineSpec(
        "onnxruntime_int8",
        "onnxruntime",
        "int8",
        ("cpu",),
        "The fused graph with as many matrices in int8 as the gates allow. Activations are scaled batch by batch.",
        "dynamic",
    ),
    EngineSpec(
        "onnxruntime_int8_static",
        "onnxruntime",
        "int8",
        ("cpu",),
        "The fused graph with as many matrices in int8 as the gates allow. Activation scales come from real text.",
        "static",
    ),
    EngineSpec(
        "openvino_fp32", "openvino", "fp32", ("cpu",), "The exported graph, which OpenVINO fuses by its own rules."
    ),
    EngineSpec(
        "onnxruntime_fp16",
        "onnxruntime",
        "fp16",
        ("cuda",),
        "The fused graph, with as much of it in fp16 as stays finite and keeps the gates, and with CUDA graphs.",
    ),
    EngineSpec(
        "onnxruntime_bf16",
        "onnxruntime",
        "bf16",
        ("cuda",),
        "The fused graph, with as much of it in bf16 as keeps the gates (bf16 cannot overflow), and with CUDA graphs.",
    ),
    EngineSpec(
        "onnxruntime_tensorrt_fp16",
        "onnxruntime",
        "fp16",
        ("cuda",),
        "ONNX Runtime with its TensorRT provider, which chooses the operators that run in half precision.",
        provider="tensorrt",
    ),
    EngineSpec("tensorrt_fp16", "tensorrt", "fp16", ("cuda",), "A strongly typed TensorRT engine in half precision."),
    EngineSpec("tensorrt_bf16", "tensorrt", "bf16", ("cuda",), "A strongly typed TensorRT engine in bfloat16."),
    EngineSpec("tensorrt_int8", "tensorrt", "int8", ("cuda",), "A TensorRT engine with symmetric int8 Q/DQ."),
    EngineSpec("tensorrt_fp8", "tensorrt", "fp8", ("cuda",), "A TensorRT engine with fp8 Q/DQ."),
)


def engine_spec(name: str) -> EngineSpec:
    """Return the engine of that name.

    Raises:
        EngineError: There is no such engine.
    """
    for spec in ENGINES:
        if spec.name == name:
            return spec
    raise EngineError(f"There is no engine named {name!r}. The engines are {', '.join(spec.name for spec in ENGINES)}.")
