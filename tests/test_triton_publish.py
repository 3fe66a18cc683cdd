"""Publishing seen from the file system: what changes, what never does, and what a killed or starved publisher leaves.

The proof itself is in test_triton_server; here releases are published unasked.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from resources.artifacts.records import ServingSetting
from resources.errors import ReleaseError, ServerError
from resources.triton import files
from resources.triton.files import staging_root
from resources.triton.layout import current_number, current_release, is_whole, list_releases, parse_internal
from resources.triton.publish import Steps, publish, unverified_root
from tests.releases import make_plan, release_digest, tree_digest, unasked

UNASKED = Steps(prove=unasked)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed) for seed in range(3)]


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "models" / "cpu"


def assert_clean(repository):
    """Nothing of an unfinished release is anywhere."""
    root = staging_root(repository)
    assert not root.exists() or list(root.iterdir()) == []
    for path in repository.iterdir():
        parsed = parse_internal(path.name)
        if parsed is not None:
            model, number, part = parsed
            assert part != "proof"
            assert (repository / model / str(number) / "release.json").is_file(), path


def test_a_changed_engine_is_the_next_release_and_touches_no_older_one(repository, plans):
    first = publish(plans[0], repository, UNASKED)
    assert (first.changed, first.release.number, first.release.status) == (True, 1, "published")
    before = release_digest(repository, "tiny", 1)
    second = publish(plans[1], repository, UNASKED)
    assert (second.changed, second.release.number) == (True, 2)
    assert release_digest(repository, "tiny", 1) == before
    assert current_release(repository, "tiny") == second.release
    assert list_releases(repository, "tiny") == [first.release, second.release]
    assert_clean(repository)


def test_an_unchanged_plan_publishes_nothing_and_keeps_a_rollback(repository, plans):
    publish(plans[0], repository, UNASKED)
    publish(plans[1], repository, UNASKED)
    before = tree_digest(repository)
    again = publish(replace(plans[1], lineage={"refinery_dagster_run": "later"}), repository, UNASKED)
    assert (again.changed, again.release.number) == (False, 2)
    assert tree_digest(repository) == before
    # A rollback by hand, then every plan that was published since.
    shutil.copyfile(repository / "tiny" / "1" / "config.pbtxt", repository / "tiny" / "new")
    (repository / "tiny" / "new").replace(repository / "tiny" / "config.pbtxt")
    for plan in plans[:2]:
        kept = publish(plan, repository, UNASKED)
        assert (kept.changed, kept.release.number) == (False, 1)
    # Something new goes past the release that was rolled back.
    assert publish(plans[2], repository, UNASKED).release.number == 3


def test_a_champion_of_before_is_published_again_when_it_wins_again(repository, plans):
    for plan, number in ((plans[0], 1), (plans[1], 2), (plans[0], 3)):
        published = publish(plan, repository, UNASKED)
        assert (published.changed, published.release.number) == (True, number)
    again = publish(plans[0], repository, UNASKED)
    assert (again.changed, again.release.number) == (False, 3)


@pytest.mark.parametrize("fault", ["error", "refusal"])
def test_a_release_that_is_not_proven_leaves_nothing(repository, plans, fault):
    def disprove(folder, release):
        if fault == "error":
            raise ServerError("no server")
        proof = unasked(folder, release)
        return proof.model_copy(update={"passed": False, "failures": ("cosine_worst 0.1 is below 0.99",)})

    with pytest.raises(ServerError if fault == "error" else ReleaseError) as caught:
        publish(plans[0], repository, Steps(prove=disprove))
    assert list(repository.iterdir()) == []
    if fault == "refusal":
        assert "tiny: release 1 (table, revision 0123456789abcdef) was not published" in str(caught.value)
        assert "cosine_worst 0.1" in str(caught.value)
    publish(plans[0], repository, UNASKED)
    before = tree_digest(repository)
    for steps in (Steps(prove=disprove), Steps(prove_inside=lambda folder, release, plan: disprove(folder, release))):
        with pytest.raises((ServerError, ReleaseError)):
            publish(plans[1], repository, steps)
        assert tree_digest(repository) == before
        assert_clean(repository)


@pytest.mark.parametrize("first", [True, False])
def test_a_release_that_the_servers_do_not_take_up_is_taken_back(repository, plans, first):
    told, gone = [], []

    def refuse(release):
        told.append(current_number(repository, "tiny"))
        raise ServerError("It does not answer.")

    def go_back(model):
        told.append(current_number(repository, "tiny"))
        return []

    if not first:
        publish(plans[0], repository, UNASKED)
    before = tree_digest(repository)
    steps = Steps(prove=unasked, announce=refuse, go_back=go_back, retire=gone.extend)
    with pytest.raises(ServerError, match=r"taken back: It does not answer\. What served before serves again\."):
        publish(plans[1], repository, steps)
    number = 1 if first else 2
    assert told == [number, None if first else 1]
    assert gone == [f"tiny__r{number}__pipeline"]
    assert tree_digest(repository) == before
    assert_clean(repository)
    # What a server still answers with stays until the next publish, and is no release; no number comes twice.
    number += 1
    stuck = Steps(prove=unasked, announce=refuse, go_back=lambda model: ["Nor does it load what was there."])
    with pytest.raises(ServerError, match=r"It does not answer\. Nor does it load what was there\."):
        publish(plans[1], repository, stuck)
    assert (repository / f"tiny__r{number}__pipeline").is_dir()
    assert current_number(repository, "tiny") == (None if first else 1)
    assert publish(plans[1], repository, UNASKED).release.number == number + 1
    assert_clean(repository)


def test_servers_are_told_of_what_is_published_already(repository, plans):
    told = []
    steps = Steps(prove=unasked, announce=lambda release: told.append(release.number))
    publish(plans[0], repository, steps)
    assert publish(plans[0], repository, steps).changed is False
    assert told == [1, 1]


def test_nothing_is_written_where_the_servers_are_not_ready(repository, plans):
    def refuse():
        raise ServerError("gone")

    with pytest.raises(ServerError, match="gone"):
        publish(plans[0], repository, Steps(prove=unasked, ready=refuse))
    assert list(repository.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(repository, plans):
    (repository / "tiny" / "1").mkdir(parents=True)
    (repository / "tiny" / "1" / "model.onnx").write_bytes(b"precious")
    (repository / "other__r1__mine" / "1").mkdir(parents=True)
    (repository / "tiny__r1__engine" / "1").mkdir(parents=True)
    before = tree_digest(repository)
    with pytest.raises(ReleaseError, match=r"was not published by transformer-refinery\. Move it away"):
        publish(plans[0], repository, UNASKED)
    assert tree_digest(repository) == before


def test_an_engine_that_is_damaged_in_the_store_is_not_released(repository, plans, tmp_path):
    folder = shutil.copytree(plans[0].engine_folder, tmp_path / "engine")
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-9] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ReleaseError, match=r"model\.onnx of the engine is damaged in the artifact store"):
        publish(replace(plans[0], engine_folder=folder), repository, UNASKED)
    assert list(repository.iterdir()) == []


def test_an_engine_that_was_not_built_is_not_released(repository, plans):
    failed = plans[0].engine.model_copy(update={"status": "failed", "reason": "out of memory"})
    with pytest.raises(ReleaseError, match="engine table is failed and cannot be released: out of memory"):
        publish(replace(plans[0], engine=failed), repository, UNASKED)
    assert not repository.exists()


def test_a_damaged_release_is_published_anew(repository, plans):
    publish(plans[0], repository, UNASKED)
    (repository / "tiny__r1__pipeline" / "1" / "model.onnx").unlink()
    again = publish(plans[0], repository, UNASKED)
    assert (again.changed, again.release.number) == (True, 2)


def test_what_is_pinned_survives_the_loss_of_its_manifest(repository, plans):
    publish(plans[0], repository, UNASKED)
    publish(plans[1], repository, UNASKED)
    (repository / "tiny" / "2" / "release.json").unlink()
    assert publish(plans[2], repository, Steps()).release.status == "unverified"  # sweeps, and moves no pointer
    assert current_number(repository, "tiny") == 2
    assert (repository / "tiny__r2__pipeline" / "1" / "model.onnx").is_file()


def test_a_release_that_nobody_can_prove_waits_outside(repository, plans):
    native = replace(plans[0], flavour="native")
    first = publish(native, repository, Steps())
    assert first.release.status == "unverified"
    assert "REFINERY_TRITON_GRPC" in first.advice
    assert list(repository.iterdir()) == []
    waiting = unverified_root(repository, "tiny")
    assert current_release(waiting, "tiny") == first.release
    assert is_whole(waiting, first.release)
    again = publish(native, repository, Steps())
    assert (again.changed, again.release) == (False, first.release)
    # Another takes its place, with a number of its own; once it is proven it is published and waits no more.
    second = publish(replace(native, serving=ServingSetting(threads=2)), repository, Steps())
    assert (second.changed, second.release.number) == (True, 2)
    third = publish(replace(native, serving=ServingSetting(threads=2)), repository, UNASKED)
    assert (third.changed, third.release.number, third.release.status) == (True, 3, "published")
    assert not waiting.exists()
    assert current_release(repository, "tiny") == third.release


def test_two_publishers_at_once_make_two_releases(repository, plans):
    threads = [threading.Thread(target=publish, args=(plan, repository, UNASKED)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    releases = list_releases(repository, "tiny")
    assert [release.number for release in releases] == [1, 2, 3]
    assert len({release.content_digest for release in releases}) == 3
    assert_clean(repository)


def test_who_waits_is_told_and_not_for_ever(repository, caplog):
    message = rf"has been changed by another process for .*\.cpu\.lock is held by process {os.getpid()} "
    held, waiting = files.repository_lock(repository), files.repository_lock(repository, patience_s=0.2)
    with held, pytest.raises(ReleaseError, match=message), waiting:
        raise AssertionError("two hold it")
    (said,) = caplog.messages
    assert said.startswith(f"{repository} is being changed by process {os.getpid()} (")


def test_a_full_disk_leaves_nothing_half_made(small_disk, plans):
    """Full at several places of the way."""
    folder, resize = small_disk
    repository = folder / "cpu"
    publish(plans[0], repository, UNASKED)
    before, used = tree_digest(repository), shutil.disk_usage(folder).used
    for share in (0.01, 0.5, 0.9, 0.995):
        resize(used + int(share * used))
        with pytest.raises(ReleaseError) as caught:
            publish(plans[1], repository, UNASKED)
        assert f"tiny: the release could not be written to {repository}: No space left" in str(caught.value)
        assert "It needs about 21 MB there: make room" in str(caught.value)
        assert tree_digest(repository) == before
        assert_clean(repository)
    resize()
    assert publish(plans[1], repository, UNASKED).release.number == 2


@pytest.mark.parametrize("limit", [100, 10_000, 1_000_000])
def test_a_limit_on_file_sizes_leaves_nothing_half_made(repository, plans, limit):
    """What stands in for a full disk without root: the kernel refuses to write files beyond a size."""
    publish(plans[0], repository, UNASKED)
    before = tree_digest(repository)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ReleaseError, match="could not be written to .*: File too large"):
            publish(plans[1], repository, UNASKED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert tree_digest(repository) == before
    assert_clean(repository)


def run_apart(function, *arguments):
    """Call a function of this module in a fresh process, which has no threads and can fork; what it prints, parsed."""
    code = f"from tests.test_triton_publish import {function}; {function}(*{arguments!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["first release", "next release", "waiting release"])
def test_a_publisher_killed_at_any_step_is_made_good_by_the_next(tmp_path, case):
    killed = run_apart("kill_everywhere", str(tmp_path), case)
    assert sum(killed.values()) > 25
    if case != "waiting release":
        # Killed both before and after the pointer was moved, and somewhere in between every time.
        assert killed["before"] > 20
        assert killed["internals only"] >= 2
        assert killed["after"] >= 1
    if case == "next release":
        assert killed["all but the pointer"] >= 1


def test_a_disk_that_fails_at_any_step_changes_nothing(tmp_path):
    assert run_apart("fail_everywhere", str(tmp_path)) > 40


def kill_everywhere(folder, case):
    """Kill a publisher before its first change of the file system, its second, and so on until it gets through.

    Prints where it was killed, by stage.
    """
    base, plan, steps, number = _prepare(folder, case)
    old = release_digest(base, "tiny", 1) if case == "next release" else ""
    killed = {"before": 0, "internals only": 0, "all but the pointer": 0, "after": 0}
    for event in range(1, 1000):
        # Links, because no file of a release is ever written again.
        repository = _copy(base, event, os.link)
        if _interrupted(event, plan, repository, steps, _kill) == "through":
            break
        _check_what_serves(repository, old, number)
        stage = _stage(repository, number)
        killed[stage] += 1
        if stage == "all but the pointer":
            _check_that_a_pointer_moved_by_hand_stays(_copy(repository, f"{event}-by-hand", shutil.copy2), plan)
        finished = publish(plan, repository, steps)
        _check_outcome(case, finished, repository, number)
        if old:
            assert release_digest(repository, "tiny", 1) == old
        assert_clean(repository)
        assert not publish(plan, repository, steps).changed
        shutil.rmtree(repository.parent)
    print(json.dumps(killed))


def fail_everywhere(folder):
    """Let the first change of the file system fail, then the second, and so on. Prints how many were tried."""
    base, plan, steps, number = _prepare(folder, "next release")
    before, event = tree_digest(base), 0
    for event in range(1, 1000):
        repository = _copy(base, event, os.link)
        outcome = _interrupted(event, plan, repository, steps, _fail)
        if outcome == "through":
            break
        if outcome == "published":  # what failed was the tidying up
            assert current_number(repository, "tiny") == number
        else:
            assert outcome == "refused", event
            assert tree_digest(repository) == before
        assert publish(plan, repository, steps).release.number in (number, number + 1)
        assert_clean(repository)
        shutil.rmtree(repository.parent)
    print(event)


def _prepare(folder, case):
    # What a killed process has written, the kernel has; waiting for the disk a thousand times would prove nothing here.
    os.fsync = lambda descriptor: None
    plans = [make_plan(Path(folder), seed=seed) for seed in range(2)]
    base = Path(folder) / "base" / "cpu"
    base.mkdir(parents=True)
    if case == "next release":
        publish(plans[0], base, UNASKED)
    plan, steps = plans[1], UNASKED
    if case == "waiting release":
        plan, steps = replace(plan, flavour="native"), Steps()
        publish(replace(plans[0], flavour="native"), base, steps)
    return base, plan, steps, 1 if case == "first release" else 2


def _copy(repository, name, copy_function):
    place = repository.parent.parent / str(name)
    shutil.copytree(repository.parent, place, copy_function=copy_function)
    return place / repository.name


def _kill():
    os.kill(os.getpid(), signal.SIGKILL)


def _fail():
    raise OSError(errno.EIO, "Input/output error")


def _interrupted(event, plan, repository, steps, how):
    """Publish in a forked child that is interrupted before its n-th change of the file system.

    `killed`, `refused` or `published`; `through` where there is no such change.
    """
    child = os.fork()
    if child == 0:
        counted = 0

        def count(name, arguments):
            nonlocal counted
            opens = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if opens or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                counted += 1
                if counted == event:
                    how()

        sys.addaudithook(count)
        try:
            publish(plan, repository, steps)
        except ReleaseError:
            os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(3 if counted < event else 0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return "killed"
    return {0: "published", 1: "refused", 2: "crashed", 3: "through"}[os.WEXITSTATUS(status)]


def _check_that_a_pointer_moved_by_hand_stays(repository, plan):
    pointer = repository / "tiny" / "config.pbtxt"
    pointer.write_text(pointer.read_text() + "# by hand\n")
    assert not publish(plan, repository, UNASKED).changed
    assert pointer.read_text().endswith("# by hand\n")
    shutil.rmtree(repository.parent)


def _check_what_serves(repository, old, number):
    current = current_release(repository, "tiny")
    if current is None:
        assert not old
        # Nothing, or a server would complain of a model without a configuration.
        assert not (repository / "tiny").exists()
        return
    assert is_whole(repository, current)
    assert current.number in ({1, number} if old else {number})
    own = repository / "tiny" / str(current.number) / "config.pbtxt"
    assert own.read_text() == (repository / "tiny" / "config.pbtxt").read_text()
    if old:
        assert release_digest(repository, "tiny", 1) == old


def _stage(repository, number):
    if current_number(repository, "tiny") == number:
        return "after"
    if (repository / "tiny" / str(number)).exists():
        return "all but the pointer"
    return "internals only" if any(repository.glob(f"tiny__r{number}__*")) else "before"


def _check_outcome(case, finished, repository, number):
    if case == "waiting release":
        waiting = unverified_root(repository, "tiny")
        assert current_release(waiting, "tiny") == finished.release
        assert is_whole(waiting, finished.release)
        assert list(repository.iterdir()) == []
        return
    assert current_release(repository, "tiny") == finished.release
    # One more where internals had been seen already: numbers are not used twice.
    assert finished.release.number in (number, number + 1)
    assert is_whole(repository, finished.release)
