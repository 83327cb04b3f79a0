"""A transaction of PostgreSQL: statements that take a whole batch at once, savepoints, and the mark's row.

What is not here: connections, commits, and what errors mean (`meaning`).

The idea needed to read it: rows travel as one array for each column, and a statement whose text is always the same unpacks them.
The mark's row is locked first: who else would write for this shard waits, a server process that has outlived its client included.
Where the mark is known, and there is nothing but rows to put, that is one statement, a transaction of its own: it moves the mark if
that is what it was thought to be, and puts the rows if it has moved the mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus

from walbatch.backends.postgres.arrays import parameters
from walbatch.backends.postgres.connections import Raw
from walbatch.backends.postgres.meaning import refusal
from walbatch.backends.postgres.schema import Column, quoted
from walbatch.backends.sql.applying import ENDED, MARKS_TABLE
from walbatch.backends.sql.table import Apart, Columns, Row, Table
from walbatch.errors import BackendBroken

_SELECT_MARK: Final = f"SELECT epoch, mark FROM {MARKS_TABLE} WHERE store = %s AND lane = %s AND shard = %s"  # noqa: S608 - a constant
_UPDATE_MARK: Final = (
    f"UPDATE {MARKS_TABLE} SET epoch = %s, mark = %b WHERE store = %s AND lane = %s AND shard = %s"  # noqa: S608 - a constant
)

BEGIN: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
BEGIN_WATCHED: Final = f"{BEGIN}; SET LOCAL walbatch.begun = 'yes'"
"""With a setting that ends with the transaction: a `write` function that has begun another one has lost it."""
_IF_BEGUN: Final = " AND current_setting('walbatch.begun', true) = 'yes'"

Scope = tuple[bytes, str]
"""Store and lane."""

Stored = tuple[int, bytes]
"""Epoch and mark, as they stand in their row."""


class Statements:
    """The statements of a table."""

    def __init__(self, table: Table, columns: Sequence[Column], apart: Apart | None) -> None:
        self.columns = columns
        self.apart = apart
        self.key_count = len(table.key)
        name = _named(*table.path)
        names = [_named(column.name) for column in columns]
        key, others = names[: self.key_count], names[self.key_count :]
        update = (
            f"UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in others)}"
            if others
            else "NOTHING"
        )
        insert = f"INSERT INTO {name} ({', '.join(names)}) SELECT {_casts(columns)} FROM "  # noqa: S608 - quoted
        conflict = f" ON CONFLICT ({', '.join(key)}) DO {update}"
        put = f"{insert}(SELECT {_arrays(columns)}) AS v{conflict}"
        put_together = (
            f"WITH moved AS ({_UPDATE_MARK} AND epoch = %s AND mark = %b RETURNING 1), "  # noqa: S608
            f"put AS ({insert}(SELECT {_arrays(columns)} FROM moved) AS v{conflict}) SELECT count(*) FROM moved"
        )
        equal = " AND ".join(f"t.{column} = u.k{place}" for place, column in enumerate(key))
        keys = columns[: self.key_count]
        delete = f"DELETE FROM {name} AS t USING (SELECT {_casts(keys, 'k')} FROM (SELECT {_arrays(keys)}) AS v) AS u WHERE {equal}"  # noqa: S608
        self.put, self.put_together, self.delete = put.encode(), put_together.encode(), delete.encode()


class PostgresTransaction:
    """A `Transaction` that has begun.

    A bold one makes no savepoints: they cost two round trips, and hardly any batch needs them. Where a row is refused, its error
    passes through, and the batch is tried again in one that is not bold.
    """

    def __init__(
        self,
        raw: Raw,
        statements: Statements | None,
        scope: Scope,
        *,
        is_bold: bool,
        is_locking: bool = True,
        is_watched: bool = False,
    ) -> None:
        self._raw = raw
        self._statements = statements
        self._scope = (UUID(bytes=scope[0]), scope[1])
        self._is_bold = is_bold
        self._is_locking = is_locking
        self._is_watched = is_watched
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
    def apart(self) -> Apart | None:
        """See `Transaction`."""
        return None if self._statements is None else self._statements.apart

    @property
    def harm(self) -> str | None:
        """See `Transaction`. Raises psycopg.OperationalError where the connection is gone, and the function has caught that."""
        status = self._raw.info.transaction_status
        if status is TransactionStatus.INTRANS:
            return None
        if status is TransactionStatus.IDLE:
            return ENDED
        if status is TransactionStatus.INERROR:
            return (
                "has caught an error of PostgreSQL, after which the transaction can do nothing any more: let it through, or put "
                "what may fail into a savepoint (with cursor.connection.transaction())"
            )
        raise psycopg.OperationalError("the connection was lost inside of the write function")

    def undo(self) -> None:
        """See `Transaction`."""
        self._raw.execute("ROLLBACK TO walbatch")
        self._raw.execute("RELEASE walbatch")

    def delete(self, keys: Sequence[Row]) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        columns = self._statements.columns[: self._statements.key_count]
        self._raw.execute(self._statements.delete, parameters(columns, tuple(zip(*keys, strict=True))))

    def put(self, columns: Columns) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        self._raw.execute(self._statements.put, parameters(self._statements.columns, columns))

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
        statement = f"{_UPDATE_MARK}{_IF_BEGUN}" if self._is_watched else _UPDATE_MARK
        moved = self._raw.execute(statement.encode(), (epoch, mark, *self._scope, shard)).rowcount
        if moved != 1:
            raise BackendBroken(f"the write function {ENDED}; what it has committed stands, and has no mark")


def put_together(
    raw: Raw, statements: Statements, scope: Scope, shard: int, old: Stored, new: Stored, columns: Columns
) -> bool:
    """Put rows and move the mark, in one statement; False, and nothing done, where the mark is not what it was thought to be."""
    row = raw.execute(
        statements.put_together,
        (*new, UUID(bytes=scope[0]), scope[1], shard, *old, *parameters(statements.columns, columns)),
        binary=True,
    ).fetchone()
    assert row is not None
    return bool(row[0])


def _arrays(columns: Sequence[Column]) -> str:
    """A parameter for each column, unpacked in parallel: in the list of what is selected, which needs no room for all rows."""
    return ", ".join(
        f"unnest({'%b::bytea[]' if column.is_bytes else '%b::text[]'}) AS v{place}"
        for place, column in enumerate(columns)
    )


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
