"""The command line, which uses the same Dagster job and instance that the web pages show."""

from orchestration.cli.main import main

__all__ = ["main"]
