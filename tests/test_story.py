"""It runs by itself: the whole story as its users have it, with nothing of it played.

`refinery ui` and `refinery serve` are the processes that the docs tell people to start; then somebody puts checkpoints
into a folder, and nobody does anything more. From the first release on clients ask all the time, until somebody rolls
back. Every checkpoint has weights and a vocabulary of its own, so parts of two releases together answer as neither.
"""

import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from itertools import combinations

import dagster as dg
import numpy as np
import pytest
from dagster._core.scheduler.instigation import InstigatorStatus, InstigatorType

from assets.freshness import REVISION_TAG
from orchestration.automation.sensor_state import Cursor
from orchestration.automation.sensors import SENSOR
from resources.tasks.samples import sample_texts
from resources.triton.client import TextClient
from resources.triton.layout import CONFIG, list_releases
from tests.checkpoints import make_checkpoint, permute_vocabulary
from tests.clients import Load, Switch, moved, require_answered
from tests.conftest import entry_for
from tests.pipeline import add_entry
from tests.servers import free_port
from tests.test_cli import REFINERY, environment, refinery

MODEL = "tiny"
TEXTS = sample_texts()[:40]
#: Of all clients: they share the cores with builds and benchmarks.
PER_SECOND = 20.0
#: Between two looks of the sensor; Dagster's daemon takes five seconds at least.
WATCH_SECONDS = 2
#: Where other tests take the cores, and nobody asks how long it takes.
LONGEST_SECONDS = 600


@contextmanager
def started(log, *arguments, variables):
    """The command as a process that is ended as by Ctrl-C, and has to take that well."""
    with log.open("wb") as stream:
        process = subprocess.Popen([REFINERY, *arguments], env=variables, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def awaited(what, *logs):
    """The first answer that is not None."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while time.monotonic() < deadline:
        answer = what()
        if answer is not None:
            return answer
        time.sleep(0.1)
    raise AssertionError("\n".join(log.read_text()[-5000:] for log in logs if log.exists()))


def answers_of(folder):
    """What the checkpoint answers, by sentence-transformers: fp32 `[texts, width]`."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS, show_progress_bar=False)


def write_revisions(folder, count):
    """Checkpoints, and what they answer; the tokenizer of one with the weights of another is seen to answer as none."""
    drafts = [make_checkpoint(folder / f"draft-{seed}", seed=seed) for seed in range(count)]
    for seed, draft in enumerate(drafts):
        permute_vocabulary(draft / "tokenizer.json", seed)
    known = np.stack([answers_of(draft) for draft in drafts])
    mixed = shutil.copytree(drafts[0], folder / "mixed")
    shutil.copy(drafts[1] / "tokenizer.json", mixed)
    for one, other in combinations([*known, answers_of(mixed)], 2):
        assert np.abs(one - other).max(axis=1).min() > 0.05
    return drafts, known


def copy_slowly(source, target, stalled, written):
    """As `cp` does, over what is there: each file is cut to nothing, then filled.

    stalled, written: called in the middle of the weights, once and after each piece, until the last says that the copy
    has been seen.
    """
    for path in sorted(source.iterdir()):
        content, place = path.read_bytes(), 0
        with (target / path.name).open("wb", buffering=0) as stream:
            if path.name == "model.safetensors":
                place = stream.write(content[: len(content) // 2])
                stalled()
                while not written():
                    assert place < len(content), "nobody saw the copy"
                    place += stream.write(content[place : place + 256])
                    time.sleep(0.2)
            stream.write(content[place:])


class Watched:
    """The Dagster instance of `refinery ui`, as seen by somebody who looks at its pages."""

    def __init__(self, instance, logs):
        self.instance, self.logs = instance, logs

    def sensor(self):
        """Its state, and what it remembers of the model; None before it looked at it."""
        states = self.instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
        for state in states:
            if state.instigator_name == SENSOR and state.instigator_data is not None:
                memory = Cursor.read(state.instigator_data.cursor).models.get(MODEL)
                return None if memory is None else (state, memory)
        return None

    def not_taken(self):
        """Why the sensor does not take what is in the folder, or not yet."""
        _, memory = self.sensor()
        return memory.seen.waiting or memory.seen.problem

    def looked_again(self, times):
        """Wait until the sensor has looked so many times more."""
        for _ in range(times):
            _, before = self.sensor()
            awaited(lambda before=before: self.sensor()[1].looked > before.looked or None, *self.logs)

    def optimized(self, count):
        """Wait until so many runs have ended well; their revisions, oldest first. There may be no others."""

        def ended():
            runs = self.instance.get_runs(dg.RunsFilter(job_name="optimize"))
            assert len(runs) <= count
            return runs if len(runs) == count and all(run.is_finished for run in runs) else None

        runs = awaited(ended, *self.logs)
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        return [run.tags[REVISION_TAG] for run in reversed(runs)]


def metrics_of(run):
    """Their names, but for those that a run has once there are samples enough: by the clock, or of a busy machine."""
    return {name for name in run.data.metrics if not name.startswith(("system/", "p99_ms."))}


def candidates_of(client, experiment, parent):
    """Of one parent run: its candidates' engines, each with the names of its metrics."""
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return {run.data.params["engine"]: metrics_of(run) for run in children}


def require_comparable(address, revisions):
    """The tracking server has a parent run for each revision, of which any two stand side by side."""
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiment = client.get_experiment_by_name(MODEL).experiment_id
    parents = client.search_runs([experiment], "tags.`refinery.parent` = 'true'", order_by=["attributes.start_time"])
    assert [run.info.status for run in parents] == ["FINISHED"] * len(revisions)
    assert [run.data.params["revision"] for run in parents] == revisions
    first, *others = parents
    candidates = candidates_of(client, experiment, first)
    assert len(candidates) > 1
    assert all(candidates.values())
    assert metrics_of(first)
    for other in others:
        assert metrics_of(other) == metrics_of(first)
        assert set(other.data.params) == set(first.data.params)
        assert candidates_of(client, experiment, other) == candidates


@pytest.mark.whole
def test_new_checkpoints_are_served_and_old_answers_come_back(workspace, tmp_path, triton_settings):
    drafts, known = write_revisions(tmp_path, 3)
    source = tmp_path / "checkpoint"
    workspace.catalog_path.write_text("models: []\n")
    add_entry(workspace, entry_for(source, engines=["onnxruntime_fp32"], shapes=["1x16"]))
    repository = workspace.repository("cpu")
    variables = environment(
        workspace,
        REFINERY_WATCH_SECONDS=str(WATCH_SECONDS),
        REFINERY_TRITON_ENVIRONMENT=str(triton_settings.environment),
    )
    ports = {name: str(free_port()) for name in ("dagster", "mlflow", "http", "grpc", "metrics", "health")}
    logs = [tmp_path / "ui.log", workspace.home / "logs" / "dagster.log", tmp_path / "serve.log"]

    def command(*names):
        return [part for name in names for part in (f"--{name}-port", ports[name])]

    def wait_until(said, log):
        awaited(lambda: said in log.read_text() or None, *logs)

    with ExitStack() as stack:
        stack.enter_context(started(logs[0], "ui", *command("dagster", "mlflow"), variables=variables))
        wait_until("Ctrl-C", logs[0])
        instance = stack.enter_context(dg.DagsterInstance.from_config(str(workspace.home / "dagster")))
        watched = Watched(instance, logs)

        # The first checkpoint comes whole.
        drafts[0].rename(source)
        watched.optimized(1)
        state, _ = watched.sensor()
        assert state.status is InstigatorStatus.DECLARED_IN_CODE  # nobody turned it on
        serve = ("serve", *command("http", "grpc", "metrics", "health"))
        stack.enter_context(started(logs[2], *serve, variables=variables))
        wait_until(f"serving {MODEL}", logs[2])

        address = f"127.0.0.1:{ports['grpc']}"
        client = stack.enter_context(TextClient(address))
        switches = [Switch(0.0, 0)]

        def served(number):
            switches.append(moved(repository / MODEL / CONFIG, number - 1))
            awaited(lambda: client.release_of(MODEL) == number or None, *logs)

        with Load(address, MODEL, TEXTS, known, PER_SECOND) as load:
            # The next is written beside it and renamed.
            source.rename(tmp_path / "before")
            drafts[1].rename(source)
            watched.optimized(2)
            served(2)

            # The third is copied over it, and what is half of one and half of the other is not taken.
            copy_slowly(
                drafts[2],
                source,
                stalled=lambda: awaited(lambda: "is damaged" in watched.not_taken() or None, *logs),
                written=lambda: "its files changed" in watched.not_taken(),
            )
            revisions = watched.optimized(3)
            served(3)
            assert len(set(revisions)) == 3
            assert [one.revision for one in list_releases(repository, MODEL)] == revisions
            require_comparable(f"http://127.0.0.1:{ports['mlflow']}", revisions)

            code, out, err = refinery(workspace, "rollback", MODEL)
            assert code == 0, err
            assert f"{MODEL} points to release 2 (onnxruntime_fp32, revision {revisions[1]}), not to 3" in out
            served(2)
            # That is a person's decision: what is in the folder was optimized, and is not again.
            watched.looked_again(3)
            assert watched.optimized(3) == revisions
            assert client.release_of(MODEL) == 2
    require_answered(load.requests, switches, PER_SECOND)
