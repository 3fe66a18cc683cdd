"""OpenVINO: the exported graph as a model of its own format, in fp32, on the CPU.

From the plain graph, not from the one that is fused for ONNX Runtime: OpenVINO has rules of its own, and does not know
ONNX Runtime's operators.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import openvino

from resources.artifacts.records import Engine
from resources.engines.interface import Built, Goal, Sources
from resources.engines.openvino.openvino_session import OpenVinoSession
from resources.engines.specs import EngineSpec
from resources.errors import EngineError
from resources.machine.targets import Device

MODEL_FILE = "model.xml"
_GRAPH_FILE = "model.onnx"


def build(sources: Sources, spec: EngineSpec, folder: Path, goal: Goal | None, device: Device) -> Built:
    """Convert, and run the result once before it counts as built. Raises EngineError."""
    from resources.engines.onnxruntime.runner import check_answer

    del goal, device
    try:
        # Not openvino.convert_model, which does the same and reports its use to OpenVINO's makers.
        model = openvino.Core().read_model(sources.graph_folder / _GRAPH_FILE)
        # Weights would be written in fp16 otherwise, and with them the answers change.
        openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)
    except Exception as error:
        raise EngineError(f"{spec.name}: OpenVINO cannot convert the graph: {_reason(error)}") from error
    runner = OpenVinoRunner(folder / MODEL_FILE, sources.graph.output, threads=1)
    check_answer(runner, sources)
    operators = Counter(operator.get_type_name() for operator in model.get_ops())
    return Built(MODEL_FILE, runner.settings, dict(operators))


class OpenVinoRunner:
    """One compiled model."""

    def __init__(self, model: Path, output: str, threads: int) -> None:
        try:
            self._session = OpenVinoSession(model, output, threads)
        except Exception as error:
            raise EngineError(f"OpenVINO cannot load the model: {_reason(error)}") from error

    @property
    def settings(self) -> dict[str, str]:
        """What it was compiled with, whatever the number of threads."""
        return {name.lower(): value for name, value in self._session.settings.items() if "THREADS" not in name}

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self._session.run(batch)


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> OpenVinoRunner:
    """The engine's model, compiled."""
    del sources
    return OpenVinoRunner(folder / engine.entry_file, engine.output, threads)


def _reason(error: Exception) -> str:
    """OpenVINO's messages begin with where in its source they come from; what went wrong is in the last lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:])[:300] or type(error).__name__
