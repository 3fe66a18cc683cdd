-- Beside Dagster's own, which the container makes.
CREATE DATABASE mlflow;
