"""Old releases go whole; what serves, is wanted or is new stays, and numbers are never given out again."""

import errno
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from orchestration.cli import main, releases
from resources.errors import ReleaseError, ServerError
from resources.settings.triton import TritonSettings
from resources.storage.objects import RemotePath, Store
from resources.triton import publish as publishing
from resources.triton import retain as module
from resources.triton.files import discard, staging_root
from resources.triton.layout import CONFIG, current_number, current_release, is_whole, list_releases
from resources.triton.publish import Steps, publish
from resources.triton.retain import retain
from resources.triton.server import EmbeddedServer
from tests.releases import answers_of, ask_together, make_plan, release_digest, unasked

UNASKED = Steps(prove=unasked)
TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(6)]


@pytest.fixture
def repository(tmp_path, plans):
    """Five releases, of which the last serves."""
    folder = tmp_path / "models" / "cpu"
    for plan in plans[:5]:
        publish(plan, folder, UNASKED)
    return folder


def point_to(repository, number):
    config = (repository / "tiny" / str(number) / CONFIG).read_bytes()
    (repository / "tiny" / "new").write_bytes(config)
    (repository / "tiny" / "new").replace(repository / "tiny" / CONFIG)


def numbers(repository):
    """Of the releases, and of every folder that belongs to one."""
    folders = {int(path.name.split("__r")[1].split("__")[0]) for path in repository.glob("tiny__r*")}
    assert folders == {release.number for release in list_releases(repository, "tiny")}
    return sorted(folders)


def test_the_newest_and_what_is_pointed_to_or_wanted_stay(repository, plans):
    point_to(repository, 2)
    (repository / "foreign" / "1").mkdir(parents=True)
    before = {number: release_digest(repository, "tiny", number) for number in (1, 2, 5)}
    done = retain(repository, "tiny", keep=1, wanted={1: "wanted", 77: "gone"})
    assert done.removed == (3, 4)
    assert done.kept == {1: "wanted", 2: "what is pointed to", 5: "one of the newest 1"}
    assert numbers(repository) == [1, 2, 5]
    assert {number: release_digest(repository, "tiny", number) for number in before} == before
    assert (repository / "foreign" / "1").is_dir()
    assert not list(staging_root(repository).glob("*"))
    assert retain(repository, "tiny", keep=3).removed == ()
    assert publish(plans[5], repository, UNASKED).release.number == 6


def test_what_a_server_serves_stays_and_answers(repository, plans, triton_settings, tmp_path):
    point_to(repository, 3)
    with (
        EmbeddedServer(repository, triton_settings, models=["tiny"], log=tmp_path / "log") as server,
        server.client() as client,
    ):
        client.load("tiny__r1__pipeline")
        point_to(repository, 5)  # and nobody has told the server
        done = retain(
            repository,
            "tiny",
            keep=1,
            settings=TritonSettings(servers=(server.grpc_address,), connection=server.connection),
            asked=["127.0.0.1:9"],
        )
        assert done.removed == (1, 2, 4)
        assert done.kept[3] == f"served at {server.grpc_address}"
        assert not client.is_ready("tiny__r1__pipeline")
        assert client.is_ready("tiny__r3__pipeline")
        np.testing.assert_allclose(ask_together(client, TEXTS), answers_of(plans[2], TEXTS), atol=1e-5)


@pytest.mark.parametrize("survives", range(2))
def test_what_a_killed_clean_up_leaves_is_swept_up(repository, monkeypatch, survives):
    calls = []

    def dying(path, bin_folder):
        calls.append(path)
        if len(calls) > survives:
            raise KeyboardInterrupt
        discard(path, bin_folder)

    monkeypatch.setattr(module, "discard", dying)
    with pytest.raises(KeyboardInterrupt):
        retain(repository, "tiny", keep=4)
    monkeypatch.undo()
    assert [release.number for release in list_releases(repository, "tiny")] == ([1] if not survives else []) + [
        2,
        3,
        4,
        5,
    ]
    assert retain(repository, "tiny", keep=4).removed == ((1,) if not survives else ())
    assert numbers(repository) == [2, 3, 4, 5]


def test_what_a_killed_publisher_has_proven_is_left_to_the_next(repository, plans, tmp_path, monkeypatch):
    """A clean-up in between keeps its note: without that the release would never serve."""

    def die(new, place):
        shutil.copytree(repository.parent, tmp_path / "left")
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "replace_file", die)
    with pytest.raises(KeyboardInterrupt):
        publish(plans[5], repository, UNASKED)
    monkeypatch.undo()
    left = tmp_path / "left" / "cpu"
    (staging_root(left) / "other").mkdir()
    assert retain(left, "tiny", keep=2).removed == (1, 2, 3, 4)
    assert current_number(left, "tiny") == 5
    assert not (staging_root(left) / "other").exists()
    done = publish(plans[5], left, UNASKED)
    assert (done.changed, done.current, done.release.number) == (False, True, 6)
    assert not list(staging_root(left).glob("*"))


def test_a_manifest_that_cannot_be_read_is_not_taken_for_a_damaged_one(repository, plans, monkeypatch, capsys):
    """The disk may be back tomorrow, and the release is gone."""
    read, unreadable = Path.read_text, ["release.json"]

    def fail(path, *arguments, **options):
        if path.parts[-2:] in (("2", unreadable[0]), ("tiny", unreadable[0])):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *arguments, **options)

    before = release_digest(repository, "tiny", 2)
    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(repository.parent))
    with pytest.raises(ReleaseError, match=r"tiny/2/release\.json could not be read: Input/output error"):
        retain(repository, "tiny", keep=1)
    assert main(["releases", "tiny"]) == 1
    assert "release.json could not be read" in capsys.readouterr().err

    # Whether the pointer was moved cannot be told either.
    def lose(public, config):
        unreadable[0] = CONFIG
        raise OSError(errno.EIO, "Input/output error", str(config))

    monkeypatch.setattr(publishing, "replace_file", lambda new, place: lose(new.replace(place), place))
    unreadable[0] = "nothing"
    with pytest.raises(ReleaseError, match="Input/output error"):
        publish(plans[5], repository, UNASKED)
    monkeypatch.undo()
    assert release_digest(repository, "tiny", 2) == before
    assert current_number(repository, "tiny") == 6
    assert is_whole(repository, current_release(repository, "tiny"))


def test_in_object_storage_servers_are_always_waited_for(plans, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    place, slept = RemotePath(Store("memory", "memory://", tmp_path), "bucket/cpu"), []
    for plan in plans[:2]:
        publish(plan, place, UNASKED)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert retain(place, "tiny", keep=2).removed == ()
    assert slept == []
    assert retain(place, "tiny", keep=1).removed == (1,)
    assert slept == [module.FOLLOW_SECONDS]
    MemoryFileSystem.store.clear()


def test_mistakes_remove_nothing(repository):
    for model, keep, message in (("tiny", 0, "at least 1"), ("other", 1, "no release of it")):
        with pytest.raises(ReleaseError, match=message):
            retain(repository, model, keep=keep)
    (repository / "tiny" / CONFIG).write_text("by hand")
    with pytest.raises(ReleaseError, match=r"points to no release \(whole: 1, 2, 3, 4, 5\)"):
        retain(repository, "tiny", keep=1)
    assert numbers(repository) == [1, 2, 3, 4, 5]
    # With the one that serves damaged, the others may be all there is.
    point_to(repository, 5)
    (repository / "tiny__r5__pipeline" / "1" / "model.onnx").write_bytes(b"")
    with pytest.raises(ReleaseError, match="points to release 5, which is not there whole"):
        retain(repository, "tiny", keep=1)


def test_a_server_that_does_not_answer_may_hold_anything(repository):
    with pytest.raises(ServerError, match="nobody knows which release it holds"):
        retain(repository, "tiny", keep=1, settings=TritonSettings(servers=("127.0.0.1:9",)))
    assert numbers(repository) == [1, 2, 3, 4, 5]


def test_the_command_keeps_the_champion(repository, tmp_path, monkeypatch, capsys):
    from mlflow import MlflowClient

    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REFINERY_TRITON_GRPC", raising=False)
    monkeypatch.setattr(releases, "DEFAULT_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(repository.parent))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("REFINERY_MLFLOW_URI", uri)
    assert main(["retain", "tiny", "--keep", "4"]) == 0
    assert capsys.readouterr().out.endswith("removed: 1\n")
    client = MlflowClient(uri, uri)
    client.create_registered_model("tiny")
    version = client.create_model_version("tiny", "file:///nowhere", tags={"refinery.release": "2"})
    client.set_registered_model_alias("tiny", "champion-cpu", version.version)
    assert main(["retain", "tiny", "--keep", "1"]) == 0
    assert capsys.readouterr().out == (
        "release 2 stays: the champion in MLflow\nrelease 5 stays: what is pointed to\nremoved: 3, 4\n"
    )
