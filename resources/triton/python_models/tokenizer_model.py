"""Runs inside Triton: text to token ids.

Its version folder also holds tokenization.py, tokenizer.json, encoder.json and a copy of the `tokenizers` package, so
that any Triton with a Python backend and numpy serves it.
"""

import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from tokenization import TextEncoder  # noqa: E402


class TritonPythonModel:
    """TEXT, strings `[batch, 1]`, to the model's int64 inputs `[batch, sequence]`."""

    def initialize(self, args):
        """Load the tokenizer beside this file."""
        del args
        self._encoder = TextEncoder.from_folder(_HERE)

    def execute(self, requests):
        """One call of the tokenizer for all requests; one with text that is not UTF-8 fails alone."""
        texts, rows, responses = [], [], []
        for request in requests:
            try:
                decoded = [item.decode("utf-8") for item in _strings(request)]
                responses.append(None)
            except UnicodeDecodeError as error:
                decoded = []
                responses.append(_refusal(f"TEXT is not valid UTF-8: {error}"))
            rows.append(range(len(texts), len(texts) + len(decoded)))
            texts += decoded
        encodings = self._encoder.tokens(texts)
        for number, wanted in enumerate(rows):
            if responses[number] is None:
                responses[number] = self._response([encodings[row] for row in wanted])
        return responses

    def _response(self, encodings):
        length = self._encoder.bucket(max((len(encoding.ids) for encoding in encodings), default=0))
        arrays = self._encoder.pad(encodings, length)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])


def _strings(request):
    return pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy().astype(np.object_).ravel().tolist()


def _refusal(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
