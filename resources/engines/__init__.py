"""Engines: what competes (`specs`), how a runtime is reached (`interface`), and one folder for each runtime."""
