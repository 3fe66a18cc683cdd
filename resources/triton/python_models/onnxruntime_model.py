"""Runs inside Triton: an ONNX Runtime engine, where there is no backend of that name (the embedded server)."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """int64 inputs `[batch, sequence]` to one fp32 output `[batch, width]`."""

    def initialize(self, args):
        """Open the session as it was measured: the same threads, the same options."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(
            str(Path(__file__).resolve().parent / parameters["entry_file"]),
            options,
            providers=["CPUExecutionProvider"],
        )
        self._given = [item["name"] for item in config["input"]]
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._output = config["output"][0]["name"]

    def execute(self, requests):
        """One run of the engine for all requests of one length, which is how the dynamic batcher groups them."""
        batches = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._given}
            for request in requests
        ]
        responses = [None] * len(requests)
        groups = {}
        for number, batch in enumerate(batches):
            groups.setdefault(batch[self._given[0]].shape[1], []).append(number)
        for numbers in groups.values():
            feed = {name: np.concatenate([batches[number][name] for number in numbers]) for name in self._inputs}
            answers = self._session.run([self._output], feed)[0]
            start = 0
            for number in numbers:
                end = start + len(batches[number][self._given[0]])
                tensor = pb_utils.Tensor(self._output, np.ascontiguousarray(answers[start:end]))
                responses[number] = pb_utils.InferenceResponse([tensor])
                start = end
        return responses
