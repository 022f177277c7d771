"""Users' own text, parallel text, questions and problems as SeqIO data sources.

`lines` opens files, `readers` turns what is in them into checked records, `records` caches these
and deals them into shards, `local_files` chooses between users' files and another source. Tasks
import this room; it imports the cache of `data.embedded`. It knows formats and gin's
`LOCAL_FILES`; tasks, features and vocabularies never enter.
"""
