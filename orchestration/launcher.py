"""The old place of orchestration.runs.run_launcher, which dagster.yaml of existing deployments names."""

from orchestration.runs.run_launcher import WatchedRunLauncher

__all__ = ["WatchedRunLauncher"]
