"""Experimental kernels, off by default.

They have run only as Pallas interprets them, and compile ahead of time for TPUs; on a TPU they have
never run.
"""
