"""Checkpoints: the sources that hold them, and the checks before one is used."""
