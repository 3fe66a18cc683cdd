"""The rules about ONNX graphs. A graph has to be complete, have its weights, and match the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.errors import first_line
from resources.triton.lint.findings import Finding
from resources.triton.lint.reading import (
    LARGEST_GRAPH_BYTES,
    TooLargeError,
    is_below,
    read_file,
    text_of,
    why_not_below,
)

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from resources.triton.lint.model import Model

#: ONNX's name of each type, by Triton's name.
_TYPES = {
    "TYPE_BOOL": "BOOL",
    "TYPE_UINT8": "UINT8",
    "TYPE_UINT16": "UINT16",
    "TYPE_UINT32": "UINT32",
    "TYPE_UINT64": "UINT64",
    "TYPE_INT8": "INT8",
    "TYPE_INT16": "INT16",
    "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64",
    "TYPE_FP16": "FLOAT16",
    "TYPE_FP32": "FLOAT",
    "TYPE_FP64": "DOUBLE",
    "TYPE_BF16": "BFLOAT16",
    "TYPE_STRING": "STRING",
}
#: The bytes of one value, by ONNX's number of its type: float, the integers, bool, float16, double, bfloat16.
_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


def type_name(number: int) -> str:
    """Return Triton's name of a type, or the number of a type that Triton does not know."""
    from tritonclient.grpc.model_config_pb2 import DataType

    return str(DataType.Name(number)) if number in DataType.values() else str(number)


def graph_findings(model: Model, path: Path) -> Iterator[Finding]:
    """Yield the findings in a version's graph.

    Args:
        model: The model of the version.
        path: The graph's file, or a folder of that name that holds the graph and its weights.
    """
    import onnx

    file = path / path.name if path.is_dir() else path
    if not file.is_file():
        yield model.at("model-file", f"{path.name}/ holds no {path.name}.", path=path)
        return
    if not is_below(model.root, file):
        return  # the link that leads out is a finding of its own
    try:
        proto = onnx.ModelProto.FromString(read_file(file, LARGEST_GRAPH_BYTES))
    except TooLargeError as error:
        yield model.at("too-large", str(error), path=file)
        return
    except Exception as error:
        yield model.at("onnx-graph", f"cannot be read: {first_line(error)}", path=file)
        return
    if not proto.graph.node:
        yield model.at("onnx-graph", "holds no operator. Copy it again.", path=file)
        return
    yield from _weights(model, file, proto, in_folder=path.is_dir())
    config = model.config
    assert config is not None
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    yield from _compare(model, "input", config.input, inputs, all_of_them=True)
    yield from _compare(model, "output", config.output, proto.graph.output, all_of_them=False)


def _weights(model: Model, file: Path, proto: ModelProto, *, in_folder: bool) -> Iterator[Finding]:
    needed: dict[str, int] = {}
    for tensor in _tensors(proto):
        entries = {text_of(entry.key): text_of(entry.value) for entry in tensor.external_data}
        if "location" not in entries:
            continue
        name = entries["location"]
        parts = [entries.get("offset", "0"), entries.get("length") or str(_size_bytes(tensor))]
        if not all(part.isascii() and part.isdigit() and len(part) < 20 for part in parts):
            what = f"{text_of(tensor.name)!r} begins at {parts[0]!r} of {name!r} and has {parts[1]!r} bytes."
            yield model.at("external-data", f"{what} Export it again.", path=file)
            continue
        needed[name] = max(needed.get(name, 0), sum(map(int, parts)))
    if needed and not in_folder:
        yield model.at(
            "external-data",
            f"has weights beside it ({', '.join(sorted(needed))}), which Triton finds only where both lie in a folder "
            f"named {file.name}/.",
            path=file,
        )
    for name, size in sorted(needed.items()):
        place = file.parent / name
        # ONNX Runtime refuses weights outside of the folder, also through links. Other runtimes read any file.
        why = why_not_below(file.parent, name)
        if why is not None:
            what = f"its weights do not lie in the graph's folder: {why}."
            yield model.at("external-data", f"{what} Put them beside the graph.", path=file)
        elif not place.is_file():
            yield model.at("external-data", f"its weights in {name} are missing.", path=file)
        elif place.stat().st_size < size:
            yield model.at(
                "external-data", f"{name} has {place.stat().st_size} bytes of {size}. Copy it again.", path=file
            )


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """Yield all tensors that hold values: those of the graph, of graphs inside its operators, and of its functions."""
    graphs = [proto.graph, *(graph for info in proto.training_info for graph in (info.initialization, info.algorithm))]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        while nodes:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                graphs += (attribute.g, *attribute.graphs)
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node


def _size_bytes(tensor: TensorProto) -> int:
    """Return the size of the tensor's values, or 0 if its type has no known size."""
    return max(0, prod(tensor.dims)) * _SIZES.get(tensor.data_type, 0)


def _compare(
    model: Model, kind: str, said: Sequence[Any], found: Sequence[Any], *, all_of_them: bool
) -> Iterator[Finding]:
    """Compare names, types and dims in the configuration with those in the graph, and yield the differences."""
    import onnx

    config = model.config
    assert config is not None
    graph = {text_of(value.name): value.type.tensor_type for value in found}
    for item in said:
        near = f'"{item.name}"'
        if item.name not in graph:
            there = ", ".join(graph) or "none"
            yield model.at("tensor-name", f"the graph has no {kind} {item.name!r} (it has {there}).", near=near)
            continue
        type_, number = type_name(item.data_type), graph[item.name].elem_type
        known = onnx.TensorProto.DataType.values()
        real = onnx.TensorProto.DataType.Name(number) if number in known else str(number)
        if item.data_type and _TYPES.get(type_) != real:
            yield model.at("tensor-type", f"{kind} {item.name!r} is {type_}, and {real} in the graph.", near=near)
        if not graph[item.name].HasField("shape"):
            continue
        sizes = [size.dim_value if size.HasField("dim_value") else -1 for size in graph[item.name].shape.dim]
        batch = [-1] if config.max_batch_size > 0 else []
        if batch and sizes and sizes[0] != -1:
            yield model.at(
                "batch-size",
                f"max_batch_size is {config.max_batch_size}, and the graph's {kind} {item.name!r} has {sizes[0]} rows.",
                near="max_batch_size",
            )
        dims = [*batch, *(item.reshape.shape if item.HasField("reshape") else item.dims)]
        # The configuration may fix an input dimension that is free in the graph. An output must match the graph.
        free = kind == "input"
        fits = len(dims) == len(sizes) and all(
            one == other or (other == -1 and free) or (place == 0 and batch)
            for place, (one, other) in enumerate(zip(dims, sizes, strict=True))
        )
        fits = fits or (not sizes and dims == [1])  # a scalar has no dims in ONNX, and Triton requires one
        if not fits:
            yield model.at(
                "tensor-dims",
                f"{kind} {item.name!r} has dims {list(item.dims)}{' after the batch' if batch else ''}, and "
                f"{sizes} in the graph.",
                near=near,
            )
    if all_of_them and said:
        sequence = config.sequence_batching
        given = {item.name for item in (*said, *sequence.control_input)}
        given |= {state.input_name for state in sequence.state}
        given |= {name for item in config.batch_input for name in item.target_name}
        for name in sorted(set(graph) - given):
            yield model.at("tensor-name", f"the graph's {kind} {name!r} is not given.", near=kind)
