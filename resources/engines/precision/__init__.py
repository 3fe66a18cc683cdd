"""Engines of reduced precision: half precision, 8 bits, and the search for what must stay in higher precision."""
