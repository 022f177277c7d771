"""Exit codes by which programs that start ours tell what happened."""

# The run was told to stop and saved everything first: start it again, and it goes on. It is
# sysexits' EX_TEMPFAIL.
PREEMPTED = 75

# Something could not be written because the disk is full; starting again would not help before
# there is room. It is sysexits' EX_IOERR.
DISK_FULL = 74
