"""Runs whose process is killed: noticed, failed, their slots given back, started again. Those that live go on."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.events import EngineEventData
from dagster._core.launcher import WorkerStatus
from dagster._grpc.types import CanCancelExecutionResult
from dagster._serdes import serialize_value

from orchestration.definitions import make_definitions
from orchestration.runs import run_launcher as launcher_module
from orchestration.runs.instance import POSTGRES_VARIABLE, prepare_instance
from orchestration.runs.jobs import close_tracking_of_killed_runs
from orchestration.runs.run_launcher import HOST_TAG, WatchedRunLauncher, is_alive
from resources.triton.layout import current_release, list_releases
from resources.triton.lint import lint
from tests.conftest import entry_for
from tests.pipeline import add_entry, settings_of
from tests.waiting_definitions import FOLDER, POOL

ROOT = Path(__file__).resolve().parents[1]
#: What the issue asks for, from the kill to the next try.
NOTICED_SECONDS = 60
#: Where other tests take the cores, and nobody asks how long it takes.
START_SECONDS = 150
FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)


@pytest.fixture
def home(workspace, tmp_path, monkeypatch):
    """An instance as the product makes it, in whose pool one step has room."""
    monkeypatch.delenv(POSTGRES_VARIABLE, raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(workspace.home / "dagster"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "waiting"))
    (tmp_path / "waiting").mkdir()
    folder = prepare_instance(workspace)
    with dg.DagsterInstance.get() as instance:
        instance.event_log_storage.set_concurrency_slots(POOL, 1)
    return folder


@pytest.fixture
def impatient(home):
    """The same, but it looks at its runs every second."""
    configuration = home / "dagster.yaml"
    text = configuration.read_text()
    for name, usual in (("poll_interval", 10), ("free_slots_after_run_end", 5)):
        assert f"{name}_seconds: {usual}\n" in text
        text = text.replace(f"{name}_seconds: {usual}\n", f"{name}_seconds: 1\n")
    configuration.write_text(text)
    return home


@contextmanager
def daemon(log, module="tests.waiting_definitions", **variables):
    """Dagster's daemon with the code location of that module."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster._daemon", "run", "-m", module],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=stream,
            stderr=stream,
        )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process):
    """The process and all that it started, at once, as when a machine loses its power."""
    if process.poll() is not None:
        return
    parent = psutil.Process(process.pid)
    processes = [parent, *parent.children(recursive=True)]
    for one in processes:
        one.kill()
    process.wait(10)
    psutil.wait_procs(processes, 10)


def awaited(what, seconds, log):
    """The first answer that is not None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = what()
        if answer is not None:
            return answer
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-5000:])


def launch(module="tests.waiting_definitions", job="wait", tags="{}", **variables):
    """As a person does, or a schedule: whoever asks is not who runs it."""
    command = [sys.executable, "-m", "dagster", "job", "launch", "-m", module, "-j", job, "--tags", tags]
    environment = {**os.environ, **variables}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)


def begun(instance, waiting, but=()):
    """Another run than those, whose step has begun; None where there is none."""
    runs = {run.run_id: run for run in instance.get_runs()}
    return next((runs[path.name] for path in waiting.iterdir() if path.name in runs.keys() - {*but}), None)


def let_finish(instance, waiting, run, log):
    (waiting / "go").touch()
    done = awaited(
        lambda: found if (found := instance.get_run_by_id(run.run_id)).status in FINISHED else None, START_SECONDS, log
    )
    assert done.status is dg.DagsterRunStatus.SUCCESS


def statuses(instance):
    return {run.run_id: run.status for run in instance.get_runs()}


def kill(what, process, instance, run):
    if what == "everything":
        kill_all(process)
    else:
        (pid,) = {pid for pid, _ in instance.run_launcher.processes(run.run_id)}
        os.kill(pid, signal.SIGKILL)


def killed_and_started_again(what, tmp_path, seconds):
    """What a run came to whose process, or whose whole machine, was killed in the middle of its step.

    seconds: within which it has to have begun anew.
    """
    log, waiting = tmp_path / "daemon.log", tmp_path / "waiting"
    with dg.DagsterInstance.get() as instance, ExitStack() as daemons:
        launch()
        process = daemons.enter_context(daemon(log))
        first = awaited(lambda: begun(instance, waiting), START_SECONDS, log)
        kill(what, process, instance, first)
        since = time.monotonic()
        if what == "everything":
            assert instance.get_run_by_id(first.run_id).status is dg.DagsterRunStatus.STARTED
            daemons.enter_context(daemon(log))
        second = awaited(lambda: begun(instance, waiting, {first.run_id}), seconds, log)
        print(f"started again {time.monotonic() - since:.1f} s after {what} was killed")
        let_finish(instance, waiting, second, log)
        assert statuses(instance) == {
            first.run_id: dg.DagsterRunStatus.FAILURE,
            second.run_id: dg.DagsterRunStatus.SUCCESS,
        }
        assert instance.event_log_storage.get_concurrency_info(POOL).active_slot_count == 0


def test_a_run_that_was_killed_with_everything_around_it_is_started_again(impatient, tmp_path):
    killed_and_started_again("everything", tmp_path, START_SECONDS)


@pytest.mark.whole
@pytest.mark.parametrize("what", ["everything", "the run's process"])
def test_a_killed_run_is_started_again_within_a_minute(home, tmp_path, what):
    killed_and_started_again(what, tmp_path, NOTICED_SECONDS)


@pytest.mark.whole
def test_a_run_that_outlives_the_daemon_goes_on(impatient, tmp_path):
    log, waiting = tmp_path / "daemon.log", tmp_path / "waiting"
    with dg.DagsterInstance.get() as instance, ExitStack() as daemons:
        launch()
        process = daemons.enter_context(daemon(log))
        run = awaited(lambda: begun(instance, waiting), START_SECONDS, log)
        left = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        try:
            daemons.enter_context(daemon(log))
            # Its code server ends itself once it has heard from nobody for half a minute, but not before its runs do.
            time.sleep(45)
            assert statuses(instance) == {run.run_id: dg.DagsterRunStatus.STARTED}
            let_finish(instance, waiting, run, log)
            assert len(statuses(instance)) == 1
        finally:
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()


def test_a_run_of_the_command_line_is_judged_by_its_process(home):
    """`refinery optimize` has no code server; its run names the machine, and its process is in the run's log."""
    sleeper = subprocess.Popen(["/bin/sleep", "60"])
    try:
        with dg.DagsterInstance.get() as instance:
            launcher = instance.run_launcher
            assert isinstance(launcher, WatchedRunLauncher)

            def run_on(host, pid):
                run = instance.create_run_for_job(dg.GraphDefinition(name="nothing").to_job(), tags={HOST_TAG: host})
                instance.report_engine_event("Executing steps in process", run, EngineEventData.in_process(pid))
                return run

            here = socket.gethostname()
            mine, elsewhere = run_on(here, sleeper.pid), run_on("another-machine", 2**22 + 1)
            assert launcher.check_run_worker_health(mine).status is WorkerStatus.RUNNING
            assert launcher.check_run_worker_health(elsewhere).status is WorkerStatus.RUNNING
            sleeper.kill()
            os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken note of it
            assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
            assert launcher.check_run_worker_health(mine).status is WorkerStatus.NOT_FOUND
            sleeper.wait()
            found = launcher.check_run_worker_health(mine)
            assert found.status is WorkerStatus.NOT_FOUND
            assert f"process {sleeper.pid} is gone" in found.msg
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.whole
def test_a_model_is_released_once_however_often_its_run_is_killed(
    home, workspace, tmp_path, made_checkpoint, triton_settings
):
    """The real job: killed with everything around it in the middle of two steps, of which the second publishes."""
    module, log = "orchestration.definitions", tmp_path / "daemon.log"
    variables = {**settings_of(workspace), "REFINERY_TRITON_ENVIRONMENT": str(triton_settings.environment)}
    add_entry(workspace, entry_for(made_checkpoint(), engines=["onnxruntime_fp32"], shapes=["1x16"]))

    def runs():
        return instance.get_runs(dg.RunsFilter(job_name="optimize"))

    def started(step):
        for run in runs():
            steps = {event.step_key for event in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_START)}
            if step in steps and not run.is_finished:
                return run
        return None

    def finished():
        run = runs()[0]
        return run if run.status in FINISHED and "dagster/auto_retry_run_id" not in run.tags else None

    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions("model", ["tiny"])
        launch(module, "optimize", '{"dagster/partition": "tiny"}', **variables)
        for step in ("onnx_graph", "triton_repository__cpu"):
            with daemon(log, module, **variables):
                awaited(lambda step=step: started(step), 300, log)
                time.sleep(1)  # well into it
        with daemon(log, module, **variables):
            last = awaited(lambda: finished() if len(runs()) == 3 else None, 300, log)
            assert last.status is dg.DagsterRunStatus.SUCCESS
            time.sleep(35)  # the sensor that closes MLflow's runs looks every half minute
        assert sorted(run.status.value for run in runs()) == ["FAILURE", "FAILURE", "SUCCESS"]
    repository = workspace.repository("cpu")
    assert [release.number for release in list_releases(repository, "tiny")] == [1]
    assert current_release(repository, "tiny").proof.passed
    assert lint(repository) == []
    from mlflow import MlflowClient

    client = MlflowClient(workspace.mlflow_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    left = [run.info.run_name for run in client.search_runs([experiment.experiment_id]) if run.info.status == "RUNNING"]
    assert left == []


class CodeServer:
    """On another machine; `answers`: whether it has a process for the run, None: it does not answer."""

    socket, host, answers = None, "code", True

    def can_cancel_execution(self, request, timeout):
        if self.answers is None:
            raise DagsterUserCodeUnreachableError("Could not reach user code server")
        return serialize_value(CanCancelExecutionResult(can_cancel=self.answers))


def test_a_code_server_on_another_machine_is_asked_and_given_time(home, monkeypatch):
    server, now = CodeServer(), 0.0
    monkeypatch.setattr(launcher_module.time, "monotonic", lambda: now)
    with dg.DagsterInstance.get() as instance:
        launcher = instance.run_launcher
        monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda run_id: server)
        run = instance.create_run_for_job(dg.GraphDefinition(name="nothing").to_job())
        seen = []
        for now, answers in (  # noqa: B007 - what the clock says
            (0, True),
            (10, None),
            (20, True),
            (30, None),
            (40, None),
            (51, None),
            (60, False),
        ):
            server.answers = answers
            seen.append(launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING)
    assert seen == [True, True, True, True, True, False, False]


def test_a_number_that_was_given_anew_is_another_process():
    began = psutil.Process().create_time()
    assert is_alive(os.getpid(), began + 1)
    assert not is_alive(os.getpid(), began - 3600)


def test_a_clock_that_is_set_forward_kills_nobody(home, monkeypatch):
    """When a process began is counted from when the machine did, which is told by the clock as it is now."""
    with dg.DagsterInstance.get() as instance:
        launcher = instance.run_launcher
        run = instance.create_run_for_job(
            dg.GraphDefinition(name="nothing").to_job(), tags={HOST_TAG: socket.gethostname()}
        )
        instance.report_engine_event("Executing steps in process", run, EngineEventData.in_process(os.getpid()))
        assert launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING
        booted = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 3600)
        assert not is_alive(os.getpid(), time.time())
        assert launcher.check_run_worker_health(run).status is WorkerStatus.RUNNING


class Closed(list):
    """What a tracker was asked to abandon."""

    def abandon(self, dagster_run, model, why):
        self.append((dagster_run, model, why))


def test_the_mlflow_run_of_a_killed_run_is_closed(home):
    """What closes it where a step fails had no process to run in, or is not part of that step."""

    def tell(event, run):
        closed = Closed()
        context = dg.build_run_status_sensor_context("sensor", event, instance, run).for_run_failure()
        close_tracking_of_killed_runs(context, tracker=closed)
        return closed

    @dg.op
    def failing():
        raise RuntimeError("missed its gate")

    tags = {"dagster/partition": "tiny"}
    with dg.DagsterInstance.get() as instance:
        killed = instance.create_run_for_job(dg.GraphDefinition(name="nothing").to_job(), tags=tags)
        event = instance.report_run_failed(killed, "its process is gone")
        assert tell(event, killed) == [(killed.run_id, "tiny", "its process is gone")]
        job = dg.GraphDefinition(name="all", node_defs=[failing]).to_job()
        result = job.execute_in_process(instance=instance, raise_on_error=False, tags=tags)
        # What the failed step wrote to is closed; the run may have been killed, or another target's steps not begun.
        assert [run for run, _, _ in tell(result.get_run_failure_event(), result.dagster_run)] == [result.run_id]


def test_the_sensor_runs_without_being_asked(workspace):
    (sensor,) = [
        one for one in make_definitions(workspace).sensors or () if one.name == close_tracking_of_killed_runs.name
    ]
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
