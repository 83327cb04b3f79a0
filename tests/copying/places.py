"""SQLite files of tests."""

import contextlib
import sqlite3
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lite(path: Path, *statements: str) -> str:
    """Run statements, and return the URL of the file."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
    return f"sqlite://{path}"


def count(path: Path, table: str = "t") -> int:
    """The rows of a table."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def finished(folder: Path) -> bool:
    """Whether nothing of a store is left."""
    return not list(folder.glob("store*"))
