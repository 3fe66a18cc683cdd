"""Runs inside Triton: an ONNX Runtime engine, where there is no backend of that name (the embedded server).

Its version folder also holds the engine's files, batched_model.py, neighbours.py, sessions.py, cuda.py and
tensorrt_provider.py.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("onnxruntime")

from batched_model import BatchedModel  # noqa: E402
from cuda import CudaSession  # noqa: E402
from neighbours import Neighbours  # noqa: E402
from sessions import open_session  # noqa: E402
from tensorrt_provider import ProviderSession  # noqa: E402

#: For capturing CUDA graphs while the model is loaded; what is left then is captured when it is asked for.
_WARM_SECONDS = 20.0


class TritonPythonModel(BatchedModel):
    """A session on the CPU, on CUDA, or on CUDA through TensorRT."""

    def initialize(self, args):
        """Open the session as it was measured, with the same threads."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        path, threads = str(Path(_HERE) / parameters["entry_file"]), int(parameters["threads"])
        self._output = config["output"][0]["name"]
        if parameters["device"] == "cuda":
            kind = ProviderSession if parameters.get("provider") == "tensorrt" else CudaSession
            session = kind(path, self._output, device=int(args["model_instance_device_id"]), threads=threads)
            self._inputs, self._answer = session.inputs, session.run
            if kind is CudaSession:
                # Here, and not while somebody waits for an answer.
                widths = {item["name"]: max(0, item["dims"][-1]) for item in config["input"]}
                lengths = [int(length) for length in parameters["lengths"].split(",")]
                session.warm(widths, lengths, max(1, config["max_batch_size"]), _WARM_SECONDS)
        else:
            spinning, beside = parameters["spinning"] == "true", int(parameters["threads_beside"])
            self._alone = open_session(path, threads, spinning=spinning)
            self._beside = open_session(path, beside, spinning=spinning) if beside < threads else self._alone
            self._neighbours = Neighbours(args, config["instance_group"][0]["count"])
            self._inputs = [item.name for item in self._alone.get_inputs()]
            self._answer = self._run_session

    def _run_session(self, feed):
        """With all threads, as it was measured, or, while the other instance computes, with half of them."""
        with self._neighbours:
            session = self._beside if self._neighbours.at_work() else self._alone
            return session.run([self._output], feed)[0]
