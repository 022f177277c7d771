"""Reads XLA's optimised HLO: memory traffic, launches and time, with loops counted in full.

Instruments of `benchmarks.tpu`, `benchmarks.collectives`, `benchmarks.dry_runs` and
`benchmarks.accelerator`, on the library's `training.hlo` and `training.collectives`.
"""
