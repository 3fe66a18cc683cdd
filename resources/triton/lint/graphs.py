"""Rules about ONNX graphs: whole, with their weights, and as the configuration says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resources.errors import first_line
from resources.triton.lint.findings import Finding

if TYPE_CHECKING:
    from resources.triton.lint.repository import Model

#: ONNX's name of a type by Triton's.
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


def type_name(number: int) -> str:
    """Triton's name of a type; of one that it does not know, the number."""
    from tritonclient.grpc.model_config_pb2 import DataType

    return str(DataType.Name(number)) if number in DataType.values() else str(number)


def graph_findings(model: Model, path: Path) -> Iterator[Finding]:
    """What is wrong with a version's graph. path: of the file, or of the folder of the same name with its weights."""
    import onnx

    file = path / path.name if path.is_dir() else path
    if not file.is_file():
        yield model.at("model-file", f"{path.name}/ holds no {path.name}.", path=path)
        return
    try:
        proto = onnx.load(file, load_external_data=False)
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


def _weights(model: Model, file: Path, proto: Any, *, in_folder: bool) -> Iterator[Finding]:
    needed: dict[str, int] = {}
    for tensor in proto.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in entries:
            parts = [entries.get(key, "0") for key in ("offset", "length")]
            end = sum(int(part) for part in parts if part.isdigit())
            needed[entries["location"]] = max(needed.get(entries["location"], 0), end)
    if needed and not in_folder:
        yield model.at(
            "external-data",
            f"has weights beside it ({', '.join(sorted(needed))}), which Triton finds only where both lie in a folder "
            f"named {file.name}/.",
            path=file,
        )
    for name, size in sorted(needed.items()):
        place = file.parent / name
        if not place.is_file():
            yield model.at("external-data", f"its weights in {name} are missing.", path=file)
        elif place.stat().st_size < size:
            yield model.at(
                "external-data", f"{name} has {place.stat().st_size} bytes of {size}. Copy it again.", path=file
            )


def _compare(
    model: Model, kind: str, said: Sequence[Any], found: Sequence[Any], *, all_of_them: bool
) -> Iterator[Finding]:
    """Names, types and dims of the configuration with those of the graph."""
    import onnx

    config = model.config
    assert config is not None
    graph = {value.name: value.type.tensor_type for value in found}
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
        # An input may be narrower than what the graph takes; an output is what the graph makes.
        free = kind == "input"
        fits = len(dims) == len(sizes) and all(
            one == other or (other == -1 and free) or (place == 0 and batch)
            for place, (one, other) in enumerate(zip(dims, sizes, strict=True))
        )
        fits = fits or (not sizes and dims == [1])  # a scalar has no dims, and Triton wants one
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
