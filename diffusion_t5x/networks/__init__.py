"""Transformer stacks, their attention patterns and key-value caches."""
