"""Others' models: T5X's checkpoints, and the names and settings of Hugging Face's families.

Only `checkpointing` imports from here, and T5X itself through gin (`t5x_restore`). This room works
on names, shapes and files; it never imports T5X, `transformers` or modules of networks, of which it
knows the configuration alone.
"""
