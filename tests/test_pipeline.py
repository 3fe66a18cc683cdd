"""The whole job on tiny real checkpoints: Dagster, MLflow, ONNX Runtime and a real Triton, from folder to answer."""

import json
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestration.settings import tracker_of
from resources.artifacts.fingerprint import Fingerprint
from resources.artifacts.records import BenchmarkReport, Champion, Checkpoint, Engine, OnnxGraph, ServingConfiguration
from resources.benchmark import ranking as choosing
from resources.engines.specs import SERVED
from resources.errors import ReleaseError, ServerError
from resources.processes.isolation import Limits
from resources.settings.workspace import Workspace
from resources.steps.onnx_graph import OnnxGraphStep
from resources.steps.promote import promote
from resources.steps.step import Recipe
from resources.triton import exam
from resources.triton.layout import current_number, current_release, list_releases
from resources.triton.preflight import require_publishable
from resources.triton.publish import Steps, unverified_root
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from tests.checkpoints import edit_json
from tests.conftest import entry_for
from tests.native import play_native_backend
from tests.pipeline import LOOSE_GATES, add_entry, run_assets, run_job
from tests.releases import query_texts, unasked

BUSY = "system/cpu_utilization_percentage"
QUICK = {"gates": LOOSE_GATES, "shapes": ["1x16"], "engines": ["onnxruntime_fp32"]}
SUPPORTED = ("torch", "onnxruntime_fp32", "onnxruntime_int8")
UNSUPPORTED = ("onnxruntime_fp16", "onnxruntime_bf16", "onnxruntime_tensorrt_fp16", "tensorrt_fp16", "tensorrt_int8")


@pytest.fixture
def ready(workspace, triton_settings):
    """A workspace whose embedded server is there."""
    return replace(workspace, triton=triton_settings)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, made_checkpoint, triton_settings):
    """The artifacts of one run of the quick entry; the next one builds and measures nothing."""
    home = tmp_path_factory.mktemp("shelf")
    limits = Limits(timeout_s=240, memory_bytes=6 * 10**9)
    workspace = Workspace(home / "home", home / "models.yaml", limits=limits, triton=triton_settings)
    add_entry(workspace, entry_for(made_checkpoint(), **QUICK))
    outcome = run_job(workspace, "tiny")
    assert outcome.success, outcome.messages
    return workspace.store.root


@pytest.fixture
def begun(ready, shelf):
    """A workspace with those artifacts, and without Dagster's instance, MLflow's store and releases."""
    shutil.copytree(shelf, ready.store.root, symlinks=True)
    return ready


def ask(workspace, texts, tmp_path, model="tiny"):
    repository = workspace.repository("cpu")
    with EmbeddedServer(repository, workspace.triton, models=[model], log=tmp_path / "ask.log") as server:
        return query_texts(server.grpc_address, model, texts)


def change_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 1.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_embedding_from_folder_to_answer_and_again(own_checkpoint, ready, tmp_path):
    from mlflow import MlflowClient

    folder = own_checkpoint()
    add_entry(ready, entry_for(folder, gates=LOOSE_GATES, shapes=["1x16"]))
    first = run_job(ready, "tiny", whole=True)
    assert first.success, first.messages
    # Every candidate is in the lineage, what cannot run here with its reason.
    for name in SUPPORTED:
        assert first.metadata("engines", "cpu", name)["status"] == "built"
        assert first.metadata("benchmarks", "cpu", name)["status"] == "measured"
    for name in UNSUPPORTED:
        assert "needs an NVIDIA GPU" in first.metadata("engines", "cpu", name)["reason"]
    checks = first.checks()
    assert checks["checkpoint:required_files"]
    assert checks["onnx_graph:onnx_valid"]
    assert checks["onnx_graph:parity_with_pytorch"]
    assert checks["benchmarks/cpu/onnxruntime_fp32:accuracy_gate"]
    assert checks["triton_repository/cpu:served_answers_equal"]
    release = current_release(ready.repository("cpu"), "tiny")
    assert release.number == 1
    assert release.proof.items >= 64
    assert len(release.proof.metrics) == 7

    # The served answer is PyTorch's, asked for by nothing of this project but the client.
    from transformers import AutoModel, AutoTokenizer

    texts = ["How long should I boil the eggs?", "", "naïve 🙂"]
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(folder).eval()(**batch).last_hidden_state.detach().numpy()
    mask = batch["attention_mask"].numpy()[..., None]
    expected = (hidden * mask).sum(1) / mask.sum(1)
    served = ask(ready, texts, tmp_path)
    if ready.store.current(Champion, "champion/cpu/tiny").engine == "onnxruntime_fp32":
        np.testing.assert_allclose(served, expected, atol=1e-4)
    lengths = np.linalg.norm(served, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((served * expected).sum(axis=1) / lengths > 0.9).all()

    # How busy the machine was while graph, reference and engines were made.
    client = MlflowClient(ready.mlflow_uri())
    parent = first.metadata("champion", "cpu")["mlflow_run"].rsplit("/", 1)[1]
    assert len(client.get_metric_history(parent, BUSY)) >= 4

    # Again, with nothing changed: nothing is made, nothing published, nothing written to MLflow.
    store = (ready.home / "mlflow.db").stat().st_mtime_ns
    second = run_job(ready, "tiny")
    assert second.success
    assert all(second.metadata(*name.split("/"))["reused"] for name in second.materialized())
    assert [release.number for release in list_releases(ready.repository("cpu"), "tiny")] == [1]
    assert (ready.home / "mlflow.db").stat().st_mtime_ns == store
    for asset in (("champion", "cpu"), ("triton_repository", "cpu"), ("benchmarks", "cpu", "torch")):
        links = [name for name in first.metadata(*asset) if name.startswith("mlflow_") or name == "report"]
        assert links
        assert [second.metadata(*asset)[name] for name in links] == [first.metadata(*asset)[name] for name in links]

    # New weights in the folder: the next release, and the first still there.
    change_weights(folder)
    third = run_job(ready, "tiny")
    assert third.success, third.messages
    assert current_release(ready.repository("cpu"), "tiny").number == 2
    assert [release.number for release in list_releases(ready.repository("cpu"), "tiny")] == [1, 2]

    # No engine accurate enough: a clear failure, and release 2 serves on.
    add_entry(ready, entry_for(folder, shapes=["1x16"], gates={"cosine_mean": 1.0, "cosine_worst": 1.0}))
    fourth = run_job(ready, "tiny")
    assert not fourth.success
    assert "tiny: no engine for cpu is accurate enough" in fourth.messages[0]
    assert "onnxruntime_int8: not accurate enough: cosine_mean" in fourth.messages[0]
    assert "triton_repository/cpu" not in fourth.materialized()
    assert current_release(ready.repository("cpu"), "tiny").number == 2


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classification_from_folder_to_answer(made_checkpoint, ready, tmp_path, problem):
    folder = made_checkpoint(architecture="distilbert", labels=("bad", "fair", "good"), problem_type=problem)
    fields = {"gates": {"label_agreement": 0.9, "probability_error": 0.4}, "engines": ["onnxruntime_fp32"]}
    add_entry(ready, entry_for(folder, task="classification", shapes=["2x16"], **fields))
    outcome = run_job(ready, "tiny")
    assert outcome.success, outcome.messages
    release = current_release(ready.repository("cpu"), "tiny")
    assert release.labels == ("bad", "fair", "good")
    labels = ready.repository("cpu") / "tiny__r1__pipeline" / "labels.txt"
    assert labels.read_text().split() == ["bad", "fair", "good"]

    from transformers import pipeline

    texts = ["Soft-boiled eggs take six minutes.", "I want my money back."]
    function = "sigmoid" if problem.startswith("multi") else "softmax"
    ask_transformers = pipeline("text-classification", model=str(folder), device="cpu")
    expected = [
        {item["label"]: item["score"] for item in scores}
        for scores in ask_transformers(texts, top_k=None, function_to_apply=function)
    ]
    for answer, scores in zip(ask(ready, texts, tmp_path), expected, strict=True):
        assert dict(zip(release.labels, answer.tolist(), strict=True)) == pytest.approx(scores, abs=1e-4)

    # Triton itself names the labels (its classification extension).
    import tritonclient.grpc as triton

    with EmbeddedServer(ready.repository("cpu"), ready.triton, models=["tiny"], log=tmp_path / "l.log") as server:
        client = triton.InferenceServerClient(server.grpc_address)
        tensor = triton.InferInput("TEXT", [1, 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[texts[0].encode()]], dtype=np.object_))
        wanted = [triton.InferRequestedOutput("probabilities", class_count=1)]
        top = client.infer("tiny", [tensor], outputs=wanted).as_numpy("probabilities").ravel()[0].decode()
        client.close()
    assert top.split(":")[-1] == max(expected[0], key=expected[0].__getitem__)


def test_a_killed_build_costs_that_candidate_alone(made_checkpoint, begun):
    add_entry(begun, entry_for(made_checkpoint(), gates=LOOSE_GATES))
    killed = []

    def kill_the_build():
        """The child that is there while int8 is built."""
        log = begun.home / "logs" / "tiny" / "engine-cpu-onnxruntime_int8.log"
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True) if log.exists() else []:
                if any(str(log) == file.path for file in _open_files(process)):
                    process.kill()
                    killed.append(process.pid)
            time.sleep(0.005)

    def _open_files(process):
        try:
            return process.open_files()
        except psutil.Error:
            return []

    killer = threading.Thread(target=kill_the_build)
    killer.start()
    outcome = run_job(begun, "tiny")
    killer.join()
    assert killed
    assert outcome.success, outcome.messages
    engine = begun.store.current(Engine, "engines/cpu/onnxruntime_int8/tiny")
    assert engine.status == "failed"
    assert "SIGKILL" in engine.reason
    assert begun.store.current(BenchmarkReport, "benchmarks/cpu/onnxruntime_int8/tiny").status == "failed"
    assert current_release(begun.repository("cpu"), "tiny").engine == "onnxruntime_fp32"
    # Nobody kills it this time, and then it takes part.
    assert run_job(begun, "tiny").success
    assert begun.store.current(BenchmarkReport, "benchmarks/cpu/onnxruntime_int8/tiny").status == "measured"


def test_what_serves_is_measured_again_beside_what_is_built_anew(made_checkpoint, begun, monkeypatch):
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    first = run_job(begun, "tiny")
    assert first.success, first.messages
    assert first.metadata("benchmarks", "cpu", SERVED)["reason"] == "no release serves yet"
    before = begun.store.current(Engine, "engines/cpu/onnxruntime_fp32/tiny")

    # Built of the same checkpoint with its weights beside the graph. It differs in nothing but the noise, which is made
    # larger than any.
    begun = replace(begun, external_data_threshold_bytes=1000)
    monkeypatch.setattr(choosing, "EQUAL", 1000.0)
    second = run_job(begun, "tiny")
    assert second.success, second.messages
    after = begun.store.current(Engine, "engines/cpu/onnxruntime_fp32/tiny")
    assert after.content_digest != before.content_digest
    assert second.metadata("benchmarks", "cpu", SERVED)["serves"] == "onnxruntime_fp32 of release 1"
    champion = begun.store.current(Champion, "champion/cpu/tiny")
    assert (champion.engine, champion.engine_digest) == (SERVED, before.digest)
    assert (champion.contest.challenger, champion.contest.outcome) == ("onnxruntime_fp32", "equal")
    assert second.checks()["champion/cpu:as_good_as_what_serves"]
    assert [release.number for release in list_releases(begun.repository("cpu"), "tiny")] == [1]
    third = run_job(begun, "tiny")
    assert all(third.metadata(*name.split("/"))["reused"] for name in third.materialized())

    # Worse than what serves: a warning, and that goes on serving.
    worse = {"tiny": 0.001}
    score = choosing.score
    monkeypatch.setattr(
        choosing, "score", lambda one, *rest: score(one, *rest) * (1 if one.engine == SERVED else worse["tiny"])
    )
    monkeypatch.setattr(choosing, "EQUAL", 1.05)
    fourth = run_job(begun, "tiny")
    assert fourth.success, fourth.messages
    assert not fourth.checks()["champion/cpu:as_good_as_what_serves"]
    assert current_release(begun.repository("cpu"), "tiny").engine_digest == before.digest
    # And better by more than any noise: it is released.
    worse["tiny"] = 1000.0
    fifth = run_job(begun, "tiny")
    assert fifth.success, fifth.messages
    assert current_release(begun.repository("cpu"), "tiny").engine_digest == after.digest
    assert begun.store.current(Champion, "champion/cpu/tiny").contest.outcome == "replaced"
    # After that nothing is new, though what was beaten serves no more.
    sixth = run_job(begun, "tiny")
    reused = {name: sixth.metadata(*name.split("/"))["reused"] for name in sixth.materialized()}
    assert reused == dict.fromkeys(reused, True)
    assert sixth.metadata("champion", "cpu")["digest"] == fifth.metadata("champion", "cpu")["digest"]


def test_a_checkpoint_that_answers_nan_is_refused(own_checkpoint, ready):
    from safetensors.torch import load_file, save_file

    folder = own_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_entry(ready, entry_for(folder))
    outcome = run_job(ready, "tiny")
    assert not outcome.success
    assert len(outcome.messages) == 1
    assert outcome.messages[0].startswith("tiny, revision ")
    assert "NaN or infinity in the answers to 350 of 350 rows" in outcome.messages[0]
    assert outcome.materialized() == {"checkpoint"}
    assert not ready.repository("cpu").exists()


def test_weights_beside_the_graph_are_served_too(made_checkpoint, ready, tmp_path):
    small = replace(ready, external_data_threshold_bytes=1000)
    add_entry(small, entry_for(made_checkpoint(), gates=LOOSE_GATES, shapes=["1x16"]))
    outcome = run_job(small, "tiny")
    assert outcome.success, outcome.messages
    graph = small.store.current(OnnxGraph, "onnx_graph/tiny")
    assert graph.external_data
    assert graph.files["model.onnx.data"].size_bytes > graph.files["model.onnx"].size_bytes / 4
    for name in ("onnxruntime_fp32", "onnxruntime_int8"):
        engine = small.store.current(Engine, f"engines/cpu/{name}/tiny")
        assert engine.status == "built", engine.reason
        assert set(engine.content) == {"model.onnx", "model.onnx.data"}
    assert ask(small, ["hello"], tmp_path).shape == (1, 32)


def test_a_shape_longer_than_the_checkpoint_takes(made_checkpoint, ready):
    add_entry(ready, entry_for(made_checkpoint(), shapes=["1x128"]))
    outcome = run_job(ready, "tiny")
    assert outcome.messages == [
        "tiny: shapes: 1x128 is longer than this checkpoint takes (64 tokens). Shorten it in the models file."
    ]


def test_damage_in_the_store_is_seen_mended_and_said_by_the_next_run(made_checkpoint, begun):
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    assert run_job(begun, "tiny").success
    stored = begun.store.folder(begun.store.current(Checkpoint, "checkpoint/tiny")) / "model.safetensors"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1  # of the same size, so that only the bytes tell
    stored.write_bytes(data)
    outcome = run_job(begun, "tiny")
    assert outcome.success, outcome.messages
    assert outcome.checks()["checkpoint:required_files"]
    assert outcome.metadata("checkpoint")["damaged"] == "model.safetensors"
    reused = {name for name in outcome.materialized() if outcome.metadata(*name.split("/"))["reused"]}
    assert outcome.materialized() - reused == {"checkpoint"}
    assert not begun.store.damaged(begun.store.current(Checkpoint, "checkpoint/tiny"), every_byte=True)


@pytest.mark.parametrize(
    ("wrong", "check", "said"),
    [
        ({"checker": "The checker refuses node 3."}, "onnx_graph:onnx_valid", "refuses node 3"),
        ({"parity_misses": ("At 3x33 it differs.",)}, "onnx_graph:parity_with_pytorch", "At 3x33 it differs"),
        ({"parity": ()}, "onnx_graph:parity_with_pytorch", "Nothing was compared"),
    ],
)
def test_a_wrong_graph_stops_the_run_at_its_check(made_checkpoint, begun, monkeypatch, wrong, check, said):
    right = OnnxGraphStep.recipe

    def make_wrong(step, work):
        made_of = Fingerprint.of("onnx_graph", wrong=str(wrong))
        made = work.follow(step, right(step, work)).record
        return Recipe.of_ready(made_of, made.model_copy(update={**wrong, "digest": made_of.digest, "files": {}}))

    monkeypatch.setattr(OnnxGraphStep, "recipe", make_wrong)
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    outcome = run_job(begun, "tiny")
    assert outcome.checks()[check] is False
    assert len(outcome.messages) == 1
    assert said in outcome.messages[0]
    assert not [name for name in outcome.materialized() if name.startswith("engines")]


def test_a_missed_gate_is_a_failed_check_and_costs_that_engine_alone(made_checkpoint, begun):
    add_entry(begun, entry_for(made_checkpoint(), shapes=["1x16"], gates={"cosine_worst": 0.9999999}))
    outcome = run_job(begun, "tiny", whole=True)
    assert "Not among the engines" in outcome.metadata("engines", "cpu", "onnxruntime_int8_static")["reason"]
    checks = outcome.checks()
    assert checks["benchmarks/cpu/onnxruntime_int8:accuracy_gate"] is False
    assert checks["benchmarks/cpu/onnxruntime_fp32:accuracy_gate"]
    # One that this target cannot have missed nothing.
    assert checks["benchmarks/cpu/tensorrt_fp16:accuracy_gate"]
    assert outcome.success, outcome.messages


def test_an_unproven_release_is_a_failed_check_and_said_beside_what_serves(made_checkpoint, begun):
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    first = run_job(begun, "tiny")
    assert first.checks()["triton_repository/cpu:served_answers_equal"]
    native = replace(begun, triton=replace(begun.triton, flavour="native"))
    outcome = run_job(native, "tiny")
    assert outcome.success, outcome.messages
    assert outcome.checks()["triton_repository/cpu:served_answers_equal"] is False
    assert "REFINERY_TRITON_GRPC" in outcome.metadata("triton_repository", "cpu")["advice"]
    assert current_release(begun.repository("cpu"), "tiny").number == 1


def check_what_is_shown(outcome, workspace):
    """Tables have what the records have, and what Dagster plots are numbers under constant names."""
    report = workspace.store.current(BenchmarkReport, "benchmarks/cpu/onnxruntime_fp32/tiny")
    shown = outcome.metadata("benchmarks", "cpu", "onnxruntime_fp32")
    (row,) = shown["latency"].records
    assert (row.data["shape"], row.data["pairs"]) == ("1x16", report.timings[0].pairs)
    types = {column.name: column.type for column in shown["latency"].schema.columns}
    assert (types["p50_ms"], types["pairs"], types["shape"]) == ("float", "int", "string")
    plotted = ("p50_ms_1x16", "rows_per_s_1x16", "speedup_1x16", "accuracy_cosine_worst", "engine_size_bytes")
    assert all(shown[name] > 0 for name in plotted)
    engine = outcome.metadata("engines", "cpu", "onnxruntime_fp32")
    assert sum(row.data["nodes"] for row in engine["operators"].records) == engine["nodes"] > 0
    release = outcome.metadata("triton_repository", "cpu")
    files = {row.data["file"]: row.data["size_bytes"] for row in release["contents"].records}
    assert release["release_number"] == 1 and sum(files.values()) == release["size_bytes"]
    assert {row.data["metric"] for row in release["answers"].records} == set(report.accuracy.metrics)


def test_how_it_is_served_is_found_under_load_and_released(made_checkpoint, begun, tmp_path):
    """The settings that were tried are runs beside the candidates, and the one that was taken is in the release."""
    from mlflow import MlflowClient

    serving = {"search_seconds": 6.0, "benchmark_seconds": 2.0, "clients": 4, "p99_ms": 0.001}
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "serving": serving}))
    outcome = run_job(begun, "tiny")
    assert outcome.success, outcome.messages
    found = begun.store.current(ServingConfiguration, "serving_configuration/cpu/tiny")
    tried = {trial.setting.queue_delay_us for trial in found.trials}
    assert {0, 500} <= tried <= {0, 500, 2000}
    assert f"({len(tried)} of 3 settings tried)" in found.reason
    assert not any(trial.reason for trial in found.trials)
    said = outcome.metadata("serving_configuration", "cpu")
    assert said["setting"] == str(found.setting)
    assert "no setting keeps 0.001 ms" in said["reason"]
    assert "taken" in [row.data["verdict"] for row in said["trials"].records]
    assert said["queue_delay_us"] == found.setting.queue_delay_us
    release = current_release(begun.repository("cpu"), "tiny")
    assert release.serving == found.setting
    load = outcome.metadata("serving_benchmark", "cpu")
    assert load["status"] == "measured"
    assert load["throughput_per_s"] > 0
    assert [row.data["clients"] for row in load["load"].records] == [1, 2, 4]
    check_what_is_shown(outcome, begun)
    client = MlflowClient(begun.mlflow_uri())
    (experiment,) = [item for item in client.search_experiments() if item.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("refinery.parent") == "true"]
    kinds = {}
    for run in runs:
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id:
            kinds.setdefault(run.data.tags.get("refinery.kind", "candidate"), []).append(run)
    assert {kind: len(of_kind) for kind, of_kind in kinds.items()} == {
        "candidate": len(QUICK["engines"]) + 1,
        "serving_trial": len(tried),
        "serving_benchmark": 1,
    }
    taken = [run for run in kinds["serving_trial"] if run.data.tags["refinery.taken"] == "true"]
    assert [run.data.params["queue_delay_us"] for run in taken] == [str(found.setting.queue_delay_us)]
    notes = [run.data.tags["mlflow.note.content"] for run in kinds["serving_trial"]]
    assert sum(found.reason in one for one in notes) == 1, "what is said of the winner is said of it alone"
    assert kinds["serving_benchmark"][0].data.metrics["tritonclient_4_clients_throughput_per_s"] > 0
    # The parent's report knows of all that, and Dagster leads to it.
    told = json.loads(Path(client.download_artifacts(parent.info.run_id, "report.json", str(tmp_path))).read_text())
    assert told["serving"]["setting"] == found.setting.model_dump()
    assert told["load"]["levels"]
    assert told["release"] == release.number
    assert told["dagster_run"] == outcome.result.run_id
    drawn = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "latency.png", "pareto.png", "load.png"} <= drawn
    chosen = outcome.metadata("champion", "cpu")
    assert chosen["report"] == f"{chosen['mlflow_run']}/artifacts/report.html"
    assert chosen["pareto"].startswith("![speed against accuracy](data:image/png;base64,")
    published = outcome.metadata("triton_repository", "cpu")
    assert published["report"] == chosen["report"]
    assert published["mlflow_version"].endswith("/#/models/tiny/versions/1")
    assert said["mlflow_run"] == chosen["mlflow_run"]
    assert load["mlflow_run"] != chosen["mlflow_run"]  # its own
    # How busy the machine was while an engine was built is in its run, whenever that was; this run built nothing.
    assert {run.data.tags["refinery.engine_name"] for run in kinds["candidate"] if BUSY in run.data.metrics} == set(
        QUICK["engines"]
    )
    assert BUSY not in parent.data.metrics
    again = run_job(begun, "tiny")
    assert again.metadata("serving_configuration", "cpu")["reused"]
    assert again.metadata("serving_benchmark", "cpu")["reused"]
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)
    # Another limit is searched for anew, from the same champion; what is released is the same if the setting is.
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "serving": {**serving, "p99_ms": 60_000.0}}))
    other = run_job(begun, "tiny")
    assert other.success, other.messages
    assert not other.metadata("serving_configuration", "cpu")["reused"]
    assert "no setting keeps" not in other.metadata("serving_configuration", "cpu")["reason"]


def test_a_release_that_waits_is_promoted_where_a_server_proves_it(made_checkpoint, begun, tmp_path, monkeypatch):
    """And one that was rolled back."""
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    assert run_job(begun, "tiny").success
    tracker, repository = tracker_of(begun), begun.repository("cpu")

    def promoted(workspace):
        return promote(workspace, tracker, "tiny", "cpu", dagster_run="none", log=tmp_path / "log")

    with pytest.raises(ReleaseError, match="release 1 is the newest, and what is pointed to already"):
        promoted(begun)
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "max_batch_size": 4}))
    assert run_job(begun, "tiny").success
    roll_back(repository, "tiny", begun.triton, log=tmp_path / "log")
    assert promoted(begun).release.number == current_number(repository, "tiny") == 2
    native = replace(begun, triton=replace(begun.triton, flavour="native"))
    assert run_job(native, "tiny").success
    with pytest.raises(ReleaseError, match="Nobody has seen it answer"):
        promoted(native)
    # The waiting one is of Triton's own backends, which the embedded server has not.
    with (
        EmbeddedServer(repository, begun.triton, models=["tiny"], log=tmp_path / "log") as server,
        pytest.raises(ServerError, match="lacks that backend"),
    ):
        promoted(
            replace(native, triton=replace(native.triton, servers=(server.grpc_address,), connection=server.connection))
        )
    assert current_number(repository, "tiny") == 2
    # Where a server has it, what waits is published: this one's proof nobody gave.
    monkeypatch.setattr(exam, "fleet_steps", lambda *arguments, **options: Steps(prove=unasked))
    done = promoted(replace(native, triton=replace(native.triton, servers=("127.0.0.1:9",))))
    assert (done.before, done.release.flavour, done.release.status) == (2, "native", "published")
    assert current_number(repository, "tiny") == done.release.number
    assert not list_releases(unverified_root(repository, "tiny"), "tiny")
    assert tracker.champion_release("tiny", "cpu") == done.release.number
    with pytest.raises(ReleaseError, match="no release of it is in"):
        promote(begun, tracker, "other", "cpu", dagster_run="none", log=tmp_path / "log")


def test_only_what_the_champion_was_chosen_from_is_released(own_checkpoint, begun):
    """Assets may be materialized one by one, and then what was chosen may be gone."""
    folder = own_checkpoint()
    add_entry(begun, entry_for(folder, **QUICK))
    assert run_job(begun, "tiny").success
    change_weights(folder)
    sources = ["checkpoint", "evaluation_set", "reference", "onnx_graph"]
    keys = [*sources, "engines/cpu/torch", "engines/cpu/onnxruntime_fp32"]
    assert run_assets(begun, "tiny", keys).success
    outcome = run_assets(begun, "tiny", ["triton_repository/cpu"])
    assert not outcome.success
    assert "Materialize champion/cpu" in outcome.messages[0]
    assert [release.number for release in list_releases(begun.repository("cpu"), "tiny")] == [1]
    # Nor does the champion choose among reports on other weights.
    outcome = run_assets(begun, "tiny", ["champion/cpu"])
    assert not outcome.success
    assert "no engine" in outcome.messages[0]


def test_reports_at_other_shapes_do_not_compete(made_checkpoint, begun):
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    assert run_job(begun, "tiny").success
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "shapes": ["1x16", "1x32"]}))
    assert run_assets(begun, "tiny", ["evaluation_set", "benchmarks/cpu/onnxruntime_fp32"]).success
    outcome = run_assets(begun, "tiny", ["champion/cpu"])
    assert outcome.success, outcome.messages
    assert "| torch |" not in outcome.metadata("champion", "cpu")["candidates"]


def test_libraries_errors_are_told_as_ours(made_checkpoint, begun, monkeypatch):
    """Not as the defect that the last cause in the chain looks like."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    add_entry(begun, entry_for(made_checkpoint(), **QUICK))
    outcome = run_job(replace(begun, tracking_uri="http://127.0.0.1:9"), "tiny")
    assert not outcome.success
    assert outcome.messages[0].startswith("MLflow at http://127.0.0.1:9 cannot be written")
    assert "defect" not in outcome.messages[0]


def test_a_failed_run_closes_its_mlflow_parent(made_checkpoint, begun):
    from mlflow import MlflowClient

    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "gates": {"cosine_mean": 1.0}}))
    assert not run_job(begun, "tiny").success
    client = MlflowClient(begun.mlflow_uri())
    (experiment,) = [item for item in client.search_experiments() if item.name == "tiny"]
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`refinery.parent` = 'true'")
    assert parent.info.status == "FAILED"
    assert "no engine" in parent.data.tags["mlflow.note.content"]


def test_a_folder_that_became_something_else(made_checkpoint, ready):
    folder = shutil.copytree(made_checkpoint(), ready.home.parent / "m")
    add_entry(ready, entry_for(folder))
    edit_json(folder / "config.json", architectures=["BertForCausalLM"])
    outcome = run_job(ready, "tiny")
    assert not outcome.success
    assert "needs an encoder" in outcome.messages[0]


def test_no_embedded_triton(made_checkpoint, begun, tmp_path):
    without = replace(begun, triton=replace(begun.triton, environment=tmp_path / "nothing"))
    add_entry(without, entry_for(made_checkpoint(), gates=LOOSE_GATES, shapes=["1x16"], engines=["onnxruntime_fp32"]))
    outcome = run_job(without, "tiny")
    assert not outcome.success
    assert "embedded Triton is not installed" in outcome.messages[0]
    assert "refinery setup" in outcome.messages[0]
    assert outcome.materialized() == set()
    assert not without.repository("cpu").exists()


def test_what_would_keep_a_release_from_being_published_is_said_before_anything_is_built(
    made_checkpoint, begun, unused_port, tmp_path
):
    add_entry(begun, entry_for(made_checkpoint()))
    dead = replace(begun, triton=replace(begun.triton, servers=(f"127.0.0.1:{unused_port}",)))
    (tmp_path / "file").touch()
    closed = replace(begun, triton=replace(begun.triton, repositories=tmp_path / "file" / "models"))
    for workspace, whole, said in (
        (dead, True, rf"No Triton answers gRPC at 127\.0\.0\.1:{unused_port} \(REFINERY_TRITON_GRPC\)"),
        (closed, False, rf"the release could not be written to {tmp_path}/file/models/cpu: Not a directory"),
    ):
        outcome = run_job(workspace, "tiny", whole=whole)
        assert re.search(said, outcome.messages[0])
        assert len(outcome.messages) == 1
        assert outcome.materialized() == set()
    # What makes no release asks for none of that; nor does a server that is started anew for each release.
    assert run_assets(dead, "tiny", ["checkpoint"]).success
    require_publishable(replace(dead, triton=replace(dead.triton, control="none")), "tiny", "cpu")


def test_a_native_release_is_searched_for_proven_and_measured_on_the_configured_server(
    made_checkpoint, begun, tmp_path, monkeypatch
):
    play_native_backend(monkeypatch)
    serving = {"search_seconds": 6.0, "benchmark_seconds": 2.0, "clients": 4}
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "serving": serving}))
    repository = begun.repository("cpu")
    repository.mkdir(parents=True)
    with EmbeddedServer(repository, begun.triton, models=[], log=tmp_path / "log") as server:
        settings = replace(begun.triton, flavour="native", servers=(server.grpc_address,), connection=server.connection)
        outcome = run_job(replace(begun, triton=settings), "tiny")
    assert outcome.success, outcome.messages
    assert "settings tried" in outcome.metadata("serving_configuration", "cpu")["reason"]
    release = current_release(repository, "tiny")
    assert (release.flavour, release.number, release.status) == ("native", 1, "published")
    load = outcome.metadata("serving_benchmark", "cpu")
    assert (load["status"], load["release_number"]) == ("measured", 1)
    assert load["throughput_per_s"] > 0
    # The next run has no such server: what it would measure on is named.
    add_entry(begun, entry_for(made_checkpoint(), **{**QUICK, "serving": serving, "max_batch_size": 4}))
    alone = run_job(replace(begun, triton=replace(settings, servers=())), "tiny")
    assert "no server with Triton's own backends is configured" in alone.metadata("serving_benchmark", "cpu")["reason"]
    assert "is configured to measure on" in alone.metadata("serving_configuration", "cpu")["reason"]
