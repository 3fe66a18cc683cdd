"""Executors for the steps of a run: its own process, processes on its machine, Celery's workers, or Kubernetes.

The definitions are the same for all executors. The choice of the executor and its settings are configuration
(`REFINERY_EXECUTOR`). Each step asks the artifact store for what other steps made, so the store is all that every
machine has to reach.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from resources.errors import CatalogError, first_line

if TYPE_CHECKING:
    import dagster as dg

ExecutorKind = Literal["in_process", "multiprocess", "celery", "k8s"]

#: The default is in process, because the steps themselves are light: work that is heavy or may crash runs in child
#: processes of its own. Eighteen empty steps took 1.9 s this way, and 13 s with a process for each step.
IN_PROCESS: ExecutorKind = "in_process"
#: A build uses several cores, and up to six times the size of its graph in memory.
_MULTIPROCESS = {"max_concurrent": 2, "start_method": {"forkserver": {}}}
#: The module and the name of the executors that need a package of their own. This project has an extra for that
#: package, which has the name of the kind.
_PACKAGES = {"celery": ("dagster_celery", "celery_executor"), "k8s": ("dagster_k8s", "k8s_job_executor")}


@dataclass(frozen=True)
class Execution:
    """The executor and its settings.

    Args:
        kind: The kind of the executor.
        config: The executor's settings, which Dagster documents under `execution: config:`.
    """

    kind: ExecutorKind = IN_PROCESS
    config: Mapping[str, Any] = field(default_factory=dict)


def read_config(path: Path) -> dict[str, Any]:
    """Return the executor's settings from a file, which `dagster-celery worker start --config-yaml` can read as well.

    Raises:
        CatalogError: The file cannot be read, or holds no settings.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CatalogError(f"REFINERY_EXECUTOR_CONFIG: {path} cannot be read: {first_line(error)}.") from error
    execution = document.get("execution") if isinstance(document, dict) else None
    config = execution.get("config") if isinstance(execution, dict) else None
    if not isinstance(config, dict):
        raise CatalogError(
            f"REFINERY_EXECUTOR_CONFIG: {path} has no mapping `execution: config:`. Write the executor's settings "
            "there, in the form of a run's configuration in Dagster."
        )
    return config


def make_executor(execution: Execution) -> dg.ExecutorDefinition:
    """Return Dagster's executor with its settings.

    Raises:
        CatalogError: The executor's package is missing, or a setting is wrong.
    """
    import dagster as dg  # imported late because commands without Dagster import this module too

    config = dict(execution.config)
    if execution.kind == "in_process":
        executor = dg.in_process_executor
    elif execution.kind == "multiprocess":
        executor, config = dg.multiprocess_executor, {**_MULTIPROCESS, **config}
    else:
        module, name = _PACKAGES[execution.kind]
        try:
            executor = getattr(import_module(module), name)
        except ImportError as error:
            raise CatalogError(
                f"REFINERY_EXECUTOR is {execution.kind}: {first_line(error)}. "
                f"Run: pip install 'transformer-refinery[{execution.kind}]'."
            ) from error
    executor = executor.configured(config, name=execution.kind)
    if execution.kind == IN_PROCESS and not config:  # the usual case has nothing to be wrong
        return executor
    try:
        # Dagster itself would check the settings only when a run is launched.
        dg.validate_run_config(dg.GraphDefinition(name="settings").to_job(executor_def=executor))
    except dg.DagsterInvalidConfigError as error:
        reasons = "; ".join(one.message.splitlines()[0] for one in error.errors)
        raise CatalogError(
            f"REFINERY_EXECUTOR_CONFIG: the {execution.kind} executor does not accept these settings. {reasons}"
        ) from error
    return executor
