"""Folders of files as a backend: each batch a file, exactly once.

`backend` is a lane's folder, `stream` the files of one shard and the argument why each shows exactly once, `markfile` where the
marks stand. `jsonlines` and `parquet` say what is in a file.
"""
