"""The former place of orchestration.runs.run_launcher. The dagster.yaml of existing deployments still names it."""

from orchestration.runs.run_launcher import WatchedRunLauncher

__all__ = ["WatchedRunLauncher"]
