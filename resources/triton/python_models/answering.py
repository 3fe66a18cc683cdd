"""Runs inside Triton, copied beside `model.py`: from texts to answers around an engine, wherever that is."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class AnsweringModel:
    """The pipeline's texts, strings `[batch, 1]` each, to its answers, one a row.

    Answers are JSON documents, or fp32 `[batch, width]` where they are the engine's own numbers. A subclass sets
    `_pipeline`, `_answers` (the output's name), `_per_token` and `_largest` (rows that the engine takes), and has
    `_infer`, from the engine's arrays to its numbers, one a row.
    """

    def execute(self, requests):
        """The rows of all requests together through the engine; a request that has no answer fails alone."""
        asked = [self._read(request) for request in requests]
        groups = self._rows([item for items, _ in asked for item in items])
        outputs = iter(self._outputs([row for rows in groups if not isinstance(rows, Exception) for row in rows]))
        groups = iter(groups)
        responses = []
        for items, complaint in asked:
            answered = []
            for item in items:
                rows = next(groups)
                found = [rows] if isinstance(rows, Exception) else [next(outputs) for _ in rows]
                answered.append((item, rows, found))
            responses.append(_refusal(complaint) if complaint else self._response(answered))
        return responses

    def _read(self, request):
        """The request's items, and why they have no answer, if they have none."""
        try:
            columns = [_strings(request, name) for name in self._pipeline.inputs]
        except UnicodeDecodeError as error:
            return [], f"a text is not valid UTF-8: {error}"
        items = [dict(zip(self._pipeline.inputs, texts, strict=True)) for texts in zip(*columns, strict=True)]
        try:
            complaint = next(filter(None, map(self._pipeline.complaint, items)), "")
        except Exception as error:  # whatever one request meets, the others of this execution must not
            complaint = f"the request cannot be read: {error}"
        return ([], complaint) if complaint else (items, "")

    def _rows(self, items):
        """The engine's rows of each item, from one call of the tokenizer, or the exception that an item met."""
        try:
            return self._pipeline.rows(items)
        except Exception as error:
            if len(items) > 1:
                return [self._rows([item])[0] for item in items]
            return [ValueError(f"the request cannot be tokenized: {error}")]

    def _response(self, answered):
        try:
            for _, _, outputs in answered:
                for output in outputs:
                    if isinstance(output, Exception):
                        raise output
            answers = [self._pipeline.answer(*parts) for parts in answered]
            if self._pipeline.structured:
                documents = [json.dumps(answer, ensure_ascii=False).encode() for answer in answers]
                column = np.array([[document] for document in documents], dtype=np.object_)
            else:
                column = np.stack(answers)
        except Exception as error:
            return _refusal(str(error))
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._answers, column)])

    def _outputs(self, rows):
        """For each row its own numbers without padding, or the exception that it met.

        Rows of one bucket run together, whichever request they come from.
        """
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
        if np.isfinite(numbers).all():
            return cut
        return [
            output if np.isfinite(output).all() else ValueError("the engine answered with NaN or infinity")
            for output in cut
        ]


def _strings(request, name):
    texts = pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(np.object_).ravel().tolist()
    return [text.decode("utf-8") for text in texts]


def _refusal(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
