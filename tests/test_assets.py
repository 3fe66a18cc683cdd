"""What people find in Dagster of every asset, check, job, schedule and sensor."""

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import dagster as dg
import dagster_webserver
import pytest

from orchestration.automation.policies import FRESH_DAYS, GRACE_DAYS, Policies
from orchestration.definitions import make_definitions
from orchestration.settings import read_policies
from resources.errors import CatalogError
from resources.settings.workspace import Workspace

#: Names of icons as the page's own code has them: a kind of another name is shown without one.
ICON = re.compile(r"[{,]([a-z0-9]+):\{icon:")


def definitions(policies=None):
    workspace = Workspace(Path("home"), Path("models.yaml"), targets=("cpu", "cuda_sm90"))
    return make_definitions(workspace, policies=policies)


def specs(policies=None):
    return {spec.key.to_user_string(): spec for spec in definitions(policies).resolve_all_asset_specs()}


@pytest.fixture(scope="module")
def known_kinds():
    chunks = Path(dagster_webserver.__file__).parent / "webapp" / "build" / "_next" / "static" / "chunks"
    texts = [path.read_text() for path in chunks.glob("*.js")]
    (icons,) = [text for text in texts if "tool-huggingface-color" in text]
    return set(ICON.findall(icons))


def test_every_asset_says_what_it_is_and_whose(known_kinds):
    assert {"huggingface", "mlflow", "pytorch"} < known_kinds
    found = specs()
    # Two targets: sources and graph once; engines, their benchmarks, what serves, champion and three of serving each.
    assert len(found) == 4 + 2 * (12 + 12 + 1 + 1 + 3)
    for name, spec in found.items():
        assert spec.group_name not in (None, "default"), name
        assert spec.kinds and spec.kinds <= known_kinds, (name, spec.kinds - known_kinds)
        assert spec.owners == ["team:refinery"], name
        assert re.fullmatch("[0-9a-f]{16}", spec.code_version or ""), name
        first, *rest = spec.description.split("\n\n")
        assert len(first) > 30 and first.endswith("."), name
        assert [part.split("** ")[0] for part in rest] == ["**Made from", "**Rebuilt when"], name
        assert spec.freshness_policy == dg.FreshnessPolicy.time_window(
            warn_window=timedelta(days=FRESH_DAYS + GRACE_DAYS),
            fail_window=timedelta(days=2 * (FRESH_DAYS + GRACE_DAYS)),
        ), name
        assert spec.partitions_def is not None, name
        on_target = spec.key.path[1:]
        assert not on_target or spec.tags["target"] == on_target[0], name
    assert found["engines/cpu/onnxruntime_int8"].tags["precision"] == "int8"


def test_code_versions_are_those_of_what_the_store_compares():
    from resources.artifacts.fingerprint import code_version
    from resources.engines import rebuild
    from resources.steps.champion import ChampionStep

    found = specs()
    assert found["champion/cpu"].code_version == code_version(*ChampionStep.code)
    assert found["engines/cpu/onnxruntime_fp32"].code_version == code_version(*rebuild.CODE, "resources.steps.engine")
    # What is built to keep the gates changes with what judges.
    assert found["engines/cpu/onnxruntime_int8"].code_version == code_version(
        *rebuild.CODE, "resources.steps.engine", *rebuild.JUDGING
    )


def test_everything_else_is_described():
    repository = definitions().get_repository_def()
    checks = [spec for one in repository.asset_checks_defs_by_key.values() for spec in one.check_specs]
    jobs = [job for job in repository.get_all_jobs() if not job.name.startswith("__")]
    described = [*jobs, *repository.schedule_defs, *repository.sensor_defs, *checks]
    assert {job.name for job in jobs} == {
        "optimize",
        "check_releases",
        "rollback",
        "promote",
        "retain",
        "verify",
        "gc",
    }
    assert len(repository.schedule_defs) == 1 and len(repository.sensor_defs) == 4
    assert {spec.name for spec in checks} == {
        "required_files",
        "onnx_valid",
        "parity_with_pytorch",
        "accuracy_gate",
        "as_good_as_what_serves",
        "served_answers_equal",
        "up_to_date",
    }
    for one in described:
        assert len(one.description or "") > 30, one.name


def test_owners_and_freshness_are_configured():
    policies = read_policies({"REFINERY_OWNERS": "team:ml-platform, someone@example.org", "REFINERY_FRESH_DAYS": "5"})
    for spec in specs(policies).values():
        assert list(spec.owners) == ["team:ml-platform", "someone@example.org"]
        assert spec.freshness_policy.warn_window.to_timedelta() == timedelta(days=7)
    assert read_policies({}) == Policies()
    assert specs(replace(policies, fresh_days=float("inf")))  # never


@pytest.mark.parametrize("owner", ["ml-platform", "team:", "someone@"])
def test_what_is_no_owner_is_refused(owner):
    with pytest.raises(CatalogError, match=f"REFINERY_OWNERS: '{re.escape(owner)}'"):
        read_policies({"REFINERY_OWNERS": f"team:fine,{owner}"})


def test_what_is_no_number_of_days_is_refused():
    with pytest.raises(CatalogError, match="REFINERY_FRESH_DAYS: 'soon'"):
        read_policies({"REFINERY_FRESH_DAYS": "soon"})
