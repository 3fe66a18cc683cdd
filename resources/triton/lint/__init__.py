"""What is wrong with a Triton model repository, ours or anybody's, found without a server; its code is never run."""

from resources.triton.lint.findings import RULES, Finding
from resources.triton.lint.repository import lint

__all__ = ["RULES", "Finding", "lint"]
