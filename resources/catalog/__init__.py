"""The models file, which lists the checkpoints to optimize with their accuracy gates and their objectives."""
