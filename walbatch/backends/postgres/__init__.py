"""PostgreSQL as a backend: needs the extra `postgres` (psycopg 3)."""

from __future__ import annotations

try:
    import psycopg as psycopg
except ImportError as error:
    raise ImportError("PostgresBackend needs psycopg 3: pip install 'walbatch[postgres]'") from error

from walbatch.backends.postgres.backend import PostgresBackend

__all__ = ["PostgresBackend"]
