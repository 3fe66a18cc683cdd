"""Requests to Triton that are broken in one place or several, the same ones for the same seed.

Nesting and the shapes of numbers stay below what ends Triton itself, and binary strings have as many bytes as they say,
since Triton's Python backend refuses a whole batch for one that has not: docs/security.md tells of these.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_NAMES: tuple[str, ...] = ("", "text", "TEXT\0", "T" * 10_000, "🙂", "QUERY", "..", "sentence_embedding")
_SHAPES: tuple[Any, ...] = (
    *([], [0], [1], [0, 1], [1, 0], [2, 1], [9, 1], [1, 2], [1, 1, 1], [-1, 1], [1, -1], [2**31, 1], [2**63 - 1, 1]),
    *([2**63, 2], [2**32, 2**32], [1.5, 1], ["1", 1], [None, 1], "1", None, {}, [[1, 1]], [1] * 5000),
)
_KINDS: tuple[Any, ...] = (
    "INT64",
    "INT32",
    "UINT8",
    "FP32",
    "FP16",
    "BF16",
    "BOOL",
    "bytes",
    "STRING",
    "",
    None,
    5,
    [],
    "B" * 5000,
)
_DATA: tuple[Any, ...] = (
    *([], [1], [None], [True], [1.5], [[]], [{}], ["a", "b"], ["a"] * 900, "a", None, {}, [["a"], ["b"]], 10**30),
    *(["\ud800"], ["\0"], ["🙂" * 2000], ["word " * 4000], ["a." * 5000], ["a" * 9000], [" " * 9000]),
    ["e" + "\u0301" * 5000],
)
_ODD: tuple[Any, ...] = (True, 0, 1, -1, 2**63, 2**64, "1", None, [])
_PARAMETERS: tuple[Any, ...] = (
    *({"binary_data_size": size} for size in (-1, 2**31, 2**63, 2**64, "4", 1.5, None)),
    {"shared_memory_region": "no", "shared_memory_byte_size": 64},
    {"shared_memory_region": "no", "shared_memory_byte_size": 2**63, "shared_memory_offset": 2**63},
    *({"classification": count} for count in (-1, 0, 3, 2**31, 2**64, "3", None)),
    *({"binary_data": value} for value in _ODD),
    *({"sequence_id": value, "sequence_start": True} for value in _ODD),
    *({"priority": value, "timeout": value} for value in _ODD),
    *({"triton_enable_empty_final_response": True}, {"unknown": {"deep": [1]}}, [], "text", 7),
)
_IDS: tuple[Any, ...] = ("", "an id", 5, None, [], {}, "i" * 5000, "\n\r", "🙂")
_HEADER = "Inference-Header-Content-Length"
_LENGTHS = ("-1", "0", "1", "5", "99999999", str(2**63), str(2**64), "x", "", " 12")


@dataclass(frozen=True)
class Request:
    """One HTTP request: what follows the host in its address, headers, and the body."""

    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Mutations:
    """Broken requests to models, each a pair of a name and the names of its texts."""

    def __init__(self, seed: int, models: Mapping[str, Sequence[str]]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._models = models

    def http(self) -> Request:
        """The next request over HTTP."""
        pick, model, body = self._random.choice, *self._start()
        path = f"/v2/models/{model}/infer"
        for _ in range(pick((1, 1, 1, 2, 3))):
            self._break(body)
        _spare_memory(body)
        kind = self._random.randrange(12)
        if kind == 0:
            return self._binary(path, body)
        raw = json.dumps(body).encode()
        if kind == 1:
            return Request(path, self._flip(raw))
        if kind == 2:
            return Request(path, raw[: self._random.randrange(len(raw) + 1)])
        if kind == 3:
            return Request(path, raw, {_HEADER: pick(_LENGTHS)})
        if kind == 4:
            return Request(path, raw, {"Content-Encoding": pick(("gzip", "deflate", "br", "gzip, gzip"))})
        if kind == 5:
            version = pick(("0", "1", "2", "-1", "9" * 30, "x", "%00", ".."))
            return Request(f"/v2/models/{model}/versions/{version}/infer", raw)
        if kind == 6:
            depth = pick((10, 1000, 20_000))
            return Request(path, pick((b'{"inputs":', b"")) + pick((b"[", b'{"a":')) * depth)
        return Request(path, raw)

    def grpc(self) -> bytes:
        """The next request over gRPC: a ModelInferRequest, as bytes that may be none."""
        from tritonclient.grpc import service_pb2 as pb

        pick, model, body = self._random.choice, *self._start()
        message = pb.ModelInferRequest(model_name=model, id=pick(("", "an id", "i" * 5000)))
        for tensor in body["inputs"]:
            one = message.inputs.add(name=tensor["name"], datatype="BYTES", shape=[1, 1])
            kind = self._random.randrange(10)
            shape = pick(_SHAPES)
            if kind == 0 and isinstance(shape, list):
                one.shape[:] = [size for size in shape if isinstance(size, int) and abs(size) < 2**63]
            elif kind == 1:
                one.datatype = str(pick(_KINDS))
            elif kind == 2:
                one.name = pick(_NAMES)
            elif kind == 3:
                one.parameters[pick(("binary_data_size", "shared_memory_region", "x"))].string_param = pick(_NAMES)
            text = pick((b"a text", b"", b"\xff\xfe", b"\xed\xa0\x80", b"a" * 20_000, "🙂".encode() * 2000))
            if list(one.shape) == [1, 1] and self._random.random() < 0.5:
                message.raw_input_contents.extend([_packed(text)] * pick((1, 1, 1, 1, 0, 2)))
            else:
                one.contents.bytes_contents.extend([text] * pick((1, 1, 1, 0, 2, 500)))
            if self._random.random() < 0.1:
                one.contents.int64_contents.extend([1, 2])
        if self._random.random() < 0.3:
            asked = message.outputs.add(name=pick(("sentence_embedding", *_NAMES)))
            asked.parameters["classification"].int64_param = pick((-1, 0, 3, 2**62))
        if self._random.random() < 0.2:
            message.parameters[pick(("sequence_id", "priority", "timeout", "x"))].int64_param = pick((0, -1, 2**62))
        if self._random.random() < 0.1:
            message.model_version = pick(("0", "1", "7", "-1", "x", "9" * 30))
        data = message.SerializeToString()
        flipped = not message.raw_input_contents and self._random.random() < 0.4
        return self._flip(data) if flipped else data

    def _start(self) -> tuple[str, dict[str, Any]]:
        """A model, and a request to it that is right."""
        model = self._random.choice(tuple(self._models))
        texts = self._models[model]
        tensors = [{"name": name, "shape": [1, 1], "datatype": "BYTES", "data": ["a text"]} for name in texts]
        return model, {"inputs": tensors}

    def _break(self, body: dict[str, Any]) -> None:
        pick = self._random.choice
        tensors = body["inputs"] if isinstance(body.get("inputs"), list) else []
        tensor = pick(tensors) if tensors else None
        kind = self._random.randrange(11)
        if not isinstance(tensor, dict) or kind == 0:
            body[pick(("inputs", "outputs", "id", "parameters", "x"))] = pick((None, [], {}, 5, "x", [None], [[]]))
        elif kind < 5:
            name, values = (("name", _NAMES), ("shape", _SHAPES), ("datatype", _KINDS), ("data", _DATA))[kind - 1]
            tensor[name] = pick(values)
        elif kind == 5:
            tensor["parameters"] = pick(_PARAMETERS)
        elif kind == 6:
            body["parameters"] = pick(_PARAMETERS)
        elif kind == 7:
            body["id"] = pick(_IDS)
        elif kind == 8:
            body["outputs"] = [{"name": pick(("sentence_embedding", *_NAMES)), "parameters": pick(_PARAMETERS)}]
        elif kind == 9:
            tensor.pop(pick(tuple(tensor)))
        else:
            body["inputs"] = [*tensors] * pick((2, 20))

    def _binary(self, path: str, body: dict[str, Any]) -> Request:
        """With Triton's binary tensors, and lengths around them that lie."""
        pick = self._random.choice
        raw = _packed(pick((b"a text", b"", b"\xff\xfe", b"\xed\xa0\x80", b"a" * 20_000)))
        tensors = body.get("inputs")
        for tensor in tensors if isinstance(tensors, list) else ():
            if isinstance(tensor, dict) and tensor.get("shape") == [1, 1]:
                tensor.pop("data", None)
                tensor.setdefault("parameters", {"binary_data_size": len(raw)})
        header = json.dumps(body).encode()
        length = pick((str(len(header)), str(len(header)), str(len(header)), *_LENGTHS))
        return Request(path, header + raw * pick((1, 1, 1, 0, 2)), {_HEADER: length})

    def _flip(self, data: bytes) -> bytes:
        """With some bytes changed, removed or put in."""
        changed = bytearray(data)
        for _ in range(self._random.choice((1, 2, 8))):
            place = self._random.randrange(len(changed) + 1)
            changed[place : place + self._random.choice((0, 1, 1, 3))] = self._random.randbytes(
                self._random.choice((0, 1, 1, 2))
            )
        return bytes(changed)


def _spare_memory(body: dict[str, Any]) -> None:
    """Make texts of those tensors that claim to hold 2^31 numbers or more: Triton would allocate them all at once."""
    tensors = body.get("inputs")
    for tensor in tensors if isinstance(tensors, list) else ():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        huge = isinstance(shape, list) and any(isinstance(size, int) and size >= 2**31 for size in shape)
        if huge and "datatype" in tensor:
            tensor["datatype"] = "BYTES"


def _packed(text: bytes) -> bytes:
    """As Triton's binary tensors have a string: its length, and its bytes."""
    return struct.pack("<I", len(text)) + text
