"""Runs inside Triton: a graph in ONNX Runtime with its usual settings, one request after the other."""

import json

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """int64 `[texts, sequence]` to fp32 `[texts, width]`."""

    def initialize(self, args):
        """Open the session."""
        config = json.loads(args["model_config"])
        path = config["parameters"]["graph"]["string_value"]
        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._output = config["output"][0]["name"]

    def execute(self, requests):
        """One run a request."""
        responses = []
        for request in requests:
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            (answer,) = self._session.run([self._output], feed)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(self._output, answer)]))
        return responses
