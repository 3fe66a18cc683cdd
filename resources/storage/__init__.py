"""Safe writes, locks, staging folders and object storage."""
