"""The Dagster instance below the workspace's home, unless DAGSTER_HOME points to another."""

from __future__ import annotations

import os
from pathlib import Path

from resources.workspace import Workspace

_CONFIGURATION = """\
# Written once by transformer-refinery and yours from then on: storage, run launcher and the rest are described in
# Dagster's documentation of dagster.yaml.
telemetry:
  enabled: false
nux:
  enabled: false
# Of the runs that wait, so many are begun at once: they share this machine, and their benchmarks take turns.
concurrency:
  runs:
    max_concurrent_runs: 2
# Steps print nothing: what their libraries print is in $REFINERY_HOME/logs.
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""


#: The workspace.yaml of this repository, for pages that are opened elsewhere.
WORKSPACE = """\
load_from:
  - python_module:
      module_name: orchestration.definitions
      location_name: transformer-refinery
"""


def prepare_instance(workspace: Workspace) -> Path:
    """The instance's folder, made if it is not there, and named to Dagster through DAGSTER_HOME."""
    given = os.environ.get("DAGSTER_HOME")
    folder = Path(given).resolve() if given else workspace.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "dagster.yaml"
    if not configuration.exists():
        configuration.write_text(_CONFIGURATION)
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder
