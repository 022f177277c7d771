"""Devices, files, the terminal, and guards against what ends a process.

Holds meshes, shardings, the train state, files that are whole or absent, locks, progress, signals,
the watchdog and full disks. Every room above `data` may import it. It imports nothing of the
package but the layout of data shards: networks, objectives and datasets never enter here.
"""
