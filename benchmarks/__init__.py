"""Benchmarks: each prints JSON lines with a figure, a baseline of the same run, and their ratio."""
