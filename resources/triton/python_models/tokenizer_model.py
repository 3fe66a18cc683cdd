"""Runs inside Triton: text to token ids.

Its version folder also holds the package `pipelines`, what that reads (pipeline.json, encoder.json, tokenizer.json) and
a copy of the `tokenizers` package, so that any Triton with a Python backend and numpy serves it.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
# Links are not resolved: the Python inside Triton cannot name a path that is not ASCII, and the embedded server is
# given its repository by a link whose path is.
_HERE = str(Path(__file__).absolute().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("pipelines", "tokenizers")

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from pipelines import open_pipeline  # noqa: E402


class TritonPythonModel:
    """The pipeline's texts, strings `[batch, 1]` each, to the model's int64 inputs `[batch, sequence]`."""

    def initialize(self, args):
        """Load the pipeline beside this file."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._pipeline = open_pipeline(_HERE)
        if "length_step" in parameters:
            self._pipeline.encoder.set_length_step(int(parameters["length_step"]["string_value"]))

    def execute(self, requests):
        """One call of the tokenizer for all requests; one with text that is not UTF-8 fails alone."""
        items, counts, refusals = [], [], []
        for request in requests:
            try:
                columns = [_strings(request, name) for name in self._pipeline.inputs]
                refusals.append(None)
            except UnicodeDecodeError as error:
                columns = [[]]
                refusals.append(_refusal(f"a text is not valid UTF-8: {error}"))
            found = [dict(zip(self._pipeline.inputs, texts, strict=True)) for texts in zip(*columns, strict=True)]
            counts.append(len(found))
            items += found
        try:
            groups = iter(self._pipeline.rows(items))
        except Exception:
            if len(requests) == 1:
                raise
            return [self.execute([request])[0] for request in requests]  # one must not cost the others
        rows = [[row for _ in range(count) for row in next(groups)] for count in counts]
        return [refusal or self._response(own) for refusal, own in zip(refusals, rows, strict=True)]

    def _response(self, rows):
        length = self._pipeline.encoder.bucket(max((row.tokens for row in rows), default=0))
        arrays = self._pipeline.arrays(rows, length)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])


def _strings(request, name):
    texts = pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(np.object_).ravel().tolist()
    return [text.decode("utf-8") for text in texts]


def _refusal(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
