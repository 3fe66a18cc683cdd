"""One partition a model of the catalog."""

import dagster as dg

models = dg.DynamicPartitionsDefinition(name="model")
#: As Dagster tags the runs of a partition.
PARTITION_TAG = "dagster/partition"
