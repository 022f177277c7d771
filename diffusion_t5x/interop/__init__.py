"""T5X's checkpoints: their layouts on disk, and the names of their parameters in our networks.

Only `checkpointing` imports from here, and T5X itself through gin (`t5x_restore`). This room works
on names, shapes and files; it never imports T5X or modules of networks.
"""
