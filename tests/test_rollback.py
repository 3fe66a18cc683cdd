"""Going back on the real server: to what was published and answers, or not at all."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from orchestration.cli import listing, main, releases, serving
from resources.errors import ReleaseError, ServerError, StorageError
from resources.settings.triton import TritonSettings
from resources.triton import fleet, verify
from resources.triton import rollback as module
from resources.triton.asking import ask
from resources.triton.files import staging_root
from resources.triton.layout import CONFIG, current_number
from resources.triton.publish import Steps, publish
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from resources.triton.verify import differences_from_manifest, find_release
from tests.releases import answers_of, ask_together, make_plan, tree_digest, unasked

TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(3)]


@pytest.fixture
def repository(tmp_path, plans):
    """Three releases, of which the last serves."""
    folder = tmp_path / "models" / "cpu"
    for plan in plans:
        publish(plan, folder, Steps(prove=unasked))
    return folder


@pytest.fixture
def broken(repository, tmp_path):
    """A fourth release, as published as the others, that no server can load; it serves nothing."""
    plan = make_plan(tmp_path / "broken", seed=9)
    (plan.engine_folder / "model.onnx").write_bytes(b"no graph")
    plan = replace(plan, engine=plan.engine.with_files(plan.engine_folder))
    publish(plan, repository, Steps(prove=unasked))
    pointer = (repository / "tiny" / "3" / CONFIG).read_bytes()
    (repository / "tiny" / CONFIG).write_bytes(pointer)
    return 4


def served(client):
    return client.release_of("tiny"), ask_together(client, TEXTS)


def test_what_cannot_be_put_back_is_said_beside_why_it_was(repository, monkeypatch):
    """A store that is away hides neither the server's reason nor that the servers have to go back."""

    def refuse(place, release):
        monkeypatch.setattr(module, "replace_file", away)
        raise ServerError("Out of memory.")

    def away(new, place):
        raise StorageError("The store is away.")

    servers = SimpleNamespace(
        require_ready=lambda: None,
        ask_aside=lambda place, release: None,
        served=lambda model: [],
        retire=lambda names: None,
        take_up=refuse,
        go_back=lambda place, model: ["Nor does it load what was there."],
    )
    message = (
        r"Out of memory\. The pointer was not put back: The store is away\. The pointer may have moved all the same.* "
        r"Nor does it load what was there\."
    )
    with pytest.raises(ServerError, match=message):
        module._switch(repository, find_release(repository, "tiny", 1), servers)
    assert current_number(repository, "tiny") == 1


def test_back_to_the_release_before_and_to_any(repository, plans, triton_settings, tmp_path):
    internals = {path: tree_digest(path) for path in repository.iterdir() if "__r" in path.name}
    done = roll_back(repository, "tiny", triton_settings, log=tmp_path / "log")
    assert (done.before, done.release.number, current_number(repository, "tiny")) == (3, 2, 2)
    assert roll_back(repository, "tiny", triton_settings, log=tmp_path / "log").release.number == 1
    with pytest.raises(ReleaseError, match=r"no release before 1 .*\(there: 1, 2, 3\)"):
        roll_back(repository, "tiny", triton_settings, log=tmp_path / "log")
    assert roll_back(repository, "tiny", triton_settings, to=3, log=tmp_path / "log").before == 1
    assert {path: tree_digest(path) for path in internals} == internals
    assert not list(staging_root(repository).glob("*"))
    # What was rolled back is not published again; see test_triton_publish.
    assert not publish(plans[2], repository, Steps(prove=unasked)).changed


@pytest.mark.parametrize(
    ("to", "message"),
    [(7, r"no release 7 in .* \(there: 1, 2, 3\)"), (3, "release 3 is what is pointed to already")],
)
def test_numbers_that_make_no_sense_are_refused(repository, tmp_path, to, message):
    before = tree_digest(repository)
    with pytest.raises(ReleaseError, match=message):
        roll_back(repository, "tiny", TritonSettings(), to=to, log=tmp_path / "log")
    with pytest.raises(ReleaseError, match="no release of it"):
        roll_back(repository, "other", TritonSettings(), log=tmp_path / "log")
    assert tree_digest(repository) == before


def change(repository, number=2):
    path = repository / f"tiny__r{number}__pipeline" / "1" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def take_away(repository):
    (repository / "tiny__r2__pipeline" / "1" / "tokenizer.json").unlink()


def add(repository):
    (repository / "tiny__r2__pipeline" / "1" / "notes.txt").write_text("mine")


def resize(repository):
    path = repository / "tiny" / "2" / CONFIG
    path.write_text(path.read_text().replace("max_batch_size: 8", "max_batch_size: 4"))


def repoint(repository):
    (repository / "tiny" / "2" / CONFIG).write_bytes((repository / "tiny" / "1" / CONFIG).read_bytes())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change, "tiny__r2__pipeline/1/model.onnx was changed."),
        (take_away, "tiny__r2__pipeline/1/tokenizer.json is missing."),
        (add, "tiny__r2__pipeline/1/notes.txt was added."),
        (resize, "tiny/2/config.pbtxt was changed."),
        (repoint, "tiny/2/config.pbtxt was changed: it names another release."),
    ],
)
def test_a_release_that_is_not_what_was_published_is_named_and_not_gone_back_to(repository, tmp_path, edit, said):
    release = find_release(repository, "tiny", 2)
    assert differences_from_manifest(repository, release) == []
    edit(repository)
    assert differences_from_manifest(repository, release) == [said]
    with pytest.raises(ReleaseError, match=re.escape(said)):
        roll_back(repository, "tiny", TritonSettings(), to=2, log=tmp_path / "log")
    assert current_number(repository, "tiny") == 3


def test_what_was_left_and_edited_then_does_not_undo_the_rollback(repository, plans, tmp_path, monkeypatch):
    """Until the person who left it does what the message says."""
    monkeypatch.setattr(module, "ask_embedded", lambda *arguments: None)
    roll_back(repository, "tiny", TritonSettings(), log=tmp_path / "log")
    change(repository, 3)
    assert not publish(plans[2], repository, Steps(prove=unasked)).changed
    assert current_number(repository, "tiny") == 2
    left = repository / "tiny" / "3"
    with pytest.raises(ReleaseError, match=rf"remove {left} and publish again: refinery optimize tiny\.$"):
        roll_back(repository, "tiny", TritonSettings(), to=3, log=tmp_path / "log")
    shutil.rmtree(left)
    assert publish(plans[2], repository, Steps(prove=unasked)).release.number == 4


def by_hand(pointer):
    pointer.write_text(pointer.read_text() + "# by hand\n")


def with_another_step(pointer):
    pointer.write_text(pointer.read_text().replace("tiny__r3__pipeline", "tiny__r1__pipeline"))


def with_a_release_that_is_none(pointer):
    pointer.write_text(re.sub("versions: 3", "versions: 7", pointer.read_text()))


def with_none(pointer):
    pointer.write_text("name: 'tiny'")


def with_bytes(pointer):
    pointer.write_bytes(b"\xff")


@pytest.mark.parametrize(
    "edit", [by_hand, with_another_step, with_a_release_that_is_none, with_none, with_bytes, Path.unlink]
)
def test_a_pointer_that_somebody_changed_is_named_and_put_back(repository, tmp_path, monkeypatch, edit):
    """By what the message says; until then nothing is removed, because what it does not name may be what serves."""
    for asking in (module, verify):
        monkeypatch.setattr(asking, "ask_embedded", lambda *arguments: None)
    before, pointer = tree_digest(repository), repository / "tiny" / CONFIG
    edit(pointer)
    said = set()
    for act in (
        lambda: verify.verify_release(repository, "tiny", TritonSettings(), log=tmp_path / "log"),
        lambda: retain(repository, "tiny", keep=1),
    ):
        with pytest.raises(ReleaseError, match=rf"tiny: {pointer} .*: refinery rollback tiny --to [3N]\.$") as caught:
            act()
        said.add(str(caught.value))
    assert len(said) == 1
    verify.verify_release(repository, "tiny", TritonSettings(), 2, log=tmp_path / "log")  # it is what it was
    done = roll_back(repository, "tiny", TritonSettings(), to=3, log=tmp_path / "log")
    assert (done.release.number, tree_digest(repository)) == (3, before)
    with pytest.raises(ReleaseError, match="release 3 is what is pointed to already"):
        roll_back(repository, "tiny", TritonSettings(), to=3, log=tmp_path / "log")


def test_where_the_pointer_is_gone_and_no_server_takes_the_release_up_it_is_gone_again(repository, monkeypatch):
    def refuse(place, release):
        assert current_number(place, "tiny") == 1
        raise ServerError("Out of memory.")

    (repository / "tiny" / CONFIG).unlink()
    servers = SimpleNamespace(
        ask_aside=lambda place, release: None,
        served=lambda model: [],
        retire=lambda names: None,
        take_up=refuse,
        go_back=lambda place, model: [],
    )
    with pytest.raises(ServerError, match=r"Out of memory\. What served before"):
        module._switch(repository, find_release(repository, "tiny", 1), servers)
    assert not (repository / "tiny" / CONFIG).exists()


@pytest.mark.parametrize("gone", ["tiny/3", "tiny__r3__pipeline"])
def test_a_release_that_is_gone_is_told_in_one_way(repository, tmp_path, monkeypatch, capsys, gone):
    shutil.rmtree(repository / gone)
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(repository.parent))
    monkeypatch.delenv("REFINERY_TRITON_GRPC", raising=False)
    monkeypatch.setattr(serving, "DEFAULT_ADDRESS", "127.0.0.1:9")
    problem = (
        f"{repository}/tiny/config.pbtxt points to release 3, which is not there whole (whole: 1, 2). "
        "Have one that is serve: refinery rollback tiny --to N."
    )
    commands = [["query", "tiny", "text"], ["releases", "tiny"]]
    if gone == "tiny/3":  # of files alone it names each
        commands.append(["verify", "tiny"])
    for command in commands:
        main(command)
        assert capsys.readouterr().err == f"refinery: tiny: {problem}\n"
    with pytest.raises(ReleaseError) as caught:
        retain(repository, "tiny", keep=1)
    assert str(caught.value) == f"tiny: {problem}"
    assert listing.served_text(repository, "tiny") == problem
    assert listing.served_text(repository, "other") == "nothing yet"


def test_a_release_that_does_not_load_is_not_gone_back_to(repository, broken, triton_settings, tmp_path):
    before = tree_digest(repository)
    with pytest.raises(ServerError, match="model.onnx"):
        roll_back(repository, "tiny", triton_settings, to=broken, log=tmp_path / "log")
    assert tree_digest(repository) == before


def test_native_releases_need_a_server_that_has_their_backend(tmp_path):
    repository = tmp_path / "models" / "cpu"
    for seed in range(2):
        publish(make_plan(tmp_path / "plans", seed=seed, flavour="native"), repository, Steps(prove=unasked))
    with pytest.raises(ReleaseError, match="REFINERY_TRITON_GRPC"):
        roll_back(repository, "tiny", TritonSettings(), log=tmp_path / "log")
    assert current_number(repository, "tiny") == 2


def test_a_running_server_is_told_and_asked(repository, broken, plans, triton_settings, tmp_path):
    with EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server:
        settings = replace(triton_settings, servers=(server.grpc_address,), connection=server.connection)
        with server.client() as client:
            roll_back(repository, "tiny", settings, to=1, log=tmp_path / "log")
            number, answers = served(client)
            assert number == 1
            np.testing.assert_allclose(answers, answers_of(plans[0], TEXTS), atol=1e-5)

            with pytest.raises(ServerError, match=f"cannot load tiny__r{broken}"):
                roll_back(repository, "tiny", settings, to=broken, log=tmp_path / "log")
            assert current_number(repository, "tiny") == 1
            np.testing.assert_array_equal(served(client)[1], answers)
            assert not client.is_ready(f"tiny__r{broken}__pipeline")
            assert not list(repository.glob("*__proof"))
            with pytest.raises(ServerError, match="serves release 1 as tiny, not release 2"):
                ask(client, repository, find_release(repository, "tiny", 2))
            with pytest.raises(ReleaseError, match="release 1 is what is pointed to and served already"):
                roll_back(repository, "tiny", settings, to=1, log=tmp_path / "log")
    with pytest.raises(ServerError, match="REFINERY_TRITON_GRPC"):
        roll_back(repository, "tiny", settings, to=2, log=tmp_path / "log")
    assert current_number(repository, "tiny") == 1


def test_what_fails_after_the_switch_is_switched_back(repository, plans, triton_settings, tmp_path, monkeypatch):
    asked = []

    def failing(client, repository, release, name=None):
        asked.append(name)
        ask(client, repository, release, name)
        if name is None and release.number == 2:  # the public model, which everybody asks
            raise KeyboardInterrupt

    monkeypatch.setattr(fleet, "ask", failing)
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "triton.log") as server,
        server.client() as client,
    ):
        settings = replace(triton_settings, servers=(server.grpc_address,), connection=server.connection)
        with pytest.raises(KeyboardInterrupt):
            roll_back(repository, "tiny", settings, log=tmp_path / "log")
        assert asked == ["tiny__r2__proof", None, None], "and what it goes back to"
        assert current_number(repository, "tiny") == 3
        number, answers = served(client)
        assert number == 3
        np.testing.assert_allclose(answers, answers_of(plans[2], TEXTS), atol=1e-5)
        assert not client.is_ready("tiny__r2__pipeline")
        monkeypatch.undo()
        # A pointer that was moved, by whomever, and that the server was never told of.
        (repository / "tiny" / CONFIG).write_bytes((repository / "tiny" / "1" / CONFIG).read_bytes())
        roll_back(repository, "tiny", settings, to=1, log=tmp_path / "log")
        assert served(client)[0] == 1


def test_the_commands(repository, triton_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REFINERY_TRITON_GRPC", raising=False)
    monkeypatch.setattr(releases, "DEFAULT_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(repository.parent))
    monkeypatch.setenv("REFINERY_TRITON_ENVIRONMENT", os.fspath(triton_settings.environment))
    assert main(["rollback", "tiny"]) == 0
    assert "points to release 2 (table, revision 0123456789abcdef), not to 3 any more" in capsys.readouterr().out
    assert main(["verify", "tiny"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"all \d+ files of release 2 \([0-9.]+ MB\) are as published, and an embedded server answers", out)
    change(repository)
    assert main(["verify", "tiny", "--release", "2"]) == 1
    assert "model.onnx was changed" in capsys.readouterr().err
    assert main(["verify", "tiny", "--release", "8"]) == 1
    assert "there is no release 8" in capsys.readouterr().err
