"""Exit codes by which programs that start ours tell what happened."""

# The run was told to stop and saved everything first: start it again, and it goes on. It is
# sysexits' EX_TEMPFAIL.
PREEMPTED = 75

# Something could not be written because the disk is full; starting again would not help before
# there is room. It is sysexits' EX_IOERR.
DISK_FULL = 74

# No step came for so long that a process, or the network between them, must hang. Started again,
# the run goes on from its last checkpoint, and what hung is usually gone with the old processes. It
# is sysexits' EX_UNAVAILABLE.
HUNG = 69

# What launchers start again, as often as they are allowed.
RESTARTABLE = {PREEMPTED: "preempted", HUNG: "hung"}
