"""Users' own text, parallel text, questions and problems as SeqIO data sources.

`readers` turns files into checked records, `local_files` caches the records and chooses between
users' files and another source. Tasks import this room; it imports the cache of `data.embedded`. It
knows formats and gin's `LOCAL_FILES`; tasks, features and vocabularies never enter.
"""
