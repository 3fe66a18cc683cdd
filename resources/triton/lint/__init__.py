"""Find the problems of any Triton model repository, without a server and without running code of the repository."""

from resources.triton.lint.findings import RULES, Finding
from resources.triton.lint.repository import lint

__all__ = ["RULES", "Finding", "lint"]
