"""Every built engine can be built again, alone and without a search, by the script that lies in it."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from resources.artifacts.records import Engine, EvaluationSet, sha256_file
from resources.catalog.entries import ModelEntry
from resources.engines.interface import Built, Goal, Sources, build
from resources.engines.rebuild import SCRIPT, EngineRecipe, differing_files, main, recipe_of, write_script
from resources.engines.specs import engine_spec
from resources.errors import EngineError
from resources.processes.isolation import Limits
from resources.settings.workspace import Workspace
from resources.triton.release import check_copies, content_digest, list_files, write_engine
from tests.conftest import entry_for
from tests.making import collect_checkpoint, goal_of, make_engine, make_evaluation_set, make_graph, sources_of
from tests.releases import make_plan
from tests.test_half import overflowing

__all__ = ["overflowing"]
ROOT = Path(__file__).resolve().parents[1]
#: Too much for all of the tiny model in int8, and kept with some of it in fp32.
GATES = {"cosine_mean": 0.99985, "cosine_worst": 0.9, "neighbours": 0.3}


@dataclass(frozen=True)
class Prepared:
    """All that engines of one model are made from."""

    workspace: Workspace
    entry: ModelEntry
    sources: Sources
    evaluation: EvaluationSet

    def make(self, engine: str, **fields: Any) -> Engine:
        entry = self.entry.model_copy(update=fields)
        return make_engine(self.workspace, entry, engine_spec(engine), "cpu", self.sources, self.evaluation).record

    def built(self, engine: str) -> tuple[Engine, Path]:
        record = self.make(engine)
        assert record.status == "built", record.reason
        return record, self.workspace.store.folder(record)


def prepare(workspace: Workspace, folder: Path) -> Prepared:
    entry = entry_for(folder, gates=GATES, engines=None)
    checkpoint = collect_checkpoint(entry, workspace.store, workspace.limits).record
    evaluation = make_evaluation_set(workspace, entry, checkpoint).record
    sources = sources_of(workspace, entry, checkpoint, make_graph(workspace, entry, checkpoint).record)
    return Prepared(workspace, entry, sources, evaluation)


@pytest.fixture(scope="module")
def tiny(made_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A tiny model with its weights beside the graph. Engines are added to its store, and nothing there is changed."""
    home = tmp_path_factory.mktemp("home")
    workspace = Workspace(home, home / "models.yaml", external_data_threshold_bytes=1000)
    return prepare(workspace, made_checkpoint())


def run(script, *, cwd, artifacts, output):
    given = [] if artifacts is None else ["--artifacts", str(artifacts)]
    command = [sys.executable, str(script), *given, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout, done.stderr


def recipe_in(folder):
    return runpy.run_path(str(folder / SCRIPT))["RECIPE"]


def same_files(record, folder, again):
    assert set(record.content) == {path.name for path in again.iterdir()}
    return all((folder / name).read_bytes() == (again / name).read_bytes() for name in record.content)


def test_fp32_is_built_again_elsewhere_and_what_differs_is_said(tiny, tmp_path):
    record, folder = tiny.built("onnxruntime_fp32")
    assert set(record.files) == {"model.onnx", "model.onnx.data", SCRIPT}
    # Nothing but the store and the script: no home, no models file, and no path of this machine in it.
    elsewhere, again, artifacts = tmp_path / "elsewhere", tmp_path / "again", tmp_path / "another disk"
    elsewhere.mkdir()
    shutil.copytree(tiny.workspace.store.root, artifacts)
    script = artifacts / folder.relative_to(tiny.workspace.store.root) / SCRIPT
    assert str(tiny.workspace.home) not in script.read_text()
    code, out, err = run(script, cwd=elsewhere, artifacts=artifacts, output=again)
    assert (code, err) == (0, "")
    assert out == f"Equal: model.onnx, model.onnx.data in {again} have the same bytes as the original files.\n"
    assert same_files(record, script.parent, again)
    assert list(elsewhere.iterdir()) == []
    assert not again.with_name("again.log").exists()

    # Its own store is what it looks in by itself.
    code, out, _ = run(script, cwd=elsewhere, artifacts=None, output=tmp_path / "by itself")
    assert (code, out[:7]) == (0, "Equal: ")

    # The folder is full now, and a full one is never built into.
    code, _, err = run(script, cwd=elsewhere, artifacts=artifacts, output=again)
    assert code == 2
    assert err.startswith(f"rebuild.py: {again} exists and is not an empty folder.")

    recipe = EngineRecipe.model_validate(recipe_in(script.parent))
    changed = script.with_name("model.onnx.data")
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    (said,) = differing_files(recipe, again, script.parent)
    assert said == "model.onnx.data beside this script is not the file that was built: it was changed or removed."
    (again / "model.onnx").write_bytes(b"another")
    (again / "model.onnx.data").unlink()
    said = differing_files(recipe, again, elsewhere)
    assert said[0].startswith("model.onnx differs: its sha256 is ")
    assert said[1] == "model.onnx.data was not built again."


@pytest.mark.parametrize("engine", ["onnxruntime_int8", "onnxruntime_int8_static"])
def test_int8_keeps_what_the_ladder_kept_without_searching(tiny, tmp_path, engine, capsys):
    record, folder = tiny.built(engine)
    assert record.parameters["ladder"] == "gates kept"
    recipe = recipe_in(folder)
    assert len(recipe["goal"]["kept_nodes"]) == len(record.kept) > 0
    # No trial could be made, and no gate kept.
    recipe["goal"] |= {"trials": 0, "seconds": 0.0, "gates": {**recipe["goal"]["gates"], "cosine_worst": 1.0}}
    arguments = ["--artifacts", str(tiny.workspace.store.root), "--output", str(tmp_path / "again")]
    assert main(str(folder / SCRIPT), recipe, arguments) == 0
    assert capsys.readouterr().out.startswith("Equal: ")  # and no note of what is another than it was
    assert same_files(record, folder, tmp_path / "again")

    # Kept is what the recipe says, and nothing else.
    recipe["goal"]["kept_nodes"] = ()
    arguments[-1] = str(tmp_path / "all in int8")
    assert main(str(folder / SCRIPT), recipe, arguments) == 1
    sizes = [(place / "model.onnx.data").stat().st_size for place in (tmp_path / "all in int8", folder)]
    assert sizes[0] < sizes[1]


def test_fp16_keeps_what_overflowed(overflowing, workspace, tmp_path):
    ready, spec = prepare(workspace, overflowing), engine_spec("onnxruntime_fp16")
    goal = goal_of(workspace, ready.entry, ready.evaluation)
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    built = build(ready.sources, spec, first, goal, "cpu")
    assert built.kept and built.kept_nodes
    known = replace(goal, kept_nodes=built.kept_nodes, evaluation_folder=tmp_path / "not needed")
    build(ready.sources, spec, again, known, "cpu")
    assert sha256_file(first / "model.onnx") == sha256_file(again / "model.onnx")
    with pytest.raises(EngineError, match="has no operator 'no such node' to keep"):
        build(ready.sources, spec, again, replace(goal, kept_nodes=("no such node",)), "cpu")


def test_what_it_was_made_from_is_gone_damaged_or_of_another_version(tiny, tmp_path, capsys):
    _, folder = tiny.built("onnxruntime_fp32")
    recipe, again = recipe_in(folder), tmp_path / "again"
    artifacts = Path(shutil.copytree(tiny.workspace.store.root, tmp_path / "artifacts"))

    def rebuilt(store=artifacts, **changes):
        arguments = ["--artifacts", str(store), "--output", str(again)]
        return main(str(folder / SCRIPT), {**recipe, **changes}, arguments), capsys.readouterr()

    code, said = rebuilt(tmp_path / "nothing here")
    assert code == 2
    assert f"rebuild.py: tiny: the checkpoint {recipe['checkpoint'][:32]} (revision " in said.err
    assert f"is missing from {tmp_path / 'nothing here'} or incomplete." in said.err
    code, said = rebuilt(graph="0" * 64)
    assert code == 2
    assert "the onnx graph 0000" in said.err
    code, said = rebuilt(unheard_of=1)
    assert code == 2
    assert "another version of transformer-refinery" in said.err
    code, said = rebuilt(target="cuda_sm90")
    assert code == 2
    assert "cuda_sm90 needs an NVIDIA GPU" in said.err
    assert not again.exists()

    code, said = rebuilt(libraries={**recipe["libraries"], "onnx": "0.1"}, code="another")
    assert code == 0
    assert "the engine was built with 0.1" in said.out
    assert "The builders of transformer-refinery have changed" in said.out

    graph = artifacts / "onnx_graph" / recipe["graph"][:32] / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    code, said = rebuilt()
    assert code == 2
    assert "is damaged. These files have changed: model.onnx." in said.err


def test_the_recipe_says_what_the_engine_is_made_of(tiny, tmp_path):
    goal = goal_of(tiny.workspace, tiny.entry, tiny.evaluation)
    (tmp_path / "model.onnx").write_bytes(b"an engine")
    (tmp_path / "report.json").write_text("{}")
    built = Built("model.onnx", {}, {}, kept_nodes=("a", "b"), documents=("report.json",))
    spec = engine_spec("onnxruntime_int8")
    recipe = recipe_of(tiny.sources, spec, "cpu", built, tmp_path, {"onnx": "1"}, tiny.evaluation, goal)
    made_from = (tiny.sources.checkpoint.digest, tiny.sources.graph.digest, tiny.evaluation.digest)
    assert (recipe.checkpoint, recipe.graph, recipe.evaluation) == made_from
    assert set(recipe.files) == {"model.onnx"}
    # Every field of a goal but the folder, which is a place on this machine.
    assert set(recipe.goal) == {field.name for field in fields(Goal)} - {"evaluation_folder"}
    assert recipe.goal["kept_nodes"] == ("a", "b")
    write_script(recipe, tmp_path)
    first = (tmp_path / SCRIPT).read_bytes()
    write_script(recipe, tmp_path)
    assert (tmp_path / SCRIPT).read_bytes() == first
    assert EngineRecipe.model_validate(recipe_in(tmp_path)) == recipe


@pytest.mark.parametrize("flavour", ["python", "native"])
def test_documents_are_neither_served_nor_counted(tmp_path, flavour):
    plain = make_plan(tmp_path / "plan", flavour=flavour)
    (plain.engine_folder / SCRIPT).write_text("print('rebuild')")
    engine = plain.engine.with_files(plain.engine_folder).model_copy(update={"documents": (SCRIPT,)})
    assert set(engine.files) == {"model.onnx", SCRIPT}
    assert engine.size_bytes == plain.engine.size_bytes
    assert engine.content_digest == plain.engine.content_digest
    plan = replace(plain, engine=engine)
    assert content_digest(plan) == content_digest(plain)
    (tmp_path / "repository" / "engine").mkdir(parents=True)
    write_engine(plan, tmp_path / "repository" / "engine")
    found = list_files(tmp_path / "repository", ["engine"])
    assert not [name for name in found if SCRIPT in name]
    # One file that is served is no graph with weights beside it.
    assert "engine/model.onnx" in found
    check_copies(plan, {**found, **plan.checkpoint.files})
    # As the store reads it back.
    assert Engine.model_validate_json(json.dumps(engine.model_dump(mode="json"))).content == engine.content


def test_limits_cost_the_engine_alone_and_it_is_tried_again(tiny):
    """What ends a child from outside is the engine's own failure, recorded, with nothing half-made beside it."""
    untried = {"ladder": tiny.entry.ladder.model_copy(update={"trials": 0})}
    for limits, said in (
        (Limits(timeout_s=0.2), "stopped after its limit of 0.2 s. Raise REFINERY_STEP_SECONDS"),
        (Limits(memory_bytes=10**8), "over its limit of 0.10 GB. Raise REFINERY_STEP_MEMORY_GB"),
    ):
        strict = replace(tiny, workspace=replace(tiny.workspace, limits=limits))
        failed = strict.make("onnxruntime_int8", **untried)
        assert failed.status == "failed"
        assert said in failed.reason
        assert "tiny: building onnxruntime_int8 for cpu" in failed.reason
        assert failed.files == {} and failed.documents == ()
    assert tiny.make("onnxruntime_int8", **untried).status == "built"


def segfault(*arguments):
    import ctypes

    (arguments[2] / "half.onnx").write_bytes(b"half an engine")
    ctypes.string_at(0)


def test_a_builder_that_crashes_costs_the_engine_alone(tiny, monkeypatch):
    import resources.steps.engine as module

    monkeypatch.setattr(module, "build", segfault)
    failed = tiny.make("onnxruntime_int8", max_batch_size=3)  # so that it is none that is there
    assert failed.status == "failed"
    assert "its process was ended by SIGSEGV" in failed.reason
    assert failed.files == {}
    assert {path.name for path in tiny.workspace.store.folder(failed).iterdir()} == {"record.json"}
