"""Checkpoints of runs: saved atomically, verified, restored, and converted from and to T5X's.

Training, evaluation, commands and benchmarks import from here. This room knows names, shapes and
files; it holds no mathematics of models and nothing about diffusion.
"""
