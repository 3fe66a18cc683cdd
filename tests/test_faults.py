"""Every write of a command fails once, and on a disk that is full from there on: our error, no leftovers, and it works
again as soon as there is room.
"""

import os
import re
import shutil
import time

import dagster as dg
import pytest

from orchestration.instance import prepare_instance
from resources.artifacts.records import Engine
from resources.artifacts.store import ArtifactStore
from resources.triton.layout import current_number, list_releases, parse_internal, release_numbers
from resources.triton.publish import Steps, publish
from resources.triton.verify import differences, find_release
from resources.workspace import Workspace
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
    assert differences(repository, find_release(repository, "tiny", number)) == []
    assert release_numbers(repository, "tiny") == [release.number for release in list_releases(repository, "tiny")]
    return number


def assert_says(done, home):
    """Our own error: which file or database, what is wrong with it, and what to do, in three sentences at most."""
    assert "Traceback" not in done.err
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("refinery: "), done
    assert str(home) in last or "REFINERY_HOME" in last, done
    assert re.search(r"No space left on device|disk is full|disk I/O error", last), done
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
