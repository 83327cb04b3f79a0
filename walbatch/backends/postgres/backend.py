"""PostgreSQL as a backend: a batch and its mark in one transaction, exactly once, whatever becomes of the connection.

What is not here: statements (`transaction`), tables (`schema`), connections (`connections`), what errors mean (`meaning`).

The idea needed to read it: a connection that is lost at the commit leaves open whether that took place. Nobody guesses: the mark
tells, read on another connection, under the lock that the lost one holds until the server has ended it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import quote
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from walbatch.backends.postgres import meaning, schema
from walbatch.backends.postgres.connections import Connection, Connections
from walbatch.backends.postgres.transaction import (
    BEGIN,
    BEGIN_WATCHED,
    PostgresTransaction,
    Statements,
    put_together,
)
from walbatch.backends.sql.applying import MARKS_TABLE, Puts, Transaction, Work, Write, only_puts, read_mark
from walbatch.backends.sql.backend import CALL_S, SqlBackend
from walbatch.backends.sql.fields import url_query
from walbatch.backends.sql.table import Table
from walbatch.core.mark import encode_mark
from walbatch.errors import BackendBroken, ConfigError, RetryBatch, StorageError, WalbatchError
from walbatch.types import Batch, Mark

_logger = logging.getLogger("walbatch")
_T = TypeVar("_T")

KEY_BYTES_MAX: Final = 2_600
"""Of a key that is stored as it is: an entry of an index takes a third of a page, which is 2,704 bytes, with its header."""

_SECRETS: Final = frozenset(
    {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
)
"""Settings of libpq that are never remembered or shown. They come from PGPASSWORD, or a password file."""

KNOWN_BYTES_MAX: Final = 1 << 16
"""Of a mark that is known, and sent with each statement. A larger one is read instead."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A mark that the database held when it was last looked at."""

    mark: Mark
    data: bytes


class PostgresBackend(SqlBackend):
    """A transactional backend in the database that `conninfo` names: a URL, or `host=... dbname=...`.

    See `SqlBackend` for `table` and `write`, which is given a `psycopg.Cursor`. Each call of `apply` uses a connection of its
    own, and keeps it for the next one. Statements are given up by the server after three quarters of the lane's time limit,
    waits for locks after half of it, and connections on which nothing comes back after all of it.
    """

    def __init__(
        self, conninfo: str, table: Table | str | None = None, *, write: Write | None = None
    ) -> None:
        super().__init__(table, write)
        try:
            self._parameters: Mapping[str, Any] = conninfo_to_dict(conninfo)
        except (psycopg.Error, TypeError):
            # What libpq says of it repeats parts of it, and there may be a password in them.
            raise ConfigError(
                "what PostgresBackend was given is no URL of a database: postgresql://user@host/database"
            ) from None
        if self.table is not None and self.table.key_codec in {"bytes", "text"}:
            self.key_bytes_max = KEY_BYTES_MAX
        self._connections = Connections(conninfo, self._place(), self._limit_s)
        self._conninfo = conninfo
        self._statements: Statements | None = None
        self._known: dict[int, _Known] = {}

    def _place(self) -> str:
        known = {name: str(value) for name, value in self._parameters.items() if name not in _SECRETS}
        return f"postgresql://{known.get('host', '')}/{known.get('dbname', '')}"

    @property
    def url(self) -> str | None:
        """`postgresql://...?table=...`, without a password, from which the command line makes it again; None with functions."""
        if self.table is None or not self.table.is_nameable:
            return None
        rest = {name: str(value) for name, value in self._parameters.items() if name not in _SECRETS}
        database = quote(rest.pop("dbname", ""), safe="")
        fields = [
            url_query(self.table),
            *(f"{name}={quote(value, safe='')}" for name, value in sorted(rest.items())),
        ]
        return f"postgresql:///{database}?{'&'.join(fields)}"

    def limit_time(self, timeout_s: float | None) -> None:
        """See `SqlBackend`."""
        super().limit_time(timeout_s)
        self._connections.limit_s = timeout_s

    # --- opening and closing --------------------------------------------------------------------------------------

    def _open(self, shards: int) -> None:
        self._known.clear()
        limit_s = self._limit_s
        # Opening has an end also where calls have none.
        self._connections = Connections(self._conninfo, self._place(), CALL_S if limit_s is None else limit_s)
        try:
            connection = self._connections.take()
        except psycopg.Error as error:
            raise meaning.at_opening(error, self._place()) from error
        try:
            self._prepare(connection, shards)
        except psycopg.Error as error:
            raise meaning.at_opening(error, self._place()) from error
        finally:
            self._connections.give(connection)
        self._connections.limit_s = limit_s

    def _prepare(self, connection: Connection, shards: int) -> None:
        """Make the tables that are missing, check those that are there, and make a row for the mark of each shard.

        The rows are there before the first batch, so that there is always something to lock: two transactions that both found none
        would both take everything for fresh.
        """
        raw, place = connection.raw, self._place()
        with raw.transaction():
            raw.execute("SELECT pg_advisory_xact_lock(%s)", (schema.LOCK_KEY,))
            schema.make_marks(raw)
            schema.check_columns(raw, place, (MARKS_TABLE,), schema.MARKS_COLUMNS, schema.MARKS_COLUMNS[:3])
            if self.table is not None:
                schema.make_table(raw, self.table)
                columns = schema.check_columns(
                    raw, place, self.table.path, self.table.all_columns, tuple(self.table.key)
                )
                self._statements = Statements(self.table, columns, schema.apart(raw, self.table, columns))
            for shard in range(shards):
                raw.execute(
                    f"INSERT INTO {MARKS_TABLE} VALUES (%s, %s, %s, 0, %b) ON CONFLICT DO NOTHING".encode(),  # noqa: S608
                    (UUID(bytes=self._store), self._lane, shard, encode_mark(Mark())),
                )

    def _close(self) -> None:
        self._connections.close()

    # --- transactions ---------------------------------------------------------------------------------------------

    def _together(self, batch: Batch) -> Work | None:
        """In one statement, if the mark is known, and there is nothing but rows to put."""
        known = self._known.pop(batch.shard, None)
        if known is None or self.table is None:
            return None
        puts = only_puts(batch, known.mark, self.table)
        if puts is None:
            return None
        done = self._put_together(batch, known, puts)
        if done is not None:
            self._remember(batch.shard, done.mark)
        return done

    def _transaction(self, batch: Batch, work: Callable[[Transaction], Work]) -> Work:
        """Bold first. Where a row is refused, again with savepoints."""
        done = self._try(batch, work, is_bold=True)
        if done is None:
            done = self._try(batch, work, is_bold=False)
        assert done is not None
        self._remember(batch.shard, done.mark)
        return done

    def _remember(self, shard: int, mark: Mark | None) -> None:
        """What the database now holds of a shard. Whoever else writes it makes that wrong, which costs a statement."""
        if mark is not None:
            known = _Known(mark, encode_mark(mark))
            if len(known.data) <= KNOWN_BYTES_MAX:
                self._known[shard] = known

    def _put_together(self, batch: Batch, known: _Known, puts: Puts) -> Work | None:
        """One statement, which is a transaction; None where it took no effect, or nobody can tell: going step by step finds out.

        Crash story: the statement locks the mark's row, and changes nothing at all unless that row is what `known` says. Where
        the connection is lost, it has taken effect, with the mark, or it has not. If it is still under way, who comes next waits
        at the row. If it has not even arrived, it finds another mark when it does.
        """
        assert self._statements is not None
        mark = puts.work.mark
        assert mark is not None
        old, new = (known.mark.epoch, known.data), (mark.epoch, encode_mark(mark))
        connection = self._taken()
        try:
            is_done = put_together(
                connection.raw, self._statements, self._scope(), batch.shard, old, new, puts.columns
            )
        except Exception as error:
            if isinstance(error, psycopg.Error) and meaning.is_lost(connection.raw, error):
                self._connections.drop(connection)
                self._connections.drop_free()
                _logger.info("%s: the connection was lost in a batch; the mark will tell", self._place())
                return None
            self._connections.give(connection)
            if meaning.refusal(error) is not None:
                return None
            raise self._ours(error, len(batch)) from error
        except BaseException:
            self._connections.drop(connection)
            raise
        self._connections.give(connection)
        return puts.work if is_done else None

    def _try(self, batch: Batch, work: Callable[[Transaction], Work], *, is_bold: bool) -> Work | None:
        """The transaction, committed; None where it was bold, and a row is refused."""
        connection = self._begin(len(batch))
        tx = PostgresTransaction(
            connection.raw,
            self._statements,
            self._scope(),
            is_bold=is_bold,
            is_watched=self._write is not None,
        )
        try:
            done = work(tx)
        except Exception as error:
            self._roll_back(connection)
            if is_bold and meaning.refusal(error) is not None:
                return None
            raise self._ours(error, len(batch)) from error
        except BaseException:
            self._connections.drop(connection)
            raise
        try:
            tag = connection.raw.execute("COMMIT").statusmessage
        except psycopg.Error as error:
            if meaning.is_lost(connection.raw, error):
                self._connections.drop(connection)
                return self._resolve(batch, done, error)
            self._roll_back(connection)
            raise self._ours(error, len(batch)) from error
        except BaseException:
            self._connections.drop(connection)
            raise
        self._connections.give(connection)
        if tag != "COMMIT":  # what PostgreSQL answers where an error had aborted it before
            raise BackendBroken(
                f"{self._place()}: the transaction was not committed, but rolled back ({tag}): something has caught an error in it"
            )
        return done

    def _resolve(self, batch: Batch, done: Work, lost: psycopg.Error) -> Work:
        """Whether a commit took place whose answer was lost. Raises RetryBatch if not, or if nobody can tell now.

        The server may still be at it. Until it has ended, it holds the lock of the mark's row, and the question waits.
        """
        text = f"{self._place()}: the connection was lost at the commit"
        self._connections.drop_free()
        if not done.lsns:
            raise RetryBatch(f"{text}: {meaning.said(lost)}") from lost
        try:
            connection = self._begin(len(batch))
            try:
                tx = PostgresTransaction(connection.raw, self._statements, self._scope(), is_bold=True)
                mark = read_mark(tx, batch.shard)
            finally:
                self._roll_back(connection)
        except (psycopg.Error, WalbatchError) as error:
            raise RetryBatch(f"{text}, and the mark cannot be read now: {error}") from lost
        if not all(map(mark.covers, done.lsns)):
            raise RetryBatch(f"{text}; the mark says that it did not take place") from lost
        _logger.warning("%s; the mark says that it took place", text)
        return done

    def _look(self, look: Callable[[Transaction], _T]) -> _T:
        try:
            connection = self._begin(1)
        except (RetryBatch, BackendBroken) as error:
            raise StorageError(str(error)) from error
        try:
            return look(
                PostgresTransaction(connection.raw, None, self._scope(), is_bold=True, is_locking=False)
            )
        except psycopg.Error as error:
            raise meaning.at_opening(error, self._place()) from error
        finally:
            self._roll_back(connection)

    def _begin(self, count: int) -> Connection:
        """A connection with a transaction. Where one that lay here has gone stale, all of them have: a new one is tried."""
        while True:
            connection = self._taken()
            try:
                connection.raw.execute(BEGIN if self._write is None else BEGIN_WATCHED)
            except psycopg.Error as error:
                self._connections.drop(connection)
                if not connection.is_used:
                    raise self._ours(error, count) from error
                self._connections.drop_free()
            else:
                return connection

    def _taken(self) -> Connection:
        try:
            return self._connections.take()
        except psycopg.Error as error:
            raise meaning.at_connecting(error, self._place()) from error

    def _roll_back(self, connection: Connection) -> None:
        """End a transaction that is not to be committed, and give its connection back, or close one that does not answer."""
        try:
            if connection.raw.info.transaction_status is not TransactionStatus.IDLE:
                connection.raw.execute("ROLLBACK")
        except psycopg.Error:
            self._connections.drop(connection)
        else:
            self._connections.give(connection)

    def _scope(self) -> tuple[bytes, str]:
        return self._store, self._lane or ""

    def _ours(self, error: Exception, count: int) -> Exception:
        return meaning.for_batch(error, count, self._place()) if isinstance(error, psycopg.Error) else error
