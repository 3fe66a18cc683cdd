"""int8 operators compute what they claim, smoothing helps where channels differ, and trials run what is built."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from resources.engines.onnxruntime.runner import OnnxRuntimeRunner
from resources.engines.precision.quantization import (
    SWITCHES,
    Activations,
    find_operators,
    quantize,
    quantize_weight,
    switched_graph,
    watch,
    watched_graph,
    weights_of,
)
from resources.errors import EngineError
from tests.checkpoints import add_outliers

ROWS, COLUMNS = 48, 32


def activations_of(sample):
    return Activations(sample.min(axis=0), sample.max(axis=0), sample)


def initializer(name, value):
    return ir.Value(
        name=name,
        const_value=ir.tensor(value, name=name),
        shape=ir.Shape(value.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
    )


def graph(rng):
    """Two products with matrices of their own, one with a matrix that two nodes share, and one that is too narrow."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    first, shared, narrow = (
        initializer(name, rng.normal(size=size).astype(np.float32))
        for name, size in (("first", (ROWS, COLUMNS)), ("shared", (COLUMNS, COLUMNS)), ("narrow", (COLUMNS, 2)))
    )
    nodes, value = [], x
    for name, matrix in (("a", first), ("b", shared), ("c", shared), ("d", narrow)):
        nodes.append(ir.node("MatMul", [value, matrix], name=name))
        nodes[-1].outputs[0].name = f"{name}_out"
        value = nodes[-1].outputs[0]
    value.shape, value.type = ir.Shape(["batch", "sequence", 2]), ir.TensorType(ir.DataType.FLOAT)
    content = ir.Graph(
        [x], [value], nodes=nodes, initializers=[first, shared, narrow], opset_imports={"": 20, "com.microsoft": 1}
    )
    return ir.Model(content, ir_version=10)


def loaded(model, path):
    ir.save(model, path)
    return OnnxRuntimeRunner(path, model.graph.outputs[0].name, threads=1)


@pytest.fixture(params=["even", "outlying"])
def made(tmp_path, request):
    rng = np.random.default_rng(0)
    model = graph(rng)
    operators = find_operators(model)
    batches = [{"x": rng.normal(size=(1, tokens, ROWS)).astype(np.float32)} for tokens in (3, 17, 40)]
    if request.param == "outlying":
        for batch in batches:
            batch["x"][..., [3, 40]] *= 100
    watching, watched = watched_graph(model, operators)
    seen = watch(loaded(watching, tmp_path / "watching.onnx").outputs, watched, batches)
    return model, operators, batches, seen


def test_a_matrix_of_several_nodes_is_one_operator(made):
    _, operators, _, _ = made
    assert [(operator.nodes, operator.rows, operator.columns) for operator in operators] == [
        (("a",), ROWS, COLUMNS),
        (("b", "c"), COLUMNS, COLUMNS),
    ]


def test_activations_are_those_of_the_batches(made):
    model, operators, batches, seen = made
    whole = np.concatenate([batch["x"][0] for batch in batches])
    np.testing.assert_array_equal(seen["a"].low, whole.min(axis=0))
    np.testing.assert_array_equal(seen["a"].high, whole.max(axis=0))
    first = weights_of(model, operators)["a"]
    into_b = whole @ first
    assert (
        seen["b"].high >= into_b.max(axis=0) - 1e-5 * np.abs(into_b).max()
    ).all()  # and what goes into c, which shares the matrix
    assert set(map(tuple, seen["a"].sample)) <= set(map(tuple, whole))


def test_activations_that_are_not_finite_are_refused():
    batches = [{"x": np.zeros((1, 2, 3), np.float32)}]
    with pytest.raises(EngineError, match="NaN or infinity"):
        watch(lambda names, batch: [np.full((1, 2, 3), np.nan)], {"a": ["x"]}, batches)


@pytest.mark.parametrize("static", [False, True])
def test_the_error_that_is_foretold_is_the_runtime_s(made, tmp_path, static):
    model, operators, batches, seen = made
    outlying = batches[0]["x"].max() > 10
    weights = {
        name: quantize_weight(weight, seen[name], static=static)
        for name, weight in weights_of(model, operators).items()
    }
    only_first = quantize(model, operators, weights, kept=["b"])
    types = [node.op_type for node in only_first.graph]
    assert ("DynamicQuantizeMatMul" in types) != static
    assert ("MatMulIntegerToFloat" in types) == static
    exact, found = (
        np.concatenate([loaded(version, tmp_path / "m.onnx").run(batch)[0] for batch in batches])
        for version in (model, only_first)
    )
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0.3 * weights["a"].error < error < 3 * weights["a"].error
    assert error < (0.002 if outlying else 0.02)
    assert (weights["a"].outliers is not None) == outlying


@pytest.mark.parametrize("static", [False, True])
def test_switches_run_exactly_what_is_built(made, tmp_path, static):
    model, operators, batches, seen = made
    weights = {
        name: quantize_weight(weight, seen[name], static=static)
        for name, weight in weights_of(model, operators).items()
    }
    switched = loaded(switched_graph(model, operators, weights), tmp_path / "switched.onnx")
    for kept in ([], ["a"], ["b"], ["a", "b"]):
        built = loaded(quantize(model, operators, weights, kept), tmp_path / "built.onnx")
        switches = np.array([operator.name not in kept for operator in operators])
        for batch in batches:
            np.testing.assert_array_equal(switched.run({**batch, SWITCHES: switches}), built.run(batch))


@pytest.mark.parametrize("static", [False, True])
def test_smoothing_is_chosen_where_channels_differ_and_only_there(static):
    rng = np.random.default_rng(1)
    weight = rng.uniform(-1, 1, size=(256, 64)).astype(np.float32)
    even = rng.uniform(-1, 1, size=(200, 256)).astype(np.float32)
    assert quantize_weight(weight, activations_of(even), static=static).smoothing is None
    outliers = even.copy()
    outliers[:, [3, 200]] *= 60
    weight[[3, 200]] /= 60
    smoothed = quantize_weight(weight, activations_of(outliers), static=static)
    assert smoothed.smoothing is not None
    assert smoothed.smoothing[3] < 0.2 * np.median(smoothed.smoothing)
    # Without it the two channels would leave the others a handful of steps.
    assert smoothed.error < 0.03


@pytest.mark.parametrize("static", [False, True])
def test_channels_are_multiplied_apart_where_smoothing_is_not_enough(static):
    rng = np.random.default_rng(1)
    weight = rng.uniform(-1, 1, size=(256, 64)).astype(np.float32)
    sample = rng.uniform(-1, 1, size=(200, 256)).astype(np.float32)
    assert quantize_weight(weight, activations_of(sample), static=static).outliers is None
    sample[:, [3, 200]] *= 1000
    found = quantize_weight(weight, activations_of(sample), static=static)
    assert {3, 200} <= set(found.outliers)
    assert len(found.outliers) == 8
    np.testing.assert_array_equal(found.outlier_rows, weight[found.outliers])
    assert (found.values[found.outliers] == 0).all()
    assert (found.smoothing[found.outliers] == 0).all()
    assert found.error < 0.0001


def test_attention_answers_alike_with_channels_apart(made_checkpoint, sharing, tmp_path):
    from resources.engines.fusion import fuse
    from tests.test_fusion import batch
    from tests.test_half import prepared

    sources, _ = prepared(sharing, made_checkpoint())
    fused, _ = fuse(sources.graph_folder / "model.onnx")
    operators = find_operators(fused)
    attention = operators[0]
    assert attention.columns == 3 * attention.rows
    # As if one channel were far larger than all others: how a matrix is split changes nothing of what it computes.
    sample = np.random.default_rng(0).normal(size=(100, attention.rows)).astype(np.float32)
    sample[:, 5] *= 1000
    weight = quantize_weight(weights_of(fused, operators)[attention.name], activations_of(sample), static=False)
    assert 5 in weight.outliers
    kept = [operator.name for operator in operators[1:]]
    model = quantize(fused, operators, {attention.name: weight}, kept)
    nodes = [node.op_type for node in model.graph]
    assert nodes.count("MultiHeadAttention") == 1
    answers = []
    for number, graph in enumerate((fused, model)):
        ir.save(graph, tmp_path / f"{number}.onnx")
        answers.append(OnnxRuntimeRunner(tmp_path / f"{number}.onnx", sources.graph.output, 1).run(batch(3, 33)))
    assert 0 < np.linalg.norm(answers[1] - answers[0]) < 0.02 * np.linalg.norm(answers[0])


def test_zeros_are_no_trouble():
    nothing = activations_of(np.zeros((8, ROWS), np.float32))
    found = quantize_weight(np.zeros((ROWS, COLUMNS), np.float32), nothing, static=True)
    assert found.error == 0.0
    assert (found.values == 0).all()
    assert np.isfinite(found.scale).all() and (found.scale > 0).all()


def test_the_output_keeps_its_name_where_it_is_what_is_quantized(tmp_path):
    rng = np.random.default_rng(0)
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "sequence", ROWS])
    matrix = initializer("matrix", rng.normal(size=(ROWS, COLUMNS)).astype(np.float32))
    node = ir.node("MatMul", [x, matrix], name="last")
    node.outputs[0].name = "logits"
    node.outputs[0].shape, node.outputs[0].type = (
        ir.Shape(["batch", "sequence", COLUMNS]),
        ir.TensorType(ir.DataType.FLOAT),
    )
    content = ir.Graph(
        [x], [node.outputs[0]], nodes=[node], initializers=[matrix], opset_imports={"": 20, "com.microsoft": 1}
    )
    model = ir.Model(content, ir_version=10)
    operators = find_operators(model)
    batch = {"x": rng.normal(size=(1, 5, ROWS)).astype(np.float32)}
    watching, watched = watched_graph(model, operators)
    ir.save(watching, tmp_path / "watching.onnx")
    seen = watch(OnnxRuntimeRunner(tmp_path / "watching.onnx", "logits", 1).outputs, watched, [batch])
    weights = {
        name: quantize_weight(weight, seen[name], static=False) for name, weight in weights_of(model, operators).items()
    }
    for made, more in (
        (quantize(model, operators, weights, []), {}),
        (switched_graph(model, operators, weights), {SWITCHES: np.array([True])}),
    ):
        ir.save(made, tmp_path / "model.onnx")
        answer = OnnxRuntimeRunner(tmp_path / "model.onnx", "logits", 1).run({**batch, **more})
        np.testing.assert_allclose(answer, batch["x"] @ matrix.const_value.numpy(), atol=0.5)


@pytest.fixture
def outliers(own_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint whose first layer has ten channels of 160 that cancel each other."""
    return add_outliers(own_checkpoint(initializer_range=0.1, hidden_size=64, intermediate_size=128))


def judged(workspace, folder, engine, **fields):
    """The engine built for the checkpoint, and the gates that its benchmark finds missed."""
    from resources.benchmark.champion import gates_missed
    from resources.engines.specs import engine_spec
    from tests.conftest import entry_for
    from tests.making import (
        collect_checkpoint,
        make_benchmark,
        make_engine,
        make_evaluation_set,
        make_graph,
        sources_of,
    )

    entry = entry_for(folder, shapes=["1x16"], engines=None, **fields)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
    made, baseline = (
        make_engine(workspace, entry, engine_spec(name), "cpu", sources, evaluation).record
        for name in (engine, "torch")
    )
    report = make_benchmark(workspace, entry, made, baseline, evaluation, sources).record
    return made, gates_missed(entry, report)


@pytest.mark.parametrize("engine", ["onnxruntime_int8", "onnxruntime_int8_static"])
def test_the_ladder_rescues_a_model_with_outliers(outliers, sharing, engine):
    plain, missed = judged(sharing, outliers, engine, ladder={"trials": 0})
    assert plain.kept == ()
    assert plain.parameters["int8_operators"] == "8 of 8"
    assert plain.parameters["ladder"] == "not rescued: the budget of trials is spent"
    assert any("neighbours" in miss for miss in missed), missed

    rescued, missed = judged(sharing, outliers, engine)
    assert missed == []
    assert rescued.kept == ("encoder.encoder.layer.0.output.dense",)
    assert rescued.parameters["int8_operators"] == "7 of 8"
    assert rescued.parameters["ladder"] == "gates kept"
    assert rescued.steps[-1] == "encoder.encoder.layer.0.output.dense in higher precision: every gate is kept"
    assert rescued.digest != plain.digest


def test_the_ladder_says_where_it_cannot_rescue(outliers, sharing):
    # One step of 256 away from PyTorch is too far for this gate, wherever it is.
    made, missed = judged(sharing, outliers, "onnxruntime_int8", gates={"cosine_worst": 1.0})
    assert made.kept == ()
    assert made.parameters["ladder"].startswith(
        "not rescued: no trial with operators left in low precision passed the gates"
    )
    assert any("cosine_worst" in miss for miss in missed)


def test_other_gates_are_another_engine(made_checkpoint, sharing):
    digests = {
        judged(sharing, made_checkpoint(), name, ladder={"trials": 0}, gates=gates)[0].digest
        for name in ("onnxruntime_int8", "onnxruntime_fp32")
        for gates in ({}, {"neighbours": 0.5})
    }
    # The builder of int8 knows the gates, and that of fp32 does not.
    assert len(digests) == 3


@pytest.mark.parametrize("rows", [6, 7])
def test_two_neighbouring_products_fit_into_sixteen_bits(rows):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(rows, 5)).astype(np.float32)
    weight[:2, 0] = 3.0  # two neighbours as large as can be, of one sign
    weight[2:4, 1] = (3.0, -3.0)  # and of two
    seen = Activations(np.full(rows, -1, np.float32), np.full(rows, 1, np.float32), rng.uniform(-1, 1, (40, rows)))
    values = quantize_weight(weight, seen, static=False).values.astype(int)
    padded = np.pad(values, ((0, rows % 2), (0, 0))).reshape(-1, 2, 5)
    assert 255 * np.maximum(padded, 0).sum(axis=1).max() <= 32767
    assert 255 * np.minimum(padded, 0).sum(axis=1).min() >= -32768
    assert (np.abs(values).max(axis=0) >= 63).all()
    assert np.abs(values[:, 1]).max() == 127
