"""The partitions of all assets: one for each model of the catalog."""

import dagster as dg

models = dg.DynamicPartitionsDefinition(name="model")
#: The tag that Dagster gives to the runs of a partition.
PARTITION_TAG = "dagster/partition"
