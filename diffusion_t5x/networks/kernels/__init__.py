"""Experimental kernels, off by default.

All have run as Pallas interprets them and compile ahead of time. Those for NVIDIA GPUs have also
run on an H100, those for TPUs never on a TPU.
"""
