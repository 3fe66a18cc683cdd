"""The Dagster code location, the command line and the web pages."""
