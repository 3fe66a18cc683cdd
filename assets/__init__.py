"""The Dagster assets and their checks."""

import gc
import warnings

import dagster as dg

# Partitioned checks are a preview feature, so pyproject.toml holds Dagster to one minor version. Without them, one
# model's pass would hide another's failure.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
# Dagster's own objects live as long as the process. Without this call the garbage collector goes through all of them
# again and again while the definitions are loaded, which takes a fifth of that time.
gc.freeze()
