"""Repeated, cheap looks at the sources of the catalog, which find new revisions without fetching them."""
