"""Where checkpoints come from, and what must hold before one is used."""

from resources.checkpoints.collect import checkpoint_files, collect_checkpoint, load_arguments
from resources.checkpoints.sources import Located, locate

__all__ = ["Located", "checkpoint_files", "collect_checkpoint", "load_arguments", "locate"]
