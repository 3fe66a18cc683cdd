"""Runs inside Triton: a whole pipeline around an engine that is another model of the same server.

Its version folder also holds the package `pipelines`, what that reads (pipeline.json, encoder.json, tokenizer.json) and
a copy of the `tokenizers` package, so that any Triton with a Python backend and numpy serves it.
"""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # a release never changes
_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from aside import import_aside  # noqa: E402

import_aside("pipelines", "tokenizers")

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402
from pipelines import open_pipeline  # noqa: E402


class TritonPythonModel:
    """The pipeline's texts, strings `[batch, 1]` each, to RESULT, one JSON document a row."""

    def initialize(self, args):
        """Load the pipeline beside this file, and tokenize once: the first request is not to wait for that."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._engine, self._output = parameters["engine"], parameters["engine_output"]
        self._inputs, self._largest = parameters["engine_inputs"].split(","), config["max_batch_size"]
        self._per_token = parameters["per_token"] == "true"  # noqa: S105
        self._pipeline = open_pipeline(_HERE)
        if "length_step" in parameters:
            self._pipeline.encoder.set_length_step(int(parameters["length_step"]))
        self._pipeline.encoder.tokens(["warm"])

    def execute(self, requests):
        """The rows of all requests together through the engine; a request that has no answer fails alone."""
        asked = [self._read(request) for request in requests]
        outputs = iter(self._outputs([row for _, groups, _ in asked for group in groups for row in group]))
        return [
            _refusal(complaint)
            if complaint
            else self._response(
                [(item, rows, [next(outputs) for _ in rows]) for item, rows in zip(items, groups, strict=True)]
            )
            for items, groups, complaint in asked
        ]

    def _read(self, request):
        """The request's items, the rows of each, and why they have no answer, if they have none."""
        try:
            columns = [_strings(request, name) for name in self._pipeline.inputs]
        except UnicodeDecodeError as error:
            return [], [], f"a text is not valid UTF-8: {error}"
        items = [dict(zip(self._pipeline.inputs, texts, strict=True)) for texts in zip(*columns, strict=True)]
        try:
            complaint = next(filter(None, map(self._pipeline.complaint, items)), "")
            return items, [] if complaint else self._pipeline.rows(items), complaint
        except Exception as error:  # whatever one request meets, the others of this execution must not
            return [], [], f"the request cannot be tokenized: {error}"

    def _response(self, answered):
        try:
            for _, _, outputs in answered:
                for output in outputs:
                    if isinstance(output, Exception):
                        raise output
            documents = [json.dumps(self._pipeline.answer(*parts), ensure_ascii=False) for parts in answered]
        except Exception as error:
            return _refusal(str(error))
        column = np.array([[document.encode()] for document in documents], dtype=np.object_)
        return pb_utils.InferenceResponse([pb_utils.Tensor("RESULT", column)])

    def _outputs(self, rows):
        """For each row its own numbers without padding, or the exception that it met."""
        buckets = {}
        for number, row in enumerate(rows):
            buckets.setdefault(self._pipeline.encoder.bucket(row.tokens), []).append(number)
        outputs = [None] * len(rows)
        for length, numbers in buckets.items():
            for start in range(0, len(numbers), self._largest):
                chunk = numbers[start : start + self._largest]
                for number, output in zip(chunk, self._ask([rows[place] for place in chunk], length), strict=True):
                    outputs[number] = output
        return outputs

    def _ask(self, rows, length):
        try:
            numbers = self._infer(self._pipeline.arrays(rows, length))
        except Exception as error:
            if len(rows) > 1:  # what one row met must not cost the others
                return [self._ask([row], length)[0] for row in rows]
            return [error]
        cut = [output[: row.tokens] if self._per_token else output for row, output in zip(rows, numbers, strict=True)]
        return [
            output if np.isfinite(output).all() else ValueError("the engine answered with NaN or infinity")
            for output in cut
        ]

    def _infer(self, arrays):
        request = pb_utils.InferenceRequest(
            model_name=self._engine,
            requested_output_names=[self._output],
            inputs=[pb_utils.Tensor(name, arrays[name]) for name in self._inputs],
        )
        response = request.exec()
        if response.has_error() and not pb_utils.is_model_ready(self._engine):
            # In explicit model control a server that was told of the public model alone has not loaded the engine.
            pb_utils.load_model(model_name=self._engine)
            response = request.exec()
        if response.has_error():
            raise RuntimeError(response.error().message())
        return pb_utils.get_output_tensor_by_name(response, self._output).as_numpy()


def _strings(request, name):
    texts = pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(np.object_).ravel().tolist()
    return [text.decode("utf-8") for text in texts]


def _refusal(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
