"""Exit codes by which programs that start ours tell what happened."""

# The run was told to stop and saved everything first: start it again, and it goes on. It is
# sysexits' EX_TEMPFAIL.
PREEMPTED = 75
