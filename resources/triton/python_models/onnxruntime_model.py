"""Runs inside Triton: an ONNX Runtime engine, where there is no backend of that name (the embedded server).

Its version folder also holds the engine's files and sessions.py.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from sessions import open_session  # noqa: E402


class TritonPythonModel:
    """int64 inputs `[batch, sequence]` to one fp32 output `[batch, width]`."""

    def initialize(self, args):
        """Open the session as it was measured, with the same threads."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._session = open_session(str(Path(_HERE) / parameters["entry_file"]), int(parameters["threads"]))
        self._inputs = [item.name for item in self._session.get_inputs()]
        self._output = config["output"][0]["name"]

    def execute(self, requests):
        """One run of the engine for all requests of one length, which is how the dynamic batcher groups them."""
        batches = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        groups = {}
        for number, batch in enumerate(batches):
            groups.setdefault(tuple(array.shape[1] for array in batch.values()), []).append(number)
        responses = [None] * len(requests)
        for numbers in groups.values():
            for number, response in zip(numbers, self._run([batches[number] for number in numbers]), strict=True):
                responses[number] = response
        return responses

    def _run(self, batches):
        try:
            feed = {name: np.concatenate([batch[name] for batch in batches]) for name in self._inputs}
            answers = self._session.run([self._output], feed)[0]
        except Exception as error:
            if len(batches) > 1:  # one request with ids that the model does not know must not cost the others
                return [self._run([batch])[0] for batch in batches]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))]
        ends = np.cumsum([len(batch[self._inputs[0]]) for batch in batches])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self._output, np.ascontiguousarray(rows))])
            for rows in np.split(answers, ends[:-1])
        ]
