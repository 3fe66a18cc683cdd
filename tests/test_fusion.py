"""Fused graphs answer as the exported ones did, and rules keep their hands off what only looks alike."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from resources.engines.fusion import fuse
from resources.engines.fusion.activations import fuse_fast_gelu
from resources.engines.fusion.eager import fuse_eager_attention
from resources.engines.fusion.embeddings import fuse_embeddings
from resources.engines.fusion.masks import masks_padding, masks_to_lengths
from resources.engines.fusion.pooling import fuse_mean_pooling, fuse_normalization
from resources.engines.fusion.rotary import fuse_rotary_attention, fuse_skip_normalization
from resources.engines.graphs import drop_unused, name_nodes
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner
from resources.engines.onnxruntime.sessions import session_of_bytes
from tests.checkpoints import ENCODERS
from tests.conftest import entry_for
from tests.making import collect_checkpoint, make_graph

#: Nodes of two fused layers, mean pooling included, views left out; a rule that no longer fires shows here.
MOST_NODES = {
    "bert": 23,
    "distilbert": 22,
    "electra": 23,
    "albert": 24,
    "roberta": 31,
    "xlm-roberta": 31,
    "camembert": 31,
    "mpnet": 56,
    "deberta-v2": 133,
    "modernbert": 62,
}


def batch(rows, tokens, pad=0):
    """Random ids, padded on the right to all kinds of lengths, with two segments."""
    generator = np.random.default_rng(rows * 100 + tokens)
    lengths = np.maximum(1, tokens - np.arange(rows) * max(1, tokens // rows))
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, generator.integers(5, 1100, (rows, tokens)), pad)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (np.arange(tokens) > tokens // 2) * mask}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_fused_graph_answers_as_the_exported_one(made_checkpoint, sharing, tmp_path, architecture):
    entry = entry_for(made_checkpoint(architecture=architecture))
    checkpoint = collect_checkpoint(entry, sharing.store, sharing.limits).record
    graph = make_graph(sharing, entry, checkpoint).record
    source = sharing.store.folder(graph) / "model.onnx"
    model, _ = fuse(source)
    ir.save(model, tmp_path / "fused.onnx")
    onnx.checker.check_model(tmp_path / "fused.onnx")
    plain, fused = (OnnxRuntimeRunner(path, graph.output, threads=2) for path in (source, tmp_path / "fused.onnx"))
    pad = 1 if architecture == "mpnet" else 0
    for shape in ((1, 1), (1, 7), (3, 33), (5, 60)):
        given = batch(*shape, pad)
        expected = plain.run(given)
        np.testing.assert_allclose(fused.run(given), expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
    working = [node for node in model.graph if node.op_type not in ("Unsqueeze", "Squeeze")]
    if architecture in MOST_NODES:
        assert len(working) <= MOST_NODES[architecture]


def read(nodes, outputs, initializers=(), inputs=("input_ids", "attention_mask")):
    """A model of onnx nodes over int64 inputs `[batch, sequence]`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in dict(initializers).items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    return ir.from_proto(model)


def mask_model(kind):
    """Attention over `x`, with a mask of a kind; all of them begin alike."""
    low = np.array(-1.0 if kind == "too high" else -3.4e38, np.float32)
    initializers = {
        "axes": np.array([1, 2]),
        "zero": np.array(0.0, np.float32),
        "low": low,
        "weights": np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32),
        "bias": np.zeros(12, np.float32),
        "table": np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32),
        "one": np.array([1]),
        "two": np.array([2]),
        "wide": np.array(2),
        "start": np.array(0),
        "step": np.array(1),
        "axis": np.array([0]),
        "row": np.array([1]),
        "last": np.array([3]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["attention_mask", "axes"], ["spread"]),
        helper.make_node("Cast", ["spread"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Shape", ["input_ids"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["length"]),
        helper.make_node("Squeeze", ["length"], ["tokens"]),
        helper.make_node("Range", ["start", "tokens", "step"], ["places"]),
        helper.make_node("Unsqueeze", ["places", "axis"], ["across"]),
        helper.make_node("Unsqueeze", ["places", "row"], ["down"]),
        helper.make_node("Sub", ["down", "across"], ["distance"]),
        helper.make_node("Abs", ["distance"], ["far"]),
        helper.make_node("LessOrEqual", ["far", "wide"], ["near"]),
        helper.make_node("LessOrEqual", ["across", "down"], ["before"]),
        helper.make_node("Or", ["before", "kept"], ["either"]),
    ]
    allowed = "kept"
    if kind == "window":
        nodes.append(helper.make_node("And", ["kept", "near"], ["allowed"]))
        allowed = "allowed"
    elif kind == "causal":
        nodes.append(helper.make_node("And", ["kept", "before"], ["allowed"]))
        allowed = "allowed"
    elif kind == "ids":
        nodes.append(helper.make_node("Unsqueeze", ["input_ids", "axes"], ["ids"]))
        nodes.append(helper.make_node("Cast", ["ids"], ["allowed"], to=TensorProto.BOOL))
        allowed = "allowed"
    first, second = ("low", "zero") if kind == "turned round" else ("zero", "low")
    nodes += [
        helper.make_node("Where", [allowed, first, second], ["keys"]),
        helper.make_node("Gather", ["shape", "axis"], ["rows"]),
        helper.make_node("Concat", ["rows", "one", "length", "length"], ["full"], axis=0),
        helper.make_node("Expand", ["keys", "full"], ["mask"]),
        helper.make_node(
            "Attention",
            ["x", "weights", "bias", "", "", "mask"],
            ["answer"],
            domain="com.microsoft",
            num_heads=2,
        ),
    ]
    model = read(nodes, ["answer"], initializers)
    drop_unused(model)
    name_nodes(model)
    return model


def small_batch():
    given = batch(3, 7)
    return {name: given[name] % 9 if name == "input_ids" else given[name] for name in ("input_ids", "attention_mask")}


def answers(model):
    session = session_of_bytes(ir.to_proto(model).SerializeToString())
    given = small_batch()
    return session.run(None, {item.name: given[item.name] for item in session.get_inputs()})[0]


def test_a_mask_of_padding_becomes_lengths():
    model = mask_model("padding")
    expected = answers(model)
    assert masks_to_lengths(model) == 1
    drop_unused(model)
    assert sorted(node.op_type for node in model.graph) == ["Attention", "Cast", "Gather", "ReduceSum"]
    said = small_batch()["attention_mask"] == 1
    np.testing.assert_allclose(answers(model)[said], expected[said], atol=1e-6)


@pytest.mark.parametrize("kind", ["window", "causal", "ids", "too high", "turned round"])
def test_other_masks_stay(kind):
    model = mask_model(kind)
    assert masks_to_lengths(model) == 0
    assert not masks_padding(model, next(node for node in model.graph if node.op_type == "Attention").inputs[5])


def gelu_model(half=0.5, power=3.0, bias=True):
    initializers = {
        "table": np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32) * 2,
        "bias": np.arange(4).astype(np.float32),
        "half": np.array(half, np.float32),
        "power": np.array(power, np.float32),
        "cubic": np.array(0.044715, np.float32),
        "root": np.array(0.7978845834732056, np.float32),
        "one": np.array(1, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Add", ["x", "bias"], ["b"]) if bias else helper.make_node("Identity", ["x"], ["b"]),
        helper.make_node("Mul", ["b", "half"], ["halved"]),
        helper.make_node("Pow", ["b", "power"], ["cubed"]),
        helper.make_node("Mul", ["cubed", "cubic"], ["small"]),
        helper.make_node("Add", ["b", "small"], ["inner"]),
        helper.make_node("Mul", ["inner", "root"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["tanh"]),
        helper.make_node("Add", ["tanh", "one"], ["plus"]),
        helper.make_node("Mul", ["halved", "plus"], ["answer"]),
    ]
    model = read(nodes, ["answer"], initializers)
    name_nodes(model)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_gelu_by_tanh_is_one_operator(bias):
    model = gelu_model(bias=bias)
    expected = answers(model)
    assert fuse_fast_gelu(model) == 1
    drop_unused(model)
    assert [node.op_type for node in model.graph if node.op_type != "Identity"] == ["Gather", "FastGelu"]
    np.testing.assert_allclose(answers(model), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"half": 0.4}, {"power": 2.0}])
def test_what_is_no_gelu_stays(wrong):
    assert fuse_fast_gelu(gelu_model(**wrong)) == 0


def embedding_model(positions):
    """Word and position embeddings, normalized; `positions` says how the second are indexed."""
    random = np.random.default_rng(2)
    initializers = {
        "words": random.normal(size=(9, 4)).astype(np.float32),
        "places": random.normal(size=(20, 4)).astype(np.float32),
        "scale": random.normal(size=4).astype(np.float32),
        "bias": random.normal(size=4).astype(np.float32),
        "all": np.arange(20)[None, ::-1].copy() if positions == "backwards" else np.arange(20)[None, :],
        "zero": np.array([0]),
        "one": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["word"]),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Slice", ["all", "zero", "length", "one", "one"], ["numbers"]),
        helper.make_node("Gather", ["places", "attention_mask" if positions == "mask" else "numbers"], ["place"]),
        helper.make_node("Add", ["word", "place"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["answer"], epsilon=1e-5, axis=-1),
    ]
    model = read(nodes, ["answer"], initializers)
    name_nodes(model)
    return model


@pytest.mark.parametrize("positions", ["forwards", "mask"])
def test_embeddings_are_one_operator(positions):
    model = embedding_model(positions)
    expected = answers(model)
    assert fuse_embeddings(model) == 1
    drop_unused(model)
    assert {node.op_type for node in model.graph} == {"Cast", "EmbedLayerNormalization"}
    np.testing.assert_allclose(answers(model), expected, atol=1e-5)


def test_other_positions_stay():
    assert fuse_embeddings(embedding_model("backwards")) == 0


def pooling_model(axis=1, spread=-1, keepdims=0, weights="attention_mask", small=1e-9, counts=1):
    """Mean pooling and normalization of word vectors."""
    initializers = {
        "words": np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32),
        "axis": np.array([axis]),
        "last": np.array([-1]),
        "spread": np.array([spread]),
        "small": np.array(small, np.float32),
        "smaller": np.array(1e-12, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["hidden"]),
        helper.make_node("Unsqueeze", [weights, "spread"], ["column"]),
        helper.make_node("Cast", ["column"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["hidden", "weights"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis"], ["sum"], keepdims=keepdims),
        helper.make_node("ReduceSum", ["weights", "axis"], ["count"], keepdims=keepdims),
        helper.make_node("Clip", ["count", "small"], ["bounded"]),
        helper.make_node("Div", ["sum", "bounded"], ["mean"]),
        helper.make_node("ReduceL2", ["mean", "last"], ["norm"], keepdims=1),
        helper.make_node("Clip", ["norm", "smaller"], ["divisor"]),
        helper.make_node("Div", ["mean", "divisor"], ["answer"]),
    ]
    model = read(nodes, ["answer"], initializers)
    for node in model.graph:
        if node.outputs[0].name == "mean":
            node.outputs[0].shape = ir.Shape(["batch", 4])
        if node.outputs[0].name == "bounded":
            node.outputs[0].shape = ir.Shape(["batch", counts])
    name_nodes(model)
    return model


def test_pooling_is_a_product_and_a_normalization():
    model = pooling_model()
    expected = answers(model)
    assert (fuse_mean_pooling(model), fuse_normalization(model)) == (1, 1)
    drop_unused(model)
    assert {"MatMul", "SimplifiedLayerNormalization"} <= {node.op_type for node in model.graph}
    # The direction of a mean is that of the sum.
    assert not {"Mul", "ReduceL2", "Div", "Clip"} & {node.op_type for node in model.graph}
    np.testing.assert_allclose(answers(model), expected, atol=1e-6)


@pytest.mark.parametrize("other", [{"small": -1.0}, {"counts": 4}])
def test_a_division_that_may_turn_a_vector_stays(other):
    model = pooling_model(**other)
    assert fuse_normalization(model) == 1
    drop_unused(model)
    assert "Div" in {node.op_type for node in model.graph}


def test_a_vector_of_zeros_stays_one():
    model = pooling_model()
    fuse_normalization(model)
    words = model.graph.initializers["words"]
    words.const_value = ir.tensor(np.zeros((9, 4), np.float32), name="words")
    assert (answers(model) == 0).all()


@pytest.mark.parametrize("other", [{"axis": 2}, {"keepdims": 1}, {"weights": "input_ids"}])
def test_other_sums_stay(other):
    assert fuse_mean_pooling(pooling_model(**other)) == 0


def eager_model(change="", heads=2, width=3):
    """Attention spelled out over word vectors, with positions and a mask added to its scores."""
    random = np.random.default_rng(3)
    size = heads * width
    initializers = {
        "words": random.normal(size=(9, size)).astype(np.float32),
        **{name: random.normal(size=(size, size)).astype(np.float32) for name in ("wq", "wk", "wv")},
        **{name: random.normal(size=size).astype(np.float32) for name in ("bq", "bk", "bv")},
        "positions": random.normal(size=(1, heads, 7, 7)).astype(np.float32),
        "apart": np.array([0, 0, heads, width]),
        "together": np.array([0, 0, size]),
        "root": np.array(width**0.5, np.float32),
        "axes": np.array([1, 2]),
        "low": np.array(-3.4e38, np.float32),
        "zero": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["attention_mask", "axes"], ["spread"]),
        helper.make_node("Cast", ["spread"], ["kept"], to=TensorProto.BOOL),
        helper.make_node("Where", ["kept", "zero", "low"], ["mask"]),
    ]
    for name in ("q", "k", "v"):
        turn = [0, 2, 3, 1] if name == "k" and change != "unturned" else [0, 2, 1, 3]
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}_product"]),
            helper.make_node("Add", [f"{name}_product", f"b{name}"], [f"{name}_linear"]),
            helper.make_node("Reshape", [f"{name}_linear", "apart"], [f"{name}_apart"]),
            helper.make_node("Transpose", [f"{name}_apart"], [name], perm=turn),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["raw"]),
        helper.make_node("Div", ["raw", "root"], ["scores"])
        if change == "divided"
        else helper.make_node("Add", ["raw", "positions"], ["scores"]),
        helper.make_node("Add", ["scores", "mask"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=2 if change == "queries" else -1),
        helper.make_node("MatMul", ["weights", "v"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "together"], ["answer"]),
    ]
    ranks = {"apart": 4, "linear": 3, "turned": 4, "answer": 3}
    model = read(nodes, ["answer"], initializers)
    for node in model.graph:
        name = str(node.outputs[0].name)
        part = name.split("_")[-1]
        if part in ranks:
            sizes = (heads, width) if ranks[part] == 4 else (size,)
            node.outputs[0].shape = ir.Shape(["batch", "sequence", *sizes])
    name_nodes(model)
    return model


def test_attention_spelled_out_is_one_operator():
    model = eager_model()
    expected = answers(model)
    assert fuse_eager_attention(model) == 1
    drop_unused(model)
    assert sorted(node.op_type for node in model.graph) == ["Attention", "Cast", "Gather", "ReduceSum"]
    said = small_batch()["attention_mask"] == 1
    np.testing.assert_allclose(answers(model)[said], expected[said], atol=1e-5)


@pytest.mark.parametrize("change", ["queries", "divided"])
def test_what_is_no_attention_that_is_known_stays(change):
    assert fuse_eager_attention(eager_model(change)) == 0


def skip_model(axis=-1):
    """Two vectors added, normalized without a bias, and read once more as their sum."""
    random = np.random.default_rng(5)
    initializers = {
        **{name: random.normal(size=(9, 4)).astype(np.float32) for name in ("first", "second")},
        "scale": random.normal(size=4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["first", "input_ids"], ["a"]),
        helper.make_node("Gather", ["second", "input_ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale"], ["normal"], axis=axis, epsilon=1e-5),
        helper.make_node("Mul", ["normal", "sum"], ["answer"]),
    ]
    model = read(nodes, ["answer"], initializers)
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["batch", "sequence", 4])
    name_nodes(model)
    return model


def test_a_sum_and_its_normalization_are_one_operator():
    model = skip_model()
    expected = answers(model)
    assert fuse_skip_normalization(model) == 1
    drop_unused(model)
    assert [node.op_type for node in model.graph] == ["Gather", "Gather", "SkipLayerNormalization", "Mul"]
    np.testing.assert_allclose(answers(model), expected, atol=1e-6)


def rotary_model(halves=(0, 4), order=(0, 1, 2), heads=2, width=8):
    """One packed product, queries and keys turned by their positions as ModernBERT is exported, and attention."""
    random = np.random.default_rng(6)
    size = heads * width
    initializers = {
        "words": random.normal(size=(9, 3 * size)).astype(np.float32),
        "frequencies": (10.0 ** -np.arange(width // 2)).astype(np.float32),
        "five": np.array([0, 0, 3, heads, width]),
        "third": np.array([-3]),
        "one": np.array([1]),
        "axes": np.array([0, 2]),
        "zero": np.array(0),
        "step": np.array(1),
        "together": np.array([0, 0, -1]),
        "last": np.array([3]),
        "first_start": np.array([halves[0]]),
        "middle": np.array([halves[1]]),
        "end": np.array([2**62]),
        **{f"place_{number}": np.array([number]) for number in range(4)},
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["linear"]),
        helper.make_node("Reshape", ["linear", "five"], ["whole"]),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Squeeze", ["length"], ["tokens"]),
        helper.make_node("Range", ["zero", "tokens", "step"], ["range"]),
        helper.make_node("Cast", ["range"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["places", "axes"], ["column"]),
        helper.make_node("Mul", ["column", "frequencies"], ["angles"]),
        helper.make_node("Concat", ["angles", "angles"], ["both"], axis=-1),
        helper.make_node("Cos", ["both"], ["cosine"]),
        helper.make_node("Sin", ["both"], ["sine"]),
        helper.make_node("Unsqueeze", ["cosine", "one"], ["cos"]),
        helper.make_node("Unsqueeze", ["sine", "one"], ["sin"]),
    ]
    shapes = {"whole": ("b", "s", 3, heads, width), "angles": (1, "s", width // 2)}
    for name, place in zip("qkv", order, strict=True):
        nodes += [
            helper.make_node("Slice", ["whole", f"place_{place}", f"place_{place + 1}", "third"], [f"{name}_piece"]),
            helper.make_node("Squeeze", [f"{name}_piece", "third"], [f"{name}_heads"]),
        ]
        if name != "v":
            nodes += [
                helper.make_node("Transpose", [f"{name}_heads"], [f"{name}_x"], perm=[0, 2, 1, 3]),
                helper.make_node("Slice", [f"{name}_x", "first_start", "middle", "last"], [f"{name}_low"]),
                helper.make_node("Slice", [f"{name}_x", "middle", "end", "last"], [f"{name}_high"]),
                helper.make_node("Neg", [f"{name}_high"], [f"{name}_minus"]),
                helper.make_node("Concat", [f"{name}_minus", f"{name}_low"], [f"{name}_crossed"], axis=-1),
                helper.make_node("Mul", [f"{name}_x", "cos"], [f"{name}_one"]),
                helper.make_node("Mul", [f"{name}_crossed", "sin"], [f"{name}_two"]),
                helper.make_node("Add", [f"{name}_one", f"{name}_two"], [f"{name}_sum"]),
                helper.make_node("Transpose", [f"{name}_sum"], [f"{name}_back"], perm=[0, 2, 1, 3]),
            ]
            shapes[f"{name}_x"] = ("b", heads, "s", width)
        source = f"{name}_heads" if name == "v" else f"{name}_back"
        nodes.append(helper.make_node("Reshape", [source, "together"], [name]))
    nodes.append(
        helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["answer"], domain="com.microsoft", num_heads=heads)
    )
    model = read(nodes, ["answer"], initializers)
    for node in model.graph:
        if node.outputs[0].name in shapes:
            node.outputs[0].shape = ir.Shape(shapes[node.outputs[0].name])
    name_nodes(model)
    return model


def test_rotary_positions_are_one_operator():
    model = rotary_model()
    expected = answers(model)
    assert fuse_rotary_attention(model) == 1
    drop_unused(model)
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("RotaryEmbedding"), kinds.count("Split"), kinds.count("Slice")) == (2, 1, 0)
    np.testing.assert_allclose(answers(model), expected, atol=1e-5)


@pytest.mark.parametrize("other", [{"order": (1, 0, 2)}, {"halves": (1, 5)}])
def test_what_is_turned_otherwise_stays(other):
    assert fuse_rotary_attention(rotary_model(**other)) == 0
