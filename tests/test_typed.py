"""Graphs for strongly typed TensorRT: what each node's type is, how far answers are from PyTorch, and that TensorRT
builds an engine from every one of them. TensorRT-RTX builds on machines without a GPU, and runs on none.
"""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from resources.engines.fusion import fuse
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner, cpu_runner
from resources.engines.onnxruntime.sessions import session_of_bytes
from resources.engines.precision.half_precision import WITHOUT_BF16, to_half
from resources.engines.precision.precision_search import open_gate_check, reduce_to_half
from resources.engines.precision.qdq import eight_bit_weights, qdq_form
from resources.engines.precision.quantization import find_operators, quantize, weights_of
from resources.engines.precision.tensorrt_precision import drop_nan_guards, plain_graph, typed_graph
from resources.engines.specs import EngineSpec, engine_spec
from resources.errors import EngineError
from resources.processes.isolation import Limits
from resources.settings.workspace import Workspace
from resources.tasks.samples import sample_texts
from tests.checkpoints import add_outliers, add_overflow, make_checkpoint
from tests.test_fusion import small_batch
from tests.test_half import answers, prepared, product_model
from tests.test_quantization import activations_of, graph

#: What answers may differ from PyTorch's, with every operator in the precision. Random weights have neighbours as close
#: as rounding, so those do not count here. No bound is close: a WordPiece tokenizer is not trained alike twice.
BOUNDS = {
    "fp32": {"cosine_mean": 0.999999, "cosine_worst": 0.99999, "norm_error": 0.001},
    "fp16": {"cosine_mean": 0.99999, "cosine_worst": 0.9999, "norm_error": 0.01},
    "bf16": {"cosine_mean": 0.9995, "cosine_worst": 0.998, "norm_error": 0.05},
    "int8": {"cosine_mean": 0.998, "cosine_worst": 0.97, "norm_error": 0.1},
    "fp8": {"cosine_mean": 0.97, "cosine_worst": 0.85, "norm_error": 0.25},
}
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "int8": TensorProto.FLOAT16}
HALF["fp8"] = HALF["int8"]
EIGHT_BITS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}


def spec_of(precision):
    return EngineSpec(f"typed_{precision}", "tensorrt", precision, ("cuda",), "")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Sources and goal of a checkpoint, exported once."""
    made = {}

    def make(name, change=lambda folder: folder, **kind):
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            # Fewer texts than are shipped, and still of all lengths: they are read a dozen times.
            texts = sorted(sample_texts(), key=len)[::8]
            (home / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
            workspace = Workspace(home / "home", home / "models.yaml", Limits(timeout_s=240, memory_bytes=6 * 10**9))
            made[name] = prepared(
                workspace, change(make_checkpoint(home / "model", **kind)), evaluation=str(home / "texts.jsonl")
            )
        return made[name]

    return make


@pytest.fixture
def bert(exported):
    return exported("bert", architecture="bert")


def within(goal, precision, trials=0):
    gates = goal.gates.model_copy(update={**BOUNDS[precision], "neighbours": 0.01})
    return replace(goal, gates=gates, trials=trials)


def built_by_tensorrt(path):
    """The size of the engine that TensorRT-RTX builds from the graph; fails with its parser's words."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # RTX knows no other than strongly typed
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(n).desc() for n in range(parser.num_errors)]
    assert {network.get_input(n).dtype for n in range(network.num_inputs)} == {trt.int64}
    assert network.get_output(0).dtype == trt.float32
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for number in range(network.num_inputs):
        profile.set_shape(network.get_input(number).name, (1, 8), (2, 16), (8, 64))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return plan.nbytes


def typed_nodes(path):
    """The graph's nodes, and the type of every value by name, as ONNX itself infers it."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {value.name: value.data_type for value in model.graph.initializer}
    return list(model.graph.node), types


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_tensorrt_builds_it_and_its_types_are_those_intended(exported, tmp_path, architecture, precision):
    sources, goal = exported(architecture, architecture=architecture)
    target = tmp_path / "model.onnx"
    reduced = typed_graph(sources, spec_of(precision), within(goal, precision), target)
    assert reduced.kept == ()
    # The bounds are kept with every operator in it.
    assert reduced.parameters.get("ladder", "not needed") == "not needed", reduced.steps
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert built_by_tensorrt(target) > 0

    nodes, types = typed_nodes(target)
    assert {node.domain for node in nodes} == {""}
    assert types[sources.graph.output] == TensorProto.FLOAT
    assert all(types[name] == TensorProto.INT64 for name in sources.graph.inputs)
    half = HALF.get(precision, TensorProto.FLOAT)
    by_type = {}
    for node in nodes:
        by_type.setdefault(node.op_type, []).append(node)
    for node in [*by_type["MatMul"], *by_type["Softmax"], *by_type["Gelu"]]:
        assert {types[name] for name in [*node.input, *node.output]} == {half}, node.name
    # Statistics, pooling and norms are fp32 in all of them.
    for node in [*by_type["LayerNormalization"], *by_type["ReduceSum"], *by_type["Div"]]:
        assert types[node.output[0]] == types[node.input[0]] == TensorProto.FLOAT, node.name
    if precision != "fp32":
        assert "IsNaN" not in by_type  # it would stand between the products of attention
    assert ("QuantizeLinear" in by_type) == (precision in EIGHT_BITS)
    if precision in EIGHT_BITS:
        check_quantized(target, nodes, types, EIGHT_BITS[precision])


def check_quantized(target, nodes, types, eight_bits):
    """Every product with a weight reads both in 8 bits, symmetric, and no quantized form of a value is made twice."""
    model = onnx.load(target)
    initializers = {item.name: item for item in model.graph.initializer}
    makers = {name: node for node in nodes for name in node.output}
    products = 0
    for node in (node for node in nodes if node.op_type == "MatMul"):
        weight = makers.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            assert node.input[1] not in initializers  # attention: two values, no weight
            continue
        products += 1
        activation = makers[node.input[0]]
        assert (activation.op_type, makers[activation.input[0]].op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert initializers[weight.input[0]].data_type == eight_bits
        assert types[activation.input[0]] == eight_bits
        for dequantize in (weight, activation):
            assert types[dequantize.input[1]] == TensorProto.FLOAT16
            assert not onnx.numpy_helper.to_array(initializers[dequantize.input[2]]).astype(np.float32).any()
        columns = list(initializers[weight.input[1]].dims)
        assert columns == ([initializers[weight.input[0]].dims[1]] if eight_bits == TensorProto.INT8 else [])
    scales = [node.input[1] for node in nodes if node.op_type == "QuantizeLinear"]
    assert products >= 8 and len(scales) == len(set(scales)) <= products  # one a value, whoever reads it


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_answers_are_pytorch_s_within_the_precision(bert, tmp_path, precision):
    sources, goal = bert
    goal = within(goal, precision)
    target = tmp_path / "model.onnx"
    reduced = typed_graph(sources, spec_of(precision), goal, target)
    gate_check = open_gate_check(goal, sources)
    if precision == "bf16":
        assert "rounded to bf16" in reduced.parameters["judged"]
        found = reference_answers(target, gate_check)
        exact = OnnxRuntimeRunner(sources.graph_folder / "model.onnx", sources.graph.output, 2)
        for batch, answer in found:
            wanted = exact.run(batch)
            cosines = (answer * wanted).sum(1) / np.linalg.norm(answer, axis=1) / np.linalg.norm(wanted, axis=1)
            assert BOUNDS["bf16"]["cosine_worst"] < cosines.min() < 0.99999
        return
    runner = OnnxRuntimeRunner(target, sources.graph.output, 2, as_written=True)
    assert gate_check.misses(runner.run) == []


def reference_answers(path, gate_check):
    """What ONNX's own reference answers, which has bf16 and is no faster than it must be."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(path))
    for batch, _ in gate_check.screening_batches()[:1]:
        given = {name: array[:3] for name, array in batch.items() if name in evaluator.input_names}
        yield given, evaluator.run(None, given)[0]


def test_what_overflows_stays_single_in_every_graph(exported, tmp_path):
    kind = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    sources, goal = exported("overflowing", add_overflow, **kind)
    for precision in ("fp16", "int8"):
        target = tmp_path / precision / "model.onnx"
        target.parent.mkdir()
        reduced = typed_graph(sources, spec_of(precision), goal, target)
        assert reduced.parameters["ladder"] in ("not needed", "gates kept")
        assert "encoder.encoder.layer.0.output.dense" in reduced.kept
        assert "near fp16's largest number" in reduced.steps[0]
        nodes, types = typed_nodes(target)
        assert {types[node.output[0]] for node in nodes if node.op_type == "MatMul"} == {1, 10}
        assert built_by_tensorrt(target) > 0
    naive = to_half(plain_graph(sources.graph_folder / "model.onnx"), emulated=True)
    run = cpu_runner(naive, tmp_path / "naive.onnx", sources).run
    gate_check = open_gate_check(goal, sources)
    assert "finite" in gate_check.misses(run)[0] or "NaN" in gate_check.misses(run)[0]


def test_the_ladder_keeps_what_eight_bits_harm(exported, tmp_path):
    kind = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    sources, goal = exported("outliers", add_outliers, **kind)
    goal = replace(goal, gates=goal.gates.model_copy(update={"cosine_worst": 0.9995}))
    target = tmp_path / "model.onnx"
    reduced = typed_graph(sources, spec_of("int8"), replace(goal, trials=0), target)
    assert (reduced.kept, reduced.parameters["int8_operators"]) == ((), "12 of 12")
    assert reduced.parameters["ladder"] == "not rescued: the budget of trials is spent"

    reduced = typed_graph(sources, spec_of("int8"), goal, target)
    assert reduced.parameters["ladder"] == "gates kept"
    assert reduced.kept == ("encoder.encoder.layer.0.output.dense",)
    gate_check = open_gate_check(goal, sources)
    assert gate_check.misses(OnnxRuntimeRunner(target, sources.graph.output, 2, as_written=True).run) == []
    assert built_by_tensorrt(target) > 0


def test_a_graph_without_products_is_refused(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("resources.engines.precision.quantization.NARROWEST", 10**6)
    with pytest.raises(EngineError, match="no matrix product"):
        typed_graph(bert[0], spec_of("int8"), bert[1], tmp_path / "model.onnx")


def test_external_weights_lie_beside_the_graph(bert, tmp_path):
    sources, goal = bert
    sources = replace(sources, graph=sources.graph.model_copy(update={"external_data": True}))
    typed_graph(sources, spec_of("fp8"), within(goal, "fp8"), tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert built_by_tensorrt(tmp_path / "model.onnx") > 0


def test_guards_against_nan_are_only_dropped_behind_a_softmax(bert):
    model = plain_graph(bert[0].graph_folder / "model.onnx")
    wheres = sum(node.op_type == "Where" for node in model.graph)
    assert drop_nan_guards(model) == 2
    assert sum(node.op_type == "Where" for node in model.graph) == wheres - 2  # the mask's own stays
    assert drop_nan_guards(model) == 0


# The 8-bit form


def eight_bits(kind, sample, weight_scale=1.0):
    rng = np.random.default_rng(0)
    model = graph(rng)
    operators = [operator for operator in find_operators(model) if operator.name == "a"]
    weights = {"a": weights_of(model, operators)["a"] * np.float32(weight_scale)}
    return model, operators, eight_bit_weights(model, operators, weights, {"a": activations_of(sample)}, kind)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_error_that_is_foretold_is_that_of_the_graph(tmp_path, kind):
    sample = np.random.default_rng(1).normal(size=(300, 48)).astype(np.float32)
    model, operators, weights = eight_bits(kind, sample)
    model.graph.outputs.clear()
    model.graph.outputs.append(next(node for node in model.graph if node.name == "a").outputs[0])
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    exact = sample @ weights_of(model, operators)["a"]
    ir.save(quantize(model, operators, weights, [], qdq_form), tmp_path / "model.onnx")
    runner = OnnxRuntimeRunner(tmp_path / "model.onnx", model.graph.outputs[0].name, 1, as_written=True)
    found = runner.run({"x": sample[None]})[0]
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(weights["a"].error, rel=0.02)
    assert 0.001 < error < {"int8": 0.015, "fp8": 0.05}[kind]


def test_int8_is_smoothed_where_channels_differ_and_fp8_never():
    sample = np.random.default_rng(2).uniform(-1, 1, size=(384, 48)).astype(np.float32)
    assert eight_bits("int8", sample)[2]["a"].smoothing is None
    sample[:, 7] *= 60
    assert eight_bits("int8", sample)[2]["a"].smoothing is not None
    # fp8 has small steps for small numbers anyway.
    assert eight_bits("fp8", sample)[2]["a"].smoothing is None


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e9])
def test_scales_are_positive_and_finite_for_any_numbers(kind, size):
    sample = (np.random.default_rng(3).normal(size=(20, 48)) * size).astype(np.float32)
    weight = eight_bits(kind, sample, weight_scale=size)[2]["a"]
    for scale in (weight.scale, weight.input_scale):
        assert np.isfinite(scale).all() and (scale > 0).all()
        assert size > 1 or (scale.astype(np.float16) == scale).all()  # what fp16 makes of it is itself
    assert np.isfinite(weight.error)


# bf16


def test_bf16_is_emulated_by_rounding_wherever_it_would_be():
    model = product_model()
    words, matrix = (model.graph.initializers[name].const_value.numpy() for name in ("words", "matrix"))
    rounded = to_half(model, kind="bf16", emulated=True)
    assert {value.dtype for value in rounded.graph.initializers.values()} <= {ir.DataType.FLOAT, ir.DataType.INT64}
    found = answers(rounded)[0]
    assert not np.array_equal(found, answers(model)[0])

    def bf16(array):
        return array.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)

    product = bf16(bf16(words)[small_batch()["input_ids"]] @ bf16(matrix))
    np.testing.assert_array_equal(found, product)  # the second matrix is the identity
    assert to_half(model, kind="bf16").graph.initializers["matrix_bf16"].dtype == ir.DataType.BFLOAT16


def test_fp16_is_emulated_with_its_overflow():
    large = product_model(scale=5e4)  # fits into fp16, and its products do not
    assert np.isfinite(answers(large)[0]).all()
    assert np.isfinite(answers(to_half(large))[0]).all()  # what ONNX Runtime makes of fp16 on a processor
    assert not np.isfinite(answers(to_half(large, emulated=True))[0]).all()


def test_bf16_does_not_overflow():
    huge = product_model(scale=7e4)
    assert not np.isfinite(answers(to_half(huge))[0]).all()
    np.testing.assert_allclose(
        answers(to_half(huge, kind="bf16", emulated=True))[0], answers(huge)[0], rtol=0.02, atol=2e3
    )


def test_the_fused_graph_in_bf16_has_kernels_for_cuda_and_consistent_types(bert, tmp_path):
    assert engine_spec("onnxruntime_bf16").devices == ("cuda",)
    sources, goal = bert
    fused = fuse(sources.graph_folder / "model.onnx")[0]
    target = tmp_path / "model.onnx"
    reduced = reduce_to_half(fused, sources, within(goal, "bf16"), target, kind="bf16", wide=WITHOUT_BF16)
    assert (reduced.kept, reduced.parameters["ladder"]) == ((), "not needed")
    model = ir.load(target)
    counts = {}
    for node in model.graph:
        types = {item.dtype for item in [*node.inputs, *node.outputs] if item is not None}
        wide = (node.domain, node.op_type) in WITHOUT_BF16
        counts.setdefault(node.op_type, []).append(ir.DataType.BFLOAT16 in types)
        assert not (wide and ir.DataType.BFLOAT16 in types), node.op_type
        assert ir.DataType.FLOAT16 not in types
    assert counts["EmbedLayerNormalization"] == [False]
    for name in ("Attention", "SkipLayerNormalization", "BiasGelu"):
        assert counts[name] and all(counts[name]), name
    # ONNX Runtime checks types before it looks for kernels; the processor has none, and says which.
    with pytest.raises(Exception, match="NOT_IMPLEMENTED.*Could not find an implementation"):
        session_of_bytes(target.read_bytes())
