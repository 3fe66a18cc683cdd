"""Read the texts of requests, and refuse requests that have no answer.

This module runs inside Triton, copied beside `model.py`.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from pipelines import open_pipeline
from pipelines.limits import RefusedError, RequestLimits
from pipelines.names import TOKEN_COUNT, TOKEN_IDS


class BusyError(RuntimeError):
    """Too many large requests wait already. The client may try again later."""


def open_here(folder, parameters):
    """Open the pipeline of a release, with the limits and lengths that its configuration names."""
    pipeline = open_pipeline(folder)
    pipeline.limits = RequestLimits(**json.loads(parameters["limits"]))
    if "length_step" in parameters:
        pipeline.encoder.set_length_step(int(parameters["length_step"]))
    pipeline.encoder.tokens(["warm"])
    pipeline.encoder.cut("warm", 1)
    return pipeline


def attempt(function, *arguments):
    """Return the function's result, or the exception that it raised, so that one request cannot fail the others.

    A panic of the tokenizers library is a BaseException and no Exception, so BaseException is caught.
    """
    try:
        return function(*arguments)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return error


def read(request, pipeline):
    """Return the request's items.

    Raises:
        RefusedError: The request exceeds a limit, lacks an input, holds no row, or its bytes are not valid UTF-8.
    """
    limits, total, columns = pipeline.limits, 0, {}
    for name in (*pipeline.inputs, *pipeline.optional):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        texts = tensor.as_numpy().astype(np.object_).ravel().tolist()
        longest = max(map(len, texts), default=0)
        if longest > limits.text_bytes:
            raise RefusedError(f"{name} holds a text of {longest} bytes; this model takes at most {limits.text_bytes}")
        total += sum(map(len, texts))
        columns[name] = texts
    tokens = pb_utils.get_input_tensor_by_name(request, TOKEN_IDS)
    _require_inputs(pipeline, columns, tokens is not None)
    if total > limits.request_bytes:
        raise RefusedError(f"the request holds {total} bytes of texts; this model takes at most {limits.request_bytes}")
    try:
        columns = {name: [text.decode("utf-8") for text in texts] for name, texts in columns.items()}
    except UnicodeDecodeError as error:
        raise RefusedError(f"a text is not valid UTF-8: {error}") from None
    items = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    if tokens is not None:
        ids = tokens.as_numpy()
        if ids.ndim != 2 or ids.shape[1] > pipeline.encoder.max_tokens:
            raise RefusedError(
                f"{TOKEN_IDS} is of shape {list(ids.shape)}; give rows of at most {pipeline.encoder.max_tokens} tokens"
            )
        given = [pipeline.given(row) for row in ids.tolist()]
        items = [{**one, **item} for one, item in zip(given, items or [{}] * len(given), strict=True)]
    if not items:
        raise RefusedError("the request holds no row")
    return items


def _require_inputs(pipeline, texts, has_ids):
    """Raise RefusedError if texts are missing, or given twice: as texts and as token ids."""
    for name in pipeline.inputs:
        may_be_ids = name in pipeline.from_ids
        if has_ids and may_be_ids and name in texts:
            raise RefusedError(f"the request holds both {name} and {TOKEN_IDS}; give one of them")
        if name not in texts and not (has_ids and may_be_ids):
            raise RefusedError(f"the request holds no {name}" + (f", and no {TOKEN_IDS}" if may_be_ids else ""))
    if has_ids and any(name in texts for name in pipeline.optional):
        raise RefusedError(
            f"beside {TOKEN_IDS} no {pipeline.optional[0]} is taken; give the ids of both texts together"
        )


def prepare(items, pipeline):
    """Return the texts that the tokenizer reads for each item.

    Raises:
        RefusedError: The request has no answer, or needs too many rows of the engine.
    """
    prepared, rows = [], 0
    for item in items:
        prepared.append(pipeline.prepare(item))
        rows += len(prepared[-1])
        require_rows(rows, pipeline)
    return prepared


def require_rows(rows, pipeline):
    """Raise RefusedError if a request needs more rows of the engine than its limits allow."""
    most = pipeline.limits.engine_rows
    if rows > most:
        raise RefusedError(
            f"the request needs {rows} rows of the engine or more, with its windows, labels and masks; this model "
            f"takes at most {most}"
        )


def count_of(rows):
    """Return the number of tokens that were read for each item, special tokens included, in all of its rows."""
    counts = [[sum(row.tokens for row in group)] for group in rows]
    return pb_utils.Tensor(TOKEN_COUNT, np.array(counts, dtype=np.int64))


def refusal(error):
    """Return the response for an exception.

    Its error code is INVALID_ARG for a RefusedError, UNAVAILABLE for a BusyError, and INTERNAL for any other error.
    """
    message = str(error) or type(error).__name__
    if isinstance(error, RefusedError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
    if isinstance(error, BusyError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
