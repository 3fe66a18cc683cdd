"""Typed records and the content-addressed store that keeps their files."""
