"""What the sources of the catalog hold now: found out cheaply, again and again, and without fetching anything."""

from resources.revisions.looks import Looks
from resources.revisions.source import Seen, look

__all__ = ["Looks", "Seen", "look"]
