"""What a plan says, and what a run then does: one small model, and one thing changed at a time."""

import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import dagster as dg
import pytest

from orchestration.automation import schedules
from orchestration.automation.schedules import MOST_ATTEMPTS, PLAN_TAG, WHY_TAG, reoptimization
from orchestration.definitions import make_definitions
from resources.artifacts import fingerprint as fingerprints
from resources.artifacts import hashes
from resources.artifacts.records import Engine
from resources.checkpoints import collect
from resources.checkpoints.sources.reference import Located
from resources.engines.specs import ENGINES
from resources.errors import CatalogError, EngineError, UnfetchedError
from resources.plan import differences, plan_model
from resources.processes.isolation import Limits
from resources.settings.workspace import Workspace
from resources.steps import step as stepping
from tests.conftest import entry_for
from tests.pipeline import LOOSE_GATES, add_entry, instance, run_assets, run_job
from tests.sources import COMMIT, OLDER, write_checkpoint
from tests.test_cli import refinery

#: By size the smaller engine wins whatever this machine's mood is.
FIELDS = {
    "gates": LOOSE_GATES,
    "shapes": ["1x16"],
    "objective": "size",
    "benchmark": {"seconds": 0.3, "threads": 1},
}
#: The distribution, of which there is one of two.
ONNXRUNTIME = "onnxruntime-gpu" if sys.platform == "linux" else "onnxruntime"
BUILT = ("onnxruntime_fp32", "onnxruntime_int8")
SOURCES = {"checkpoint", "evaluation_set", "reference"}
CHOSEN = {"champion/cpu", "serving_configuration/cpu"}
RELEASED = {"triton_repository/cpu", "serving_benchmark/cpu"}


def engines(*names):
    return {f"engines/cpu/{name}" for name in names}


def benchmarks(*names):
    return {f"benchmarks/cpu/{name}" for name in names}


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory, made_checkpoint):
    return shutil.copytree(made_checkpoint(), tmp_path_factory.mktemp("planned") / "checkpoint")


@pytest.fixture(scope="module")
def optimized(tmp_path_factory, checkpoint_folder, triton_settings):
    """A workspace whose model was optimized."""
    home = tmp_path_factory.mktemp("optimized")
    limits = Limits(timeout_s=240, memory_bytes=6 * 10**9)
    workspace = Workspace(home / "home", home / "models.yaml", limits=limits, triton=triton_settings)
    add_entry(workspace, entry_for(checkpoint_folder, **FIELDS))
    outcome = run_job(workspace, "tiny", whole=True)
    assert outcome.success, outcome.messages
    return workspace


@pytest.fixture
def copy(optimized, tmp_path):
    """The same, to be changed. Times of files are kept, so that nothing is read again."""
    home = shutil.copytree(optimized.home, tmp_path / "home", symlinks=True)
    catalog = shutil.copyfile(optimized.catalog_path, tmp_path / "models.yaml")
    return replace(optimized, home=home, catalog_path=catalog)


def another_tokenizer(workspace, folder, monkeypatch):
    """Capitals are not made small any more. The vocabulary is as it was."""
    path = folder / "tokenizer.json"
    text = path.read_text()
    data = json.loads(text)
    assert data["normalizer"]["lowercase"]
    data["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(data))
    return lambda: path.write_text(text)


def another_gate(workspace, folder, monkeypatch):
    add_entry(workspace, entry_for(folder, **{**FIELDS, "gates": {**LOOSE_GATES, "cosine_mean": 0.91}}))


def another_onnxruntime(workspace, folder, monkeypatch):
    """As fingerprints see it: the one that builds is the same."""
    known = fingerprints._version
    monkeypatch.setattr(fingerprints, "_version", lambda name: "9.9.9" if name == ONNXRUNTIME else known(name))
    fingerprints.library_versions.cache_clear()
    return fingerprints.library_versions.cache_clear


def lost_bits(workspace, folder, monkeypatch):
    """Of the same size, so that the digest alone tells."""
    graph = next((workspace.store.root / "onnx_graph").iterdir()) / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)


#: What was changed, with what the plan says of it, and everything that is made again because of it. The graph knows of
#: a tokenizer how many ids there are and nothing else; PyTorch and fp32 engines are built of the weights alone.
CASES = {
    "tokenizer": (
        another_tokenizer,
        {"checkpoint": "the tokenizer's files (tokenizer.json)"},
        SOURCES | engines("onnxruntime_int8") | benchmarks(*(spec.name for spec in ENGINES)) | CHOSEN | RELEASED,
    ),
    "gate": (
        another_gate,
        {
            "engines/cpu/onnxruntime_int8": "gates.cosine_mean 0.9 -> 0.91",
            "champion/cpu": "once benchmarks/cpu/onnxruntime_int8 and 1 other are made",
        },
        engines("onnxruntime_int8") | benchmarks("onnxruntime_int8") | CHOSEN,
    ),
    "onnxruntime": (
        another_onnxruntime,
        {"engines/cpu/onnxruntime_fp32": f"{ONNXRUNTIME} {version(ONNXRUNTIME)} -> 9.9.9"},
        engines(*BUILT) | benchmarks(*BUILT) | CHOSEN,
    ),
    "damage": (lost_bits, {"onnx_graph": "model.onnx is damaged"}, {"onnx_graph"}),
}


@contextmanager
def changed(case, workspace, folder, monkeypatch):
    """Nothing but that is another, until the block ends."""
    restore = CASES[case][0](workspace, folder, monkeypatch)
    try:
        yield
    finally:
        if restore is not None:
            restore()


@pytest.mark.parametrize("case", CASES)
def test_the_plan_says_what_depends_on_the_change(copy, checkpoint_folder, monkeypatch, case):
    _, reasons, expected = CASES[case]
    with changed(case, copy, checkpoint_folder, monkeypatch):
        found = plan_model(copy, copy.entry("tiny"))
    assert found.error == ""
    states = {step.step: step.state for step in found.steps}
    surely = {name for name, state in states.items() if state == "run"}
    perhaps = {name for name, state in states.items() if state == "follows"}
    assert surely <= expected <= surely | perhaps, (surely - expected, expected - surely - perhaps)
    said = {step.step: "; ".join(step.reasons) for step in found.steps}
    assert {name: said[name] for name in reasons} == reasons


@pytest.mark.parametrize(
    "case",
    ["gate", "onnxruntime", *(pytest.param(case, marks=pytest.mark.whole) for case in ("tokenizer", "damage"))],
)
def test_a_run_makes_again_what_depends_on_the_change_and_nothing_else(copy, checkpoint_folder, monkeypatch, case):
    with changed(case, copy, checkpoint_folder, monkeypatch):
        outcome = run_job(copy, "tiny", whole=True)
        assert outcome.success, outcome.messages
        after = plan_model(copy, copy.entry("tiny"))
    made = {name for name in outcome.materialized() if not outcome.metadata(*name.split("/"))["reused"]}
    assert made == CASES[case][2]
    assert {step.step for step in after.steps} == outcome.materialized()
    assert after.differing == ()
    assert (outcome.metadata("onnx_graph").get("damaged") == "model.onnx") is (case == "damage")


def test_nothing_differs_and_nothing_is_written(copy):
    def times():
        """Digests of the source's files are noted where other tests have changed those."""
        return {path: path.stat().st_mtime_ns for path in copy.home.rglob("*") if "caches" not in path.parts}

    before = times()
    found = plan_model(copy, copy.entry("tiny"))
    assert {step.state for step in found.steps} == {"reused"}
    assert times() == before


def test_what_was_there_before_is_taken_up_again_without_being_made(copy, checkpoint_folder):
    """Someone tries a smaller batch, and goes back."""
    first = copy.entry("tiny")
    digest = copy.store.pointed("engines/cpu/onnxruntime_int8/tiny")
    other = copy.store.get_or_make(Engine, "e" * 64, lambda folder: _engine("e" * 64)).record
    copy.store.point("engines/cpu/onnxruntime_int8/tiny", other)
    found = {step.step: step for step in plan_model(copy, first).steps}
    step = found["engines/cpu/onnxruntime_int8"]
    assert (step.state, step.digest) == ("found", digest)
    assert {name for name, one in found.items() if one.state != "reused"} == {step.step}


def test_an_engine_that_failed_is_tried_again_by_runs_and_starts_none(copy, monkeypatch):
    def fail(*arguments, **options):
        raise EngineError("Out of memory.")

    copy.store.remove(copy.store.current(Engine, "engines/cpu/onnxruntime_int8/tiny"))
    monkeypatch.setattr(stepping, "run_isolated", fail)
    steps = engines("onnxruntime_int8") | benchmarks("onnxruntime_int8") | CHOSEN
    outcome = run_assets(copy, "tiny", sorted(steps))
    assert outcome.success, outcome.messages
    found = plan_model(copy, copy.entry("tiny"))
    tried = {step.step: step.reasons[0] for step in found.steps if step.state == "retry"}
    assert set(tried) == engines("onnxruntime_int8") | benchmarks("onnxruntime_int8")
    assert all("Out of memory." in reason for reason in tried.values())
    # What was not asked for above is left: the release, of the other engine now.
    assert {step.step for step in found.differing} == RELEASED
    assert "the engine onnxruntime_int8 -> onnxruntime_fp32" in found.differing[0].reasons


def test_what_another_machine_made_is_left_to_it(copy, monkeypatch, checkpoint_folder):
    """One without the target's GPU cannot tell, and would have every engine unsupported."""
    both = replace(copy, targets=("cpu", "cuda_sm90"))
    baseline = copy.store.current(Engine, "engines/cpu/torch/tiny")
    copy.store.point("engines/cuda_sm90/torch/tiny", baseline)
    found = plan_model(both, both.entry("tiny"))
    assert found.differing == ()
    of_gpu = [step for step in found.steps if "cuda_sm90" in step.step]
    assert {step.state for step in of_gpu} == {"elsewhere"}
    assert "needs an NVIDIA GPU of compute capability 9.0" in of_gpu[0].reasons[0]
    lost_bits(both, checkpoint_folder, monkeypatch)
    found = plan_model(both, both.entry("tiny"))
    assert {step.state for step in found.steps if "cuda_sm90" in step.step} == {"follows"}


def test_a_source_that_is_gone_is_said_and_nothing_is_planned_behind_it(copy, tmp_path):
    add_entry(copy, entry_for(tmp_path / "nowhere", **FIELDS))
    found = plan_model(copy, copy.entry("tiny"))
    assert "nowhere does not exist" in found.error
    assert found.steps == found.differing == ()


def test_a_new_revision_on_the_hub_is_told_without_being_fetched(copy, monkeypatch):
    import huggingface_hub

    class Api:
        def __init__(self, **settings):
            pass

        def model_info(self, repository, *, revision, timeout):
            return type("Info", (), {"sha": "b" * 40})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    add_entry(copy, entry_for("org/no-such-model", **FIELDS))
    found = plan_model(copy, copy.entry("tiny"))
    first, *others = found.steps
    assert (first.step, first.state) == ("checkpoint", "run")
    assert first.reasons[0].endswith(" -> bbbbbbbbbbbb")
    assert {step.state for step in others} == {"follows"}


def test_a_source_that_is_not_here_is_what_it_was_by_its_revision(copy, checkpoint_folder, monkeypatch):
    """Another machine collected it, or its copy was tidied up: that is no reason for a run."""
    monkeypatch.setattr(collect, "locate", lambda *_, **__: Located(checkpoint_folder, COMMIT))
    assert run_assets(copy, "tiny", ["checkpoint", "evaluation_set", "reference"]).success

    def elsewhere(source, *, fetch, **_):
        assert not fetch
        raise UnfetchedError(source, holds)

    monkeypatch.setattr(collect, "locate", elsewhere)
    entry = copy.entry("tiny")
    holds = COMMIT
    assert plan_model(copy, entry).differing == ()
    pickles = plan_model(copy, entry.model_copy(update={"allow_pickle": True}))
    assert pickles.steps[0].state == "run"  # other files may be fetched then
    holds = OLDER
    assert plan_model(copy, entry).steps[0].reasons == (f"revision {COMMIT[:12]} -> {OLDER[:12]}",)


def test_a_file_that_cannot_be_read_is_an_error_of_that_model_alone(workspace, tmp_path, monkeypatch):
    def fails(folder, name):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / name))

    monkeypatch.setattr(hashes, "open_below", fails)  # a broken disk
    found = plan_model(workspace, entry_for(write_checkpoint(tmp_path / "checkpoint")))
    assert "Input/output error: " in found.error
    assert "Make the file readable" in found.error


@pytest.mark.parametrize("seconds", [60.0, 0.0])
def test_a_process_that_ends_early_costs_the_model_whose_turn_it_was(monkeypatch, seconds):
    def plan(names, seconds):
        count = names.index("b") if "b" in names else len(names)
        return [{"model": name, "error": ""} for name in names[:count]], "Killed"

    monkeypatch.setattr(schedules, "_plan", plan)
    errors = {name: plan["error"] for name, plan in schedules.read_plans(["a", "b", "c"], seconds).items()}
    assert errors == ({"a": "", "b": "the planning process ended early: Killed", "c": ""} if seconds else {})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            {"libraries": {"torch": "2.13.0", "onnx": "1"}},
            {"libraries": {"torch": "2.14.0", "onnx": "1"}},
            "torch 2.13.0 -> 2.14.0",
        ),
        ({"gates": {"cosine_mean": 0.995}}, {"gates": {"cosine_mean": 0.99}}, "gates.cosine_mean 0.995 -> 0.99"),
        ({"code": {"a.b": "12", "a.c": "3"}}, {"code": {"a.b": "13", "a.c": "3"}}, "the code of a.b"),
        (
            {"files": {"vocab.txt": "a", "x.json": "b"}},
            {"files": {"x.json": "c"}},
            "the tokenizer's files (vocab.txt)|the checkpoint's files (x.json)",
        ),
        (
            {"device": "NVIDIA H100, driver 550.1"},
            {"device": "NVIDIA H100, driver 580.2"},
            "driver 550.1 -> driver 580.2",
        ),
        (
            {"device": "AMD EPYC, 2 cores"},
            {"device": "NVIDIA H100, driver 580.2"},
            "AMD EPYC, 2 cores -> NVIDIA H100, driver 580.2",
        ),
        ({"graph": "a" * 64}, {"graph": "b" * 64}, "onnx_graph changed"),
        ({"weights": "a" * 64}, {"weights": "b" * 64}, "the weights or their configuration changed"),
        ({"seconds": 45.0}, {"seconds": 30.0}, "seconds 45.0 -> 30.0"),
        ({"sample": None}, {"sample": "a" * 64}, "the sample of requests changed"),
        ({"shapes": ["1x16"]}, {"shapes": ["1x16", "8x128"]}, "shapes 1x16 -> 1x16, 8x128"),
        ({"graph": "a" * 64}, {"graph": fingerprints.pending("onnx_graph")}, ""),
        ({"a": 1}, {"a": 1}, ""),
    ],
)
def test_what_differs_is_said_in_words(before, now, said):
    assert "|".join(differences(before, now)) == said


def _engine(digest, **fields):
    given = {"model": "tiny", "name": "e", "target": "cpu", "runtime": "onnxruntime", "precision": "int8"}
    return Engine(**{**given, "digest": digest, "status": "built", **fields})


@pytest.fixture
def tick(copy, monkeypatch):
    """One evaluation of the schedule, as Dagster's daemon has it, with the instance and the job."""
    monkeypatch.setenv("REFINERY_HOME", str(copy.home))
    monkeypatch.setenv("REFINERY_CATALOG", str(copy.catalog_path))
    with instance(copy.home) as found:
        repository = make_definitions(copy).get_repository_def()

        def evaluate():
            context = dg.build_schedule_context(
                instance=found,
                repository_def=repository,
                resources={"workspace": copy},
                scheduled_execution_time=datetime(2026, 11, 27, 3, tzinfo=UTC),
            )
            return repository.get_schedule_def("reoptimize").evaluate_tick(context)

        yield evaluate, found, repository.get_job("optimize")


def test_the_schedule_submits_what_would_differ_and_nothing_else(copy, tick, checkpoint_folder, monkeypatch):
    evaluate, found, job = tick
    add_entry(copy, entry_for("/no/such/folder", name="lost"))
    quiet = evaluate()
    assert quiet.run_requests == []
    assert "nothing differs for tiny: inputs, configuration" in quiet.skip_message
    assert "lost: a run would fail: lost: source: the folder /no/such/folder does not exist" in quiet.skip_message
    another_gate(copy, checkpoint_folder, monkeypatch)
    (request,) = evaluate().run_requests
    assert request.partition_key == "tiny"
    assert "gates.cosine_mean 0.9 -> 0.91" in request.tags[WHY_TAG]
    names = {"/".join(key.path) for key in request.asset_selection}
    assert engines("onnxruntime_int8") | benchmarks("onnxruntime_int8") | CHOSEN <= names
    assert not names & (SOURCES | {"onnx_graph"} | engines("torch", "onnxruntime_fp32"))
    # What fails again and again with the same inputs is left to people, and while a run is under way there is no other.
    for _ in range(MOST_ATTEMPTS):
        assert len(evaluate().run_requests) == 1
        run = found.create_run_for_job(job, tags={**request.tags, "dagster/partition": "tiny"})
        assert "is under way" in evaluate().skip_message
        found.report_run_failed(run)
    assert f"{MOST_ATTEMPTS} runs failed with the same plan" in evaluate().skip_message
    # The run that was asked for is one of these assets alone, and then nothing is left to do.
    result = job.execute_in_process(
        partition_key="tiny", instance=found, asset_selection=request.asset_selection, tags={PLAN_TAG: "x"}
    )
    assert result.success
    assert {"/".join(event.asset_key.path) for event in result.get_asset_materialization_events()} == names
    assert "benchmarks/cpu/onnxruntime_int8" in {
        "/".join(check.asset_key.path) for check in result.get_asset_check_evaluations()
    }
    assert plan_model(copy, copy.entry("tiny")).differing == ()


def test_a_cron_expression_that_is_none_is_named():
    with pytest.raises(CatalogError, match="REFINERY_SCHEDULE: 'nightly' is not a cron expression"):
        reoptimization("nightly")


def test_the_command_says_what_would_run_and_why(copy, checkpoint_folder, monkeypatch):
    code, out, err = refinery(copy, "plan")
    assert (code, err) == (0, "")
    assert "tiny: 0 of" in out
    assert "nothing differs" in out
    another_gate(copy, checkpoint_folder, monkeypatch)
    code, out, _ = refinery(copy, "plan", "tiny")
    assert code == 0
    (line,) = [line for line in out.splitlines() if "│ engines/cpu/onnxruntime_int8 " in line]
    assert "would run" in line
    assert "gates.cosine_mean 0.9 -> 0.91" in line
    code, out, _ = refinery(copy, "plan", "tiny", "--json")
    data = json.loads(out)
    assert data["model"] == "tiny"
    assert "engines/cpu/onnxruntime_int8" in data["differing"]
    code, _, err = refinery(copy, "plan", "other")
    assert code == 1
    assert "There is no model named 'other'" in err
