"""Comparisons of methods as graphs of commands: the paper's tables, and those of your own.

The room holds the records that gin files fill in (`experiment_graph`), the commands that they stand
for (`stages`), what is read back from finished ones (`report`) and the command that runs them
(`python -m diffusion_t5x.experiments`). Benchmarks and tests may import it; no other room does. It
calls commands by their command lines alone: no model, no data and no array enters.
"""
