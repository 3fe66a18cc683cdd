"""A repository in object storage does what one in a folder does: nothing half done is pointed to, and nothing is lost.

S3 is moto's, on loopback. Where every single step is interrupted, fsspec's store in memory stands in for it: it is the
same code from `RemotePath` on, and a hundred publishes there take seconds.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from orchestration.cli import main, releases, serving
from orchestration.settings import read_workspace
from resources.artifacts.records import ServingSetting
from resources.errors import CatalogError, ReleaseError, ServerError, StorageError
from resources.settings.triton import TritonSettings
from resources.storage import lease as leases
from resources.storage import objects as storage
from resources.storage.locations import parse_location
from resources.storage.objects import LeaseTimes, RemotePath, Store
from resources.triton import files
from resources.triton import release as writing
from resources.triton import retain as retaining
from resources.triton import rollback as rolling_back
from resources.triton import verify as verifying
from resources.triton.files import copy_tree, discard, repository_lock, staging_root
from resources.triton.foreground import serve_foreground
from resources.triton.launch import Ports
from resources.triton.layout import CONFIG, MANIFEST, current_number, current_release, is_whole, list_releases
from resources.triton.mirror import served_folder
from resources.triton.preflight import require_writable
from resources.triton.publish import Steps, publish, unverified_root
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.verify import verify_release
from tests.objects import BUCKET, CHANGES, files_of, s3_credentials, write_file
from tests.releases import answers_of, make_plan, query_texts, unasked

UNASKED = Steps(prove=unasked)
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]


@pytest.fixture(scope="module", autouse=True)
def credentials():
    with s3_credentials():
        yield


@pytest.fixture(autouse=True)
def followed(monkeypatch):
    """Nobody serves what is cleaned up here, so nobody has to be waited for."""
    monkeypatch.setattr(retaining, "FOLLOW_SECONDS", 0.0)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(4)]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Releases without the twelve megabytes of `tokenizers`, where none is served."""
    package = tmp_path / "package" / "__init__.py"
    write_file(package, b"")
    monkeypatch.setattr(writing, "find_spec", lambda name: SimpleNamespace(origin=str(package)))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def bucket(s3, tmp_path):
    """An empty repository in S3."""
    return s3.place(f"{tmp_path.name}/cpu", tmp_path / "scratch")


@pytest.fixture(params=["folder", "s3"])
def repository(request, tmp_path):
    """An empty repository, in either."""
    return tmp_path / "models" / "cpu" if request.param == "folder" else request.getfixturevalue("bucket")


class NoFolders(list):
    """What object storage keeps of folders that nothing is in."""

    def append(self, folder):
        pass


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty repository in fsspec's store in memory."""
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", NoFolders([""]))
    return RemotePath(Store("memory", "memory://", tmp_path / "scratch"), "bucket/cpu")


def point_to(repository, number):
    """As somebody who rolls back by hand."""
    write_file(repository / "tiny" / CONFIG, (repository / "tiny" / str(number) / CONFIG).read_bytes())


def numbers(repository):
    return [release.number for release in list_releases(repository, "tiny")]


def assert_nothing_beside(repository):
    """No staging, no lease, nothing on this machine."""
    assert files_of(staging_root(repository)) == {} if staging_root(repository).exists() else True
    if isinstance(repository, RemotePath):
        assert (repository.parent / f".{repository.name}.lock").sizes() == {}
        assert [path for path in repository.store.scratch.rglob("*") if path.is_file()] == []


# --- as in a folder ---------------------------------------------------------------------------------------------------


def test_what_is_published_stays_as_it_is(repository, plans, small):
    first = publish(plans[0], repository, UNASKED)
    assert (first.changed, first.release.number) == (True, 1)
    before = files_of(repository)
    assert not publish(replace(plans[0], lineage={"refinery_dagster_run": "later"}), repository, UNASKED).changed
    assert files_of(repository) == before
    second = publish(plans[1], repository, UNASKED)
    assert (second.changed, current_release(repository, "tiny")) == (True, second.release)
    after = files_of(repository)
    assert {name: after[name] for name in before if name != f"tiny/{CONFIG}"} == {
        name: data for name, data in before.items() if name != f"tiny/{CONFIG}"
    }
    assert after[f"tiny/{CONFIG}"] == after[f"tiny/2/{CONFIG}"]
    assert numbers(repository) == [1, 2]
    point_to(repository, 1)
    for plan in plans[:2]:
        assert not publish(plan, repository, UNASKED).changed
    assert current_number(repository, "tiny") == 1
    assert publish(plans[2], repository, UNASKED).release.number == 3
    assert publish(plans[0], repository, UNASKED).release.number == 4  # champion again
    assert_nothing_beside(repository)


def test_what_is_not_proven_leaves_nothing(repository, plans, small):
    def disprove(folder, release):
        return unasked(folder, release).model_copy(update={"passed": False, "failures": ("cosine 0.1",)})

    def fail(folder, release, plan):
        assert (folder / f"tiny__r{release.number}__pipeline" / CONFIG).is_file()
        raise ServerError("no server")

    for before in ({}, None):
        before = before if before is not None else files_of(repository)
        with pytest.raises(ReleaseError, match="was not published"):
            publish(plans[1], repository, Steps(prove=disprove))
        with pytest.raises(ServerError, match="no server"):
            publish(plans[1], repository, Steps(prove_inside=fail))
        assert files_of(repository) == before
        assert_nothing_beside(repository)
        publish(plans[0], repository, UNASKED)


def test_what_a_server_does_not_take_up_is_taken_back(repository, plans, small):
    def refuse(release):
        assert current_number(repository, "tiny") == release.number
        raise ServerError("out of memory")

    for plan in plans[:2]:
        before = files_of(repository) if repository.exists() else {}
        with pytest.raises(ServerError, match="was taken back: out of memory"):
            publish(plan, repository, Steps(prove=unasked, announce=refuse))
        assert files_of(repository) == before
        assert_nothing_beside(repository)
        publish(plan, repository, UNASKED)


def test_a_place_that_is_not_ours_is_left_alone(repository, plans, small, tmp_path):
    write_file(repository / "tiny" / "1" / "model.onnx", b"precious")
    write_file(repository / "other__r1__mine" / "1" / "model.py", b"precious")
    write_file(repository / "tiny__r1__engine" / "1" / "model.onnx", b"precious")
    before = files_of(repository)
    with pytest.raises(ReleaseError, match=r"was not published by transformer-refinery\. Move it away"):
        publish(plans[0], repository, UNASKED)
    assert files_of(repository) == before
    publish(make_plan(tmp_path, model="mine"), repository, UNASKED)
    assert before.items() <= files_of(repository).items()


def test_a_folder_with_a_number_in_another_script_is_no_release(bucket, plans, small):
    theirs = b'model_name: "somebody__r2__engine"'
    write_file(bucket / "somebody" / "²" / CONFIG, theirs)
    publish(plans[0], bucket, UNASKED)
    assert (bucket / "somebody" / "²" / CONFIG).read_bytes() == theirs


def test_a_damaged_release_is_published_anew(repository, plans, small):
    publish(plans[0], repository, UNASKED)
    write_file(repository / "tiny__r1__pipeline" / "1" / "model.onnx", b"")
    assert publish(plans[0], repository, UNASKED).release.number == 2


def test_what_nobody_can_prove_waits_beside(repository, plans, small):
    native = replace(plans[0], flavour="native")
    first = publish(native, repository, Steps())
    waiting = unverified_root(repository, "tiny")
    assert str(waiting) in first.advice
    assert not repository.exists() or files_of(repository) == {}
    assert current_release(waiting, "tiny") == first.release
    assert is_whole(waiting, first.release)
    assert not publish(native, repository, Steps()).changed
    assert publish(replace(native, serving=ServingSetting(threads=2)), repository, Steps()).release.number == 2
    assert publish(replace(native, serving=ServingSetting(threads=2)), repository, UNASKED).release.number == 3
    assert not waiting.exists()
    assert_nothing_beside(repository)


def test_publishers_at_once_make_one_release_each(repository, plans, small, monkeypatch):
    if isinstance(repository, RemotePath):
        repository.store.lease_times = LeaseTimes(look=0.05)
    threads = [threading.Thread(target=publish, args=(plan, repository, UNASKED)) for plan in plans[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert numbers(repository) == [1, 2, 3]
    assert len({release.content_digest for release in list_releases(repository, "tiny")}) == 3
    assert_nothing_beside(repository)


def test_old_releases_go_whole(repository, plans, small):
    for plan in plans:
        publish(plan, repository, UNASKED)
    point_to(repository, 2)
    write_file(repository / "foreign" / "1" / "model.onnx", b"precious")
    done = retain(repository, "tiny", keep=1)
    assert (done.removed, list(done.kept)) == ((1, 3), [2, 4])
    assert numbers(repository) == [2, 4]
    left = {name.split("/")[0] for name in files_of(repository)}
    assert left == {"foreign", "tiny", *(f"tiny__r{number}__{part}" for number in (2, 4) for part in PARTS)}
    assert_nothing_beside(repository)


PARTS = ("pipeline",)


# --- in which order ---------------------------------------------------------------------------------------------------


def test_documents_beyond_their_bound_are_not_read(bucket, monkeypatch):
    monkeypatch.setattr(storage, "MOST_DOCUMENT_BYTES", 2**20)
    place = bucket / "record.json"
    for size in (0, 5, 2**20):
        place.write_bytes(bytes(size))
        assert len(place.read_bytes()) == size
    place.write_bytes(bytes(2**20 + 1))
    with pytest.raises(StorageError, match=r"record\.json is larger than 1 MB"):
        place.read_bytes()


def test_files_come_model_py_first_and_the_pointer_last(s3, bucket, plans, small):
    publish(plans[0], bucket, UNASKED)
    home = bucket.key.removeprefix(f"{BUCKET}/")
    s3.requests.clear()
    publish(plans[1], bucket, UNASKED)
    put = [key.removeprefix(f"{home}/") for key in s3.changed() if key.startswith(f"{home}/")]
    assert put[-3:] == [f"tiny/2/{CONFIG}", f"tiny/2/{MANIFEST}", f"tiny/{CONFIG}"]
    for part in PARTS:
        own = [key for key in put if key.startswith(f"tiny__r2__{part}/")]
        # A version folder is there from its first file on, and without model.py it hangs a server.
        assert own[0] == f"tiny__r2__{part}/1/model.py"
        assert own[-1] == f"tiny__r2__{part}/{CONFIG}"
        assert len(own) > 5


def test_what_is_removed_goes_the_other_way_round(memory, plans, small, monkeypatch):
    publish(plans[0], memory, UNASKED)
    removed = []
    monkeypatch.setattr(RemotePath, "remove", lambda path, names: removed.append(names))
    discard(memory / "tiny__r1__pipeline", memory)
    assert (removed[0], removed[-1]) == ([CONFIG], ["1/model.py"])
    removed.clear()
    discard(memory / "tiny" / "1", memory)
    assert removed == [[MANIFEST], [CONFIG]]
    removed.clear()
    discard(memory / "tiny", memory)
    assert removed == [[CONFIG], [f"1/{MANIFEST}"], [f"1/{CONFIG}"]]


def test_names_that_lead_out_of_a_folder_are_not_copied(memory, tmp_path):
    for name in ("tiny/../../outside", f"{tmp_path}/outside", "tiny//outside", "tiny/./outside"):
        (memory / name).write_bytes(b"")
        with pytest.raises(ReleaseError, match="is no path of a repository"):
            copy_tree(memory, tmp_path / "copy" / "deep")
        memory.remove([name])
        assert memory.sizes() == {}
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "copy").exists()


def test_a_removal_that_the_store_refuses_is_seen_and_nothing_more_is_removed(s3, bucket, plans, small):
    """Else a configuration could outlive its `model.py`, and a server would wait for that for ever."""
    for plan in plans[:3]:
        publish(plan, bucket, UNASKED)
    before = files_of(bucket)
    s3.refuses = lambda method, key: method == "DELETE" and key.endswith(f"tiny__r1__pipeline/{CONFIG}")
    with pytest.raises(StorageError, match=f"tiny__r1__pipeline/{CONFIG}: the store refuses to remove it"):
        retain(bucket, "tiny", keep=1)
    gone = {name.split("/")[0] for name in before.keys() - files_of(bucket).keys()}
    assert gone == {"tiny"}
    s3.refuses = lambda method, key: False
    retain(bucket, "tiny", keep=1)
    assert numbers(bucket) == [3]
    assert not (bucket / "tiny__r1__pipeline").exists()


def test_names_are_no_patterns(memory):
    """Of somebody else's file: a place that a user gives is refused with a star or bracket."""
    for name in ("tiny/a[12]", "tiny/a1", "tiny/*"):
        (memory / name).write_bytes(b"")
    memory.remove(["tiny/a[12]", "tiny/*"])
    assert memory.sizes() == {"tiny/a1": 0}


# --- killed -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """No handler of the code under test has a say after it."""


def interrupted(store, step, action, how="killed"):
    """Run it so that its n-th change of the store, and all that it asks after that, does not happen, or, `unanswered`,
    so that it happens and an error is all that is said of it. `interrupted`, or `through` where it made fewer.
    """
    real, count = Store.filesystem, 0

    def filesystem(self):
        if how == "killed" and count >= step:
            raise Killed
        return real(self)

    changing = RemotePath._changing

    @contextmanager
    def counted(self, *arguments):
        nonlocal count
        count += 1
        lost = how == "unanswered" and count == step
        with changing(self, *arguments) as asked:
            yield asked
        if lost:
            raise StorageError("no answer in time")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemotePath, "_changing", counted)
        patch.setattr(Store, "filesystem", filesystem)
        try:
            action()
        except Killed:
            return "interrupted"
        except (ReleaseError, StorageError) as error:
            assert "no answer in time" in str(error)
            return "interrupted"
        finally:
            store.leases.clear()
    return "through" if count < step else "interrupted"


def forget_claims(repository):
    """A dead publisher's lease would have to be waited for; see below."""
    lock = repository.parent / f".{repository.name}.lock"
    lock.remove(list(lock.sizes()))


HOW = pytest.mark.parametrize("how", ["killed", "unanswered"])


@HOW
@pytest.mark.parametrize("case", ["first release", "next release", "waiting release"])
def test_a_publisher_interrupted_at_any_step_is_made_good_by_the_next(memory, plans, small, case, how):
    from fsspec.implementations.memory import MemoryFileSystem

    plan, steps = plans[1], UNASKED
    if case == "next release":
        publish(plans[0], memory, UNASKED)
    if case == "waiting release":
        plan, steps = replace(plan, flavour="native"), Steps()
        publish(replace(plans[0], flavour="native"), memory, steps)
    base = {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}
    old = {name: data for name, data in files_of(memory).items() if name != f"tiny/{CONFIG}"}
    finished = 0
    for step in range(1, 200):
        MemoryFileSystem.store.clear()
        for name, data in base.items():
            MemoryFileSystem().pipe_file(name, data)
        if interrupted(memory.store, step, lambda: publish(plan, memory, steps), how) == "through":
            break
        current = current_release(memory, "tiny")
        assert current is None or is_whole(memory, current)
        assert current is not None or not old
        whole = f"tiny/2/{MANIFEST}" in files_of(memory)
        forget_claims(memory)
        if case == "next release":  # what it has proven survives that, and is finished all the same
            retain(memory, "tiny", keep=5)
            forget_claims(memory)
        done = publish(plan, memory, steps)
        finished += whole and not done.changed
        assert done.current
        # Numbers that were seen are not given out again.
        number = 2 if case == "next release" else 1
        assert done.release.number in (number, number + 1)
        if case == "waiting release":
            assert is_whole(unverified_root(memory, "tiny"), done.release)
        else:
            assert current_release(memory, "tiny") == done.release
            assert is_whole(memory, done.release)
        there = files_of(memory)
        assert {name: there.get(name) for name in old} == old
        known = {f"tiny__r{number}__" for number in numbers(memory)}
        assert {name.split("__")[0] + "__" + name.split("__")[1] + "__" for name in there if "__r" in name} <= known
        assert not publish(plan, memory, steps).changed
        assert_nothing_beside(memory)
    assert 20 < step < 199
    # Killed with all but the pointer in place: the next one only moves that.
    assert finished >= 1 or case != "next release"


@HOW
def test_going_back_interrupted_at_any_step_ends_here_or_there(memory, plans, small, tmp_path, monkeypatch, how):
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(rolling_back, "ask_embedded", lambda *arguments: None)
    for plan in plans[:2]:
        publish(plan, memory, UNASKED)
    base = {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}

    def go_back():
        roll_back(memory, "tiny", TritonSettings(), to=1, log=tmp_path / "log")

    for step in range(1, 30):
        MemoryFileSystem.store.clear()
        for name, data in base.items():
            MemoryFileSystem().pipe_file(name, data)
        if interrupted(memory.store, step, go_back, how) == "through":
            break
        assert current_number(memory, "tiny") in (1, 2)
        assert numbers(memory) == [1, 2]
        forget_claims(memory)
        if current_number(memory, "tiny") == 2:
            go_back()
        assert current_number(memory, "tiny") == 1
        assert numbers(memory) == [1, 2]
        assert_nothing_beside(memory)
    assert 3 < step < 29


@HOW
def test_a_clean_up_interrupted_at_any_step_is_ended_by_the_next(memory, plans, small, how):
    from fsspec.implementations.memory import MemoryFileSystem

    for plan in plans[:3]:
        publish(plan, memory, UNASKED)
    point_to(memory, 2)
    base = {name: file.getvalue() for name, file in MemoryFileSystem.store.items()}
    for step in range(1, 100):
        MemoryFileSystem.store.clear()
        for name, data in base.items():
            MemoryFileSystem().pipe_file(name, data)
        if interrupted(memory.store, step, lambda: retain(memory, "tiny", keep=1), how) == "through":
            break
        assert is_whole(memory, current_release(memory, "tiny"))
        forget_claims(memory)
        retain(memory, "tiny", keep=1)
        assert numbers(memory) == [2, 3]
        assert not [name for name in files_of(memory) if name.startswith(("tiny__r1__", "tiny/1/"))]
        assert_nothing_beside(memory)
    assert 5 < step < 99


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_note_of_a_killed_publisher_moves_no_pointer_that_somebody_else_moved(s3, bucket, plans, small, by_hand):
    """Over the wire: everything is refused from the put of the pointer on, as to one who is dead."""
    publish(plans[0], bucket, UNASKED)
    pointer = (bucket / "tiny" / CONFIG).key.removeprefix(f"{BUCKET}/")
    dead = threading.Event()

    def refuse(method, key):
        if method == "PUT" and key == pointer:
            dead.set()
        return dead.is_set()

    s3.refuses = refuse
    with pytest.raises(ReleaseError, match="refuses"):
        publish(plans[1], bucket, UNASKED)
    s3.refuses = lambda method, key: False
    assert current_number(bucket, "tiny") == 1
    assert is_whole(bucket, list_releases(bucket, "tiny")[1])
    forget_claims(bucket)
    if by_hand:
        write_file(bucket / "tiny" / CONFIG, (bucket / "tiny" / CONFIG).read_bytes() + b"# by hand\n")
    s3.requests.clear()
    again = publish(plans[1], bucket, UNASKED)
    assert not again.changed
    assert again.release.number == (1 if by_hand else 2)
    assert s3.changed().count(pointer) == (0 if by_hand else 1)
    assert_nothing_beside(bucket)


@pytest.mark.parametrize("when", ["at once", "later", "never"])
def test_a_pointer_that_moves_without_an_answer_names_a_release_that_is_there(memory, plans, small, when):
    """A store may do what it was told after nobody waits for its answer any more."""
    late = []

    def lose(path, data):
        if path != memory / "tiny" / CONFIG:
            return write(path, data)
        if when == "at once":
            write(path, data)
        late.append(data)
        raise StorageError(f"{path}: no answer.")

    write = RemotePath.write_bytes
    for number, plan in enumerate(plans[:2], 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RemotePath, "write_bytes", lose)
            with pytest.raises(ReleaseError, match=rf"no answer\. The store was told to point to release {number} and"):
                publish(plan, memory, UNASKED)
        if when == "later":
            write(memory / "tiny" / CONFIG, late[-1])
        if when != "never":
            assert is_whole(memory, current_release(memory, "tiny"))
            assert current_number(memory, "tiny") == number
        again = publish(plan, memory, UNASKED)
        assert (again.changed, again.current, again.release.number) == (False, True, number)
        assert current_number(memory, "tiny") == number
        assert_nothing_beside(memory)


def test_what_cannot_be_taken_back_is_said_beside_why_it_was(memory, plans, small):
    publish(plans[0], memory, UNASKED)
    told = []

    def refuse(release):
        patch.setattr(RemotePath, "write_bytes", lambda path, data: (_ for _ in ()).throw(StorageError("Away.")))
        raise ServerError("out of memory.")

    steps = Steps(prove=unasked, announce=refuse, go_back=lambda model: told.append(model) or [])
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ServerError, match=r"out of memory\. The release may still be pointed to, so it stays: Away\."),
    ):
        publish(plans[1], memory, steps)
    assert told == ["tiny"]
    assert is_whole(memory, current_release(memory, "tiny"))


@pytest.mark.parametrize("refused", [1, 20, -2])
def test_a_store_that_refuses_a_put_changes_nothing(s3, bucket, plans, small, refused):
    """refused: which of those to the repository; -2: the manifest, the last before the pointer."""
    publish(plans[0], bucket, UNASKED)
    before = files_of(bucket)
    home = bucket.key.removeprefix(f"{BUCKET}/")
    wanted = [f"{home}/tiny/2/{CONFIG}", f"{home}/tiny/2/{MANIFEST}", f"{home}/tiny/{CONFIG}"]
    count = 0

    def refuse(method, key):
        nonlocal count
        counts = method == "PUT" and key.startswith(f"{home}/")
        count += counts
        return counts and (key == wanted[refused] if refused < 0 else count == refused)

    s3.refuses = refuse
    with pytest.raises(StorageError, match=r"refuses to write it: Access Denied\. Set AWS_ACCESS_KEY_ID"):
        publish(plans[1], bucket, UNASKED)
    assert files_of(bucket) == before
    assert_nothing_beside(bucket)


def test_a_store_that_cannot_be_read_is_not_taken_for_an_empty_one(s3, bucket, plans, small):
    """Folders without a manifest are swept up; a manifest that nobody could look at is none of those."""
    publish(plans[0], bucket, UNASKED)
    publish(plans[1], bucket, UNASKED)
    before = files_of(bucket)
    for name in (MANIFEST, CONFIG):
        s3.refuses = lambda method, key, name=name: method in ("GET", "HEAD") and key.endswith(f"/{name}")
        with pytest.raises(StorageError, match="refuses to read it"):
            publish(plans[2], bucket, UNASKED)
        with pytest.raises(StorageError, match="refuses to read it"):
            retain(bucket, "tiny", keep=1)
    s3.refuses = lambda method, key: False
    assert files_of(bucket) == before


PUBLISH = """
import os, signal, sys
from pathlib import Path
from resources.triton import files
from resources.triton.publish import Steps, publish
from tests.releases import make_plan, unasked
from tests.test_storage import parse_location
place = parse_location(sys.argv[1], Path(sys.argv[2]), {}) / "cpu"
plan = make_plan(Path(sys.argv[3]), seed=1)
def prove(folder, release, plan):
    os.kill(os.getpid(), signal.SIGKILL)
publish(plan, place, Steps(prove_inside=prove))
"""


def test_a_killed_process_leaves_a_lease_that_is_taken_over(bucket, plans, small, tmp_path, monkeypatch, caplog):
    publish(plans[0], bucket, UNASKED)
    command = [sys.executable, "-c", PUBLISH, str(bucket.parent), str(tmp_path / "other"), str(tmp_path / "plans")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr[-2000:]
    assert (bucket / "tiny__r2__pipeline" / CONFIG).is_file()
    assert len((bucket.parent / ".cpu.lock").sizes()) == 1
    bucket.store.lease_times = LeaseTimes(life=1.5, margin=0.3, renewal=0.3, look=0.1)
    begun = time.monotonic()
    assert publish(plans[1], bucket, UNASKED).release.number == 3
    assert time.monotonic() - begun > 1.5
    assert f"@{socket.gethostname()}, process" in caplog.text
    assert not (bucket / "tiny__r2__pipeline").exists()
    assert_nothing_beside(bucket)


# --- the lease --------------------------------------------------------------------------------------------------------


def test_a_lease_is_kept_while_its_holder_lives(memory, monkeypatch):
    memory.store.lease_times = LeaseTimes(life=0.6, margin=0.1, renewal=0.1, look=0.02, patience=1.5)
    other = RemotePath(replace(memory.store, leases={}), memory.key)
    with repository_lock(memory):
        message = rf"is being changed by .*, process {os.getpid()}, since 20"
        with pytest.raises(StorageError, match=message), repository_lock(other):
            raise AssertionError("two hold it")
        (memory / "tiny" / CONFIG).write_bytes(b"")  # it is still ours
    with repository_lock(memory):
        pass


def test_who_cannot_renew_the_lease_changes_nothing_more(memory, monkeypatch):
    memory.store.lease_times = LeaseTimes(life=0.6, margin=0.3, renewal=60.0, look=0.02)
    with repository_lock(memory):
        (memory / "tiny" / "one").write_bytes(b"")
        time.sleep(0.4)
        # Nobody else has it yet, and what is begun now could arrive when somebody has.
        assert leases.Lease(memory.parent / ".cpu.lock")._living() is not None
        for change in (lambda: (memory / "tiny" / CONFIG).write_bytes(b""), lambda: memory.remove(["tiny/one"])):
            with pytest.raises(StorageError, match="could not renew its lease for 0.3 s"):
                change()
        other = RemotePath(replace(memory.store, leases={}), memory.key)
        with repository_lock(other):
            assert other.sizes() == {"tiny/one": 0}


def test_an_upload_that_outlasts_the_lease_is_the_last(memory, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    memory.store.lease_times = LeaseTimes(life=0.6, margin=0.3, renewal=60.0)
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *arguments, **options: time.sleep(0.5))
    (tmp_path / "one").write_bytes(b"")
    with repository_lock(memory), pytest.raises(StorageError, match="could not renew its lease"):
        (memory / "tiny" / "one").upload(tmp_path / "one")


def test_who_lost_a_tie_waits_and_has_it_then(memory, monkeypatch):
    """For longer than a claim lives: its own that it took back is not one that it could not renew."""
    memory.store.lease_times = LeaseTimes(life=0.4, margin=0.1, renewal=0.05, look=0.02)
    loser = leases.Lease(memory.parent / ".cpu.lock")
    blind, look = [None], loser._living
    monkeypatch.setattr(loser, "_living", lambda: blind.pop() if blind else look())
    waiter = threading.Thread(target=loser.acquire)
    with repository_lock(memory):
        waiter.start()
        time.sleep(1.0)
        assert waiter.is_alive()
        assert loser._count == 1
    waiter.join(10)
    loser.require()
    loser.release()
    assert (memory.parent / ".cpu.lock").sizes() == {}


def test_a_claim_that_is_being_written_does_not_come_back(memory, monkeypatch):
    memory.store.lease_times = LeaseTimes(renewal=0.05)
    begun, write = threading.Event(), RemotePath.write_bytes

    def slowly(path, data):
        if b'"renewed": 1' in data:
            begun.set()
            time.sleep(0.3)
        write(path, data)

    monkeypatch.setattr(RemotePath, "write_bytes", slowly)
    with repository_lock(memory):
        assert begun.wait(10)
    time.sleep(0.5)
    assert (memory.parent / ".cpu.lock").sizes() == {}


def test_repositories_of_one_store_are_held_each_by_its_own(memory, monkeypatch):
    memory.store.lease_times = LeaseTimes(margin=LeaseTimes().life)
    other = memory.parent / "cuda"
    with repository_lock(memory):
        memory.store.lease_times = LeaseTimes(margin=0.0)
        with repository_lock(other):
            for lease in memory.store.leases.values():
                lease.times = LeaseTimes(margin=2 * LeaseTimes().life)
            for place in (memory, other, staging_root(memory), unverified_root(memory, "tiny")):
                with pytest.raises(StorageError, match=str(place.parent if place == other else memory.parent)):
                    (place / "one").write_bytes(b"")
            (memory.parent / "cpu2" / "one").write_bytes(b"")
        with pytest.raises(StorageError, match="could not renew"):
            (memory / "one").write_bytes(b"")
        (other / "one").write_bytes(b"")


def test_only_one_of_many_holds_the_lease(memory, monkeypatch):
    memory.store.lease_times = LeaseTimes(look=0.01)
    inside, most, done = 0, 0, 0

    def take():
        nonlocal inside, most, done
        for _ in range(5):
            with repository_lock(RemotePath(replace(memory.store, leases={}), memory.key)):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1
                done += 1

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, done) == (1, 20)


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_store_is_said(s3, bucket, plans, small, tmp_path):
    absent = s3.place("models/cpu", tmp_path, bucket="absent")
    for ask in (lambda: publish(plans[0], absent, UNASKED), lambda: list_releases(absent, "tiny")):
        with pytest.raises(StorageError, match=r"/absent does not exist\. Create the bucket"):
            ask()
    s3.refuses = lambda method, key: method in CHANGES
    for act in (lambda: publish(plans[0], bucket, UNASKED), lambda: require_writable(bucket, "tiny")):
        with pytest.raises(StorageError, match=r"refuses to write it: Access Denied\. Set AWS_ACCESS_KEY_ID.* write"):
            act()
    s3.refuses = lambda method, key: True
    with pytest.raises(StorageError, match="refuses to list it"):
        publish(plans[0], bucket, UNASKED)
    s3.refuses = lambda method, key: False
    require_writable(bucket, "tiny")
    assert bucket.parent.sizes() == {}
    assert not list((tmp_path / "scratch").rglob("*.onnx"))


def test_a_read_only_folder_is_said_and_left_as_it_is(plans, small, tmp_path):
    folder = tmp_path / "mounted"
    folder.mkdir()
    publish(plans[0], folder / "cpu", UNASKED)
    before = files_of(folder / "cpu")
    bind = ["/usr/bin/env", "mount", "--bind", str(folder), str(folder)]
    read_only = ["/usr/bin/env", "mount", "-o", "remount,bind,ro", str(folder)]
    try:
        subprocess.run(bind, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root")
    try:
        subprocess.run(read_only, check=True, capture_output=True)
        for act in (
            lambda: publish(plans[1], folder / "cpu", UNASKED),
            lambda: retain(folder / "cpu", "tiny", keep=1),
            lambda: require_writable(folder / "cpu", "tiny"),
            lambda: require_writable(folder / "cuda_sm90", "tiny"),
        ):
            with pytest.raises(
                ReleaseError, match=rf"Read-only file system\. Whoever .* write in {folder}/c"
            ) as caught:
                act()
            assert ".lock" not in str(caught.value)
        assert files_of(folder / "cpu") == before
    finally:
        subprocess.run(["/usr/bin/env", "umount", str(folder)], check=True)


@pytest.mark.parametrize("listens", [False, True], ids=["nobody listens", "nobody answers"])
def test_a_dead_endpoint_is_said_soon(plans, small, tmp_path, monkeypatch, listens):
    assert storage.ANSWER_SECONDS == 15
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 3.0)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listens:
            held.listen()
        place = parse_location(f"s3://127.0.0.1:{held.getsockname()[1]}/bucket/models", tmp_path, {})
        begun = time.monotonic()
        with pytest.raises(
            StorageError, match="the request to list it failed.*The release that served before goes on serving"
        ):
            publish(plans[0], place / "cpu", UNASKED)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gs"), ("as", "as")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, scheme, extra):
    import fsspec

    def missing(protocol, **options):
        raise ImportError(f"Install a package to access {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(StorageError, match=rf"pip install 'transformer-refinery\[{extra}\]'"):
        parse_location(f"{scheme}://one/two/three", tmp_path, {}).exists()


@pytest.mark.parametrize(
    ("text", "shown", "key", "options"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b", "bucket/a/b", {}),
        ("s3://bucket", "s3://bucket", "bucket", {}),
        (
            "s3://http://host:9000/bucket/a",
            "s3://http://host:9000/bucket/a",
            "bucket/a",
            {"endpoint_url": "http://host:9000"},
        ),
        (
            "s3://https://h.example:443/b//a",
            "s3://https://h.example:443/b/a",
            "b/a",
            {"endpoint_url": "https://h.example:443"},
        ),
        (
            "s3://localhost:9000/bucket/a",
            "s3://localhost:9000/bucket/a",
            "bucket/a",
            {"endpoint_url": "http://localhost:9000"},
        ),
        ("gs://bucket/a", "gs://bucket/a", "bucket/a", {}),
        (
            "as://account/container/a",
            "as://account/container/a",
            "container/a",
            {"account_name": "account", "account_key": "key"},
        ),
    ],
)
def test_paths_are_those_that_triton_reads(tmp_path, text, shown, key, options):
    place = parse_location(text, tmp_path, {"AZURE_STORAGE_KEY": "key"})
    assert (str(place), place.key) == (shown, key)
    assert options.items() <= place.store.options.items()
    assert str(place / "cpu") == f"{shown}/cpu"
    assert (place / "cpu").parent == place


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://bucket/a[12]",
        "gs://b/*",
        "as://a/c/?",
        "as://account",
        "s3://http://host/bucket",
        "ftp://host/a",
        "gs:///",
    ],
)
def test_paths_that_nothing_reads_are_refused(tmp_path, text):
    with pytest.raises(CatalogError, match="REFINERY_TRITON_REPOSITORIES: "):
        read_workspace({"REFINERY_TRITON_REPOSITORIES": text, "REFINERY_HOME": str(tmp_path)})


# --- on this machine --------------------------------------------------------------------------------------------------


def test_one_bad_model_or_a_store_that_is_away_costs_no_other(memory, plans, small, tmp_path, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    other, said = make_plan(tmp_path, model="zebra"), []
    for plan in (plans[0], other):
        publish(plan, memory, UNASKED)
    engine = "tiny__r1__pipeline/1/model.onnx"
    whole = (memory / engine).read_bytes()
    (memory / engine).write_bytes(b"")
    with pytest.raises(ReleaseError, match="release 1 of tiny is not there whole"):
        served_folder(memory, tmp_path / "copies")
    folder = served_folder(memory, tmp_path / "copies", say=said.append)
    assert "of tiny is not there whole. Until then, the local copy is served." in said.pop()
    assert [current_number(folder, model) for model in ("tiny", "zebra")] == [None, 1]
    # Somebody who copied was killed.
    write_file(staging_root(folder) / "killed" / "model.onnx", b"gigabytes")
    (memory / engine).write_bytes(whole)
    assert served_folder(memory, tmp_path / "copies", say=said.append) == folder
    assert said == []
    assert (folder / engine).read_bytes() == whole
    assert not list(staging_root(folder).glob("*"))

    def away(self):
        raise StorageError("The store is away.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "filesystem", away)
        assert served_folder(memory, tmp_path / "copies", say=said.append, prune=True) == folder
        assert said == ["The store is away. Until then, the local copy is served."]
        with pytest.raises(StorageError, match="away"):
            served_folder(memory, tmp_path / "nothing here", say=said.append)
    # The same number and sizes, of a repository that was made anew.
    MemoryFileSystem.store.clear()
    publish(plans[1], memory, UNASKED)
    assert is_whole(folder, current_release(memory, "tiny"))
    assert served_folder(memory, tmp_path / "copies") == folder
    assert (folder / engine).read_bytes() == (memory / engine).read_bytes() != whole
    assert not (folder / "zebra").exists()


def test_what_is_wrong_on_this_machine_is_not_blamed_on_the_store(s3, bucket, tmp_path):
    write_file(bucket / "tiny" / CONFIG, b"")
    (tmp_path / "taken").mkdir()
    for act in (
        lambda: (bucket / "new").upload(tmp_path / "absent"),
        lambda: (bucket / "tiny" / CONFIG).download(tmp_path / "long" / ("x" * 300), 0),
    ):
        with pytest.raises(OSError, match="absent|too long") as caught:
            act()
        assert not isinstance(caught.value, StorageError)


@pytest.mark.parametrize("way", ["upload", "download"])
def test_a_store_that_stops_in_the_middle_of_a_file_is_given_up(s3, bucket, tmp_path, monkeypatch, way):
    """Some stores' packages have no limit of their own."""
    place, stopped = bucket / "one", threading.Event()
    write_file(place, b"1234")
    (tmp_path / "one").write_bytes(b"1234")
    monkeypatch.setattr(storage, "_FILE_SECONDS", 1.0)
    s3.refuses = lambda method, key: stopped.wait(20)
    begun = time.monotonic()
    try:
        with pytest.raises(StorageError, match="no answer in time|the download was not complete within 1 s"):
            place.upload(tmp_path / "one") if way == "upload" else place.download(tmp_path / "two", 4)
        assert time.monotonic() - begun < 10
    finally:
        stopped.set()


def test_lint_says_what_was_in_its_way(memory, tmp_path, monkeypatch):
    from orchestration.cli import lint

    write_file(memory / "tiny" / CONFIG, b"")
    monkeypatch.setattr(lint, "parse_location", lambda *arguments: memory)
    for error, message in (
        (OSError(errno.ENOSPC, "No space left on device"), rf"copied to {tempfile.gettempdir()}: .*No space.* TMPDIR"),
        (FileNotFoundError("tiny/config.pbtxt"), "the repository changed while it was read: .* Run again"),
    ):
        monkeypatch.setattr(RemotePath, "download", lambda *arguments, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(ReleaseError, match=message):
            lint._find("memory://bucket/cpu")


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_who_may_not_write_can_verify(s3, plans, triton_settings, tmp_path, monkeypatch, where, request):
    repository = tmp_path / "models" / "cpu" if where == "folder" else request.getfixturevalue("bucket")
    publish(plans[0], repository, UNASKED)
    before = files_of(repository)
    s3.refuses = lambda method, key: method in CHANGES

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    if where == "folder":
        monkeypatch.setattr(files, "file_lock", refuse)
        monkeypatch.setattr(verifying, "staging_folder", refuse)
    release, server = verify_release(repository, "tiny", triton_settings, log=tmp_path / "log")
    assert (release.number, server) == (1, "an embedded server")
    monkeypatch.undo()
    s3.refuses = lambda method, key: False
    assert files_of(repository) == before
    if where == "s3":
        assert_nothing_beside(repository)


def await_said(said, words):
    deadline = time.monotonic() + 60
    while not any(words in line for line in said):
        assert time.monotonic() < deadline, said
        time.sleep(0.05)


# --- served -----------------------------------------------------------------------------------------------------------


def test_what_was_put_is_served_checked_and_gone_back_to(
    s3, bucket, plans, triton_settings, tmp_path, monkeypatch, capsys
):
    for plan in plans[:2]:
        publish(plan, bucket, UNASKED)
    monkeypatch.setenv("REFINERY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("REFINERY_TRITON_REPOSITORIES", str(bucket.parent))
    monkeypatch.setenv("REFINERY_TRITON_ENVIRONMENT", os.fspath(triton_settings.environment))
    for module in (releases, serving):
        monkeypatch.setattr(module, "DEFAULT_ADDRESS", "127.0.0.1:9")
    workspace = read_workspace(os.environ)
    folder, done, said = served_folder(bucket, workspace.copies), threading.Event(), []
    monkeypatch.setattr(serving, "_FOLLOW_SECONDS", 0.2)
    ports = Ports.choose(None, None, None)
    address = f"127.0.0.1:{ports.grpc}"
    thread = threading.Thread(
        target=serve_foreground,
        args=(folder, triton_settings),
        kwargs={
            "http_port": ports.http,
            "grpc_port": ports.grpc,
            "metrics_port": ports.metrics,
            "log": tmp_path / "log",
            "say": said.append,
            "stop": done.is_set,
            "refresh": serving._follow(workspace, bucket, said.append),
        },
    )
    thread.start()
    try:
        await_said(said, "release 2 serves")
        np.testing.assert_allclose(query_texts(address, "tiny", TEXTS), answers_of(plans[1], TEXTS), atol=1e-5)
        assert main(["rollback", "tiny"]) == 0
        assert "points to release 1 (table" in capsys.readouterr().out
        assert current_number(bucket, "tiny") == 1
        s3.refuses = lambda method, key: True
        await_said(said, "Until then, the local copy is served")
        s3.refuses = lambda method, key: False
        await_said(said, "release 1 serves")
        np.testing.assert_allclose(query_texts(address, "tiny", TEXTS), answers_of(plans[0], TEXTS), atol=1e-5)
    finally:
        done.set()
        thread.join(60)
    assert served_folder(bucket, workspace.copies, prune=True) == folder
    assert not (folder / "tiny__r2__pipeline").exists()

    assert main(["verify", "tiny"]) == 0
    assert "of release 1" in capsys.readouterr().out
    assert main(["releases", "tiny"]) == 0
    assert "0123456789abcdef" in capsys.readouterr().out
    assert main(["lint", str(bucket)]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["query", "tiny", "--json", TEXTS[0]]) == 0
    np.testing.assert_allclose(json.loads(capsys.readouterr().out), answers_of(plans[0], TEXTS[:1])[0], atol=1e-5)

    engine = bucket / "tiny__r2__pipeline" / "1" / "model.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    assert main(["verify", "tiny", "--release", "2"]) == 1
    assert "tiny__r2__pipeline/1/model.onnx was changed" in capsys.readouterr().err
    assert main(["rollback", "tiny", "--to", "2"]) == 1
    assert current_number(bucket, "tiny") == 1
    assert_nothing_beside(bucket)
    assert not [path for path in (tmp_path / "home" / "staging").rglob("*") if path.is_file()]


def age(repository, request):
    """Let all that is there have been written a day before it was."""
    if isinstance(repository, RemotePath):
        request.getfixturevalue("s3").age(repository, 1)
        return
    for path in [repository, *repository.rglob("*")]:
        when = path.stat().st_mtime - 86400
        os.utime(path, (when, when))


def test_a_release_that_somebody_edited_is_published_again(repository, plans, small, request):
    """Whatever `refinery verify` says so of; also where the file's size is what it was."""
    for number, what in enumerate(("a file", "its pointer", "one more"), start=1):
        assert publish(plans[0], repository, UNASKED).release.number == number
        age(repository, request)
        name = f"tiny__r{number}__pipeline/1/model.onnx" if what == "a file" else f"tiny/{number}/{CONFIG}"
        data = (repository / name).read_bytes()
        if what == "one more":
            name = f"tiny__r{number}__pipeline/1/notes.txt"
        write_file(repository / name, bytes([data[0] ^ 1]) + data[1:])
    assert publish(plans[0], repository, UNASKED).release.number == 4
    assert not publish(plans[0], repository, UNASKED).changed


def test_a_copied_repository_is_not_taken_for_an_edited_one(repository, plans, small, request):
    """All of it is younger than its manifest by then; the bytes are what they were."""
    publish(plans[0], repository, UNASKED)
    age(repository / "tiny" / "1" / MANIFEST, request)
    assert not publish(plans[0], repository, UNASKED).changed
