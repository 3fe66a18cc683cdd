"""How runs are executed: jobs, executors, the run launcher, and the Dagster instance."""
