"""MLflow: an experiment a model, a parent run an optimization of it for one target, a child run a candidate.

Not dagster-mlflow, which pins an older Dagster; all that is needed is `MlflowClient`.
A run that changes nothing writes nothing: the parent run is made with its first child.
"""

from resources.tracking.store import RunLink
from resources.tracking.tracker import Tracker

__all__ = ["RunLink", "Tracker"]
