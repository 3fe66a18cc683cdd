"""Benchmarks of engines, and the choice of the best engine with its reasons."""
