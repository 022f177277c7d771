"""Checkpoints of other frameworks: their layouts on disk, and their names for our parameters."""
