"""The web pages of Dagster, behind a guard, and of MLflow."""
