"""Publishing, rolling back and retention, killed, starved or crowded: what was published is there, whole, and goes on.

test_triton_publish kills a publisher before each of its changes of the file system and looks at the files; here all
three are killed at moments of a random choice, and what is left is linted, served and published to.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from resources.errors import ReleaseError
from resources.settings.triton import TritonSettings
from resources.triton import retain as retaining
from resources.triton import rollback as rolling_back
from resources.triton.files import staging_root
from resources.triton.layout import current_number, internal_names, list_releases
from resources.triton.lint import lint
from resources.triton.publish import Steps, publish
from resources.triton.retain import retain
from resources.triton.rollback import roll_back
from resources.triton.server import EmbeddedServer
from resources.triton.verify import differences_from_manifest, find_release, verify_release
from tests.releases import answers_of, ask_together, make_plan, tree_digest, unasked

ROOT = Path(__file__).resolve().parents[1]
UNASKED = Steps(prove=unasked)
TEXTS = ["How long should I boil the eggs?", "", "naïve 🙂"]
#: Releases that are there before anything is killed.
BASE = 3
KEEP = 2
#: Changes of the file system, as Python's audit hooks name them; `open` where it is for writing.
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")
LONGEST_SECONDS = 120


@pytest.fixture(autouse=True)
def followed(monkeypatch):
    """Nobody serves what is cleaned up here, so nobody has to be waited for."""
    monkeypatch.setattr(retaining, "FOLLOW_SECONDS", 0.0)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return [make_plan(folder, seed=seed, permuted=True) for seed in (*range(BASE), 1000, 1001, 1002)]


@pytest.fixture
def repository(tmp_path, plans):
    """The first releases, of which the last serves."""
    folder = tmp_path / "models" / "cpu"
    for plan in plans[:BASE]:
        publish(plan, folder, UNASKED)
    return folder


# What runs in the processes that are killed.


@dataclass(frozen=True)
class Moment:
    """When a process is killed: before its n-th change of the file system, or after so many seconds."""

    change: int = 0
    seconds: float = 0.0


def act(folder: str, change: int, *, asking: bool) -> None:
    """Publish, roll back, clean up, publish, over and over; says in a journal what it begins and what it has done.

    change: the n-th change of the file system ends it; 0: nothing does, and it stops after one round. asking: rolling
    back starts a server.
    """
    repository, journal = Path(folder) / "models" / "cpu", (Path(folder) / "journal").open("a", buffering=1)
    plans = [make_plan(Path(folder) / "plans", seed=BASE + number, permuted=True) for number in range(40)]
    settings = TritonSettings()
    retaining.FOLLOW_SECONDS = 0.0
    if not asking:
        vars(rolling_back)["ask_embedded"] = lambda *arguments: None

    def say(**what: object) -> None:
        journal.write(json.dumps(what) + "\n")

    counted = 0

    def count(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal counted
        path = str(arguments[0]) if arguments else ""
        writes = name == "open" and isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        # The journal is no part of it, nor is what the server's process needs.
        if (name in CHANGES or writes) and "journal" not in path and not path.endswith((".log", "/null")):
            counted += 1
            if counted == change:
                os.kill(os.getpid(), signal.SIGKILL)

    print("begun", flush=True)
    sys.addaudithook(count)
    for plan in plans if asking else plans[:1]:
        say(begins="publish", seed=int(plan.engine.digest), changes=counted)
        say(published=publish(plan, repository, UNASKED).release.number)
        say(begins="rollback", changes=counted)
        say(rolled_back=roll_back(repository, "tiny", settings, log=Path(folder) / "rollback.log").release.number)
        say(begins="retain", keep=KEEP, changes=counted)
        say(removed=retain(repository, "tiny", keep=KEEP).removed, changes=counted)


def expected(journal: Path) -> tuple[dict[int, int], set[int], set[int]]:
    """From what a killed process has said: seeds by number, the releases that have to be there, and what may serve."""
    seeds, held = {number: number - 1 for number in range(1, BASE + 1)}, set(range(1, BASE + 1))
    serves, under_way = BASE, {BASE}
    for line in journal.read_text().splitlines():
        said = json.loads(line)
        if said.get("begins") == "publish":
            new = max(seeds) + 1
            seeds[new] = said["seed"]
            under_way = {serves, new}
        elif "published" in said:
            serves = said["published"]
            assert serves == max(seeds)
            held.add(serves)
            under_way = {serves}
        elif said.get("begins") == "rollback":
            under_way = {serves, max(number for number in held if number < serves)}
        elif "rolled_back" in said:
            serves = said["rolled_back"]
            under_way = {serves}
        elif said.get("begins") == "retain":
            held = {serves, *sorted(held)[-said["keep"] :]}
    return seeds, held, under_way


def run_killed(folder: Path, moment: Moment) -> bool:
    """Return whether the process was killed; else it came to its end before the moment."""
    asking = moment.seconds > 0
    code = f"from tests.test_killed import act; act({str(folder)!r}, {moment.change}, asking={asking})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "begun\n"
        if asking:
            time.sleep(moment.seconds)
            process.kill()
        status = process.wait(LONGEST_SECONDS)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert status in (0, -signal.SIGKILL)
    return status != 0


def link_tree(source: Path, target: Path) -> None:
    """Files of a release are never written again, so a copy may share them."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.link(path, place)


def check_serves(repository: Path, settings: TritonSettings, plan, control, log: Path) -> None:
    """A server starts on the repository, with all that is in it, and answers with the release of that plan."""
    with (
        EmbeddedServer(repository, settings, models=["tiny"], log=log, control=control) as server,
        server.client() as client,
    ):
        assert client.release_of("tiny") == current_number(repository, "tiny")
        np.testing.assert_allclose(ask_together(client, TEXTS), answers_of(plan, TEXTS), rtol=0, atol=1e-5)


def check_left(repository: Path, folder: Path) -> tuple[int, set[int]]:
    """What a killed process leaves, before anybody mends it; the seed of what serves, and what has to be there."""
    seeds, held, may_serve = expected(folder / "journal")
    serves = current_number(repository, "tiny")
    assert serves in may_serve
    for number in held | {serves}:
        assert differences_from_manifest(repository, find_release(repository, "tiny", number)) == [], number
    assert [finding for finding in lint(repository) if finding.severity == "error"] == []
    return seeds[serves], held


def check_goes_on(repository: Path, plan, held: set[int]) -> None:
    """The next publish works, loses nothing, and leaves nothing but releases."""
    release = publish(plan, repository, UNASKED).release
    assert current_number(repository, "tiny") == release.number
    there = {other.number for other in list_releases(repository, "tiny")}
    assert held | {release.number} <= there
    for number in there:
        assert differences_from_manifest(repository, find_release(repository, "tiny", number)) == [], number
    named = {name for other in list_releases(repository, "tiny") for name in internal_names(other)}
    assert {path.name for path in repository.iterdir()} == {"tiny"} | named
    assert {path.name for path in (repository / "tiny").iterdir()} == {"config.pbtxt"} | {str(one) for one in there}
    assert not list(staging_root(repository).glob("*"))
    assert lint(repository) == []


def check_is_published_again(repository: Path, folder: Path) -> None:
    """Who publishes the same once more, after a publish was killed and a clean-up came between, is served it."""
    begun = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    if begun[-1].get("begins") != "publish":
        return
    retain(repository, "tiny", keep=10)
    done = publish(make_plan(folder / "plans", seed=begun[-1]["seed"], permuted=True), repository, UNASKED)
    assert done.current
    assert current_number(repository, "tiny") == done.release.number


def choose_moments(folder: Path, base: Path, changes: int, times: int, seed: int) -> list[Moment]:
    """A third of the `changes` in each of the three, at random, and `times` at random times."""
    link_tree(base.parent, folder / "models")
    assert not run_killed(folder, Moment())
    said = [json.loads(line) for line in (folder / "journal").read_text().splitlines()]
    ends = [line["changes"] for line in said if "changes" in line]
    chance = random.Random(seed)  # noqa: S311
    moments = []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        assert end - start > 5, said
        count = changes // 3 + (number < changes % 3)
        whole, rest = divmod(count, end - start)
        drawn = [*range(start + 1, end + 1)] * whole + chance.sample(range(start + 1, end + 1), rest)
        moments += [Moment(change=change) for change in drawn]
    return moments + [Moment(seconds=chance.uniform(0.01, 8.0)) for _ in range(times)]


def kill_and_check(repository, plans, triton_settings, tmp_path, *, changes, times, served_every, seed):
    moments = choose_moments(tmp_path / "counting", repository, changes, times, seed)
    killed = served = 0
    for number, moment in enumerate(moments):
        folder = tmp_path / f"moment-{number}"
        own = folder / "models" / "cpu"
        link_tree(repository.parent, folder / "models")
        killed += run_killed(folder, moment)
        serving, held = check_left(own, folder)
        if number % served_every == 0:
            # All three modes, of which two load whatever is in the repository.
            control = ("poll", "explicit", "none")[served % 3]
            plan = make_plan(folder / "plans", seed=serving, permuted=True)
            check_serves(own, triton_settings, plan, control, folder / "served.log")
            served += 1
        check_is_published_again(own, folder)
        check_goes_on(own, plans[BASE], held)
    assert killed == changes + times
    return served


def test_killed_at_some_moments(repository, plans, triton_settings, tmp_path):
    served = kill_and_check(repository, plans, triton_settings, tmp_path, changes=10, times=2, served_every=4, seed=11)
    assert served == 3


@pytest.mark.whole
def test_killed_at_a_hundred_moments(repository, plans, triton_settings, tmp_path):
    served = kill_and_check(
        repository, plans, triton_settings, tmp_path, changes=75, times=25, served_every=1, seed=20261
    )
    assert served == 100


def test_a_full_disk(small_disk, plans, triton_settings):
    """Neither bytes nor files are left: nothing is published or gone back to, and cleaning up makes room."""
    folder, resize = small_disk
    repository = folder / "models" / "cpu"
    for plan in plans[:BASE]:
        publish(plan, repository, UNASKED)
    before = tree_digest(repository)
    for full in (["size_bytes"], ["files"], ["size_bytes", "files"]):
        resize()
        with suppress(FileNotFoundError):  # it would be removed, and leave room for one folder
            staging_root(repository).rmdir()
        found = os.statvfs(folder)
        used = {
            "size_bytes": (found.f_blocks - found.f_bfree) * found.f_frsize,
            "files": found.f_files - found.f_ffree,
        }
        resize(**{limit: used[limit] for limit in full})
        with pytest.raises(ReleaseError, match="No space left"):
            publish(plans[BASE], repository, UNASKED)
        with pytest.raises(ReleaseError, match="No space left"):
            roll_back(repository, "tiny", triton_settings, log=folder.parent / "log")
        assert tree_digest(repository) == before
    assert not staging_root(repository).exists()
    assert retain(repository, "tiny", keep=1).removed == (1, 2)
    check_goes_on(repository, plans[BASE], {BASE})


#: Files that a fault may cut short, below the repository, and how that is seen: by the release that holds them, if any.
TRUNCATED = {
    "an engine that serves": ("tiny__r3__pipeline/1/model.onnx", 3),
    "an older engine": ("tiny__r2__pipeline/1/model.onnx", 2),
    "an older tokenizer": ("tiny__r2__pipeline/1/tokenizer.json", 2),
    "a manifest": ("tiny/3/release.json", None),
    "a release's pointer": ("tiny/2/config.pbtxt", 2),
    "the pointer": ("tiny/config.pbtxt", None),
}


@pytest.mark.parametrize("what", TRUNCATED)
def test_a_truncated_file(repository, plans, triton_settings, tmp_path, what):
    name, number = TRUNCATED[what]
    os.truncate(repository / name, (repository / name).stat().st_size // 2)
    if number is not None:
        with pytest.raises(ReleaseError, match=f"{name} was changed"):
            verify_release(repository, "tiny", triton_settings, number, log=tmp_path / "log")
    if number == 2:
        with pytest.raises(ReleaseError, match=f"{name} was changed"):
            roll_back(repository, "tiny", triton_settings, to=2, log=tmp_path / "log")
    assert publish(plans[BASE], repository, UNASKED).release.number == BASE + 1
    assert current_number(repository, "tiny") == BASE + 1
    # What is damaged goes, and is not counted.
    left = [1, *([2] if number != 2 else []), *([3] if what == "the pointer" or number == 2 else []), BASE + 1]
    assert list(retain(repository, "tiny", keep=10).kept) == left
    check_goes_on(repository, plans[BASE + 1], set(left))
    if what == "the pointer":
        check_serves(repository, triton_settings, plans[BASE + 1], "poll", tmp_path / "served.log")


def test_a_file_that_is_truncated_while_it_is_proven_is_not_published(repository, plans):
    def truncate(folder, release):
        os.truncate(folder / f"tiny__r{release.number}__pipeline" / "1" / "model.onnx", 100)
        return unasked(folder, release)

    before = tree_digest(repository)
    with pytest.raises(ReleaseError, match=r"was not published: tiny__r4__pipeline/1/model\.onnx is not what was"):
        publish(plans[BASE], repository, Steps(prove=truncate))
    assert tree_digest(repository) == before
    check_goes_on(repository, plans[BASE], {1, 2, 3})


def run_apart(function: str, *arguments: object) -> subprocess.Popen[str]:
    """A function of this module in a process of its own, once a line comes in; it prints JSON."""
    code = f"import sys; from tests.test_killed import {function} as run; sys.stdin.readline(); run(*{arguments!r})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(processes: list[subprocess.Popen[str]]) -> list:
    """Let all of them go at once; what each has printed."""
    try:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [json.loads(process.communicate(timeout=LONGEST_SECONDS)[0]) for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes)
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def publish_seeds(folder: str, model: str, seeds: list[int]) -> None:
    """Publish one after the other; prints the releases' numbers with the seeds."""
    found = {}
    for seed in seeds:
        plan = make_plan(Path(folder) / f"plans-{model}", model=model, seed=seed, permuted=True)
        done = publish(plan, Path(folder) / "models" / "cpu", UNASKED)
        assert done.changed
        found[done.release.number] = seed
    print(json.dumps(found))


def test_publishers_at_once(tmp_path):
    """Two processes publish the same model, and one another model, to one repository that is not there yet."""
    parts = [("tiny", list(range(0, 5))), ("tiny", list(range(10, 15))), ("other", list(range(20, 25)))]
    found = finish([run_apart("publish_seeds", str(tmp_path), *part) for part in parts])
    repository = tmp_path / "models" / "cpu"
    for model, told in (("tiny", [*found[0].items(), *found[1].items()]), ("other", list(found[2].items()))):
        releases = list_releases(repository, model)
        assert [release.number for release in releases] == list(range(1, len(told) + 1))
        assert {release.number: int(release.engine_digest) for release in releases} == {
            int(number): seed for number, seed in told
        }
        assert current_number(repository, model) == len(told)
        assert [differences_from_manifest(repository, release) for release in releases] == [[]] * len(told)
    assert lint(repository) == []


def act_as_nobody(folder: str) -> None:
    """Publish, roll back and clean up without the right to write; prints what was said."""
    from resources.settings.triton import TritonSettings

    home, plan = Path(folder), make_plan(Path(folder) / "plans", seed=1000, permuted=True)
    publish(plan, home / "practice" / "cpu", UNASKED)  # what is imported late, is now
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    repository, said = home / "models" / "cpu", []
    retaining.FOLLOW_SECONDS = 0.0
    vars(rolling_back)["ask_embedded"] = lambda *arguments: None
    for action in (
        lambda: publish(plan, repository, UNASKED),
        lambda: roll_back(repository, "tiny", TritonSettings(), log=home / "log"),
        lambda: retain(repository, "tiny", keep=1),
    ):
        try:
            action()
        except ReleaseError as error:
            said.append(str(error))
    print(json.dumps(said))


@pytest.mark.parametrize("parent", ["writable", "read-only"])
def test_a_read_only_repository(plans, parent):
    """Of somebody else. pytest's own folders are closed to other users."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository = folder / "models" / "cpu"
        for plan in plans[:BASE]:
            publish(plan, repository, UNASKED)
        before = tree_digest(repository)
        folder.chmod(0o755)
        repository.parent.chmod(0o777 if parent == "writable" else 0o555)
        closed = [repository, *(path for path in repository.rglob("*") if path.is_dir())]
        for path in closed:
            path.chmod(0o555)
        try:
            (said,) = finish([run_apart("act_as_nobody", name)])
        finally:
            for path in (repository.parent, *closed):
                path.chmod(0o755)
        assert len(said) == 3
        for message in said:
            assert "tiny: the release could not be written to" in message
            assert f"Permission denied. Whoever runs this has to be able to write in {repository}" in message
            assert f"{repository.parent}, beside it" in message
            assert ".lock" not in message
        assert tree_digest(repository) == before
        check_goes_on(repository, plans[BASE], {1, 2, 3})
