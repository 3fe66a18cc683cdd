"""Every write of a command fails once, and on a disk that is full from there on: our error, no leftovers, and it works
again as soon as there is room.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import dagster as dg
import pytest

from orchestration.runs.instance import prepare_instance
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from resources.settings.workspace import Workspace
from resources.triton.layout import current_number, list_releases, parse_internal, release_numbers
from resources.triton.publish import Steps, publish
from resources.triton.verify import differences_from_manifest, find_release
from tests.faults import commands
from tests.releases import make_plan, unasked
from tests.test_artifacts import engine

#: Releases that are there at first; the newest serves.
RELEASES = 4
#: What a draft of a file is called, by what we and others write whole.
DRAFT = re.compile(r"\..+\.[0-9a-f]{32}|.*\.(tmp|part|draft|new)|tmp.*")
NEEDED, UNNEEDED = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A home with releases, with an artifact that is current, and with one that nobody needs."""
    folder = tmp_path_factory.mktemp("faults")
    home = folder / "made"
    for seed in range(RELEASES):
        publish(make_plan(folder / "plans", seed=seed), home / "triton_models" / "cpu", Steps(prove=unasked))
    store = ArtifactStore(home / "artifacts")
    for digest in (NEEDED, UNNEEDED):
        made = store.get_or_make(Engine, digest * 2, lambda place, digest=digest: fill(place, digest * 2))
        if digest == NEEDED:
            store.point("engines/cpu/e/m", made.record)
    long_ago = time.time() - 30 * 24 * 3600
    os.utime(home / "artifacts" / "engine" / UNNEEDED / "record.json", (long_ago, long_ago))
    (home / "models.yaml").write_text("models: []\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        prepare_instance(Workspace(home=home, catalog_path=home / "models.yaml"))
        with dg.DagsterInstance.get() as instance:
            instance.get_runs()
        del os.environ["DAGSTER_HOME"]
    return home


def fill(place, digest):
    (place / "model.onnx").write_bytes(bytes(2**16))
    return engine(digest)


@pytest.fixture(scope="module")
def refinery(tmp_path_factory):
    with commands(tmp_path_factory.mktemp("disk")) as found:
        yield found


def copy(made, home):
    """Databases are written in place, and files of a release never are."""
    shutil.rmtree(home, ignore_errors=True)

    def one(source, target):
        (os.link if "triton_models" in str(source) else shutil.copy2)(source, target)

    shutil.copytree(made, home, copy_function=one)
    return home


def leftovers(home):
    """What no command may leave, whether or not it failed."""
    found = [path for path in home.rglob("*") if DRAFT.fullmatch(path.name)]
    for staging in (home / "artifacts" / "staging", home / "triton_models" / ".cpu.staging"):
        found += staging.iterdir() if staging.is_dir() else []
    found += [
        folder
        for folder in home.glob("artifacts/*/*")
        if re.fullmatch("[0-9a-f]{32}", folder.name) and not (folder / "record.json").is_file()
    ]
    repository = home / "triton_models" / "cpu"
    for folder in repository.iterdir() if repository.is_dir() else []:
        parsed = parse_internal(folder.name)
        if parsed is not None and not (repository / parsed[0] / str(parsed[1]) / "release.json").is_file():
            found.append(folder)
    return [str(path.relative_to(home)) for path in found]


def assert_serves_whole(home):
    repository = home / "triton_models" / "cpu"
    number = current_number(repository, "tiny")
    assert number is not None
    assert differences_from_manifest(repository, find_release(repository, "tiny", number)) == []
    assert release_numbers(repository, "tiny") == [release.number for release in list_releases(repository, "tiny")]
    return number


def assert_says(done, home):
    """Our own error: which file or database, what is wrong with it, and what to do, in three sentences at most."""
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("refinery: "), done
    assert str(home) in last or "REFINERY_HOME" in last, done
    assert re.search(r"No space left on device|disk is full|disk I/O error|unable to open database file", last), done
    assert re.search(r"[Mm]ake room|has room", last), done
    assert len(re.findall(r"\.(?= [A-Z`]|$)", last)) <= 3, done


def check_release_command(refinery, arguments, at, full, expected):
    home = refinery.home
    before = current_number(home / "triton_models" / "cpu", "tiny")
    done = refinery.run(*arguments, at=at, full=full)
    if done.code:
        assert done.code == 1, done
        assert_says(done, home)
        assert assert_serves_whole(home) in (before, expected[0]), done
        assert leftovers(home) == [], done
        if assert_serves_whole(home) != before:
            return  # it failed after the last thing that it had to do
        again = refinery.run(*arguments)
        assert again.code == 0, (done, again)
    assert leftovers(home) == [], done
    assert (assert_serves_whole(home), release_numbers(home / "triton_models" / "cpu", "tiny")) == expected, done


RELEASE_COMMANDS = {
    "rollback": (["rollback", "tiny"], (RELEASES - 1, [*range(1, RELEASES + 1)])),
    "retain": (["retain", "tiny", "--keep", "1"], (RELEASES, [RELEASES])),
}


def check_gc(refinery, at, full):
    home = refinery.home
    done = refinery.run("gc", at=at, full=full)
    assert "Traceback" not in done.err, done
    kept = {path.name for path in (home / "artifacts" / "engine").iterdir()}
    if done.code:
        assert_says(done, home)
        assert refinery.run("gc").code == 0, done
    assert {path.name for path in (home / "artifacts" / "engine").iterdir()} == {NEEDED}, done
    assert leftovers(home) == [], done
    return done.code, kept


def numbers(writes, step):
    """The numbers of the writes that fail, and whether the disk is full from there on; with a step each in one mode."""
    found = range(1, writes + 1, step)
    if step == 1:
        return [(number, full) for full in (False, True) for number in found]
    return [(number, place % 2 == 1) for place, number in enumerate(found)]


STEPS = [pytest.param(10, id="every tenth"), pytest.param(1, id="every", marks=pytest.mark.whole)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("command", RELEASE_COMMANDS)
def test_what_serves_goes_on_and_nothing_stays_half_done(refinery, made, command, step):
    arguments, expected = RELEASE_COMMANDS[command]
    copy(made, refinery.home)
    whole = refinery.run(*arguments)
    assert (whole.code, leftovers(refinery.home)) == (0, []), whole
    assert whole.writes > 5
    for at, full in numbers(whole.writes, step):
        copy(made, refinery.home)
        check_release_command(refinery, arguments, at, full, expected)


@pytest.mark.parametrize("step", STEPS)
def test_gc_frees_whatever_cannot_be_written(refinery, made, step):
    copy(made, refinery.home)
    whole = refinery.run("gc")
    assert whole.code == 0, whole
    for at, full in numbers(whole.writes, step):
        copy(made, refinery.home)
        check_gc(refinery, at, full)


@pytest.mark.whole
def test_a_tracking_database_that_could_not_be_made_whole_is_made_again(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from resources.tracking.store import TrackingStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2); folder = Path(sys.argv[1])\n"
        "store = TrackingStore(f'sqlite:///{folder}/mlflow.db', ui=None, folder=folder / 'tracking')\n"
        "with store.clear_errors(): print(len(store.client.search_experiments()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    starved = subprocess.run([*command, str(2**17)], capture_output=True, text=True, check=False)
    assert starved.returncode == 1
    assert "cannot be written" in starved.stderr
    assert "Make room there" in starved.stderr
    assert list(tmp_path.glob("mlflow.db*")) == []
    assert subprocess.run([*command, str(2**30)], capture_output=True, text=True, check=True).stdout == "1\n"


#: An optimization of a tiny model on a home of its own makes tens of thousands of writes, most of them of databases.
SAMPLES = 10


def optimize_command(checkpoint):
    options = {"name": "new", "engines": "onnxruntime_fp32", "seconds": 0.3, "serving-seconds": 0, "seq-len": 16}
    return ["optimize", str(checkpoint), *(f"--{name}={value}" for name, value in options.items()), "--batch-size=1"]


def check_optimize(refinery, arguments, at, full, before, *, spared):
    done = refinery.run(*arguments, at=at, full=full, spared=spared)
    home, repository = refinery.home, refinery.home / "triton_models" / "cpu"
    assert "Traceback" not in done.err, done
    if done.code:
        assert done.code == 1, done
        assert_says(done, home)
    assert leftovers(home) == [], (done, leftovers(home))
    assert {"tiny": assert_serves_whole(home)} == before
    assert refinery.run("gc", at=1, full=True).code == 0
    again = refinery.run(*arguments)
    assert again.code == 0, (done, again)
    assert current_number(repository, "new") is not None
    assert (
        differences_from_manifest(repository, find_release(repository, "new", current_number(repository, "new"))) == []
    )
    assert leftovers(home) == [], done


@pytest.mark.whole
@pytest.mark.parametrize("spared", [True, False], ids=["files", "databases too"])
def test_an_optimization_leaves_nothing_half_done(refinery, made, made_checkpoint, spared):
    """Fail writes spread evenly over the run: every one would take days."""
    arguments = optimize_command(made_checkpoint())
    copy(made, refinery.home)
    whole = refinery.run(*arguments, spared=spared)
    assert whole.code == 0, whole
    for place, at in enumerate(range(1, whole.writes + 1, max(1, whole.writes // SAMPLES))):
        copy(made, refinery.home)
        check_optimize(refinery, arguments, at, place % 2 == 1, {"tiny": RELEASES}, spared=spared)
