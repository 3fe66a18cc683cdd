"""OpenVINO as a candidate: real models, built, compared with PyTorch, measured, and released on the real Triton.

It is an extra: without the package the engine says so, and what runs it here is skipped.
"""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from resources.benchmark.texts import batch_of_shape
from resources.catalog.entries import Shape
from resources.engines import availability
from resources.engines.availability import unsupported_reason
from resources.engines.interface import Sources, build, load
from resources.engines.specs import engine_spec
from resources.errors import EngineError
from resources.pipelines import open_pipeline
from resources.tasks import TASKS
from resources.tasks.samples import sample_texts
from resources.triton.config import engine_config
from resources.triton.environment import requirements
from resources.triton.layout import internal_name
from resources.triton.publish import Steps, publish
from resources.triton.server import EmbeddedServer
from resources.triton.stage import stage
from tests.conftest import entry_for
from tests.making import collect_checkpoint, make_benchmark, make_engine, make_evaluation_set, make_graph, sources_of
from tests.releases import exam_of, make_plan, query_texts
from tests.test_triton_server import prove_embedded

SPEC = engine_spec("openvino_fp32")
installed = pytest.mark.skipif(find_spec("openvino") is None, reason="pip install 'transformer-refinery[openvino]'")


def prepared(workspace, folder, **fields):
    entry = entry_for(folder, **fields)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    return entry, sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)


def openvino_plan(folder, **fields):
    """A plan of tests.releases whose engine is OpenVINO's."""
    plan = make_plan(folder, **fields)
    sources = Sources(plan.checkpoint, plan.checkpoint_folder, plan.engine, plan.engine_folder)
    target = folder / "openvino"
    target.mkdir()
    built = build(sources, SPEC, target)
    engine = plan.engine.model_copy(
        update={"name": SPEC.name, "runtime": SPEC.runtime, "entry_file": built.entry_file}
    ).with_files(target)
    return replace(plan, engine=engine, engine_folder=target), plan


def test_without_the_package_it_is_unsupported_with_the_remedy(monkeypatch):
    monkeypatch.setattr(availability, "find_spec", lambda name: None)
    assert unsupported_reason(SPEC, "cpu") == (
        "openvino_fp32 needs OpenVINO, which is not installed. "
        "Install it: pip install 'transformer-refinery[openvino]'."
    )
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    assert unsupported_reason(SPEC, "cpu") is None
    assert "needs a CPU" in unsupported_reason(SPEC, "cuda_sm90")


@installed
@pytest.mark.parametrize("architecture", ["bert", "mpnet", "deberta-v2", "modernbert"])
def test_it_answers_as_pytorch_does(made_checkpoint, sharing, tmp_path, architecture):
    _, sources = prepared(sharing, made_checkpoint(architecture=architecture))
    folder = tmp_path / "engine"
    folder.mkdir()
    built = build(sources, SPEC, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "model.xml"]
    assert built.parameters == {
        "performance_hint": "LATENCY",
        "num_streams": "1",
        "inference_precision_hint": "f32",
        "enable_cpu_pinning": "False",
    }
    assert built.operators["MatMul"] >= 8
    engine = record_of(sources, built)
    torch = load(engine.model_copy(update={"runtime": "torch"}), folder, sources, threads=2)
    runner = load(engine, folder, sources, threads=2)
    encoder = open_pipeline(str(sources.checkpoint_folder)).encoder
    for rows, tokens in ((1, 4), (3, 17), (8, 40)):
        batch = batch_of_shape(sample_texts(), encoder, rows, tokens, TASKS["embedding"].extra_inputs)
        batch["attention_mask"][1:, tokens // 2 :] = 0
        answer, expected = runner.run(batch), torch.run(batch)
        np.testing.assert_allclose(answer, expected, atol=2e-5 * np.abs(expected).max())
        kept = answer.copy()
        runner.run({name: np.ascontiguousarray(array[::-1]) for name, array in batch.items()})
        np.testing.assert_array_equal(answer, kept)  # it is the caller's, not the request's


def record_of(sources, built):
    """The engine's record, where nothing else of it matters."""
    from resources.artifacts.records import Engine

    return Engine(
        digest="e" * 64,
        model="tiny",
        name=SPEC.name,
        target="cpu",
        runtime="openvino",
        precision="fp32",
        status="built",
        entry_file=built.entry_file,
        inputs=sources.graph.inputs,
        output=sources.graph.output,
        width=sources.graph.width,
    )


@installed
def test_the_weights_keep_their_precision(made_checkpoint, sharing, tmp_path):
    """Written as OpenVINO does it by default they would take half of this."""
    _, sources = prepared(sharing, made_checkpoint())
    build(sources, SPEC, tmp_path)
    assert (tmp_path / "model.bin").stat().st_size > 3 * sources.graph.parameters


@installed
def test_a_graph_that_it_cannot_read_is_an_engine_error(made_checkpoint, sharing, tmp_path):
    _, sources = prepared(sharing, made_checkpoint())
    broken, target = tmp_path / "graph", tmp_path / "engine"
    broken.mkdir()
    target.mkdir()
    (broken / "model.onnx").write_bytes((sources.graph_folder / "model.onnx").read_bytes()[:-100])
    with pytest.raises(EngineError, match="openvino_fp32: OpenVINO cannot convert the graph: .*Model can't be parsed"):
        build(replace(sources, graph_folder=broken), SPEC, target)


@installed
def test_it_is_measured_like_the_others(made_checkpoint, sharing):
    entry, sources = prepared(
        sharing, made_checkpoint(architecture="mpnet"), benchmark={"seconds": 3.0, "threads": 2}, engines=None
    )
    evaluation = make_evaluation_set(sharing, entry, sources.checkpoint).record
    baseline, engine = (
        make_engine(sharing, entry, engine_spec(name), "cpu", sources, evaluation).record
        for name in ("torch", SPEC.name)
    )
    assert (engine.status, engine.entry_file) == ("built", "model.xml"), engine.reason
    report = make_benchmark(sharing, entry, engine, baseline, evaluation, sources).record
    assert report.status == "measured", report.reason
    assert report.accuracy.metrics["cosine_worst"] > 0.99999
    assert [timing.shape for timing in report.timings] == [str(Shape.parse(text)) for text in ("1x16", "2x32")]
    # Its threads can only be more or fewer.
    assert all(trial.setting.spinning for trial in report.thread_trials)


@installed
def test_a_release_of_it_is_proven_and_answers(tmp_path, triton_settings):
    """On the embedded Triton, whose environment has numpy 1."""
    assert any(name.startswith("openvino==") for name in requirements()["whole"])
    plan, same = openvino_plan(tmp_path)
    repository = tmp_path / "cpu"
    steps = prove_embedded(triton_settings, exam_of(same), tmp_path / "proof.log")
    release = publish(plan, repository, steps).release
    assert release.status == "published"
    assert release.proof.passed
    assert all(metrics["cosine_worst"] > 0.999999 for metrics in release.proof.metrics.values())
    folder = repository / internal_name("tiny", 1, "pipeline") / "1"
    assert {"model.py", "engine.py", "openvino_session.py", "model.xml", "model.bin"} <= {
        path.name for path in folder.iterdir()
    }
    texts = ["How long should I boil the eggs?", "", "naïve 🙂"]
    with EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "log") as server:
        answers = query_texts(server.grpc_address, "tiny", texts)
    assert answers.shape == (3, plan.engine.width)


@installed
def test_for_triton_s_own_backend_shapes_hold_the_batch(tmp_path):
    """That backend answers full batches alone; without batching it takes any shape. No server here has it."""
    plan, _ = openvino_plan(tmp_path / "plan", flavour="native")
    config = engine_config(plan, 1)
    assert (config.backend, config.max_batch_size) == ("openvino", 0)
    assert not config.HasField("dynamic_batching")
    assert {tuple(item.dims) for item in config.input} == {(-1, -1)}
    assert list(config.output[0].dims) == [-1, plan.engine.width]
    assert list(config.model_warmup[0].inputs["input_ids"].dims) == [1, 16]
    assert config.parameters["INFERENCE_NUM_THREADS"].string_value == "1"
    stage(plan, 1, tmp_path / "root")
    folder = tmp_path / "root" / internal_name("tiny", 1, "engine") / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", "model.xml"]


def test_publishing_needs_no_proof_in_the_native_flavour(tmp_path):
    """Nobody can prove it here, so it waits unverified, as every native release does."""
    if find_spec("openvino") is None:
        pytest.skip("pip install 'transformer-refinery[openvino]'")
    plan, _ = openvino_plan(tmp_path / "plan", flavour="native")
    assert publish(plan, tmp_path / "cpu", Steps()).release.status == "unverified"
