"""The command line: T5X's flags, and the processes of a run on this machine.

This room holds what the doors of the package (`train`, `eval`, `infer`, `sample`, `convert`,
`launch`) share. Only the doors and the experiments import it. It calls functions that gin
configures; how to train, decode or evaluate never enters.
"""
