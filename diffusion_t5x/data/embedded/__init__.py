"""Text that needs no download, from CLDR and the standard library, and the cache it is kept in.

`translation`, `python` and `code` generate examples, `sources` splits them and offers them to
SeqIO, `vocabulary` trains their SentencePiece model, `file_cache` keeps generated files. Tasks
import `sources`; `data.files`, `data.vocabularies` and the commands import the cache. SeqIO tasks,
users' files and models never enter.
"""
