"""The models file: which checkpoints are optimized, and what counts as accurate and as best."""
