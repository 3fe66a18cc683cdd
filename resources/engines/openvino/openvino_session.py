"""Opening an OpenVINO model: one module for what is measured and for what serves.

A release carries a copy of this file beside its `model.py`, so it needs nothing else of this project.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino

#: One request at a time with all threads, computed in fp32: on processors that have it OpenVINO would take bfloat16.
#: Threads are not pinned: two models on one machine would be pinned to the same cores.
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": False,
}


class OpenVinoSession:
    """One model, compiled for the CPU. `inputs`: names of the arrays that it reads. Raises what OpenVINO raises."""

    def __init__(self, path: object, output: str, threads: int) -> None:
        compiled = openvino.Core().compile_model(str(path), "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})
        self.inputs: list[str] = [port.get_any_name() for port in compiled.inputs]
        names = (*SETTINGS, "INFERENCE_NUM_THREADS")
        self.settings = {name: _text(compiled.get_property(name)) for name in names}
        self._request: Any = compiled.create_infer_request()
        self._output: Any = compiled.output(output)

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for arrays by name, in memory of the caller's own: the next run writes over the request's."""
        self._request.infer({name: batch[name] for name in self.inputs}, share_inputs=True)
        answer: np.ndarray = self._request.get_tensor(self._output).data.copy()
        return answer


def _text(value: object) -> str:
    """A property as it is set; element types would show themselves as `<Type: 'float32'>`."""
    return str(value.to_string() if isinstance(value, openvino.Type) else getattr(value, "name", value))
