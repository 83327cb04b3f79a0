"""Connections of one backend: as many as there are calls at a time, kept for the next call.

What is not here: transactions, and what is done about a connection that is lost.

The idea needed to read it: a call takes a connection and gives it back, or closes it. A call that was given up by the engine
keeps its own until it ends, so that the next one for the same shard does not meet it on the same connection.
"""

from __future__ import annotations

import contextlib
import logging
import threading
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
"""How long a transaction may do nothing where calls have no limit: then its process is taken for gone."""


@dataclass(slots=True, eq=False)
class Connection:
    """A connection, and what is known of it."""

    raw: Raw
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
        }
        if limit_s is not None:
            # A machine that is gone, or a network, says nothing: the kernel gives up when the engine does.
            usual["tcp_user_timeout"] = max(1, int(1000 * limit_s))
        given = psycopg.conninfo.conninfo_to_dict(self.conninfo)
        raw = psycopg.connect(
            self.conninfo,
            autocommit=True,
            **{name: value for name, value in usual.items() if name not in given},
        )
        connection = Connection(raw, None)
        try:
            self._limit(connection)
            self._look_at_durability(raw)
        except BaseException:
            self.drop(connection)
            raise
        return connection

    def _limit(self, connection: Connection) -> None:
        """Let the server give up before the engine does, and never wait for a process that has died in a transaction."""
        limit_s = connection.limit_s = self.limit_s
        idle_s = IDLE_S if limit_s is None else limit_s
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
        row = raw.execute("SELECT current_setting('synchronous_commit'), current_setting('fsync')").fetchone()
        assert row is not None
        if row[0] == "off":
            raw.execute("SET synchronous_commit = on")
        if row[1] == "off":
            _logger.warning(
                "%s: fsync is off: a power cut at the server may lose what it has committed, and damage all of it", self.place
            )  # fmt: skip
