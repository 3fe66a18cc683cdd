"""The terminal: output that is safe to print, and the progress of a run."""
