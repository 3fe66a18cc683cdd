"""Runs inside Triton, copied beside `model.py`: from texts to answers around an engine, wherever that is."""

import gc
import json

import numpy as np
import triton_python_backend_utils as pb_utils
from lane import Lane, NoLane
from reading import attempt, count_of, prepare, read, refusal, require_rows

#: Requests with a longer text, or with more in all their texts, are answered beside the others: in bytes, nearly.
_LONG_TEXT, _LONG_REQUEST = 8 * 2**10, 64 * 2**10
#: In place of the response of such a request.
_LATER = object()


class AnsweringModel:
    """The pipeline's texts, strings `[batch, 1]` each, to its answers, one a row.

    Answers are JSON documents, or fp32 `[batch, width]` where they are the engine's own numbers. A subclass sets
    `_pipeline`, `_answers` (the output's name), `_per_token` and `_largest` (rows that the engine takes), and has
    `_infer`, from the engine's arrays to its numbers, one a row. It calls `_open_lane` last.
    """

    def _open_lane(self, *, beside):
        """beside: large requests are answered by another thread, which the engine has to take."""
        self._lane, self._beside = Lane(self._answer_alone) if beside else NoLane(), beside
        # What was loaded stays. Python's collector need not look at it again, for which it would stop all threads.
        gc.freeze()

    def finalize(self):
        """Answer what still waits."""
        self._lane.close()

    def execute(self, requests):
        """The rows of all requests together through the engine; a request that has no answer fails alone."""
        with self._lane.others():
            asked = [attempt(self._read, request) for request in requests]
            return [_response(found) for found in self._answer(asked, requests)]

    def _read(self, request):
        """The request's items, each with what the tokenizer is to read of it."""
        items = read(request, self._pipeline)
        lengths = [len(text) for item in items for text in item.values()]
        if max(lengths) > _LONG_TEXT or sum(lengths) > _LONG_REQUEST:
            later = self._later(request, items)
            if later:
                return later
        asked = self._prepare(items)
        rows = sum(len(prepared) for _, prepared in asked)
        return (rows > self._largest and self._later(request, items)) or asked

    def _later(self, request, items):
        """Have a large request answered beside the others, where that is possible."""
        if not self._beside:
            return None
        sender = attempt(request.get_response_sender)
        if isinstance(sender, Exception):  # before 24.06 Triton had it for decoupled models alone
            self._beside = False
            return None
        self._lane.put(sender, items)
        return _LATER

    def _prepare(self, items):
        return list(zip(items, prepare(items, self._pipeline), strict=True))

    def _answer_alone(self, items):
        """The response to a large request. Raises what it met."""
        (found,) = self._answer([self._prepare(items)])
        if isinstance(found, BaseException):
            raise found
        return found

    def _answer(self, asked, requests=(None,)):
        """For each request its response, or the exception that it met, or that it is answered later.

        asked: `_read`'s; requests: themselves, where they may be answered later.
        """
        groups = iter(self._tokenize([one for items in asked if _is_read(items) for _, one in items]))
        rows = [
            attempt(self._take, items, groups, request) if _is_read(items) else items
            for items, request in zip(asked, requests, strict=True)
        ]
        outputs = iter(self._outputs([row for own in rows if _is_read(own) for group in own for row in group]))
        found = []
        for items, own in zip(asked, rows, strict=True):
            if _is_read(own):
                own = attempt(self._response, items, own, [[next(outputs) for _ in group] for group in own])
            found.append(own)
        return found

    def _tokenize(self, prepared):
        """The engine's rows of each item, from one call of the tokenizer, or the exception that an item met."""
        found = attempt(self._pipeline.tokenize, prepared)
        if isinstance(found, BaseException):
            return [found] if len(prepared) == 1 else [self._tokenize([one])[0] for one in prepared]
        return found

    def _take(self, items, groups, request):
        """The rows of one request. Raises what one of its items met."""
        own = [next(groups) for _ in items]
        for group in own:
            if isinstance(group, BaseException):
                raise RuntimeError(f"the request cannot be tokenized: {group}") from group
        rows = sum(map(len, own))
        require_rows(rows, self._pipeline)
        if request is not None and rows > self._largest:
            return self._later(request, [item for item, _ in items]) or own
        return own

    def _response(self, items, rows, outputs):
        for group in outputs:
            for output in group:
                if isinstance(output, BaseException):
                    raise output
        asked = [item for item, _ in items]
        answers = [self._pipeline.answer(*parts) for parts in zip(asked, rows, outputs, strict=True)]
        if self._pipeline.structured:
            documents = [_document(answer).encode() for answer in answers]
            column = np.array([[document] for document in documents], dtype=np.object_)
        else:
            column = np.stack(answers)
        return pb_utils.InferenceResponse([pb_utils.Tensor(self._answers, column), count_of(rows)])

    def _outputs(self, rows):
        """For each row its own numbers without padding, or the exception that it met.

        Rows of one bucket run together, whichever request they come from.
        """
        buckets = {}
        for number, row in enumerate(rows):
            buckets.setdefault(self._pipeline.encoder.bucket(row.tokens), []).append(number)
        outputs = [None] * len(rows)
        for length, numbers in buckets.items():
            most = self._lane.most_rows(length, self._largest)
            for start in range(0, len(numbers), most):
                chunk = numbers[start : start + most]
                for number, output in zip(chunk, self._ask([rows[place] for place in chunk], length), strict=True):
                    outputs[number] = output
        return outputs

    def _ask(self, rows, length):
        try:
            arrays = self._pipeline.arrays(rows, length)
            with self._lane.turn():
                numbers = self._infer(arrays)
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


def _document(answer):
    """Write the answer as JSON. A list is written piece by piece: while json.dumps works, no other thread runs."""
    if isinstance(answer, list):
        return f"[{', '.join([json.dumps(one, ensure_ascii=False) for one in answer])}]"
    return json.dumps(answer, ensure_ascii=False)


def _is_read(found):
    return found is not _LATER and not isinstance(found, BaseException)


def _response(found):
    """As Triton wants it: nothing for a request that is answered later."""
    if found is _LATER:
        return None
    return refusal(found) if isinstance(found, BaseException) else found
