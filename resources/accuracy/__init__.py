"""The check that an engine answers as PyTorch does, with evaluation sets, answers and accuracy gates."""
