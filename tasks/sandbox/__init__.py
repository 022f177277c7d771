"""Where generated code runs: a jail, and in it a harness that runs a program and its tests.

`judge` starts jobs and watches them. `jails` are the ways to keep a job in, for which `interpreter`
tells what may be read and `system_calls` what may be asked of the kernel. `harness` is the only
module that is in the same process as the program. Nothing here knows of tasks or models, and only
`tasks/code_execution.py` imports it.
"""
