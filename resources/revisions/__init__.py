"""What the sources of the catalog hold now: found out cheaply, again and again, and without fetching anything."""

from resources.revisions.look import Seen, look
from resources.revisions.looks import Looks

__all__ = ["Looks", "Seen", "look"]
