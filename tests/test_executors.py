"""The same definitions under every executor, by configuration alone; steps land where their target is."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml

from orchestration.definitions import make_definitions
from orchestration.runs.executors import Execution, make_executor
from orchestration.runs.instance import POSTGRES_VARIABLE, prepare_instance
from orchestration.settings import read_execution
from resources.artifacts.records import Checkpoint, Engine, EvaluationSet, OnnxGraph
from resources.errors import CatalogError, IsolationError
from resources.processes.isolation import Limits, run_isolated
from resources.settings.workspace import Workspace
from tests.conftest import entry_for
from tests.kubernetes import cluster
from tests.pipeline import add_entry, materialize, settings_of
from tests.test_deployment import loose_pod
from tests.test_tracking import CHECKPOINT

DEPLOYMENT = Path(__file__).resolve().parents[1] / "orchestration" / "deployment"
GPU = "cuda_sm90"
#: How Dagster calls them, with the check of the first, and where each belongs.
PLACES = {"checkpoint": "cpu", "checkpoint_required_files": "cpu", f"engines__{GPU}__onnxruntime_fp16": GPU}
#: One step for each target. The first works in a child process; the second says that there is no GPU, wherever it runs.
STEPS = ["checkpoint", f"engines/{GPU}/onnxruntime_fp16"]
WORKER_SECONDS = 60
MADE_UP = CHECKPOINT.model_copy(update={"model": "tiny"})


@pytest.fixture(scope="module")
def graph(tmp_path_factory, made_checkpoint):
    """A workspace for two targets, in which what comes between the two steps is made up."""
    folder = tmp_path_factory.mktemp("executors")
    workspace = Workspace(folder / "home", folder / "models.yaml", targets=("cpu", GPU))
    add_entry(workspace, entry_for(made_checkpoint()))
    graph = OnnxGraph(
        digest="g",
        model="tiny",
        weights_digest="w",
        opset=20,
        nodes=1,
        parameters=1,
        inputs=("input_ids", "attention_mask"),
        output="sentence_embedding",
        width=1,
        external_data=False,
        parity=(),
    )
    evaluation = EvaluationSet(digest="e", model="tiny", items=1, rows=1, width=1, longest_tokens=1)
    for record in (MADE_UP, graph, evaluation):
        pretend(workspace, record)
    return workspace


def pretend(workspace, record):
    """Have it in the store as what a step made last."""
    made = workspace.store.get_or_make(type(record), record.digest, lambda folder: record)
    workspace.store.point(f"{record.kind}/tiny", made.record)


@pytest.fixture
def ready(graph, tmp_path, monkeypatch):
    """The same with an instance of its own, and DAGSTER_HOME naming it."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "dagster"))
    prepare_instance(graph)
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", ["tiny"])
    return graph


def configuration(folder, **config):
    path = folder / "executor.yaml"
    path.write_text(yaml.safe_dump({"execution": {"config": config}}))
    return str(path)


def run_of(instance):
    (run,) = instance.get_runs()
    assert run.status is dg.DagsterRunStatus.SUCCESS
    return run


def assert_made(workspace):
    checkpoint = workspace.store.current(Checkpoint, "checkpoint/tiny")
    assert checkpoint.architecture == "BertModel"
    assert workspace.store.damaged(checkpoint) == []
    engine = workspace.store.current(Engine, f"{STEPS[1]}/tiny")
    assert engine.status == "unsupported"
    assert "needs an NVIDIA GPU of compute capability 9.0" in engine.reason


# --- by configuration -------------------------------------------------------------------------------------------------


def test_every_step_names_where_its_target_is(graph):
    job = make_definitions(graph).resolve_job_def("optimize")
    seen = set()
    for node in job.nodes:
        target = next((target for target in graph.targets if f"__{target}" in node.name), "cpu")
        assert node.definition.tags["dagster-celery/queue"] == target, node.name
        assert ("dagster-k8s/config" in node.definition.tags) == (target == GPU), node.name
        seen.add(node.name.split("__")[0])
    assert {"checkpoint", "onnx_graph_onnx_valid", "engines", "benchmarks", "champion", "triton_repository"} <= seen
    assert not [node.name for node in job.nodes if "dagster-celery/queue" not in node.definition.tags]


@pytest.mark.parametrize(
    ("kind", "executor"),
    [(None, "in_process"), ("multiprocess", "multiprocess"), ("celery", "celery"), ("k8s", "k8s")],
)
def test_a_variable_chooses(graph, kind, executor):
    execution = read_execution({"REFINERY_EXECUTOR": kind} if kind else {})
    definitions = make_definitions(graph, execution)
    for job in ("optimize", "__ASSET_JOB"):
        assert definitions.resolve_job_def(job).executor_def.name == executor


def test_mistakes_are_named(tmp_path, monkeypatch):
    with pytest.raises(CatalogError, match="REFINERY_EXECUTOR: 'dask' is not one of in_process, multiprocess, celery"):
        read_execution({"REFINERY_EXECUTOR": "dask"})
    path = tmp_path / "executor.yaml"
    given = {"REFINERY_EXECUTOR": "celery", "REFINERY_EXECUTOR_CONFIG": str(path)}
    with pytest.raises(CatalogError, match=r"executor.yaml cannot be read"):
        read_execution(given)
    for text in ("a: [", "- 1", "execution: {}", "execution: {config: [1]}"):
        path.write_text(text)
        with pytest.raises(
            CatalogError, match=r"REFINERY_EXECUTOR_CONFIG: .*executor.yaml (cannot be read|has no mapp)"
        ):
            read_execution(given)
    configuration(tmp_path, brokr="redis://127.0.0.1")
    with pytest.raises(
        CatalogError, match='celery executor does not accept these settings. Received unexpected config entry "brokr"'
    ):
        make_executor(read_execution(given))
    monkeypatch.setitem(sys.modules, "dagster_celery", None)
    with pytest.raises(
        CatalogError, match=r"REFINERY_EXECUTOR is celery: .*pip install 'transformer-refinery\[celery\]'"
    ):
        make_executor(Execution("celery"))


# --- on one machine ---------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_processes_of_one_machine(ready):
    materialize(ready, "tiny", STEPS, REFINERY_EXECUTOR="multiprocess")
    assert_made(ready)
    with dg.DagsterInstance.get() as instance:
        events = instance.all_logs(run_of(instance).run_id, of_type=dg.DagsterEventType.STEP_WORKER_STARTED)
    said = [event.get_dagster_event() for event in events]
    pids = {event.step_key: event.event_specific_data.metadata["pid"].value for event in said}
    assert set(pids) == PLACES.keys()
    assert len(set(pids.values())) == len(pids)


# --- Celery -----------------------------------------------------------------------------------------------------------


@contextmanager
def worker(workspace, queue, config, log):
    """A worker in a process group of its own."""
    command = [sys.executable, "-m", "dagster_celery.cli", "worker", "start", "-A", "dagster_celery.app"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "-y", config, "-q", queue, "-n", queue],
            env=settings_of(workspace),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def await_worker(log, saying=" ready."):
    deadline = time.monotonic() + WORKER_SECONDS
    while saying not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_celery_with_a_worker_for_each_target(ready, tmp_path, redis, postgres, monkeypatch):
    monkeypatch.setenv(POSTGRES_VARIABLE, postgres)
    prepare_instance(ready)
    # The other step reads the one that was made up, while this is copied anew.
    ready.store.remove(ready.store.current(Checkpoint, "checkpoint/tiny"))
    pretend(ready, MADE_UP)
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", ["tiny"])
    config = configuration(tmp_path, broker=f"{redis}/0", backend=f"{redis}/1", config_source={"worker_pool": "solo"})
    logs = {queue: tmp_path / f"{queue}.log" for queue in ready.targets}
    with ExitStack() as started:
        for queue, log in logs.items():
            started.enter_context(worker(ready, queue, config, log))
        for log in logs.values():
            await_worker(log)
        materialize(ready, "tiny", STEPS, REFINERY_EXECUTOR="celery", REFINERY_EXECUTOR_CONFIG=config)
    assert_made(ready)
    with dg.DagsterInstance.get() as instance:
        events = instance.all_logs(run_of(instance).run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    said = [event.get_dagster_event() for event in events]
    workers = {
        event.step_key: event.engine_event_data.metadata["Celery worker"].value.split("@")[0]
        for event in said
        if event.step_key and "Celery worker" in event.engine_event_data.metadata
    }
    assert workers == PLACES


@pytest.mark.whole
def test_a_step_whose_worker_was_killed_is_given_to_another(ready, tmp_path, redis):
    """With the settings of the example deployment, but the time in which a step has to be done."""
    given = yaml.safe_load((DEPLOYMENT / "celery.yaml").read_text())["execution"]["config"]["config_source"]
    given["broker_transport_options"]["visibility_timeout"] = 10
    config = configuration(tmp_path, broker=f"{redis}/0", backend=f"{redis}/1", config_source=given)
    ready.store.remove(ready.store.current(Checkpoint, "checkpoint/tiny"))
    pretend(ready, MADE_UP)
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    with ThreadPoolExecutor(1) as pool:
        with worker(ready, "cpu", config, first):
            await_worker(first)
            variables = {"REFINERY_EXECUTOR": "celery", "REFINERY_EXECUTOR_CONFIG": config}
            done = pool.submit(materialize, ready, "tiny", STEPS[:1], **variables)
            await_worker(first, " received")
        # It is killed here, with the task.
        with worker(ready, "cpu", config, second):
            done.result()
    assert ready.store.current(Checkpoint, "checkpoint/tiny").architecture == "BertModel"
    assert " succeeded in " not in first.read_text()


def test_a_worker_whose_processes_may_have_no_children_says_so(monkeypatch):
    """What Celery's usual pool is to the step: a process of a pool."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(IsolationError, match=r"a step: this process belongs to a pool .* `worker_pool: solo`"):
        run_isolated(abs, -1, limits=Limits(), what="a step")


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("works", [False, pytest.param(True, marks=pytest.mark.whole)])
def test_kubernetes_asks_for_a_gpu_where_the_target_has_one(ready, tmp_path, works):
    """works: the pods do what they are for. Else there is no room for the second, which ends the run at once."""
    with cluster(tmp_path, settings_of(ready)) as found:
        if not works:
            found.room = 1
        access = {"load_incluster_config": False, "kubeconfig_file": str(found.kubeconfig)}
        launcher = {
            **access,
            "service_account_name": "dagster",
            "instance_config_map": "dagster-instance",
            "dagster_home": os.environ["DAGSTER_HOME"],
            "job_namespace": "refinery",
        }
        (Path(os.environ["DAGSTER_HOME"]) / "dagster.yaml").write_text(
            yaml.safe_dump(
                {
                    "telemetry": {"enabled": False},
                    "run_launcher": {"module": "dagster_k8s", "class": "K8sRunLauncher", "config": launcher},
                }
            )
        )
        # The settings of the example deployment, and what is this cluster's.
        given = yaml.safe_load((DEPLOYMENT / "kubernetes.yaml").read_text())["execution"]["config"]
        given["step_k8s_config"]["pod_spec_config"]["node_selector"] = {"pool": "refinery"}
        config = configuration(tmp_path, **access, **given, job_image="registry.example/refinery:1")
        variables = {"REFINERY_EXECUTOR": "k8s", "REFINERY_EXECUTOR_CONFIG": config}
        materialize(ready, "tiny", STEPS, fails=not works, **variables)
    with dg.DagsterInstance.get() as instance:
        (run,) = instance.get_runs()
    if works:
        assert run.status is dg.DagsterRunStatus.SUCCESS
        assert_made(ready)
        assert found.jobs.keys() == PLACES.keys()
    else:
        assert run.status is dg.DagsterRunStatus.FAILURE
        assert found.jobs.keys() == PLACES.keys() - {"checkpoint_required_files"}
    for step, job in found.jobs.items():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/refinery:1"
        assert pod["serviceAccountName"] == "refinery-steps"
        assert list(loose_pod(pod["securityContext"], container["securityContext"])) == []
        (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["topologyKey"] == "kubernetes.io/hostname"
        labels = job["spec"]["template"]["metadata"]["labels"]
        assert apart["labelSelector"]["matchLabels"].items() <= labels.items(), "a step stays away from its like"
        if PLACES[step] == GPU:
            capability = {"nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0"}
            assert pod["nodeSelector"] == {"pool": "refinery", **capability}
            assert container["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
        else:
            assert pod["nodeSelector"] == {"pool": "refinery"}
            assert not container.get("resources")
