"""The exported graph is PyTorch's model at every shape, and a graph that is not is caught."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from resources.accuracy.evaluation_set import read_evaluation_set
from resources.engines.onnxruntime.runner import OnnxRuntimeRunner
from resources.errors import EngineError, ExportError
from resources.export import exporter
from resources.pipelines import open_pipeline
from resources.pipelines.tokenization import TextEncoder
from resources.tasks import TASKS
from tests.answers import CHECKPOINTS
from tests.conftest import entry_for
from tests.making import collect_checkpoint, make_evaluation_set, make_graph


def collected(workspace, folder, **fields):
    entry = entry_for(folder, **fields)
    return entry, collect_checkpoint(entry, workspace.store, workspace.limits).record


@pytest.mark.parametrize(
    ("kind", "task", "inputs", "output"),
    [
        ({}, "embedding", ("input_ids", "attention_mask", "token_type_ids"), "sentence_embedding"),
        ({"architecture": "roberta"}, "embedding", ("input_ids", "attention_mask"), "sentence_embedding"),
        ({"labels": ("a", "b")}, "classification", ("input_ids", "attention_mask", "token_type_ids"), "probabilities"),
    ],
)
def test_graph_is_the_model(made_checkpoint, workspace, kind, task, inputs, output):
    entry, checkpoint = collected(workspace, made_checkpoint(**kind), task=task)
    graph = make_graph(workspace, entry, checkpoint).record
    assert graph.problems == ()
    assert graph.inputs == inputs
    assert graph.output == output
    shapes = {(case.shape, case.padded) for case in graph.parity}
    # The shortest row holds both special tokens.
    assert {("1x2", False), ("1x7", False), ("3x33", True), ("5x64", False), ("2x64", True)} - shapes <= {
        ("5x64", False)
    }
    assert all(case.max_relative_error < 1e-4 for case in graph.parity)
    model = onnx.load(workspace.store.folder(graph) / "model.onnx")
    axes = {item.name: [axis.dim_param for axis in item.type.tensor_type.shape.dim] for item in model.graph.input}
    assert axes == {name: ["batch", "sequence"] for name in inputs}

    # Real text through the graph is what PyTorch alone answers to it.
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    known = read_evaluation_set(workspace.store.folder(evaluation))
    items, reference = known.items, known.baseline
    encoder = TextEncoder.from_folder(str(workspace.store.folder(checkpoint)))
    runner = OnnxRuntimeRunner(workspace.store.folder(graph) / "model.onnx", output, threads=1)
    np.testing.assert_allclose(
        runner.run(encoder.encode([item["TEXT"] for item in items[:7]])), reference[:7], rtol=1e-3, atol=1e-4
    )


def test_reference_is_each_text_alone(made_checkpoint, workspace):
    import torch

    from resources.checkpoints.collect import checkpoint_files

    entry, checkpoint = collected(workspace, made_checkpoint())
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    known = read_evaluation_set(workspace.store.folder(evaluation))
    items, reference = known.items, known.baseline
    texts = [item["TEXT"] for item in items]
    folder = workspace.store.folder(checkpoint)
    module = TASKS["embedding"].module(checkpoint_files(checkpoint, folder, entry.trust), **entry.trust.load_arguments)
    encoder = TextEncoder.from_folder(str(folder))
    for index in range(0, len(texts), 40):
        (encoding,) = encoder.tokens([texts[index]])
        batch = {name: torch.from_numpy(array) for name, array in encoder.pad([encoding], len(encoding.ids)).items()}
        with torch.inference_mode():
            np.testing.assert_allclose(module(**batch).numpy()[0], reference[index], rtol=1e-3, atol=1e-5)


def broken_graph(source, target, change):
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def test_parity_finds_a_wrong_weight(made_checkpoint, workspace, tmp_path):
    entry, checkpoint = collected(workspace, made_checkpoint())
    graph = make_graph(workspace, entry, checkpoint).record
    folder = workspace.store.folder(checkpoint)

    def change(model):
        weight = next(item for item in model.graph.initializer if "position" in item.name)
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    path = broken_graph(workspace.store.folder(graph) / "model.onnx", tmp_path / "model.onnx", change)
    task = TASKS["embedding"]
    module = task.module(exporter.checkpoint_files(checkpoint, folder, entry.trust))
    maker = exporter._BatchMaker(TextEncoder.from_folder(str(folder)), task, segments=2)
    _, _, misses = exporter._compare(module, path, maker, graph.output)
    assert len(misses) >= 5
    assert "differs from PyTorch by" in misses[0]


def test_the_checker_refuses_an_invalid_graph(made_checkpoint, workspace, tmp_path):
    entry, checkpoint = collected(workspace, made_checkpoint())
    graph = make_graph(workspace, entry, checkpoint).record

    def change(model):
        model.graph.node[5].input[0] = "nothing makes this"

    source = workspace.store.folder(graph) / "model.onnx"
    assert exporter._check(source) == ""
    assert "refuses the graph" in exporter._check(broken_graph(source, tmp_path / "model.onnx", change))


LONG_CONTEXT = {"longest": 8192, "max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("architecture", "task", "more"),
    [
        ("bert", "embedding", {}),
        ("bert", "classification", {"labels": ("a", "b", "c", "d", "e", "f", "g")}),
        ("roberta", "classification", {}),
        ("distilbert", "token-classification", {}),
        ("electra", "question-answering", {}),
        ("mpnet", "embedding", {}),
        ("albert", "zero-shot-classification", {}),
        ("xlm-roberta", "reranking", {}),
        ("camembert", "token-classification", {}),
        ("deberta-v2", "zero-shot-classification", {}),
        ("deberta", "question-answering", {}),
        ("modernbert", "fill-mask", {}),
        ("modernbert", "embedding", LONG_CONTEXT),
    ],
)
def test_every_engine_of_the_target_is_built(made_checkpoint, sharing, architecture, task, more):
    """Every architecture and every task at least once; the export itself compares each at shapes of its own.

    Heads too: their weights are neither square nor stored as those of layers are.
    """
    from resources.engines.interface import load
    from resources.engines.specs import ENGINES
    from tests.making import make_engine, sources_of

    folder = made_checkpoint(architecture=architecture, **{**CHECKPOINTS[task], **more})
    # Without the ladder, which would leave in fp32 whatever misses a gate: here every matrix is to be in int8.
    entry, checkpoint = collected(sharing, folder, task=task, ladder={"trials": 0}, engines=None)
    graph = make_graph(sharing, entry, checkpoint).record
    assert graph.problems == ()
    assert max(int(case.shape.split("x")[1]) for case in graph.parity) == more.get("longest", 64)
    sources = sources_of(sharing, entry, checkpoint, graph)
    evaluation = make_evaluation_set(sharing, entry, checkpoint).record
    pipeline = open_pipeline(str(sharing.store.folder(checkpoint)))
    rows = [
        row for rows in pipeline.rows(TASKS[task].items(checkpoint.settings, checkpoint.max_tokens)[:3]) for row in rows
    ][:4]
    batch = pipeline.arrays(rows, max(row.tokens for row in rows))
    real = batch["attention_mask"] == 1 if TASKS[task].per_token else slice(None)
    answers = {}
    for spec in (spec for spec in ENGINES if "cpu" in spec.devices):
        engine = make_engine(sharing, entry, spec, "cpu", sources, evaluation).record
        assert engine.status == "built", engine.reason
        answers[spec.name] = load(engine, sharing.store.folder(engine), sources, 1).run(batch)[real]
        if spec.precision == "int8":
            quantized = onnx.load(sharing.store.folder(engine) / "model.onnx")
            matrices = sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in quantized.graph.initializer)
            # Six matrices a layer, four where attention is fused; ALBERT's two layers share theirs.
            assert matrices >= (4 if architecture == "albert" else 8)
            assert engine.parameters["int8_operators"].split(" of ")[0] == str(matrices)
        if spec.runtime == "onnxruntime":
            # The exporter writes stack traces there, and so the folders of this machine.
            written = onnx.load(sharing.store.folder(engine) / "model.onnx", load_external_data=False)
            assert not any(node.metadata_props for node in written.graph.node)
            assert not np.array_equal(answers[spec.name], answers["torch"])
    scale = np.abs(answers["torch"]).max()
    np.testing.assert_allclose(answers["onnxruntime_fp32"], answers["torch"], atol=1e-4 * scale)


def test_no_engine_is_built_from_a_wrong_graph(made_checkpoint, workspace):
    from resources.engines.specs import engine_spec
    from tests.making import make_engine, sources_of

    entry, checkpoint = collected(workspace, made_checkpoint())
    graph = make_graph(workspace, entry, checkpoint).record
    wrong = graph.model_copy(update={"parity_misses": ("At 3x33 it differs.",)})
    with pytest.raises(ExportError, match="At 3x33 it differs"):
        make_engine(
            workspace, entry, engine_spec("onnxruntime_fp32"), "cpu", sources_of(workspace, entry, checkpoint, wrong)
        )


def test_export_over_its_limit_is_one_clear_error(made_checkpoint, workspace):
    limited = replace(workspace, limits=replace(workspace.limits, timeout_s=0.2))
    entry, checkpoint = collected(workspace, made_checkpoint())
    with pytest.raises(ExportError, match=r"tiny, revision \w+: exporting to ONNX.*limit of 0\.2 s.*onnx_graph\.log"):
        make_graph(limited, entry, checkpoint)
    assert not (workspace.store.root / "onnx_graph").exists()


def test_a_file_that_is_no_graph(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(EngineError, match="ONNX Runtime cannot load the graph"):
        OnnxRuntimeRunner(tmp_path / "model.onnx", "x", threads=1)
