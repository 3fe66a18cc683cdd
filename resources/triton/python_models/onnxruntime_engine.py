"""An ONNX Runtime engine on the CPU, on CUDA, or on CUDA through TensorRT.

This module runs inside Triton as engine.py. Its folder also holds the engine's files, neighbours.py, sessions.py,
cuda.py and tensorrt_provider.py.
"""

from pathlib import Path

from cuda import CudaSession
from neighbours import Neighbours
from sessions import open_session
from tensorrt_provider import ProviderSession


def open_engine(folder, parameters, args, groups):
    """Open the engine with the threads with which it was measured.

    Args:
        folder: The version folder, which holds the engine's files.
        parameters: The parameters of the model's configuration.
        args: The arguments of `initialize`.
        groups: The instance groups of the model's configuration.
    """
    path, output = str(Path(folder) / parameters["entry_file"]), parameters["engine_output"]
    if parameters["device"] == "cuda":
        kind = ProviderSession if parameters.get("provider") == "tensorrt" else CudaSession
        return kind(path, output, device=int(args["model_instance_device_id"]), threads=int(parameters["threads"]))
    return _CpuEngine(path, output, parameters, Neighbours(args, groups))


class _CpuEngine:
    """An engine on the CPU. The attribute `inputs` holds the names of the arrays that it reads."""

    def __init__(self, path, output, parameters, neighbours):
        threads, beside = int(parameters["threads"]), int(parameters["threads_beside"])
        spinning = parameters["spinning"] == "true"
        self._alone = open_session(path, threads, spinning=spinning)
        self._beside = open_session(path, beside, spinning=spinning) if beside < threads else self._alone
        self._output, self._neighbours = output, neighbours
        self.inputs = [item.name for item in self._alone.get_inputs()]

    def run(self, feed):
        """Run the engine with all threads, as it was measured, or with its share while another instance computes."""
        with self._neighbours:
            session = self._beside if self._neighbours.at_work() else self._alone
            return session.run([self._output], feed)[0]
