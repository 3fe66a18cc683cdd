"""Where checkpoints come from, and what must hold before one is used."""
