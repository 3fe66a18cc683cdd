"""The Dagster instance, which is in the workspace's home unless DAGSTER_HOME names another folder."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from resources.errors import CatalogError
from resources.settings.workspace import Workspace
from resources.storage.atomic import write_whole

#: The variable with the address of the database in which Dagster keeps runs and events instead of in files:
#: `postgresql+psycopg2://user:password@host:5432/database`.
POSTGRES_VARIABLE = "REFINERY_DAGSTER_POSTGRES_URL"
#: For plain `postgresql://`, SQLAlchemy 2.1 uses another driver than the one that dagster-postgres brings.
_POSTGRES_SCHEME = "postgresql+psycopg2://"

_CONFIGURATION = """\
# Written by transformer-refinery, and yours once you change it: storage, run launcher and the rest are described in
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
# A run whose process was killed is noticed, failed and started again; the store has what it had made. A run in which
# a step failed is not: that has a reason, which another try would only meet again.
run_launcher:
  module: orchestration.runs.run_launcher
  class: WatchedRunLauncher
run_monitoring:
  enabled: true
  poll_interval_seconds: 10
  start_timeout_seconds: 120
  free_slots_after_run_end_seconds: 5
run_retries:
  enabled: true
  max_retries: 2
  retry_on_asset_or_op_failure: false
"""

#: Every process that opens the instance reads the variable, so that no file holds the password.
_POSTGRES = f"""\
storage:
  postgres:
    postgres_url:
      env: {POSTGRES_VARIABLE}
"""

#: The dagster.yaml files that earlier versions wrote.
_EARLIER = (
    """\
# Written once by transformer-refinery and yours from then on: storage, run launcher and the rest are described in
# Dagster's documentation of dagster.yaml.
telemetry:
  enabled: false
nux:
  enabled: false
# Steps print nothing: what their libraries print is in $REFINERY_HOME/logs.
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
""",
)

#: The run launcher's place, as earlier versions wrote it and as it is now.
_MOVED = ("module: orchestration.launcher\n", "module: orchestration.runs.run_launcher\n")

#: The content of this repository's workspace.yaml, for pages that are started in another folder.
WORKSPACE = """\
load_from:
  - python_module:
      module_name: orchestration.definitions
      location_name: transformer-refinery
"""


def instance_folder(workspace: Workspace) -> Path:
    """Return the folder of the instance, which need not exist."""
    given = os.environ.get("DAGSTER_HOME")
    if not given:
        return workspace.home / "dagster"
    folder = Path(given).resolve()
    require_plain(folder, "DAGSTER_HOME")
    return folder


def require_plain(folder: Path, variable: str) -> None:
    """Raise CatalogError for a folder whose path cannot be part of the address of a SQLite database."""
    for sign in "?%":
        if sign in str(folder):
            raise CatalogError(
                f"{variable}: {str(folder)!r} holds {sign!r}, which has another meaning in the addresses of the SQLite "
                "databases that Dagster and MLflow keep there. Choose a folder whose path has no '?' and no '%'."
            )


def prepare_instance(workspace: Workspace) -> Path:
    """Make the instance's folder if it is missing, set DAGSTER_HOME to it, and return it.

    Its dagster.yaml follows the settings as long as nobody has changed that file by hand.

    Raises:
        CatalogError: Postgres is configured and cannot be used, or dagster.yaml uses Postgres and its address is not
            set.
    """
    folder = instance_folder(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "dagster.yaml"
    url = os.environ.get(POSTGRES_VARIABLE, "")
    if url:
        _require_postgres(url)
    wanted = _CONFIGURATION + (_POSTGRES if url else "")
    written = configuration.read_text(encoding="utf-8") if configuration.exists() else None
    there = written.replace(*_MOVED) if written is not None else None
    if there == _CONFIGURATION + _POSTGRES and not url:
        raise CatalogError(
            f"{configuration} keeps runs in the Postgres database of {POSTGRES_VARIABLE}, but that variable is not "
            "set. Set it, or remove that file to keep runs in local files. Dagster then does not show the runs in "
            "Postgres."
        )
    if there is None or (written != wanted and there in (wanted, _CONFIGURATION, *_EARLIER)):
        write_whole(configuration, wanted)
    elif url and POSTGRES_VARIABLE not in there:
        raise CatalogError(
            f"{POSTGRES_VARIABLE} is set, but {configuration} was changed by hand and does not name it. Add to it:\n"
            + _POSTGRES
        )
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def _require_postgres(url: str) -> None:
    if not url.startswith(_POSTGRES_SCHEME):
        scheme = f"begins with {url.partition('://')[0]!r}" if "://" in url else "has no scheme"  # no password is shown
        raise CatalogError(
            f"{POSTGRES_VARIABLE} {scheme}. Write {_POSTGRES_SCHEME}user:password@host:5432/database, so "
            "that SQLAlchemy uses the driver that dagster-postgres installs."
        )
    if find_spec("dagster_postgres") is None:
        raise CatalogError(
            f"{POSTGRES_VARIABLE} is set, but dagster-postgres is not installed. "
            "Run: pip install 'transformer-refinery[postgres]'."
        )
