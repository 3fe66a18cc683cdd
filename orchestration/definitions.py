"""The definitions that Dagster loads. No other module of the project reads the environment when it is imported."""

import os

import dagster as dg

from assets.asset_docs import documented
from assets.benchmarks import benchmark_assets, served_benchmark_asset
from assets.champion import champion_assets
from assets.checkpoint import checkpoint, required_files
from assets.engines import engine_asset
from assets.evaluation_set import evaluation_set
from assets.freshness import release_check
from assets.onnx_graph import onnx_graph, onnx_valid, parity_with_pytorch
from assets.reference import reference
from assets.serving import serving_benchmark_asset, serving_configuration_asset
from assets.triton_repository import triton_repository_assets
from orchestration.automation import maintenance_jobs as upkeep
from orchestration.automation.freshness import freshness_job, freshness_sensor
from orchestration.automation.notifications import failure_sensor
from orchestration.automation.policies import Policies
from orchestration.automation.schedules import DEFAULT_CRON, reoptimization
from orchestration.automation.sensors import checkpoint_sensor
from orchestration.runs.executors import Execution, make_executor
from orchestration.runs.jobs import close_tracking_of_killed_runs, optimize
from orchestration.settings import (
    complete_environment,
    read_execution,
    read_policies,
    read_workspace,
    tracker_of,
    webhook_of,
)
from orchestration.terminal.progress import progress_logger
from resources.boundary.addresses import Address
from resources.settings.workspace import Workspace
from resources.steps.graph import steps_of


def make_definitions(
    workspace: Workspace,
    execution: Execution | None = None,
    cron: str = DEFAULT_CRON,
    policies: Policies | None = None,
    webhook: Address | None = None,
) -> dg.Definitions:
    """Return the definitions of the whole code location.

    Args:
        workspace: The workspace in which the assets are made.
        execution: The executor of runs. None means one process.
        cron: The times at which the schedule plans all models again.
        policies: The policies of all assets. None means the defaults.
        webhook: The address that is told of failed runs.
    """
    policies = policies or Policies()
    assets: list[dg.AssetsDefinition] = [checkpoint, evaluation_set, reference, onnx_graph]
    checks: list[dg.AssetChecksDefinition] = [required_files, onnx_valid, parity_with_pytorch]
    for steps in map(steps_of, workspace.targets):
        assets += map(engine_asset, steps.engines)
        for step in steps.benchmarks:
            benchmark, accuracy_gate = benchmark_assets(step)
            assets.append(benchmark)
            checks.append(accuracy_gate)
        champion, as_good_as_what_serves = champion_assets(steps)
        repository, served_answers_equal = triton_repository_assets(steps)
        assets += [served_benchmark_asset(steps.served), champion, serving_configuration_asset(steps), repository]
        assets.append(serving_benchmark_asset(steps))
        checks += [as_good_as_what_serves, served_answers_equal, release_check(steps.target, policies.warn_days)]
    return dg.Definitions(
        assets=dg.map_asset_specs(lambda spec: policies.applied(documented(spec)), assets),
        asset_checks=checks,
        jobs=[optimize, freshness_job(workspace.targets), *upkeep.JOBS],
        schedules=[reoptimization(cron, policies.fresh_days)],
        sensors=[
            checkpoint_sensor(workspace.watch_seconds),
            freshness_sensor(policies.warn_days),
            failure_sensor(webhook, workspace.dagster_ui),
            close_tracking_of_killed_runs,
        ],
        executor=make_executor(execution or Execution()),  # also for assets that are materialized by hand
        resources={"workspace": workspace, "tracker": tracker_of(workspace)},
        loggers={"progress": progress_logger},
    )


complete_environment(os.environ)
defs = make_definitions(
    read_workspace(os.environ),
    read_execution(os.environ),
    os.environ.get("REFINERY_SCHEDULE") or DEFAULT_CRON,
    read_policies(os.environ),
    webhook_of(os.environ),
)
