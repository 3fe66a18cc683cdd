"""Tensors, files and servers, and the steps of the pipeline. Nothing here knows Dagster."""
