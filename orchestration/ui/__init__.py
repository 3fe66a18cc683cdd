"""The web pages: Dagster's behind a guard, and MLflow's."""
