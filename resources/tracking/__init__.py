"""Tracking in MLflow.

Each model has an experiment, each optimization of the model for one target has a parent run, and each candidate has a
child run. The parent run is made with its first child, so that a run that changes nothing writes nothing.

The project uses `MlflowClient` and not dagster-mlflow, which pins an older Dagster.
"""

from resources.tracking.store import RunLink
from resources.tracking.tracker import Tracker

__all__ = ["RunLink", "Tracker"]
