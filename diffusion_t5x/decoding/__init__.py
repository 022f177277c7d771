"""Decoders: from a bound network to tokens and scores, best sample last."""
