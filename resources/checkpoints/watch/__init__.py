"""What the sources of the catalog hold now: found out cheaply, again and again, without fetching anything."""
