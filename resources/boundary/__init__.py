"""Checks and limits for data, addresses and answers that come from outside of the project."""
