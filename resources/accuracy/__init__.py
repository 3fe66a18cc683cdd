"""Whether an engine answers as PyTorch does: evaluation sets, answers, and the gates."""
