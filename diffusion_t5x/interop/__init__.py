"""Others' models: T5X's checkpoints, and the names and settings of Hugging Face's families.

Only `checkpointing` imports from here, and gin files: T5X's (`t5x_restore`), and that of Hugging
Face's models (`hf_models`). This room works on names, shapes and files; it never imports T5X or
`transformers`. Of networks it knows the configuration, and asks for the shapes of parameters.
"""
