"""The way from texts to answers, around an engine that may run in this process or elsewhere.

This module runs inside Triton, copied beside `model.py`.
"""

import gc
import json

import numpy as np
import triton_python_backend_utils as pb_utils
from lane import Lane, NoLane
from reading import attempt, count_of, prepare, read, refusal, require_rows

#: A request with a longer text, or with more text in all, is answered beside the others. The limits compare numbers of
#: characters, which are roughly bytes.
_LONG_TEXT, _LONG_REQUEST = 8 * 2**10, 64 * 2**10
#: A marker in place of the response to such a request.
_LATER = object()


class AnsweringModel:
    """A Triton model that turns the pipeline's texts, strings `[batch, 1]` each, into one answer per row.

    Answers are JSON documents, or fp32 `[batch, width]` if they are the engine's own numbers. A subclass sets
    `_pipeline`, `_answers` (the output's name), `_per_token` and `_largest` (the most rows that the engine takes). It
    defines `_infer`, which takes the engine's arrays and returns its numbers, one entry per row. It calls `_open_lane`
    last.
    """

    def _open_lane(self, *, beside):
        """Start the thread for large requests if `beside` is true. The engine has to allow calls from that thread."""
        self._lane, self._beside = Lane(self._answer_alone) if beside else NoLane(), beside
        # All loaded objects stay, so Python's collector, which stops all threads while it runs, need not scan them.
        gc.freeze()

    def finalize(self):
        """Answer the requests that still wait."""
        self._lane.close()

    def execute(self, requests):
        """Run the rows of all requests through the engine together. A request that has no answer fails alone."""
        with self._lane.others():
            asked = [attempt(self._read, request) for request in requests]
            return [_response(found) for found in self._answer(asked, requests)]

    def _read(self, request):
        """Return the request's items, each with the texts that the tokenizer reads for it, or `_LATER`."""
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
        """Pass a large request to the lane and return `_LATER`, or return None if the lane cannot be used."""
        if not self._beside:
            return None
        sender = attempt(request.get_response_sender)
        if isinstance(sender, Exception):  # before 24.06, Triton had response senders for decoupled models only
            self._beside = False
            return None
        self._lane.put(sender, items)
        return _LATER

    def _prepare(self, items):
        return list(zip(items, prepare(items, self._pipeline), strict=True))

    def _answer_alone(self, items):
        """Return the response to a large request, or raise the exception that occurred."""
        (found,) = self._answer([self._prepare(items)])
        if isinstance(found, BaseException):
            raise found
        return found

    def _answer(self, asked, requests=(None,)):
        """Return for each request its response, the exception that occurred, or `_LATER`.

        `asked` holds the results of `_read`. `requests` holds the requests themselves if they may be answered later.
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
        """Return the engine's rows for each item, or the item's exception, from one call of the tokenizer.

        If that call fails, each item is tokenized by a call of its own.
        """
        found = attempt(self._pipeline.tokenize, prepared)
        if isinstance(found, BaseException):
            return [found] if len(prepared) == 1 else [self._tokenize([one])[0] for one in prepared]
        return found

    def _take(self, items, groups, request):
        """Return the rows of one request, or `_LATER`. Raise RuntimeError if one of its items cannot be tokenized."""
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
        """Return for each row its own numbers without padding, or the exception that occurred.

        Rows of one bucket run together, also if they come from different requests.
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
            if len(rows) > 1:  # an error of one row must not fail the others
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
    """Return the answer as JSON. A list is written item by item, because no other thread runs during json.dumps."""
    if isinstance(answer, list):
        return f"[{', '.join([json.dumps(one, ensure_ascii=False) for one in answer])}]"
    return json.dumps(answer, ensure_ascii=False)


def _is_read(found):
    return found is not _LATER and not isinstance(found, BaseException)


def _response(found):
    """Return the response in Triton's form, which is None for a request that is answered later."""
    if found is _LATER:
        return None
    return refusal(found) if isinstance(found, BaseException) else found
