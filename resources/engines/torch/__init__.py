"""The baseline, which runs with PyTorch."""
