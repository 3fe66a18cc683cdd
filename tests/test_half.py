"""Half precision: what overflows stays in fp32, what comes after the last product always does.

The processor has no fp16 arithmetic: ONNX Runtime computes in fp32 there and rounds every result to fp16, overflow
included, which is what tensor cores do with their fp32 accumulators. Speed is the GPU's: tests/performance/gpu.py.
"""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from resources.engines.availability import unsupported_reason
from resources.engines.interface import build
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner
from resources.engines.onnxruntime.sessions import session_of_bytes
from resources.engines.precision.half_precision import NEAR, halvable, near_overflow, to_half, watched_values
from resources.engines.precision.precision_search import open_gate_check
from resources.engines.specs import engine_spec
from resources.machine.device import parse_gpu, why_not_here
from resources.machine.targets import capability_of, check_target, device_of
from tests.checkpoints import add_overflow
from tests.conftest import entry_for
from tests.making import collect_checkpoint, goal_of, make_evaluation_set, make_graph, sources_of
from tests.test_fusion import pooling_model, read, small_batch

FP16 = engine_spec("onnxruntime_fp16")


def prepared(workspace, folder, **fields):
    entry = entry_for(folder, **fields)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
    return sources, goal_of(workspace, entry, evaluation)


def misses(sources, goal, folder):
    """The gates that the engine in the folder misses, without any reserve."""
    gate_check = open_gate_check(goal, sources)
    runner = OnnxRuntimeRunner(folder / "model.onnx", sources.graph.output, threads=2)
    return gate_check.misses(runner.run)


@pytest.fixture
def overflowing(own_checkpoint):
    """A checkpoint whose first feed-forward layer answers about a million, which normalization makes small again."""
    return add_overflow(own_checkpoint(hidden_size=64, intermediate_size=128, initializer_range=0.1))


def test_what_overflows_stays_in_single_precision(overflowing, sharing, tmp_path):
    from resources.engines.fusion import fuse

    sources, goal = prepared(sharing, overflowing)
    plain, rescued = tmp_path / "plain", tmp_path / "rescued"
    plain.mkdir()
    rescued.mkdir()
    ir.save(to_half(fuse(sources.graph_folder / "model.onnx")[0]), plain / "model.onnx")
    # Infinities divided by infinities: nothing that was answered is a number.
    assert "NaN" in misses(sources, goal, plain)[0] or "finite" in misses(sources, goal, plain)[0]

    built = build(sources, FP16, rescued, goal, "cpu")
    assert misses(sources, goal, rescued) == []
    assert "encoder.encoder.layer.0.output.dense" in built.kept
    assert not [name for name in built.kept if "layer.1" in name]
    assert int(built.parameters["overflowing_operators"]) == len(built.kept)
    assert "near fp16's largest number" in built.steps[0]
    types = {item.name: item.data_type for item in onnx.load(rescued / "model.onnx").graph.initializer}
    assert {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16} <= set(types.values())


def test_a_model_that_does_not_overflow_is_halved_whole(made_checkpoint, sharing, tmp_path):
    sources, goal = prepared(sharing, made_checkpoint())
    built = build(sources, FP16, tmp_path, goal, "cpu")
    assert built.kept == ()
    assert built.parameters["ladder"] == "not needed"
    assert misses(sources, goal, tmp_path) == []
    proto = onnx.load(tmp_path / "model.onnx")
    wide = [item for item in proto.graph.initializer if len(item.dims) == 2]
    assert wide and all(item.data_type == onnx.TensorProto.FLOAT16 for item in wide)
    assert [item.type.tensor_type.elem_type for item in proto.graph.output] == [onnx.TensorProto.FLOAT]


def test_the_ladder_finds_what_rounding_harms(made_checkpoint, sharing, tmp_path):
    # No operator overflows, and this gate is one that only fp32 everywhere can keep.
    sources, goal = prepared(sharing, made_checkpoint())
    strict = replace(goal, gates=goal.gates.model_copy(update={"cosine_worst": 1.0 - 1e-12}), trials=4)
    built = build(sources, FP16, tmp_path, strict, "cpu")
    assert built.parameters["ladder"].startswith("not rescued")
    assert "relative error" in " ".join(built.steps)


def answers(model):
    session = session_of_bytes(ir.to_proto(model).SerializeToString())
    given = small_batch()
    return session.run(None, {item.name: given[item.name] for item in session.get_inputs()})


def test_pooling_is_never_halved():
    from resources.engines.fusion.pooling import fuse_mean_pooling

    model = pooling_model()
    fuse_mean_pooling(model)
    assert [node.op_type for node in model.graph if node.op_type == "MatMul"]
    assert halvable(model) == []


def product_model(scale=1.0, mask=False):
    """One product with a matrix, its answer or a mask added to it."""
    from onnx import helper

    initializers = {
        "words": np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32),
        "matrix": np.full((4, 4), scale, np.float32),
        "second": np.eye(4, dtype=np.float32),
        "low": np.full((), -3.4e38, np.float32),
        "zero": np.zeros((), np.float32),
        "one": np.array(1),
        "last": np.array([-1]),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "matrix"], ["product"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["column"]),
        helper.make_node("Equal", ["column", "one"], ["kept"]),
        helper.make_node("Where", ["kept", "zero", "low"], ["mask"]),
        helper.make_node("Add", ["product", "mask"] if mask else ["product", "zero"], ["added"]),
        helper.make_node("MatMul", ["added", "second"], ["answer"]),
    ]
    model = read(nodes, ["answer"], initializers)
    for number, node in enumerate(model.graph):
        node.name = f"node_{number}_{node.op_type}"
    return model


def seen(model):
    watching, names = watched_values(model)
    return dict(zip(names, map(float, answers(watching)), strict=True))


def test_numbers_near_the_largest_are_found():
    assert near_overflow(product_model(), seen(product_model())) == {}
    large = product_model(scale=NEAR)
    found = near_overflow(large, seen(large))
    assert set(found) == {"node_1_MatMul", "node_5_Add", "node_6_MatMul"}
    assert max(found.values()) > NEAR
    weight = product_model(scale=7e4)
    assert "node_1_MatMul" in near_overflow(weight, dict.fromkeys(seen(weight), 0.0))


def test_a_mask_is_no_overflow_and_stays_finite():
    model = product_model(mask=True)
    assert near_overflow(model, seen(model)) == {}
    half = to_half(model)
    assert np.isfinite(answers(half)[0]).all()
    said = small_batch()["attention_mask"] == 1
    np.testing.assert_allclose(answers(half)[0][said], answers(model)[0][said], rtol=2e-2, atol=1e-2)


def test_kept_nodes_run_in_single_precision():
    model = product_model(scale=7e4)
    assert not np.isfinite(answers(to_half(model))[0]).all()
    kept = to_half(model, ["node_1_MatMul", "node_5_Add", "node_6_MatMul"])
    # The table alone is halved.
    np.testing.assert_allclose(answers(kept)[0], answers(model)[0], rtol=1e-3, atol=100)


def test_targets():
    assert check_target("cpu") == "cpu"
    assert (device_of("cpu"), device_of("cuda_sm90")) == ("cpu", "cuda")
    assert (capability_of("cuda_sm90"), capability_of("cuda_sm120")) == ("9.0", "12.0")
    for wrong in ("cuda", "gpu", "cuda_sm9", "cuda_sm09", "CPU", ""):
        with pytest.raises(ValueError, match="cuda_sm90"):
            check_target(wrong)


def test_what_nvidia_smi_says():
    gpu = parse_gpu("NVIDIA H200, 9.0, 580.159.04\nNVIDIA H200, 9.0, 580.159.04\n")
    assert gpu is not None
    assert (gpu.name, gpu.capability, gpu.driver) == ("NVIDIA H200", "9.0", "580.159.04")
    assert parse_gpu("No devices were found\n") is None
    assert parse_gpu("") is None


def test_a_target_without_its_gpu_is_unsupported(monkeypatch):
    import resources.machine.device

    assert unsupported_reason(FP16, "cpu") == "onnxruntime_fp16 needs an NVIDIA GPU; the target 'cpu' has none."
    int8 = engine_spec("onnxruntime_int8")
    assert "needs a CPU" in str(unsupported_reason(int8, "cuda_sm90"))
    monkeypatch.setattr(resources.machine.device, "first_gpu", lambda: None)
    assert "nvidia-smi shows none" in str(why_not_here("cuda_sm90"))
    assert why_not_here("cpu") is None
    monkeypatch.setattr(resources.machine.device, "first_gpu", lambda: parse_gpu("NVIDIA L4, 8.9, 580"))
    assert "Name the target cuda_sm89" in str(unsupported_reason(FP16, "cuda_sm90"))
    assert unsupported_reason(FP16, "cuda_sm89") is None
