"""How text is generated: autoregressive and diffusion decoders, their update and stop rules.

Imports `interfaces` and the arithmetic of objectives (logits, text blocks). Imported by models, and
bound in gin files. Never enters: flax modules, gin, files, logging.
"""
