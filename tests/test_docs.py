"""README and docs agree with the program: commands, options, settings, fields, files and links, in both directions."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from orchestration.cli.arguments import parser
from orchestration.definitions import defs
from resources.catalog.entries import _PARTS, ModelEntry
from resources.catalog.loading import load_catalog
from resources.engines.specs import ENGINES
from resources.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "orchestration" / "deployment" / "README.md")
#: In prose and in blocks of code alike.
COMMAND = re.compile(r"(?<![\w/-])(?<!install )refinery ([a-z]+)\b([^`\n|]*)")


@cache
def text(path):
    return path.read_text(encoding="utf-8")


@cache
def every_page():
    return "\n".join(map(text, PAGES))


def joined(page):
    """A page whose commands stand in one line each."""
    return text(page).replace("\\\n", " ")


def commands():
    """The options of every command."""
    (action,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    return {
        name: {option for one in parser._actions for option in one.option_strings if option.startswith("--")}
        for name, parser in action.choices.items()
    }


def settings():
    """The variables that the program names."""
    rooms = ("assets", "orchestration", "resources")
    code = "\n".join(text(path) for room in rooms for path in sorted((ROOT / room).rglob("*.py")))
    return set(re.findall(r"\bREFINERY_[A-Z_]+[A-Z](?!_)\b", code))


def fields():
    """The fields of the models file, those of its parts, options and gates among them."""
    models = [ModelEntry, *_PARTS.values(), *(task.options for task in TASKS.values())]
    models += [task.gates for task in TASKS.values()]
    return {name for model in models for name in model.model_fields}


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    body = re.sub(r"^```.*?^```", "", text(path), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", body, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_options_on_a_page_exist(page):
    known = commands()
    for name, rest in COMMAND.findall(joined(page)):
        assert name in known, f"{page.name}: refinery {name}"
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest.split("#")[0]):
            assert option in known[name], f"{page.name}: refinery {name} {option}"


@pytest.mark.parametrize("name", commands())
def test_a_command_and_its_options_are_documented(name):
    assert f"refinery {name}" in every_page()
    # argparse makes two options of one that can be switched off.
    for option in commands()[name] - {"--help", "--accuracy"}:
        assert option in every_page(), f"refinery {name} {option}"


def test_settings_are_documented_and_exist():
    known = settings()
    assert len(known) > 25
    assert known <= set(re.findall(r"`(REFINERY_[A-Z_]+)`", text(ROOT / "docs" / "settings.md")))
    named = set(re.findall(r"\bREFINERY_[A-Z_]+[A-Z]\b", every_page()))
    assert named <= known, named - known


def test_fields_of_the_models_file_are_documented():
    documented = text(ROOT / "docs" / "models-file.md") + text(ROOT / "docs" / "tasks.md")
    missing = {name for name in fields() if not re.search(rf"(?<!\w){name}(?!\w)", documented)}
    assert not missing


def test_engines_and_tasks_are_documented():
    for names, page in (
        ([spec.name for spec in ENGINES if spec.name != "torch"], "models-file.md"),
        (TASKS, "tasks.md"),
    ):
        assert {name for name in names if f"`{name}`" not in text(ROOT / "docs" / page)} == set()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```yaml\nmodels:" in text(page)], ids=lambda page: page.name
)
def test_models_files_that_are_shown_can_be_read(page, tmp_path):
    for block in re.findall(r"^```yaml\n(models:.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE):
        (tmp_path / "models.yaml").write_text(block)
        (entry,) = load_catalog(tmp_path / "models.yaml").models
        assert entry.task == "classification"


def test_the_whole_models_file_shows_every_field():
    (block,) = re.findall(
        r"^```yaml\n(models:.*?)^```", text(ROOT / "docs" / "models-file.md"), flags=re.DOTALL | re.MULTILINE
    )
    (shown,) = yaml.safe_load(block)["models"]
    assert set(shown) == set(ModelEntry.model_fields)
    for name in ("benchmark", "ladder", "tensorrt", "serving", "limits"):
        assert set(shown[name]) == set(_PARTS[name].model_fields), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:resources|assets|orchestration|tests|docs)/[\w./-]*)`", text(page)):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for module in re.findall(r"\btests\.performance\.\w+", text(page)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page.name}: {module}"


def test_targets_of_make_are_documented_and_exist():
    targets = set(re.findall(r"^([a-z-]+):.*##", text(ROOT / "Makefile"), flags=re.MULTILINE)) | {"setup"}
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", every_page(), flags=re.MULTILINE))
    assert named == targets


def test_assets_and_checks_are_documented():
    page = text(ROOT / "docs" / "dagster.md")
    graph = defs.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        if key.path[0] not in ("engines", "benchmarks"):
            assert f"`{key.path[0]}`" in page, key
    for check in graph.asset_check_keys:
        assert f"`{check.name}`" in page, check


def test_the_readme_is_short():
    readme = text(ROOT / "README.md")
    assert len(readme.splitlines()) <= 200
    assert len(readme.split()) <= 1600
