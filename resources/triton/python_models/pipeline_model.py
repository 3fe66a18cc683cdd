"""A whole pipeline around an engine that is another model of the same server, on Triton's own backend.

This module runs inside Triton as model.py. Its version folder also holds answering.py, lane.py, reading.py, aside.py,
the package `pipelines`, the files that the package reads (pipeline.json, encoder.json, tokenizer.json) and a copy of
the `tokenizers` package. So any Triton with a Python backend and numpy can serve it.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
# Links are not resolved. The Python inside Triton cannot name a path that is not ASCII, and the embedded server reads
# such a repository through a link with an ASCII path.
_HERE = str(Path(__file__).absolute().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("tokenizers", "pipelines")

import triton_python_backend_utils as pb_utils  # noqa: E402
from answering import AnsweringModel  # noqa: E402
from reading import open_here  # noqa: E402


class TritonPythonModel(AnsweringModel):
    """A model that turns the pipeline's texts, strings `[batch, 1]` each, into RESULT, one JSON document per row."""

    def initialize(self, args):
        """Load the pipeline beside this file, and tokenize once, so that the first request need not wait for that."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._engine, self._output = parameters["engine"], parameters["engine_output"]
        self._inputs, self._largest = parameters["engine_inputs"].split(","), config["max_batch_size"]
        self._answers, self._per_token = "RESULT", parameters["per_token"] == "true"  # noqa: S105
        self._pipeline = open_here(_HERE, parameters)
        self._open_lane(beside=False)  # only the thread of `execute` may call models

    def _infer(self, arrays):
        request = pb_utils.InferenceRequest(
            model_name=self._engine,
            requested_output_names=[self._output],
            inputs=[pb_utils.Tensor(name, arrays[name]) for name in self._inputs],
        )
        response = request.exec()
        if response.has_error() and not pb_utils.is_model_ready(self._engine):
            # In explicit model control, a server that was told to load only the public model has not loaded the engine.
            pb_utils.load_model(model_name=self._engine)
            response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, self._output).as_numpy()
