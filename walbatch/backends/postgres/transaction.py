"""A transaction of PostgreSQL: statements that take a whole batch at once, savepoints, and the mark's row.

What is not here: connections, commits, and what errors mean (`meaning`).

The idea needed to read it: rows travel as one array for each column, and a statement whose text is always the same unpacks them.
The mark's row is locked first: who else would write for this shard waits, a server process that has outlived its client included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus

from walbatch.backends.postgres.connections import Raw
from walbatch.backends.postgres.meaning import refusal
from walbatch.backends.postgres.schema import Column, quoted
from walbatch.backends.sql.applying import MARKS_TABLE
from walbatch.backends.sql.table import Columns, Row, Table
from walbatch.errors import BackendBroken

_SELECT_MARK: Final = f"SELECT epoch, mark FROM {MARKS_TABLE} WHERE store = %s AND lane = %s AND shard = %s"  # noqa: S608 - a constant
_UPDATE_MARK: Final = (
    f"UPDATE {MARKS_TABLE} SET epoch = %s, mark = %b WHERE store = %s AND lane = %s AND shard = %s"  # noqa: S608 - a constant
)


class Statements:
    """The statements of a table."""

    def __init__(self, table: Table, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.key_count = len(table.key)
        name = _named(*table.path)
        names = [_named(column.name) for column in columns]
        key, others = names[: self.key_count], names[self.key_count :]
        update = (
            f"UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in others)}"
            if others
            else "NOTHING"
        )
        put = (
            f"INSERT INTO {name} ({', '.join(names)}) SELECT {_casts(columns)} FROM {_arrays(columns)} "  # noqa: S608 - quoted
            f"ON CONFLICT ({', '.join(key)}) DO {update}"
        )
        equal = " AND ".join(f"t.{column} = u.k{place}" for place, column in enumerate(key))
        keys = columns[: self.key_count]
        delete = f"DELETE FROM {name} AS t USING (SELECT {_casts(keys, 'k')} FROM {_arrays(keys)}) AS u WHERE {equal}"  # noqa: S608
        self.put, self.delete = put.encode(), delete.encode()


class PostgresTransaction:
    """A `Transaction` that has begun.

    A bold one makes no savepoints: they cost two round trips, and hardly any batch needs them. Where a row is refused, its error
    passes through, and the batch is tried again in one that is not bold.
    """

    def __init__(
        self,
        raw: Raw,
        statements: Statements | None,
        scope: tuple[bytes, str],
        *,
        is_bold: bool,
        is_locking: bool = True,
    ) -> None:
        self._raw = raw
        self._statements = statements
        self._scope = (UUID(bytes=scope[0]), scope[1])
        self._is_bold = is_bold
        self._is_locking = is_locking
        self.cursor = raw.cursor()

    def save(self) -> None:
        """See `Transaction`."""
        if not self._is_bold:
            self._raw.execute("SAVEPOINT walbatch")

    def keep(self) -> None:
        """See `Transaction`."""
        if not self._is_bold:
            self._raw.execute("RELEASE walbatch")

    @property
    def is_intact(self) -> bool:
        """See `Transaction`."""
        return self._raw.info.transaction_status is not TransactionStatus.IDLE

    def undo(self) -> None:
        """See `Transaction`."""
        self._raw.execute("ROLLBACK TO walbatch")
        self._raw.execute("RELEASE walbatch")

    def delete(self, keys: Sequence[Row]) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        columns = self._statements.columns[: self._statements.key_count]
        self._raw.execute(self._statements.delete, _parameters(columns, tuple(zip(*keys, strict=True))))

    def put(self, columns: Columns) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        self._raw.execute(self._statements.put, _parameters(self._statements.columns, columns))

    def refusal(self, error: BaseException) -> str | None:
        """See `Transaction`."""
        return None if self._is_bold else refusal(error)

    def stored_mark(self, shard: int) -> tuple[int, bytes] | None:
        """See `Transaction`."""
        statement = f"{_SELECT_MARK} FOR UPDATE" if self._is_locking else _SELECT_MARK
        row = self._raw.execute(statement.encode(), (*self._scope, shard), binary=True).fetchone()
        if row is not None:
            return int(row[0]), bytes(row[1])
        if self._is_locking:
            # It was made by `open`. Without it nothing can be locked, and what was applied cannot be told.
            raise BackendBroken(
                f"the row of lane {self._scope[1]!r}, shard {shard}, is gone from {MARKS_TABLE}: restore it from a backup"
            )
        return None

    def store_mark(self, shard: int, epoch: int, mark: bytes) -> None:
        """See `Transaction`."""
        self._raw.execute(_UPDATE_MARK.encode(), (epoch, mark, *self._scope, shard))


def _arrays(columns: Sequence[Column]) -> str:
    """A parameter for each column, unpacked in parallel."""
    arrays = ", ".join("%b::bytea[]" if column.is_bytes else "%b::text[]" for column in columns)
    return f"unnest({arrays}) AS v({', '.join(f'v{place}' for place in range(len(columns)))})"


def _casts(columns: Sequence[Column], prefix: str = "c") -> str:
    return ", ".join(
        f"v{place} AS {prefix}{place}"
        if column.is_bytes
        else f"v{place}::{column.type.replace('%', '%%')} AS {prefix}{place}"
        for place, column in enumerate(columns)
    )


def _named(*names: str) -> str:
    """A name inside a statement that has parameters: a percent sign would look like another one."""
    return quoted(*names).replace("%", "%%")


def _parameters(columns: Sequence[Column], rows: Columns) -> list[list[Any]]:
    """An array for each column."""
    return [
        _binary(values) if column.is_bytes else _texts(column, values)
        for column, values in zip(columns, rows, strict=True)
    ]


def _binary(values: Sequence[Any]) -> list[Any]:
    if set(map(type, values)) == {bytes}:
        return list(values)
    return [value.encode() if isinstance(value, str) else value for value in values]


def _texts(column: Column, values: Sequence[Any]) -> list[str | None]:
    """Values as PostgreSQL reads them."""
    texts = [value if value is None or type(value) is str else _text(column, value) for value in values]
    for text in texts:
        if text is not None and "\0" in text:
            raise psycopg.DataError(f"column {column.name!r}: PostgreSQL keeps no texts with NUL in them")
    return texts


def _text(column: Column, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError as error:
            raise psycopg.DataError(
                f"column {column.name!r} of type {column.type} takes no such bytes: {error}"
            ) from error
    return str(value)
