"""What exists: the assets and their checks."""

import gc
import warnings

import dagster as dg

# Checks by partition are in preview; without them one model's pass would hide another's failure. pyproject.toml holds
# Dagster to one minor version for that.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)
# Dagster's own objects stay for as long as the process does. Otherwise the collector goes through all of them again
# and again while the definitions are loaded, which takes a fifth of that time.
gc.freeze()
