"""A model that turns text into token ids.

This module runs inside Triton as model.py. Its version folder also holds reading.py, aside.py, the package `pipelines`,
the files that the package reads (pipeline.json, encoder.json, tokenizer.json) and a copy of the `tokenizers` package.
So any Triton with a Python backend and numpy can serve it.
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

import_aside("pipelines", "tokenizers")

import triton_python_backend_utils as pb_utils  # noqa: E402
from reading import attempt, count_of, open_here, prepare, read, refusal  # noqa: E402


class TritonPythonModel:
    """A model that turns the pipeline's texts, strings `[batch, 1]` each, into the engine's inputs.

    The inputs are int64 `[batch, sequence]`.
    """

    def initialize(self, args):
        """Load the pipeline beside this file."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._pipeline = open_here(_HERE, parameters)

    def execute(self, requests):
        """Tokenize all requests with one call of the tokenizer. A request that has no answer fails alone."""
        asked = [attempt(self._read, request) for request in requests]
        prepared = [one for own in asked if not isinstance(own, BaseException) for one in own]
        groups = iter(self._tokenize(prepared))
        responses = []
        for own in asked:
            if not isinstance(own, BaseException):
                own = attempt(self._response, [next(groups) for _ in own])
            responses.append(refusal(own) if isinstance(own, BaseException) else own)
        return responses

    def _read(self, request):
        return prepare(read(request, self._pipeline), self._pipeline)

    def _tokenize(self, prepared):
        found = attempt(self._pipeline.tokenize, prepared)
        if isinstance(found, BaseException):
            return [found] if len(prepared) == 1 else [self._tokenize([one])[0] for one in prepared]
        return found

    def _response(self, groups):
        for group in groups:
            if isinstance(group, BaseException):
                raise RuntimeError(f"the request cannot be tokenized: {group}") from group
        rows = [row for group in groups for row in group]
        arrays = self._pipeline.arrays(rows, self._pipeline.encoder.bucket(max(row.tokens for row in rows)))
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        return pb_utils.InferenceResponse([*tensors, count_of(groups)])
