"""Running the real job on a workspace of its own, as `refinery optimize` does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg

from orchestration.cli.optimize import failures
from orchestration.definitions import make_definitions
from resources.catalog.entries import ModelEntry
from resources.catalog.loading import write_entry
from resources.engines.specs import BASELINE, SERVED
from resources.settings.workspace import Workspace

#: Gates that a model with random weights keeps in int8 on every processor. With the default for `neighbours`, the
#: instructions for int8 (AVX2, VNNI, AMX) decide how many matrices stay in fp32, and so which engine is the champion.
LOOSE_GATES = {"cosine_mean": 0.9, "cosine_worst": 0.5, "neighbours": 0.5}


@dataclass(frozen=True)
class Outcome:
    """What one run of the job came to."""

    result: Any
    messages: list[str]

    @property
    def success(self) -> bool:
        return bool(self.result.success)

    def metadata(self, *key: str) -> dict[str, Any]:
        """Metadata of the materialization of one asset."""
        for event in self.result.get_asset_materialization_events():
            if event.asset_key == dg.AssetKey(list(key)):
                return {name: value.value for name, value in event.materialization.metadata.items()}
        raise AssertionError(f"{'/'.join(key)} was not materialized")

    def materialized(self) -> set[str]:
        """Names of all assets that were materialized."""
        return {"/".join(event.asset_key.path) for event in self.result.get_asset_materialization_events()}

    def checks(self) -> dict[str, bool]:
        """Return whether each asset check passed."""
        return {
            f"{'/'.join(item.asset_key.path)}:{item.check_name}": item.passed
            for item in self.result.get_asset_check_evaluations()
        }


@contextmanager
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """A real instance on disk."""
    folder = home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    before = os.environ.get("DAGSTER_HOME")
    os.environ["DAGSTER_HOME"] = str(folder)
    try:
        with dg.DagsterInstance.get() as found:
            yield found
    finally:
        if before is None:
            del os.environ["DAGSTER_HOME"]
        else:
            os.environ["DAGSTER_HOME"] = before


def add_entry(workspace: Workspace, entry: ModelEntry) -> None:
    """Make the entry part of the workspace's catalog."""
    workspace.home.mkdir(parents=True, exist_ok=True)
    if workspace.tracking_uri is None and not (workspace.home / "mlflow.db").exists():
        (workspace.home / "mlflow.db").write_bytes(empty_tracking_store())
    if not workspace.catalog_path.exists():
        workspace.catalog_path.write_text("models: []\n")
    write_entry(entry, workspace.additions)


@cache
def empty_tracking_store() -> bytes:
    """MLflow's own, made once: it takes seconds to go through all its migrations."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def run_job(workspace: Workspace, model: str, *, whole: bool = False) -> Outcome:
    """One run of the job `optimize`; of the engines, those that the entry names, or with `whole` every one."""
    named = workspace.entry(model).engines
    if whole or named is None:
        return _run(workspace, model, "optimize", None)
    job = make_definitions(workspace).resolve_job_def("optimize")
    wanted = {BASELINE, SERVED, *named}
    keys = [key for key in job.asset_layer.executable_asset_keys if len(key.path) < 3 or key.path[-1] in wanted]
    return _run(workspace, model, "optimize", keys)


def run_assets(workspace: Workspace, model: str, keys: Sequence[str]) -> Outcome:
    """Some assets alone, with their checks, as Dagster's page materializes them."""
    return _run(workspace, model, "__ASSET_JOB", [dg.AssetKey(key.split("/")) for key in keys])


def settings_of(workspace: Workspace) -> dict[str, str]:
    """The environment of a process that is to work in that workspace."""
    return {
        **os.environ,
        # Commands that find others by their names.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REFINERY_HOME": str(workspace.home),
        "REFINERY_CATALOG": str(workspace.catalog_path),
        "REFINERY_TARGETS": ",".join(workspace.targets),
        **({"REFINERY_ARTIFACTS": str(workspace.artifacts)} if workspace.artifacts else {}),
    }


def materialize(
    workspace: Workspace, model: str, assets: Sequence[str], *, fails: bool = False, **variables: str
) -> None:
    """Some assets by Dagster's own command, in a process that knows its environment alone; that has DAGSTER_HOME."""
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "orchestration.definitions"]
    result = subprocess.run(
        [*command, "--select", ",".join(assets), "--partition", model],
        env={**settings_of(workspace), **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.returncode != 0) == fails, result.stdout + result.stderr


def _run(workspace: Workspace, model: str, job: str, selection: Sequence[dg.AssetKey] | None) -> Outcome:
    with instance(workspace.home) as found:
        found.add_dynamic_partitions("model", [model])
        result = (
            make_definitions(workspace)
            .resolve_job_def(job)
            .execute_in_process(partition_key=model, instance=found, raise_on_error=False, asset_selection=selection)
        )
        return Outcome(result, failures(result) if not result.success else [])
