"""What exists: the assets and their checks."""

import warnings

import dagster as dg

# Checks by partition are in preview; without them one model's pass would hide another's failure. pyproject.toml holds
# Dagster to one minor version for that.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
