"""Experimental kernels, off by default.

They have run as Pallas interprets them, and compile ahead of time for TPUs and NVIDIA GPUs; on
either they have never run.
"""
