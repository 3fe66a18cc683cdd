"""The weights of a checkpoint: the search for their files, and the check that each file is complete."""

from __future__ import annotations

import math
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from resources.boundary.foreign import ForeignError, check_name, open_below, parse_json
from resources.catalog.entries import ModelEntry
from resources.checkpoints.reading import has_file, read_object, refuse, refuse_file, whole_remedy
from resources.checkpoints.sources.wanted import PICKLE_REMEDY

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
#: The endings of the names of weights. transformers decides by the ending alone whether it unpickles a file.
_ENDINGS = {INDEX: ".safetensors", PICKLE_INDEX: ".bin"}
#: The library's own bound (safetensors 0.8, tensor.rs). A header of a thousand tensors has 150 kB.
_MOST_HEADER_BYTES = 100_000_000
_MOST_SHARDS = 1000
_MOST_HEADER_VALUES = 10**6
_MOST_AXES = 32
#: The bits of one number, by type. For tensors of other types, the size in the header is not checked against the shape.
_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}


def find_weights(entry: ModelEntry, folder: Path) -> tuple[str, ...]:
    """Find the files of the weights, with their index if there are several.

    Raises:
        CheckpointError: There are no weights, a file is missing, or the weights are a pickle and the entry does not
            allow that.
    """
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if has_file(entry, folder, single):
            files = [single]
        elif has_file(entry, folder, index):
            files = [index, *_shards(entry, folder, index)]
        else:
            continue
        if single == PICKLE and not entry.allow_pickle:
            raise refuse(entry, f"its weights are a pickle ({files[-1]})", PICKLE_REMEDY)
        return tuple(files)
    raise refuse(entry, f"there are no weights ({SINGLE}) in {folder}", whole_remedy(entry))


def shard_names(index: str, table: Any) -> list[str]:
    """Return the files that an index names.

    Args:
        index: The name of the index.
        table: Its `weight_map`, which has the file of each tensor.

    Raises:
        ValueError: The table names no files, or one of them is not a file of weights in the index's own folder.
    """
    ending = _ENDINGS[index]
    named = list(table.values()) if isinstance(table, dict) else []
    if not named:
        raise ValueError("it does not say which files hold the weights")
    for name in named:
        # transformers never writes a folder into such a name, and it unpickles every file with another ending.
        if not isinstance(name, str) or "/" in name or not name.endswith(ending):
            raise ValueError(f"it names {name!r:.100}, but the names of weights end in {ending}")
        try:
            check_name(name)
        except ForeignError as error:
            raise ValueError(str(error)) from None
    return sorted(set(named))


def _shards(entry: ModelEntry, folder: Path, index: str) -> list[str]:
    try:
        names = shard_names(index, read_object(entry, folder, index).get("weight_map"))
    except ValueError as error:
        raise refuse(entry, f"{folder / index} cannot be used: {error}", "Copy the checkpoint again") from None
    missing = [name for name in names if not has_file(entry, folder, name)]
    if missing:
        raise refuse(
            entry, f"{index} names {', '.join(missing[:3])}, which is missing from {folder}", whole_remedy(entry)
        )
    return names


def check_whole(entry: ModelEntry, folder: Path, name: str) -> list[str]:
    """Check that a safetensors file has the size that its header says, and return the names of its tensors.

    A safetensors file begins with 8 bytes, which hold the header's length. The header is JSON with the type, the shape
    and the byte range of each tensor. The bytes of the tensors follow, one after the other without a gap.

    Raises:
        CheckpointError: The file is truncated, damaged or no safetensors file, or it cannot be read.
    """
    path = folder / name
    try:
        with open_below(folder, name) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            data = stream.read(length) if length <= min(size - 8, _MOST_HEADER_BYTES) else None
    except ForeignError as error:
        raise refuse_file(entry, error) from None
    except OSError as error:
        raise refuse(entry, f"{path} cannot be read: {error}", "Make the file readable") from None
    try:
        if data is None:
            raise ValueError("its header does not fit into it")
        header = parse_json(data, most_values=_MOST_HEADER_VALUES)
        expected = 8 + length + _bytes_of(header)
    except ValueError:
        raise refuse(
            entry, f"{path} is truncated or is not a safetensors file ({size} bytes)", "Copy or download it again"
        ) from None
    if size != expected:
        raise refuse(
            entry,
            f"{path} is damaged: it has {size} bytes, but its header says {expected}",
            "Copy or download it again",
        )
    return [key for key in header if key != "__metadata__"]


def tensor_names(folder: Path) -> list[str]:
    """Return the names of the tensors in the headers of a folder's safetensors files.

    Files that cannot be read are left out, because `check_whole` reports them later.
    """
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors"))[:_MOST_SHARDS]:
        with suppress(OSError, ValueError, ForeignError), open_below(folder, path.name) as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if 0 < length <= _MOST_HEADER_BYTES:
                header = parse_json(stream.read(length), most_values=_MOST_HEADER_VALUES)
                names += [key for key in header if key != "__metadata__"] if isinstance(header, dict) else []
    return names


def _bytes_of(header: Any) -> int:
    """Return the number of bytes of all tensors in a header.

    Raises:
        ValueError: The header is wrong, or the tensors overlap or leave a gap.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    ranges = sorted(_range(tensor) for name, tensor in header.items() if name != "__metadata__")
    end = 0
    for begin, until in ranges:
        if begin != end:
            raise ValueError("tensors overlap, or leave a gap")
        end = until
    return end


def _range(tensor: Any) -> tuple[int, int]:
    if not isinstance(tensor, dict):
        raise ValueError("a tensor is not an object")
    offsets, shape, kind = _sizes(tensor.get("data_offsets")), _sizes(tensor.get("shape")), tensor.get("dtype")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("a tensor has no range of bytes")
    if not isinstance(kind, str):
        raise ValueError("a tensor has no type")
    if kind in _BITS and math.prod(shape) * _BITS[kind] != 8 * (offsets[1] - offsets[0]):
        raise ValueError("a tensor's shape does not match its range of bytes")
    return offsets[0], offsets[1]


def _sizes(value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        raise ValueError("a tensor has no shape, or no range of bytes")
    if not all(type(one) is int and 0 <= one < 2**63 for one in value):
        raise ValueError("a tensor's sizes are not numbers")
    return value
