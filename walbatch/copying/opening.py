"""The database that a URL names, as the source or the target of a copy.

What is not here: connecting to it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from walbatch.backends.urls import open_backend, strip_password
from walbatch.copying.databases import Database
from walbatch.errors import ConfigError


def open_database(url: str, *, role: str) -> Database:
    """The database that a URL names. Nothing is connected to yet. Raises ConfigError."""
    shown = strip_password(url)
    scheme = url.partition(":")[0].lower()
    if re.search(r"[?&]table=", url):
        raise ConfigError(f"{shown!r} names a table: leave that out, and name tables with --table")
    if scheme == "sqlite":
        from walbatch.copying.sqlite import SqliteDatabase  # noqa: PLC0415 - only who uses a database needs it

        if "?" in url:
            raise ConfigError(f"{shown!r}: nothing is known behind its ?: write %3F if the path has it")
        backend: Any = open_backend(f"{url}?table=t", allow_python=False)
        path = Path(
            os.path.realpath(backend.path)
        )  # the same file has the same name, wherever the command is run
        return SqliteDatabase(path, shown=f"sqlite://{path}", role=role)
    if scheme in {"postgresql", "postgres"}:
        try:
            from walbatch.copying.postgres import PostgresDatabase  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(str(error)) from error
        return PostgresDatabase(url, shown=unquote(shown), role=role)
    raise ConfigError(
        # Not what was given: who writes it as libpq also takes it (host=... password=...) would see the password.
        f"the {role} is no URL of a database that tables are copied from or to: sqlite:///path, or postgresql://..."
    )
