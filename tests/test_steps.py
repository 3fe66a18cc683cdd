"""What a step rests on: each record is read once, and errors of the artifact store keep their remedy."""

import pkgutil
from importlib import import_module

from orchestration.cli import optimize
from resources import errors
from resources.artifacts.records import Engine
from resources.engines.specs import BASELINE, engine_spec
from resources.steps.engine import EngineStep
from resources.steps.graph import COMMON, steps_of
from resources.steps.step import Node, Work
from tests.conftest import entry_for


def engine(digest):
    return Engine(
        digest=digest,
        model="tiny",
        name=BASELINE,
        target="cpu",
        runtime="torch",
        precision="fp32",
        status="built",
    )


def test_a_step_rests_on_the_records_that_it_read_first(workspace, tmp_path):
    """Another run may move the pointers between a step's fingerprint and what it makes, and shows."""
    store, step, entry = workspace.store, EngineStep(engine_spec(BASELINE), "cpu"), entry_for(tmp_path)
    first, second = (store.get_or_make(Engine, one * 64, lambda _, one=one: engine(one * 64)).record for one in "ab")
    work = Work(workspace, entry)
    store.point(work.pointer(step), first)
    assert work.get(step) == first
    store.point(work.pointer(step), second)
    assert work.get(step) == first
    assert Work(workspace, entry).get(step) == second


def test_the_code_of_every_step_is_there_and_names_the_step_itself():
    """What decides what is made is part of the fingerprint, wherever it stands."""
    nodes: list[Node] = [*COMMON, *steps_of("cpu")]
    for node in nodes:
        assert len(set(node.code)) == len(node.code), node.name
        if node.name.split("/")[0] not in ("checkpoint", "triton_repository"):  # their parts lie in the rooms below
            assert type(node).__module__ in node.code, node.name


def test_errors_that_people_can_mend_are_told_as_such_by_the_command_line():
    """`refinery optimize` knows them by their module's name; anything else is told as a defect."""
    import resources

    for found in pkgutil.walk_packages(resources.__path__, "resources."):
        if "storage" in found.name:
            import_module(found.name)
    waiting = [errors.StorageError]
    for kind in waiting:
        waiting += kind.__subclasses__()
        assert f"{kind.__module__}." == optimize._OURS, kind
    assert errors.RefusedError in waiting
