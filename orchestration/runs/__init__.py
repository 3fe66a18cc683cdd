"""The execution of runs: jobs, executors, the run launcher, and the Dagster instance."""
