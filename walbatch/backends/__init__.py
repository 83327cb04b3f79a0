"""Where batches go: functions, LMDB, SQLite, PostgreSQL, files, Redis, HTTP, and what a URL names.

A database is imported when its backend is first asked for, so that who delivers elsewhere does without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.backends.urls import open_backend, strip_password, url_of

if TYPE_CHECKING:
    from walbatch.backends.files.jsonlines import JsonLinesBackend
    from walbatch.backends.files.parquet import (
        ParquetBackend as ParquetBackend,  # the same as of PostgresBackend
    )
    from walbatch.backends.http import HttpBackend as HttpBackend  # the same as of PostgresBackend
    from walbatch.backends.lmdb import LmdbBackend
    from walbatch.backends.postgres import (
        PostgresBackend as PostgresBackend,
    )  # not in __all__: it may not be installed
    from walbatch.backends.redis import RedisBackend as RedisBackend  # the same
    from walbatch.backends.redis import RedisKeys as RedisKeys
    from walbatch.backends.sql.table import Table
    from walbatch.backends.sqlite import SqliteBackend

__all__ = [
    "FunctionBackend",
    "JsonLinesBackend",
    "LmdbBackend",
    "SqliteBackend",
    "Table",
    "as_backend",
    "open_backend",
    "strip_password",
    "url_of",
]

LATER: Final = {
    "JsonLinesBackend": "walbatch.backends.files.jsonlines",
    "HttpBackend": "walbatch.backends.http",
    "LmdbBackend": "walbatch.backends.lmdb",
    "ParquetBackend": "walbatch.backends.files.parquet",
    "PostgresBackend": "walbatch.backends.postgres",
    "RedisBackend": "walbatch.backends.redis",
    "RedisKeys": "walbatch.backends.redis",
    "SqliteBackend": "walbatch.backends.sqlite",
    "Table": "walbatch.backends.sql.table",
}
"""What is imported when it is asked for, and where it is."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
