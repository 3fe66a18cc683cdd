"""Where checkpoints come from, and what must hold before one is used."""

from resources.checkpoints.collect import checkpoint_files, collect_checkpoint
from resources.checkpoints.settings import Access, SourceSettings
from resources.checkpoints.sources import Located, locate

__all__ = [
    "Access",
    "Located",
    "SourceSettings",
    "checkpoint_files",
    "collect_checkpoint",
    "locate",
]
