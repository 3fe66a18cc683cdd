"""The settings of a workspace: its paths, its sources of checkpoints, and its Triton servers."""
