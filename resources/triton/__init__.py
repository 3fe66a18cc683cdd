"""Releases for NVIDIA Triton: making, proving, publishing, serving and removing them."""
