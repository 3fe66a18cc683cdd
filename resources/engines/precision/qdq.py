"""Write 8-bit matrix products in int8 or fp8 as TensorRT reads them.

A product is a MatMul with QuantizeLinear and DequantizeLinear before it.

Quantization is symmetric with a zero point of 0, because TensorRT accepts nothing else. Activations have one scale for
each tensor, fixed on real text. Weights are stored in 8 bits before a DequantizeLinear: int8 with one scale for each
column, fp8 (E4M3) with one for the tensor, as NVIDIA's own Model Optimizer writes them. Eight bits with an exponent
need no more scales.

A single scale has to reach the one channel that is ten times larger than all others. Activations for int8 are therefore
smoothed, with the strength that makes the least error on real text (see `quantization`). Products that read the same
activations (query, key and value) share one choice, so that the activations are quantized once. Cutting off the end of
the range was tried too: it lowered the error of single products by a tenth, and no answer of all-MiniLM-L6-v2 came
closer to PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from resources.engines.graphs import add_initializer, by_name
from resources.engines.precision.ladder import Operator
from resources.engines.precision.quantization import STRENGTHS, WORTH_SMOOTHING, Activations, smoothing_of

EightBits = Literal["int8", "fp8"]
_TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_HALF = np.finfo(np.float16)


@dataclass(frozen=True)
class EightBitWeight:
    """A weight `[rows, columns]` in 8 bits, and the way its input is smoothed and quantized before the product.

    Args:
        scale: The scale of the weight: fp32 `[columns]`, or one number.
        smoothing: The factors that the input is multiplied by, fp32 `[rows]`, or None for no smoothing.
        input_scale: The scale of the input.
        source: A name for the input, the same for all products that read it.
        error: The relative error of the product on the sampled tokens.
    """

    values: np.ndarray
    scale: np.ndarray
    smoothing: np.ndarray | None
    input_scale: np.ndarray
    source: str
    error: float


def eight_bit_weights(
    model: ir.Model,
    operators: Sequence[Operator],
    weights: Mapping[str, np.ndarray],
    activations: Mapping[str, Activations],
    kind: EightBits,
) -> dict[str, EightBitWeight]:
    """Return each operator's weight in 8 bits.

    All products that read the same input get the same input scale and smoothing.
    """
    nodes = by_name(model)
    groups: dict[str, list[str]] = {}
    for operator in operators:
        inputs = [nodes[name].inputs[0] for name in operator.nodes]
        groups.setdefault("+".join(str(value.name) for value in inputs if value is not None), []).append(operator.name)
    return {
        name: weight
        for source, names in groups.items()
        for name, weight in _quantized_together(source, {name: weights[name] for name in names}, activations, kind)
    }


def _quantized_together(
    source: str, weights: Mapping[str, np.ndarray], activations: Mapping[str, Activations], kind: EightBits
) -> list[tuple[str, EightBitWeight]]:
    seen = activations[next(iter(weights))]
    together = np.concatenate([weight.astype(np.float32) for weight in weights.values()], axis=1)
    exact = seen.sample @ together
    norm = float(np.linalg.norm(exact)) or 1.0
    largest = np.maximum(np.abs(seen.low), np.abs(seen.high))

    def attempt(smoothing: np.ndarray | None) -> tuple[float, np.ndarray]:
        """Return the error with that smoothing, and the scale of the input."""
        factor = np.float32(1) if smoothing is None else smoothing
        scale = _scale_of((largest * factor).max(), kind)
        values, steps = _in_eight_bits(together if smoothing is None else together / smoothing[:, None], kind)
        product = _rounded(seen.sample * factor, scale, kind) @ (values.astype(np.float32) * steps)
        return float(np.linalg.norm(product - exact)) / norm, scale

    # fp8 is not smoothed. It has an exponent of its own, so small numbers beside large ones keep their digits.
    smoothing: np.ndarray | None = None
    error, scale = attempt(None)
    for strength in STRENGTHS if kind == "int8" else ():
        other = smoothing_of(largest, together, strength)
        smoothed, steps = attempt(other)
        if smoothed < error * (WORTH_SMOOTHING if smoothing is None else 1.0):
            smoothing, error, scale = other, smoothed, steps
    found = []
    factor = np.float32(1) if smoothing is None else smoothing
    inputs = _rounded(seen.sample * factor, scale, kind)
    for name, weight in weights.items():
        values, steps = _in_eight_bits(weight if smoothing is None else weight / smoothing[:, None], kind)
        alone = seen.sample @ weight
        error = float(np.linalg.norm(inputs @ (values.astype(np.float32) * steps) - alone))
        error /= float(np.linalg.norm(alone)) or 1.0
        found.append((name, EightBitWeight(values, steps, smoothing, scale, source, error)))
    return found


def _scale_of(largest: Any, kind: EightBits) -> np.ndarray:
    """Return the scale of numbers up to `largest`, rounded to a normal fp16 number unless it is too large for one."""
    scale = np.maximum(np.asarray(largest, np.float32) / _LARGEST[kind], _HALF.smallest_normal)
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return np.asarray(np.where(np.isfinite(half), half, scale), np.float32)


def _in_eight_bits(weight: np.ndarray, kind: EightBits) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight's values in 8 bits and its scale, which is one for each column or one for all."""
    scale = _scale_of(np.abs(weight).max(axis=0 if kind == "int8" else None), kind)
    return _steps(weight, scale, kind), scale


def _steps(values: np.ndarray, scale: np.ndarray, kind: EightBits) -> np.ndarray:
    steps = np.clip(values / scale, -_LARGEST[kind], _LARGEST[kind])
    return (np.round(steps) if kind == "int8" else steps).astype(_TYPES[kind].numpy())


def _rounded(values: np.ndarray, scale: np.ndarray, kind: EightBits) -> np.ndarray:
    result: np.ndarray = _steps(values, scale, kind).astype(np.float32) * scale
    return result


def qdq_form(model: ir.Model, name: str, weight: EightBitWeight) -> Callable[[ir.Node], tuple[list[ir.Node], ir.Value]]:
    """Return the function that writes a product of the model in 8 bits, a form for `quantization.quantize`.

    The product keeps its type, fp16 or fp32, which is the type of its weight. The scales have the same type.
    """

    def constant(part: str, array: np.ndarray) -> ir.Value:
        known = model.graph.initializers.get(part)
        return add_initializer(model, part, array) if known is None else known

    def write(node: ir.Node) -> tuple[list[ir.Node], ir.Value]:
        value, matrix = node.inputs
        assert value is not None and matrix is not None and matrix.dtype is not None
        kind, type_ = matrix.dtype.short_name(), matrix.dtype.numpy()
        nodes: list[ir.Node] = []

        def add(op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
            nodes.append(ir.node(op_type, inputs, attributes, name=f"{node.name}_8bit_{len(nodes)}_{op_type}"))
            nodes[-1].outputs[0].name = nodes[-1].name
            return nodes[-1].outputs[0]

        if weight.smoothing is not None:
            value = add("Mul", [value, constant(f"{weight.source}.smoothing.{kind}", weight.smoothing.astype(type_))])
        scale = constant(f"{weight.source}.scale.{kind}", weight.input_scale.astype(type_))
        zero = constant(f"{weight.source}.zero_point", np.zeros((), weight.values.dtype))
        value = add("DequantizeLinear", [add("QuantizeLinear", [value, scale, zero]), scale, zero])
        parts = [
            constant(f"{name}.values", weight.values),
            constant(f"{name}.scale.{kind}", weight.scale.astype(type_)),
            constant(f"{name}.zero_point", np.zeros(weight.scale.shape, weight.values.dtype)),
        ]
        # The axis is always written, because its default is 1 in ONNX and 0 in TensorRT's parser.
        whole = add("DequantizeLinear", parts, **({"axis": 1} if weight.scale.ndim else {}))
        return nodes, add("MatMul", [value, whole])

    return write
