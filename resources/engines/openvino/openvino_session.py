"""Run an OpenVINO model.

The benchmark and the served release use the same module. A release carries a copy of this file beside its `model.py`,
so the file imports nothing else of this project.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino

#: One request runs at a time, with all threads, in fp32. On processors with bfloat16 OpenVINO would otherwise use it.
#: Threads are not pinned, because two models on one machine would be pinned to the same cores.
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": False,
}


class OpenVinoSession:
    """A model, compiled for the CPU.

    Its attribute `inputs` holds the names of the arrays that the model reads. Errors of OpenVINO are raised unchanged.
    """

    def __init__(self, path: object, output: str, threads: int) -> None:
        compiled = openvino.Core().compile_model(str(path), "CPU", {**SETTINGS, "INFERENCE_NUM_THREADS": threads})
        self.inputs: list[str] = [port.get_any_name() for port in compiled.inputs]
        names = (*SETTINGS, "INFERENCE_NUM_THREADS")
        self.settings = {name: _text(compiled.get_property(name)) for name in names}
        self._request: Any = compiled.create_infer_request()
        self._output: Any = compiled.output(output)

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the output for the arrays, which are given by input name.

        The output is a copy, because the next run overwrites the memory of the request.
        """
        self._request.infer({name: batch[name] for name in self.inputs}, share_inputs=True)
        answer: np.ndarray = self._request.get_tensor(self._output).data.copy()
        return answer


def _text(value: object) -> str:
    """Return a property in the form in which it is set.

    The text of an element type would otherwise be `<Type: 'float32'>`.
    """
    return str(value.to_string() if isinstance(value, openvino.Type) else getattr(value, "name", value))
