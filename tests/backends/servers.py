"""PostgreSQL for tests: one server for all that do not hurt it, and servers of their own for those that do.

Where it is not installed, tests that need it are skipped, and say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.postgres import NoPostgresError, Server, binaries, server

psycopg = pytest.importorskip(
    "psycopg", reason="PostgresBackend needs psycopg: pip install 'walbatch[postgres]'"
)


def needed() -> None:
    """Skip where there is no PostgreSQL."""
    try:
        binaries()
    except NoPostgresError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    """A server for all tests of a session."""
    needed()
    with server() as running:
        yield running


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that a test may kill."""
    needed()
    with server() as running:
        yield running


def database(running: Server, path: Path) -> str:
    """The name of the database that belongs to a folder; made at the first call."""
    name = f"t{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    with psycopg.connect(running.conninfo(), autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
            connection.execute(f"CREATE DATABASE {name}".encode())
    return name


COUNTED = (
    "CREATE TABLE pages (key bytea PRIMARY KEY, payload bytea CONSTRAINT is_good CHECK (payload <> 'bad'))",
    "CREATE TABLE effects (key bytea PRIMARY KEY, count bigint NOT NULL)",
    (
        "CREATE FUNCTION count_effect() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO effects VALUES (new.key, 1) "
        "ON CONFLICT (key) DO UPDATE SET count = effects.count + 1; RETURN NULL; END $$"
    ),
    "CREATE TRIGGER counted AFTER INSERT OR UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION count_effect()",
)
"""The table `pages`, and `effects`: how often each of its rows was written, which an upsert alone would hide."""
