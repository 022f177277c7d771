"""Reads XLA's optimised HLO: collectives, memory traffic and time, with loops counted in full.

Instruments of `benchmarks.tpu`, `benchmarks.collectives` and `benchmarks.dry_runs`; the library
itself asks XLA for `memory_analysis()` alone.
"""
