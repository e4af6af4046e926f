"""Modules that run one tile of their tokens at a time."""
