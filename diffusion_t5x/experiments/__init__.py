"""Comparisons of methods as graphs of commands: the paper's tables, and those of your own.

The room holds the graph (`experiment_graph`), what is read back from finished stages (`report`) and
the command that runs them (`python -m diffusion_t5x.experiments`). Benchmarks and tests may import
it; no other room does. It calls commands by their command lines alone: no model, no data and no
array enters.
"""
