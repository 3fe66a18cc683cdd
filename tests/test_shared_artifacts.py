"""Machines that share artifacts through object storage: what one has made, the others find, whole or not at all.

S3 is moto's, on loopback; a machine is a folder of its own.
"""

import json

import pytest

from orchestration.settings import read_workspace
from resources.artifacts.records import Checkpoint, Engine
from resources.artifacts.remote import RemoteArtifacts
from resources.artifacts.store import ArtifactStore
from resources.catalog.loading import write_entry
from resources.errors import ArtifactError, CatalogError, StorageError
from resources.plan import plan_model
from tests.conftest import entry_for
from tests.pipeline import add_entry, run_assets

FILES = {"model.onnx": b"graph", "weights/part.bin": b"0123456789", "empty": b""}


@pytest.fixture
def place(s3, tmp_path):
    """Where the machines' artifacts lie, which is empty."""
    return s3.place(tmp_path.name, tmp_path / "scratch")


@pytest.fixture
def machine(place, tmp_path):
    """Makes the store of another machine."""
    return lambda name: ArtifactStore(tmp_path / name, RemoteArtifacts(place))


class Maker:
    """Makes an engine with those files; `made`: how often."""

    def __init__(self, status="built", **files):
        self.status, self.made = status, 0
        self.files = {**FILES, **{name.replace("__", "."): data for name, data in files.items()}}

    def __call__(self, folder):
        self.made += 1
        for name, data in self.files.items() if self.status == "built" else ():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        return Engine(
            digest="d" * 64, model="m", name="e", target="cpu", runtime="r", precision="fp32", status=self.status
        )


def make(store, maker, name="engines/cpu/e/m"):
    made = store.get_or_make(Engine, "d" * 64, maker)
    store.point(name, made.record)
    return made


def contents(store, record):
    folder = store.folder(record)
    return {name: (folder / name).read_bytes() for name in record.files}


def refuse_record(s3):
    """Whoever uploads ends before the record, as when it is killed."""
    s3.refuses = lambda method, key: method == "PUT" and key.endswith("record.json")


def test_what_one_machine_made_the_other_finds(machine):
    first, second, maker, unused = machine("one"), machine("two"), Maker(), Maker()
    made = make(first, maker)
    found = second.current(Engine, "engines/cpu/e/m")
    assert found == made.record
    assert contents(second, found) == FILES
    assert second.damaged(found) == []
    again = second.get_or_make(Engine, "d" * 64, unused)
    assert again.reused
    assert (maker.made, unused.made) == (1, 0)


def test_a_machine_asks_once_for_what_it_has(machine, s3):
    make(machine("one"), Maker())
    second = machine("two")
    assert second.find(Engine, "d" * 64) is not None
    s3.requests.clear()
    assert second.find(Engine, "d" * 64) is not None
    assert s3.requests == []


def test_an_upload_that_ends_early_is_nothing_and_is_made_up_for(machine, s3):
    first, second = machine("one"), machine("two")
    refuse_record(s3)
    with pytest.raises(StorageError, match="refuses to write"):
        make(first, Maker())
    assert any(key.endswith("model.onnx") for key in s3.changed())
    s3.refuses = lambda method, key: False
    assert second.find(Engine, "d" * 64) is None
    with pytest.raises(ArtifactError, match="has not been made yet"):
        second.current(Engine, "engines/cpu/e/m")
    # It was not lost where it was made: the next try only has to bring it there.
    unused = Maker()
    assert make(first, unused).reused
    assert unused.made == 0
    assert contents(second, second.current(Engine, "engines/cpu/e/m")) == FILES


def test_two_that_made_the_same_are_not_mixed(machine, s3, place, tmp_path):
    """The second one's files are all there, its record is not: the first one's whole artifact is what is found."""
    make(machine("one"), Maker())
    refuse_record(s3)
    other = Maker(model__onnx=b"other graph")
    with pytest.raises(StorageError):
        place = machine("two")
        place.remote.push(
            ArtifactStore(tmp_path / "alone").get_or_make(Engine, "d" * 64, other).record,
            tmp_path / "alone" / "engine" / ("d" * 32),
        )
    assert sum(key.endswith("model.onnx") for key in s3.changed()) == 2
    third = machine("three")
    assert contents(third, third.find(Engine, "d" * 64)) == FILES


def test_a_file_that_is_not_what_the_record_says_is_made_anew(machine, place):
    make(machine("one"), Maker())
    (key,) = [name for name in place.sizes() if name.endswith("part.bin")]
    (place / key).write_bytes(b"9876543210")
    second, maker = machine("two"), Maker()
    assert second.find(Engine, "d" * 64) is None
    assert not make(second, maker).reused
    third = machine("three")
    assert contents(third, third.find(Engine, "d" * 64)) == FILES


def test_what_failed_on_one_machine_and_was_built_on_another_is_built_for_both(machine):
    first, second = machine("one"), machine("two")
    make(first, Maker(status="failed"))
    assert second.current(Engine, "engines/cpu/e/m").status == "failed"
    make(second, Maker())
    assert first.current(Engine, "engines/cpu/e/m").status == "built"
    unused = Maker()
    assert make(first, unused).reused
    assert unused.made == 0


def spoil(path):
    path.write_bytes(b"9876543210")


def take_away(path):
    path.parent.remove([path.name])


@pytest.mark.parametrize("harm", [spoil, take_away])
def test_what_is_damaged_where_all_share_it_is_named_and_brought_again_by_who_has_a_copy(machine, place, harm):
    first, second, unused = machine("one"), machine("two"), Maker()
    make(first, Maker())
    (name,) = [name for name in place.sizes() if name.endswith("part.bin")]
    harm(place / name)
    with pytest.raises(ArtifactError, match=rf"weights/part\.bin in .* share in {place}, changed on the disk"):
        second.current(Engine, "engines/cpu/e/m")
    assert make(first, unused).reused
    assert unused.made == 0
    assert contents(second, second.current(Engine, "engines/cpu/e/m")) == FILES


def test_who_makes_again_what_is_damaged_where_all_share_it_says_so(machine, place):
    make(machine("one"), Maker())
    (name,) = [name for name in place.sizes() if name.endswith("part.bin")]
    spoil(place / name)
    assert make(machine("two"), Maker()).damaged == ("weights/part.bin",)


def test_what_is_damaged_on_one_machine_is_brought_there_again(machine):
    first, unused = machine("one"), Maker()
    record = make(first, Maker()).record
    spoil(first.folder(record) / "weights" / "part.bin")
    made = first.get_or_make(Engine, "d" * 64, unused)
    assert (made.reused, made.damaged, unused.made) == (True, ("weights/part.bin",), 0)
    assert contents(first, record) == FILES
    first.remove(record)  # as a check does that finds it damaged
    assert contents(first, first.find(Engine, "d" * 64)) == FILES


def test_a_name_that_leads_out_of_the_store_is_not_followed(machine, place, tmp_path):
    make(machine("one"), Maker())
    (record,) = [place / name for name in place.sizes() if name.endswith("record.json")]
    upload = json.loads(record.read_bytes())["upload"]
    outside = tmp_path / "outside.bin"
    (record.parent / upload / str(outside)).write_bytes(FILES["weights/part.bin"])
    record.write_bytes(record.read_bytes().replace(b"weights/part.bin", str(outside).encode()))
    assert machine("two").find(Engine, "d" * 64) is None
    assert not outside.exists()


def test_what_is_brought_again_is_what_lies_here_under_whatever_name_it_is_passed_on(machine, place):
    """As what serves is, which is measured beside the candidates."""
    first, second = machine("one"), machine("two")
    made = make(first, Maker())
    for name in place.sizes():
        place.remove([name])
    first.point("engines/cpu/served/m", made.record.model_copy(update={"name": "served"}))
    assert second.current(Engine, "engines/cpu/served/m").name == "e"
    first.remove(made.record)
    for name in place.sizes():
        place.remove([name])
    with pytest.raises(ArtifactError, match="no more. Optimize again"):
        first.point("engines/cpu/e/m", made.record)


def test_a_step_that_made_nothing_this_time_has_nothing_for_others_either(machine):
    first, second = machine("one"), machine("two")
    make(first, Maker())
    assert second.current(Engine, "engines/cpu/e/m")
    first.forget("engines/cpu/e/m")
    first.forget("engines/cpu/e/m")  # nor again
    with pytest.raises(ArtifactError, match="has not been made yet"):
        second.current(Engine, "engines/cpu/e/m")


def test_what_cannot_be_reached_is_named(tmp_path, s3):
    variables = {"REFINERY_HOME": str(tmp_path / "home")}
    gone = {**variables, "REFINERY_ARTIFACTS": f"s3://http://{s3.address}/no-such-bucket/artifacts"}
    with pytest.raises(
        StorageError, match="no-such-bucket does not exist. Create the bucket, or correct REFINERY_ARTIFACTS"
    ):
        read_workspace(gone).store.current(Checkpoint, "checkpoint/m")
    with pytest.raises(CatalogError, match="REFINERY_ARTIFACTS: 'ftp://host/x' is neither a folder nor a path"):
        read_workspace({**variables, "REFINERY_ARTIFACTS": "ftp://host/x"})


def test_two_homes_with_one_bucket(tmp_path, place, made_checkpoint):
    """The pipeline's own steps: the second machine copies no checkpoint that the first has copied."""
    artifacts = str(place)
    made = []
    for name in ("one", "two"):
        home = tmp_path / name
        catalog = tmp_path / "models.yaml"
        workspace = read_workspace(
            {"REFINERY_HOME": str(home), "REFINERY_CATALOG": str(catalog), "REFINERY_ARTIFACTS": artifacts}
        )
        add_entry(workspace, entry_for(made_checkpoint()))
        outcome = run_assets(workspace, "tiny", ["checkpoint"])
        assert outcome.success, outcome.messages
        assert outcome.checks() == {"checkpoint:required_files": True}
        made.append(outcome.metadata("checkpoint"))
    assert [one["reused"] for one in made] == [False, True]
    assert made[0]["digest"] == made[1]["digest"]
    assert str(tmp_path / "two") in str(made[1]["files"])
    # A machine that only plans knows what was made, and brings none of it here.
    planning = read_workspace(
        {"REFINERY_HOME": str(tmp_path / "three"), "REFINERY_CATALOG": str(catalog), "REFINERY_ARTIFACTS": artifacts}
    )
    write_entry(entry_for(made_checkpoint()), planning.additions)
    for here in (workspace, planning):
        known = here.store.known(Checkpoint, "checkpoint/tiny")
        assert known is not None and known.digest == made[0]["digest"]
        steps = {step.step: step.state for step in plan_model(here, here.entry("tiny")).steps}
        assert (steps["checkpoint"], steps["onnx_graph"]) == ("reused", "run")
    assert not (tmp_path / "three" / "artifacts" / "checkpoint").exists()
