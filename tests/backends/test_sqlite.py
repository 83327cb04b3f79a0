"""SQLite as a backend."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from walbatch.backends.sqlite import SqliteBackend
from walbatch.testing.contracts import Pair, TransactionalBackendContract


class TestSqlite(TransactionalBackendContract):
    def make_backend(self, path: Path) -> Any:
        return SqliteBackend(path / "app.db", "pages")

    def content(self, path: Path) -> Iterable[Pair]:
        db = sqlite3.connect(path / "app.db")
        try:
            return db.execute("SELECT key, payload FROM pages").fetchall()
        finally:
            db.close()
