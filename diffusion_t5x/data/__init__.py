"""Data: what SeqIO lacks, and the embedded text."""
