"""Build the OpenVINO engine: the exported graph in OpenVINO's own format, in fp32, for the CPU.

The builder starts from the plain graph and not from the one that is fused for ONNX Runtime. OpenVINO has its own fusion
rules and does not know ONNX Runtime's operators.
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
    """Convert the graph, and run the result once as a check.

    Raises:
        EngineError: OpenVINO cannot convert the graph, or the converted model fails on a small batch.
    """
    from resources.engines.onnxruntime.runner import check_answer

    del goal, device
    try:
        # openvino.convert_model does the same, but it reports its use to OpenVINO's makers.
        model = openvino.Core().read_model(sources.graph_folder / _GRAPH_FILE)
        # By default the weights are written in fp16, which changes the answers.
        openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=False)
    except Exception as error:
        raise EngineError(f"{spec.name}: OpenVINO cannot convert the graph: {_reason(error)}") from error
    runner = OpenVinoRunner(folder / MODEL_FILE, sources.graph.output, threads=1)
    check_answer(runner, sources)
    operators = Counter(operator.get_type_name() for operator in model.get_ops())
    return Built(MODEL_FILE, runner.settings, dict(operators))


class OpenVinoRunner:
    """A compiled OpenVINO model."""

    def __init__(self, model: Path, output: str, threads: int) -> None:
        try:
            self._session = OpenVinoSession(model, output, threads)
        except Exception as error:
            raise EngineError(f"OpenVINO cannot load the model: {_reason(error)}") from error

    @property
    def settings(self) -> dict[str, str]:
        """The properties that the model was compiled with, without those that depend on the number of threads."""
        return {name.lower(): value for name, value in self._session.settings.items() if "THREADS" not in name}

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """Return the model's output for one batch."""
        return self._session.run(batch)


def load(engine: Engine, folder: Path, sources: Sources, threads: int) -> OpenVinoRunner:
    """Return the engine's model, compiled."""
    del sources
    return OpenVinoRunner(folder / engine.entry_file, engine.output, threads)


def _reason(error: Exception) -> str:
    """Return the cause of an OpenVINO error.

    OpenVINO's messages begin with positions in its source; the cause is in the last lines.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:])[:300] or type(error).__name__
