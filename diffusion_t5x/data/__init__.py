"""Data: from SeqIO tasks, mixtures and sources to batches of a process.

`datasets` reads tasks, `data_shards` divides batches, `feature_converters` and `preprocessors` add
what SeqIO lacks, `vocabularies` and `detokenize` translate between text and tokens, `lengths`
counts what is cut, `programs` takes Python out of what models write. Two annexes bring text:
`embedded` needs no download, `files` reads users' own. Runtime, training, evaluation and tasks
import this room; it imports no other room. Task names, networks and JAX never enter.
"""
