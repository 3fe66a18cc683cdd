"""What sources hold now: seen when it changes, not taken while it is being written, and never waited for too long.

The Hub and MLflow's REST API are played by servers on loopback, S3 by moto; MLflow's own store is a real one.
"""

import json
import os
import shutil
import socket
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest

from orchestration.cli.model_argument import ENTRY_OPTIONS, find_or_add
from orchestration.settings import read_access
from resources.boundary import http as asking
from resources.boundary.addresses import Address
from resources.checkpoints.sources import registry
from resources.checkpoints.sources.locating import locate
from resources.checkpoints.sources.registry import parse_reference
from resources.checkpoints.watch import background as aside
from resources.checkpoints.watch import probe as looking
from resources.checkpoints.watch.pool import Looks
from resources.checkpoints.watch.probe import Seen, look
from resources.errors import CheckpointError
from resources.settings.sources import Access, SourceSettings
from resources.storage.locks import file_lock
from tests.conftest import entry_for
from tests.sources import COMMIT, OLDER, serving, write_checkpoint, write_weights

INTERVAL = 30.0


@pytest.fixture(autouse=True)
def no_processes_of_other_tests(monkeypatch):
    monkeypatch.setattr(aside, "_started", [])


@pytest.fixture
def settings(tmp_path):
    return SourceSettings(tmp_path / "sources", Address(f"sqlite:///{tmp_path / 'mlflow.db'}"))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def at(seconds, entry, settings, before=None):
    """A look that many seconds from now."""
    return look(entry, before, settings, interval_s=INTERVAL, now=time.time() + seconds)


def revision(entry, settings):
    """What a folder that has long been still holds."""
    return at(3600, entry, settings).revision


# Folders


def test_a_folder_is_taken_once_it_is_still(folder, settings):
    entry = entry_for(folder)
    fresh = at(1, entry, settings)
    assert (fresh.revision, fresh.problem) == ("", "")
    assert "its files changed" in fresh.waiting
    write_weights(folder, seed=1)
    moved = at(29, entry, settings, fresh)
    assert moved.stat != fresh.stat
    assert moved.waiting
    assert at(31, entry, settings, moved).revision


def test_a_clock_ahead_of_ours_is_not_waited_for(folder, settings):
    """Files of a disk whose clock is an hour ahead are taken after an interval without a change."""
    entry = entry_for(folder)
    first = at(-3600, entry, settings)
    assert first.waiting
    assert at(-3600 + 31, entry, settings, first).revision


def test_what_has_not_changed_is_not_read_again(folder, settings, monkeypatch):
    entry = entry_for(folder)
    seen = at(31, entry, settings)
    monkeypatch.setattr(looking, "content_hashes", None)
    assert at(61, entry, settings, seen) is seen


def test_times_alone_are_no_new_revision_and_content_is_whatever_they_say(folder, settings):
    entry = entry_for(folder)
    seen = at(31, entry, settings)
    weights = folder / "model.safetensors"
    os.utime(weights, (1, 1))
    touched = at(62, entry, settings, seen)
    assert (touched.stat != seen.stat, touched.revision) == (True, seen.revision)
    write_weights(folder, seed=1)
    os.utime(weights, (1, 1))  # same size, same time
    assert at(93, entry, settings, touched).revision != seen.revision
    write_weights(folder, seed=0)
    assert at(124, entry, settings, touched).revision == seen.revision


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def half_a_configuration(folder):
    (folder / "config.json").write_text('{"model_type": ')


def one_shard_of_two(folder):
    (folder / "model.safetensors").unlink()
    write_weights(folder, 0, "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def half_a_list_of_modules(folder):
    (folder / "modules.json").write_text("[{")


@pytest.mark.parametrize("break_it", [cut, half_a_configuration, one_shard_of_two, half_a_list_of_modules])
def test_a_copy_in_progress_is_not_taken(folder, settings, tmp_path, break_it):
    """However still it is; and where it stays so, it is said to be broken, until it changes."""
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    break_it(folder)
    entry = entry_for(folder)
    stopped = at(31, entry, settings)
    assert (stopped.revision, stopped.problem) == ("", "")
    assert str(folder) in stopped.waiting
    broken = at(301, entry, settings, stopped)
    assert (broken.revision, broken.problem) == ("", stopped.waiting)
    assert at(400, entry, settings, broken) is broken
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    assert at(500, entry, settings, broken).revision == revision(entry_for(whole), settings)


@pytest.mark.parametrize(
    "name",
    [".model.safetensors.Qx3f9a", "model.safetensors.part", ".cache/huggingface/download/x.0123.incomplete"],
)
def test_what_is_renamed_once_it_is_whole_is_waited_for(folder, settings, name):
    """Meanwhile the new configuration lies beside the old weights."""
    entry = entry_for(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).touch()
    first = at(100, entry, settings)
    assert "a file is still being copied or downloaded" in first.waiting
    assert at(301, entry, settings, first).revision  # it was left behind
    assert at(100, entry, settings, at(301, entry, settings)).revision  # what lies there is known already
    (folder / name).unlink()
    assert at(100, entry, settings).revision


def test_a_problem_of_a_moment_is_none_for_ever(folder, settings, monkeypatch):
    def unreadable(*arguments):
        raise CheckpointError("tiny: Input/output error.")

    entry = entry_for(folder)
    with monkeypatch.context() as patch:
        patch.setattr(looking, "content_hashes", unreadable)
        seen = at(3600, entry, settings)
    assert "Input/output error" in seen.problem
    assert at(3630, entry, settings, seen) is seen
    assert at(3600 + 601, entry, settings, seen).revision


def test_an_entry_that_is_put_right_is_looked_at_again(folder, settings):
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "auto_map": {"a": "b"}})
    )
    entry = entry_for(folder)
    refused = at(3600, entry, settings)
    assert "trust_remote_code" in refused.problem
    assert at(3600, entry_for(folder, trust_remote_code=True), settings, refused).revision


def test_a_folder_that_is_not_there(tmp_path, settings):
    with pytest.raises(CheckpointError, match=r"the folder .*nowhere does not exist"):
        at(0, entry_for(tmp_path / "nowhere"), settings)


@pytest.mark.parametrize("limit", ["SMALL_BYTES", "SMALL_TOKENIZER_BYTES"])
def test_large_folders_are_digested_by_a_process_of_its_own(folder, settings, monkeypatch, limit):
    entry = entry_for(folder)
    expected = revision(entry, settings)
    monkeypatch.setattr(looking, limit, 10)
    began = time.monotonic()
    seen = at(31, entry, settings)
    assert "a background process is hashing" in seen.waiting
    assert time.monotonic() - began < 2
    assert wait_for(lambda before: at(31, entry, settings, before), seen).revision == expected


def test_a_large_copy_in_progress_is_not_taken(folder, settings, monkeypatch):
    monkeypatch.setattr(looking, "SMALL_BYTES", 0)
    cut(folder)
    entry = entry_for(folder)
    seen = wait_for(lambda before: at(301, entry, settings, before), at(31, entry, settings))
    assert "model.safetensors is damaged" in seen.problem


def wait_for(again, seen=None):
    """The first look that settles."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        seen = again(seen)
        if seen.revision or seen.problem:
            return seen
        time.sleep(0.2)
    raise AssertionError(seen)


def test_processes_that_end_without_an_answer_are_said(folder, settings, monkeypatch):
    """Not started again and again."""
    started = []
    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: started.append(key))
    monkeypatch.setattr(looking, "SMALL_BYTES", 0)
    entry = entry_for(folder)
    seen = at(3600, entry, settings)
    at(3610, entry, settings, seen)
    assert len(started) == 1  # it may not have begun yet
    at(3630, entry, settings, seen)
    at(3660, entry, settings, seen)
    with pytest.raises(CheckpointError, match="3 processes that looked at .* ended without an answer"):
        at(3690, entry, settings, seen)
    assert len(started) == 3
    at(3690 + 3600, entry, settings, seen)
    assert len(started) == 4


def test_a_python_package_that_is_upgraded(tmp_path, settings, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = tmp_path / "site" / "tiny_checkpoint"
    write_checkpoint(package / "model")
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    versions = [tmp_path / "site" / f"tiny_checkpoint-{version}.dist-info" for version in ("1.0", "1.1")]
    versions[0].mkdir()
    (versions[0] / "METADATA").write_text("Name: tiny-checkpoint\nVersion: 1.0\n")
    entry = entry_for("package:tiny_checkpoint/model")
    first = at(31, entry, settings)
    assert first.revision == revision(entry_for(package / "model"), settings)
    versions[0].rename(versions[1])
    (versions[1] / "METADATA").write_text("Name: tiny-checkpoint\nVersion: 1.1\n")
    same = at(62, entry, settings, first)
    assert (same.stat != first.stat, same.revision) == (True, first.revision)
    write_weights(package / "model", seed=1)
    assert at(93, entry, settings, same).revision != first.revision
    with pytest.raises(CheckpointError, match="no Python package 'no_such_package'"):
        at(0, entry_for("package:no_such_package/model"), settings)


# The Hub


def on(address, **access):
    return SourceSettings(Path(), access=Access(hub_endpoint=Address(address), **access))


def test_the_hub_is_asked_for_the_commit_of_a_branch_or_tag():
    commits = {"/api/models/org/m?expand=sha": OLDER, "/api/models/org/m/revision/v1%2Fa?expand=sha": COMMIT}
    with serving(lambda path: (200, {"sha": commits[path]}, {})) as (address, asked):
        branch = at(0, entry_for("org/m"), on(address, hub_token="secret"))
        assert (branch.revision, asked[0][1]["Authorization"]) == (OLDER, "Bearer secret")
        assert at(0, entry_for("org/m@v1/a"), on(address)).revision == COMMIT
        assert at(30, entry_for("org/m"), on(address), branch) is branch
        commits["/api/models/org/m?expand=sha"] = COMMIT
        assert at(60, entry_for("org/m"), on(address), branch).revision == COMMIT
        assert "Authorization" not in asked[-1][1]


def test_a_commit_is_never_asked_for(unused_port):
    nobody = on(f"http://127.0.0.1:{unused_port}")
    assert at(0, entry_for(f"org/m@{COMMIT}"), nobody).revision == COMMIT
    with pytest.raises(
        CheckpointError, match=r"the Hub at http://127.0.0.1:\d+ did not report the commit of org/m: .*refused"
    ):
        at(0, entry_for("org/m"), nobody)


@pytest.mark.parametrize(
    ("code", "document", "headers", "expected"),
    [
        (404, {}, {"X-Error-Code": "RevisionNotFound"}, "org/m has no revision 'v9' on the Hub"),
        (404, {}, {"X-Error-Code": "RepoNotFound"}, "the Hub has no model 'org/m'"),
        (401, {}, {}, "set HF_TOKEN for a private model"),
        (403, {}, {"X-Error-Code": "GatedRepo"}, "org/m@v9 is gated"),
        (429, {}, {}, "429"),
        (503, {}, {}, "503"),
        (200, {"sha": None}, {}, "does not name a commit"),
        (200, ["sha"], {}, "does not name a commit"),
    ],
)
def test_refusals_of_the_hub(code, document, headers, expected):
    with (
        serving(lambda path: (code, document, headers)) as (address, _),
        pytest.raises(CheckpointError, match="source: ") as caught,
    ):
        at(0, entry_for("org/m@v9"), on(address))
    assert expected in str(caught.value)


def test_a_token_stays_with_the_host_it_is_for():
    with serving(lambda path: (200, {"sha": COMMIT}, {})) as (elsewhere, asked_elsewhere):
        there = {"Location": f"{elsewhere}/moved"}
        with serving(lambda path: (307, {}, there)) as (address, asked):
            assert at(0, entry_for("org/m"), on(address, hub_token="secret")).revision == COMMIT
    assert "Authorization" in asked[0][1]
    assert [path for path, headers in asked_elsewhere if "Authorization" not in headers] == ["/moved"]


@pytest.mark.parametrize("drips", [False, True])
def test_a_hub_that_does_not_end_its_answer(monkeypatch, drips):
    """Neither silence nor an answer that never ends is waited for."""
    monkeypatch.setattr(asking, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def talk():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                for _ in range(40 if drips else 0):
                    if ended.wait(0.1):
                        return
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return
                ended.wait(5)

        talking = threading.Thread(target=talk, daemon=True)
        talking.start()
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="did not report the commit of org/m"):
            at(0, entry_for("org/m"), on(f"http://127.0.0.1:{listening.getsockname()[1]}"))
        assert time.monotonic() - began < 3
        ended.set()
        talking.join(5)


def test_offline_the_cache_says(tmp_path):
    access = read_access({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""})
    assert access.hub_token is None
    settings = SourceSettings(tmp_path, access=access)
    with pytest.raises(CheckpointError, match="org/m is not in the Hub cache, and HF_HUB_OFFLINE is set"):
        at(0, entry_for("org/m"), settings)
    reference = tmp_path / "hub" / "models--org--m" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    assert at(0, entry_for("org/m"), settings).revision == COMMIT


def test_a_token_is_found_as_huggingface_hub_finds_it(tmp_path):
    (tmp_path / "token").write_text("of the file\n")
    assert read_access({"HF_HOME": str(tmp_path)}).hub_token == "of the file"  # noqa: S105
    access = read_access({"HF_HOME": str(tmp_path), "HF_TOKEN": "given"})
    assert access.hub_token == "given"  # noqa: S105
    assert "given" not in repr(access)


# MLflow's registry


def version(number, **changes):
    return {
        "name": "bert",
        "version": str(number),
        "source": f"models:/m-{number}",
        "status": "READY",
        "creation_timestamp": 1000 + number,
        **changes,
    }


@pytest.mark.parametrize(
    ("source", "question"),
    [
        ("models:/bert@live", "registered-models/alias?name=bert&alias=live"),
        ("models:/bert/7", "model-versions/get?name=bert&version=7"),
        (
            "models:/bert/latest",
            "model-versions/search?filter=name+%3D+%27bert%27&max_results=1&order_by=version_number+DESC",
        ),
    ],
)
def test_a_tracking_server_is_asked_over_rest(source, question):
    """Without importing MLflow."""
    held = [7]

    def answer(path):
        assert path == f"/api/2.0/mlflow/{question}"
        found = version(held[0])
        return 200, {"model_versions": [found]} if "search" in path else {"model_version": found}, {}

    with serving(answer) as (address, asked):
        settings = SourceSettings(Path(), Address(address), Access(mlflow_token="secret"))
        seen = at(0, entry_for(source), settings)
        assert seen.revision.startswith("v7-")
        assert asked[0][1]["Authorization"] == "Bearer secret"
        held[0] = 8
        after = at(30, entry_for(source), settings, seen)
        if source.endswith("/7"):  # never changes
            assert (after, len(asked)) == (seen, 1)
        else:
            assert after.revision.startswith("v8-")


@pytest.mark.parametrize(
    ("code", "document", "expected"),
    [
        (200, {"model_version": version(1, source="refinery:0123")}, "this project registered itself"),
        (200, {"model_version": version(1, tags=[{"key": "refinery.champion", "value": "x"}])}, "registered itself"),
        (200, {"model_version": version(1, status="PENDING_REGISTRATION")}, "is PENDING_REGISTRATION, not READY"),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}, "has no such version"),
        (200, {}, "has no such version"),
        (401, {}, "gave no usable answer: HTTP Error 401"),
        (200, [], "gave no usable answer"),
    ],
)
def test_versions_that_are_no_checkpoint(code, document, expected):
    with (
        serving(lambda path: (code, document, {})) as (address, _),
        pytest.raises(CheckpointError, match="source: ") as caught,
    ):
        at(0, entry_for("models:/bert@live"), SourceSettings(Path(), Address(address)))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("models:/Bert base@live", "bert-base"),
        ("models:/bert/latest", "bert"),
        ("models:/bert/3", "bert"),
        ("s3://http://host:9000/bucket/trained/bert/", "bert"),
        ("gs://bucket/bert", "bert"),
    ],
)
def test_a_source_on_the_command_line_is_an_entry(workspace, source, name):
    workspace.catalog_path.write_text("models: []\n")
    given = dict.fromkeys(ENTRY_OPTIONS) | {"model": source, "task": "embedding"}
    assert find_or_add(workspace, Namespace(**given)).source == source
    assert workspace.entry(name).source == source


@pytest.mark.parametrize(
    "source", ["models:/bert", "models:/bert/Production", "models:/a/b/1", "models:/bert/0", "models:/@x"]
)
def test_references_that_name_no_version(source):
    with pytest.raises(CheckpointError, match="names no version of a registered model. Write models:/name@alias"):
        parse_reference(source)


def flavored(folder, checkpoint):
    """As mlflow.transformers lays it out: the tokenizer apart from the model."""
    model, tokenizer = folder / "model", folder / "components" / "tokenizer"
    shutil.copytree(checkpoint, model)
    tokenizer.mkdir(parents=True)
    (model / "tokenizer.json").rename(tokenizer / "tokenizer.json")
    flavor = {"transformers": {"model_binary": "model", "components": ["tokenizer"]}}
    (folder / "MLmodel").write_text(json.dumps({"flavors": flavor}))


@pytest.mark.parametrize(
    "fields",
    [{"model_binary": "../../outside"}, {"model_binary": "model", "components": ["../../../outside"]}],
)
def test_a_version_that_leads_out_of_its_folder_is_refused(folder, tmp_path, fields):
    """Nothing is written there, nor taken from there."""
    logged = tmp_path / "a" / "logged"
    flavored(logged, folder)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    (logged / "MLmodel").write_text(json.dumps({"flavors": {"transformers": {"components": ["tokenizer"], **fields}}}))
    with pytest.raises(CheckpointError, match="names a path outside the logged model"):
        registry._join_tokenizers(logged)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret.json"]
    assert not (logged / "model" / "secret.json").exists()


def test_a_store_that_only_mlflow_can_read(settings, folder, tmp_path, monkeypatch):
    """A real sqlite store: looked at by a process of its own, and only when its file has changed; then fetched."""
    from mlflow import MlflowClient

    client = MlflowClient(settings.tracking_uri)
    client.create_registered_model("bert")
    for number in (1, 2):
        write_weights(folder, number)
        flavored(tmp_path / f"logged{number}", folder)
        client.create_model_version("bert", source=(tmp_path / f"logged{number}").as_uri())
    client.set_registered_model_alias("bert", "live", "1")
    entry = entry_for("models:/bert@live")
    first = at(0, entry, settings)
    assert first.waiting
    first = wait_for(lambda before: at(0, entry, settings, before), first)
    assert first.revision.startswith("v1-")
    monkeypatch.setattr(aside, "_start", None)
    assert at(3600, entry, settings, first) is first  # the file is as it was
    monkeypatch.undo()
    client.set_registered_model_alias("bert", "live", "2")
    moved = wait_for(lambda _: after(at(3600, entry, settings, first), first))
    assert moved.revision.startswith("v2-")
    found = locate(entry.source, settings=settings)
    assert found.revision == moved.revision
    assert (found.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (found.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert locate(entry.source, settings=settings) == found
    client.create_model_version("bert", source="refinery:0123")
    with pytest.raises(CheckpointError, match="this project registered itself"):
        locate("models:/bert/latest", settings=settings)
    with pytest.raises(CheckpointError, match="has no such version"):
        locate("models:/bert@gone", settings=settings)


def after(seen, before):
    """A look that is not the one before, or one that has not settled."""
    return seen if seen.revision != before.revision else Seen(stat="", since=0.0)


def test_no_store_yet(settings):
    with pytest.raises(CheckpointError, match="has no such version"):
        at(0, entry_for("models:/bert/1"), settings)
    assert not Path(settings.tracking_uri.removeprefix("sqlite:///")).exists()


# Object storage


def put(place, folder):
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())


def test_object_storage(s3, folder, settings, tmp_path):
    place = s3.place("trained/bert", tmp_path)
    put(place, folder)
    (place / "onnx/model.onnx").write_bytes(b"of another runtime")
    entry = entry_for(str(place))
    fresh = at(0, entry, settings)
    assert "its files changed" in fresh.waiting
    first = at(40, entry, settings, fresh)
    s3.requests.clear()
    assert at(70, entry, settings, first) is first
    assert len(s3.requests) == 1
    found = locate(entry.source, settings=settings)
    assert found.revision == first.revision
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    s3.requests.clear()
    assert locate(entry.source, settings=settings) == found
    assert len(s3.requests) == 1  # nothing is downloaded again
    write_weights(folder, seed=1)
    put(place, folder)
    assert "its files changed" in at(1, entry, settings, first).waiting
    second = at(40, entry, settings, first)
    assert second.revision not in ("", first.revision)
    write_weights(folder, seed=0)
    put(place, folder)
    assert at(40, entry, settings, second).revision == first.revision


def test_an_upload_in_progress_is_not_taken(s3, folder, settings, tmp_path):
    place = s3.place("half/bert", tmp_path)
    one_shard_of_two(folder)
    put(place, folder)
    entry = entry_for(str(place))
    stopped = at(40, entry, settings)
    assert "model-00002-of-00002.safetensors is missing" in stopped.waiting
    assert "model-00002-of-00002.safetensors is missing" in at(400, entry, settings, stopped).problem
    write_weights(folder, 0, "model-00002-of-00002.safetensors")
    put(place, folder)
    assert at(40, entry, settings, stopped).revision


def test_object_storage_that_holds_nothing_or_is_away(s3, settings, unused_port, tmp_path):
    with pytest.raises(CheckpointError, match="there are no checkpoint files below"):
        at(0, entry_for(str(s3.place("nothing", tmp_path))), settings)
    with pytest.raises(CheckpointError, match="Create the bucket, or correct its source"):
        at(0, entry_for(str(s3.place("x", tmp_path, bucket="no-such-bucket"))), settings)
    with pytest.raises(CheckpointError, match="the request to list it failed"):
        at(0, entry_for(f"s3://http://127.0.0.1:{unused_port}/bucket/x"), settings)
    with pytest.raises(CheckpointError, match="names no bucket"):
        at(0, entry_for("s3://"), settings)


def test_what_changes_while_it_is_downloaded_is_not_kept(s3, folder, settings, tmp_path, monkeypatch):
    from resources.storage.objects import RemotePath

    place = s3.place("moving/bert", tmp_path)
    put(place, folder)
    download = RemotePath.download

    def and_change(self, *arguments):
        download(self, *arguments)
        write_weights(folder, seed=5)
        put(place, folder)

    monkeypatch.setattr(RemotePath, "download", and_change)
    with pytest.raises(CheckpointError, match="changed while it was downloaded"):
        locate(str(place), settings=settings)
    monkeypatch.undo()
    found = locate(str(place), settings=settings)
    assert (found.folder / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


# Many at once


def seen(text):
    return Seen(stat=text, since=0.0, revision=text)


def test_a_look_that_hangs_holds_up_no_other_and_is_not_begun_twice():
    looks, began, let_go = Looks(), [], threading.Event()

    def hang():
        began.append(1)
        let_go.wait(20)
        return seen("late")

    jobs = {(f"m{number}", ""): (lambda number=number: seen(str(number))) for number in range(100)}
    jobs = {("hangs", ""): hang, **jobs}
    found, started = {}, time.monotonic()
    while len(found) < 100 and time.monotonic() < started + 15:  # a busy machine begins none in the first
        found |= looks.take(jobs, time.monotonic() + 0.5)
    assert len(found) == 100
    assert ("hangs", "") not in found
    assert len(began) == 1
    let_go.set()
    deadline = time.monotonic() + 5
    jobs = {("hangs", ""): hang}
    while time.monotonic() < deadline and not (found := looks.take(jobs, time.monotonic() + 0.1)):
        time.sleep(0.01)
    assert found["hangs", ""].revision == "late"


def test_a_look_that_hangs_for_long_is_said(monkeypatch):
    from resources.checkpoints.watch import pool as module

    monkeypatch.setattr(module, "LATE_SECONDS", 0.1)
    looks, let_go = Looks(), threading.Event()
    jobs = {("hangs", ""): lambda: let_go.wait(20)}
    assert looks.take(jobs, time.monotonic() + 0.2) == {}
    assert "it does not answer" in str(looks.take(jobs, time.monotonic() + 0.1)["hangs", ""])
    let_go.set()


def test_more_looks_than_there_is_time_for_are_left():
    looks, begun = Looks(), []

    def one():
        begun.append(1)
        time.sleep(0.1)
        return seen("x")

    jobs = {(str(number), ""): one for number in range(200)}
    found = looks.take(jobs, time.monotonic() + 0.35)
    time.sleep(0.3)
    assert len(begun) < 100
    assert 16 <= len(found) < 100
    first = {str(number) for number in range(len(found) // 2)}
    assert first <= {name for name, _ in found}


def test_a_defect_costs_one_look():
    found = Looks().take({("a", ""): lambda: 1 / 0, ("b", ""): lambda: seen("b")}, time.monotonic() + 5)
    assert "ZeroDivisionError" in str(found["a", ""])
    assert found["b", ""].revision == "b"


def test_a_problem_is_looked_at_again_after_a_while(folder, settings, monkeypatch):
    """It may have been that of a moment."""
    started = []
    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: started.append(key))
    entry = entry_for(folder)
    problem = aside.Answer(source=entry.source, key="key", asked="key", problem="database is locked", at=1000.0)
    answered(settings, entry, problem)
    assert aside.ask(entry, settings, "key", now=1599.0) == problem
    assert started == []
    aside.ask(entry, settings, "key", now=1601.0)
    assert started == ["key"]
    # What will have been answered tomorrow was, before the clock was put back.
    answered(settings, entry, problem.model_copy(update={"at": 1000.0 + 86400}))
    aside.ask(entry, settings, "key", now=1000.0)
    assert started == ["key", "key"]


def answered(settings, entry, answer):
    path = aside._answer_file(settings, entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(answer.model_dump_json())


def test_an_answer_about_another_source_is_none_about_this_one(folder, settings, monkeypatch):
    """The catalog has the model from elsewhere now, and MLflow's database is as it was."""
    Path(settings.tracking_uri.removeprefix("sqlite:///")).touch()
    started = []
    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: started.append((entry.source, key)))
    before, after = entry_for("models:/bert@live"), entry_for("models:/roberta@live")
    at(0, before, settings)
    ((_, key),) = started
    answered(settings, before, aside.Answer(source=before.source, key=key, revision="v1-of-bert", at=time.time()))
    assert at(0, before, settings).revision == "v1-of-bert"
    assert at(0, after, settings).revision == ""
    assert started[1:] == [(after.source, key)]


def test_processes_that_ask_a_database_and_end_without_an_answer_are_said(folder, monkeypatch):
    """Each asks about another state of it."""
    settings = SourceSettings(folder / "sources", Address("postgresql://nobody/mlflow"))
    started = []
    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: started.append(key))
    for seconds in (0, 200, 400):
        assert at(seconds, entry_for("models:/bert@live"), settings).waiting
    with pytest.raises(CheckpointError, match="3 processes that looked at models:/bert@live ended"):
        at(600, entry_for("models:/bert@live"), settings)
    assert len(set(started)) == 3


def test_a_process_that_is_at_work_has_not_ended(folder, settings, monkeypatch):
    started = []
    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: started.append(key))
    monkeypatch.setattr(looking, "SMALL_BYTES", 0)
    entry = entry_for(folder)
    for seconds in (3600, 3630, 3660):
        at(seconds, entry, settings)
    with file_lock(aside._answer_file(settings, entry).with_suffix(".lock")):
        assert "a background process is hashing" in at(3690, entry, settings).waiting
    assert len(started) == 3


def test_processes_of_two_sources_at_once_and_no_more(folder, settings, monkeypatch):
    class Running:
        def poll(self):
            return None

    monkeypatch.setattr(aside, "_start", lambda entry, settings, key: aside._started.append(Running()))
    for name in ("a", "b", "c"):
        assert aside.ask(entry_for(folder, name=name), settings, "key", now=1000.0) is None
    assert len(aside._started) == 2
