"""Connections of one backend: as many as there are calls at a time, kept for the next call.

What is not here: transactions, and what is done about a connection that is lost.

The idea needed to read it: a call takes a connection and gives it back, or closes it. A call that was given up by the engine
keeps its own until it ends, so that the next one for the same shard does not meet it on the same connection.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import psycopg

_logger = logging.getLogger("walbatch")

Raw: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"

CONNECT_S: Final = 10.0
"""How long to try to connect, where the URL does not say."""

CONNECT_S_MIN: Final = 2.0
"""What libpq takes at least."""

STATEMENT_PART: Final = 0.75
"""The part of a call's time limit that one statement may take: the server ends it before the engine gives the call up."""

LOCK_PART: Final = 0.5
"""The part of it that a statement may wait for a lock."""

IDLE_S: Final = 3_600.0
"""How long a transaction may do nothing where calls have no limit: then its process is taken for gone, or the server."""

KEEPALIVE: Final = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
"""A server that is gone without a word is noticed within a minute."""


class LimitedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that waits for the end of a statement no longer than `wait_s`. Then it closes itself: it is lost.

    The server's own limits do not hold for a commit: one that waits for a standby which is not there waits for ever. The process in
    the server goes on waiting, and keeps its locks until it is done. It is not cancelled: that would make the commit valid without
    the standby.
    """

    wait_s: float = CONNECT_S

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """See `psycopg.Connection`."""
        return super().wait(self._until(gen, time.monotonic() + self.wait_s), *args, **options)

    def _until(self, gen: Generator[Any, Any, Any], deadline: float) -> Generator[Any, Any, Any]:
        """The same conversation with libpq, until the deadline. psycopg asks at least every tenth of a second."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    gen.close()
                    self.close()
                    raise psycopg.OperationalError(
                        f"no answer for {self.wait_s:g} s: the network is gone, or a commit waits for a standby that is not there "
                        "(synchronous_standby_names)"
                    )
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


@dataclass(slots=True, eq=False)
class Connection:
    """A connection, and what is known of it."""

    raw: LimitedConnection
    limit_s: float | None
    is_used: bool = False
    """It lay here since an earlier call: the server may have gone away meanwhile."""


@dataclass(slots=True, eq=False)
class Connections:
    """Connections to one database. Safe from any thread."""

    conninfo: str
    place: str
    limit_s: float | None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    # Guarded by it:
    _free: list[Connection] = field(default_factory=list)
    _is_open: bool = True

    def take(self) -> Connection:
        """One that is free, or a new one. Raises psycopg.Error."""
        with self._lock:
            connection = self._free.pop() if self._free else None
        if connection is None:
            connection = self._connect()
        elif connection.limit_s != self.limit_s:
            try:
                self._limit(connection)
            except psycopg.Error:
                self.drop(connection)
                return self._connect()
        return connection

    def give(self, connection: Connection) -> None:
        """Keep it for the next call."""
        connection.is_used = True
        with self._lock:
            if self._is_open and not connection.raw.closed:
                self._free.append(connection)
                return
        self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close it. What was under way in it is rolled back by the server."""
        with contextlib.suppress(psycopg.Error, OSError):
            connection.raw.close()

    def drop_free(self) -> None:
        """Close those that lie here: the server has gone away since."""
        with self._lock:
            free, self._free = self._free, []
        for connection in free:
            self.drop(connection)

    def close(self) -> None:
        """Close all; those in use when they are given back."""
        with self._lock:
            self._is_open = False
        self.drop_free()

    def _connect(self) -> Connection:
        limit_s = self.limit_s
        usual: dict[str, Any] = {
            "connect_timeout": int(max(CONNECT_S_MIN, min(CONNECT_S, (limit_s or CONNECT_S) / 2))),
            "fallback_application_name": "walbatch",
            **KEEPALIVE,
        }
        if limit_s is not None:
            # A machine that is gone, or a network, says nothing: the kernel gives up when the engine does.
            usual["tcp_user_timeout"] = max(1, int(1000 * limit_s))
        given = psycopg.conninfo.conninfo_to_dict(self.conninfo)
        raw = LimitedConnection.connect(
            self.conninfo,
            autocommit=True,
            client_encoding="UTF8",  # of texts in arrays
            **{name: value for name, value in usual.items() if name not in given},
        )
        raw.wait_s = IDLE_S if limit_s is None else limit_s
        connection = Connection(raw, None)
        try:
            # Statements that are transactions of their own have no BEGIN to say it.
            raw.execute("SELECT set_config('default_transaction_isolation', 'read committed', false)")
            self._limit(connection)
            self._look_at_durability(raw)
        except BaseException:
            self.drop(connection)
            raise
        return connection

    def _limit(self, connection: Connection) -> None:
        """Let the server give up before the engine does, and never wait for a process that has died in a transaction."""
        limit_s = connection.limit_s = self.limit_s
        idle_s = connection.raw.wait_s = IDLE_S if limit_s is None else limit_s
        limits = {
            "statement_timeout": 0.0 if limit_s is None else STATEMENT_PART * limit_s,
            "lock_timeout": 0.0 if limit_s is None else LOCK_PART * limit_s,
            "idle_in_transaction_session_timeout": idle_s,
        }
        for name, seconds in limits.items():
            connection.raw.execute(
                "SELECT set_config(%s, %s, false)", (name, str(max(1, int(1000 * seconds)) if seconds else 0))
            )

    def _look_at_durability(self, raw: Raw) -> None:
        """A commit must be on disk when it returns."""
        # Also set where it is on: what a session has set, a reload of the server's configuration does not change any more.
        row = raw.execute(
            "SELECT current_setting('fsync'), set_config('synchronous_commit', CASE current_setting('synchronous_commit') "
            "WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)"
        ).fetchone()
        assert row is not None
        if row[0] == "off":
            _logger.warning(
                "%s: fsync is off: a power cut at the server may lose what it has committed, and damage all of it", self.place
            )  # fmt: skip
