"""What is the same in every database's backend: whose lane it is, and a call of `apply` around a transaction.

What is not here: the transaction itself. A database's backend makes one in `_transaction`, and ends it as that says.

The idea needed to read it: a backend belongs to one lane of one store while it is open, and to the process that opened it.
"""

from __future__ import annotations

import abc
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from walbatch.backends.sql.applying import Transaction, Work, Write, apply_batch, read_mark
from walbatch.backends.sql.table import Table
from walbatch.errors import BackendBroken, ConfigError, CorruptionError, EngineClosed
from walbatch.types import Answer, Batch, Mark

_T = TypeVar("_T")

CALL_S: Final = 30.0
"""How long a call may take where nobody said: what a lane's `timeout_s` is by default."""


class SqlBackend(abc.ABC):
    """A transactional backend: batches become rows of `table`, or whatever `write(cursor, operation)` does. Safe from any thread.

    `table` is a Table, or its name. `write` runs once in effect for each operation, in order, inside the transaction that stores
    the mark; what it returns is the ticket's result. It must neither commit nor roll back. A row that the database refuses (a
    constraint, a value that its type cannot have) becomes a dead letter with the database's own message, and the rest of the
    batch is applied; anything else that `write` raises undoes the whole batch.
    """

    key_bytes_min: int = 0

    def __init__(self, table: Table | str | None, write: Write | None) -> None:
        if (table is None) == (write is None):
            raise ConfigError(
                "say what to do with an operation: either table=, or write= (a function of a cursor and it)"
            )
        if write is not None and not callable(write):
            raise ConfigError(
                f"write must be a function of a cursor and an operation, not {type(write).__name__}"
            )
        if table is not None and not isinstance(table, (Table, str)):
            raise ConfigError(f"table must be a Table or its name, not {type(table).__name__}")
        self.table: Final = Table(table) if isinstance(table, str) else table
        self._write = write
        self._limit_s: float | None = CALL_S
        # Guards `_lane` and `_store`: opening and closing.
        self._lock = threading.Lock()
        self._lane: str | None = None
        self._store = b""
        self._pid = os.getpid()

    def __repr__(self) -> str:
        use = f"lane {self._lane!r}" if self._lane is not None else "closed"
        what = self.table.name if self.table is not None else "a write function"
        return f"<{type(self).__name__} {self._place()} {what}, {use}>"

    def limit_time(self, timeout_s: float | None) -> None:
        """How long a call may take, from now on: what the lane allows. None: for ever."""
        self._limit_s = timeout_s

    def open(self, lane: str, shards: int, store: bytes) -> None:
        """Connect, make what is missing, and check that the tables are as they must be. What can be read afterwards is durable.

        Raises ConfigError for a database that does not fit, and says what to do; StorageError where it cannot be reached;
        ConfigError for a second lane.
        """
        with self._lock:
            if self._lane is not None:
                raise ConfigError(
                    f"{self!r} cannot be the backend of lane {lane!r} too: give each lane one of its own"
                )
            self._pid = os.getpid()
            self._lane, self._store = lane, store
            try:
                self._open(shards)
            except BaseException:
                self._lane = None
                with contextlib.suppress(Exception):
                    self._close()
                raise

    def close(self) -> None:
        """Release the connections. Idempotent. One that a call still uses is closed when the call ends."""
        with self._lock:
            self._lane = None
            if self._pid == os.getpid():
                self._close()

    def apply(self, batch: Batch) -> Answer:
        """Commit what the held mark does not cover of the batch, and the union of both marks, in one durable transaction.

        Crash story: before the commit nothing of the batch is there, after it all of it with its mark. An engine that was killed
        before it heard of the commit offers the batch again, in other cuts perhaps, and the mark leaves out what took effect.

        Returns None, Failures with the rows that were refused, or with `write` an outcome for each operation. Raises Fenced for
        the batch of an engine that a newer one replaced, and a BatchFailure that says what to do; nothing of the batch took
        effect then.
        """
        self._check_open()
        try:
            work = self._together(batch)
            if work is None:
                work = self._transaction(batch, lambda tx: apply_batch(tx, batch, self.table, self._write))
        except CorruptionError as error:
            raise BackendBroken(str(error)) from error
        return work.answer

    def applied_mark(self, shard: int) -> Mark:
        """The mark of this lane and store; `Mark()` where there is none. Durable. Raises CorruptionError, StorageError."""
        self._check_open()
        return self._look(lambda tx: read_mark(tx, shard))

    def _check_open(self) -> None:
        if self._lane is None or self._pid != os.getpid():
            raise EngineClosed(f"{self!r} is not open in this process: open it with an engine")

    @abc.abstractmethod
    def _place(self) -> str:
        """Where the database is, without a password."""

    @abc.abstractmethod
    def _open(self, shards: int) -> None:
        """Connect and check."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Release what is not in use."""

    def _together(self, batch: Batch) -> Work | None:
        """Commit a whole batch, and its mark, in a shorter way than step by step; None where there is none, or it had no effect."""
        return None

    @abc.abstractmethod
    def _transaction(self, batch: Batch, work: Callable[[Transaction], Work]) -> Work:
        """Run `work` in a transaction, and commit it durably. It may be run again in another one, after a rollback."""

    @abc.abstractmethod
    def _look(self, look: Callable[[Transaction], _T]) -> _T:
        """Run `look` in a transaction that changes nothing."""
