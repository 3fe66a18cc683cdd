"""One partition a model of the catalog."""

import dagster as dg

models = dg.DynamicPartitionsDefinition(name="model")
