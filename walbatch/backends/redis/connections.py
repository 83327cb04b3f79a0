"""Connections to one database of a Redis, and what is asked of the server wherever one is made.

What is not here: scripts, and what errors mean.

The idea needed to read it: a server that was away may come back with other settings, or be another server. So each new connection
looks at it, before anything is sent. Settings can change while it works, too: so it is looked at again now and then, in the same
round trip as a batch.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from walbatch.backends.redis.meaning import (
    CLUSTER_TEXT,
    LATER,
    PASSWORD_VARIABLE,
    UnfitError,
    UnreadyError,
    said,
)
from walbatch.backends.redis.persistence import (
    QUESTIONS,
    REWRITTEN,
    SETTINGS,
    changes,
    shortcomings,
    why_not_in_force,
)
from walbatch.backends.redis.url import Address

_logger = logging.getLogger("walbatch")

CONNECT_S: Final = 10.0
"""How long to try to connect, where the lane allows more."""

ANSWER_PART: Final = 0.75
"""The part of a call's time limit that Redis may take for an answer."""

LOOK_EVERY_S: Final = 1.0
"""How long settings that change while the server works can stay unnoticed."""

CONNECTIONS_MAX: Final = 300
"""More than there are shards, and calls that were given up."""


class Connections:
    """Makes clients of one server. `persistence` is what is asked of it."""

    def __init__(self, address: Address, persistence: str) -> None:
        self._address = address
        self._persistence = persistence
        self._warned: set[str] = set()
        self._looked_at = -math.inf
        self._life = ""
        self._in_force: tuple[str, tuple[str, ...]] | None = None
        """The server's life in which its file was seen in force last, and how often its settings had been changed by then."""

    def client(self, limit_s: float | None) -> redis.Redis:
        """A client with connections of its own. It connects when it is used, and never sends anything twice."""
        address = self._address
        options: dict[str, Any] = {
            "db": address.database, "username": address.user or None, "password": self._password() or None,
            "socket_timeout": None if limit_s is None else ANSWER_PART * limit_s, "retry": Retry(NoBackoff(), 0),
            # Answers in the form of scripts, which the library's readers of answers must be told.
            "protocol": 2, "max_connections": CONNECTIONS_MAX, "redis_connect_func": self._greet, "client_name": "walbatch",
        }  # fmt: skip
        if address.path:
            options |= {"connection_class": redis.UnixDomainSocketConnection, "path": address.path}
        else:
            connect_s = min(CONNECT_S, CONNECT_S if limit_s is None else limit_s / 2)
            options |= {"host": address.host, "port": address.port, "socket_connect_timeout": connect_s,
                        "socket_keepalive": True}  # fmt: skip
        if address.scheme == "rediss":
            options |= {"connection_class": redis.SSLConnection, "ssl_cert_reqs": "required", "ssl_check_hostname": True,
                        **address.tls}  # fmt: skip
        return redis.Redis(connection_pool=redis.ConnectionPool(**options))

    def _password(self) -> str:
        return self._address.password or os.environ.get(PASSWORD_VARIABLE, "")

    def _greet(self, connection: Any) -> None:
        """Log in, and look at the server. Raises UnfitError for one that cannot be used, and redis.RedisError."""
        connection.on_connect()
        place = self._address.place
        server = _lines(_ask(connection, "INFO", "server"))
        if server.get("redis_mode") == "cluster":
            raise UnfitError(f"{place}: {CLUSTER_TEXT}")
        if _lines(_ask(connection, "INFO", "replication")).get("role") == "slave":
            raise UnfitError(f"{place} is a replica, which takes no writes: name its master")
        self._life = server.get("run_id", "")
        self.judge([_ask(connection, *question) for question in QUESTIONS])

    def questions(self) -> Sequence[tuple[str, ...]]:
        """What to ask the server beside what it is to do: nothing where it was asked a moment ago."""
        is_due = self._persistence == "synced" and time.monotonic() - self._looked_at >= LOOK_EVERY_S
        return QUESTIONS if is_due else ()

    def judge(self, answers: Sequence[Any]) -> None:
        """Look at the answers. Raises UnfitError, UnreadyError, and what Redis says where it cannot answer now."""
        if error := next((answer for answer in answers if isinstance(answer, redis.ResponseError)), None):
            if said(error).partition(" ")[0] in LATER:
                raise error
            self._tell(f"its settings may not be read ({said(error)})")
            return
        settings = {name: _text(answer[1]) if answer else "" for name, answer in zip(SETTINGS, answers, strict=False)}  # fmt: skip
        state = _lines(answers[-1])
        changed = changes(state)
        if found := shortcomings(settings):
            self._tell("; ".join(found))
            return
        why = why_not_in_force(state)
        if why == REWRITTEN and (not changed or self._in_force == (self._life, changed)):
            why = ""  # nobody has switched it on since it was seen in force, or since the server was started with it
        if why:
            self._tell(why, passes=True)
            return
        self._in_force = self._life, changed
        self._looked_at = time.monotonic()

    def _tell(self, why: str, *, passes: bool = False) -> None:
        """Refuse a server, or say once what is not to be relied upon."""
        place = self._address.place
        if self._persistence == "synced":
            if passes:
                raise UnreadyError(f"{place}: {why}")
            raise UnfitError(
                f"{place}: {why}. Exactly once needs a Redis that keeps what it has acknowledged: set appendonly yes and "
                "appendfsync always. persistence='any' takes it as it is: what Redis loses after it has acknowledged it is lost "
                "for good then"
            )
        if why not in self._warned:
            self._warned.add(why)
            _logger.warning(
                "%s: %s: what Redis loses after it has acknowledged it is lost for good", place, why
            )


def _ask(connection: Any, *command: str) -> Any:
    """What the server answers, which may be an error of its own."""
    connection.send_command(*command)
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _lines(answer: Any) -> dict[str, str]:
    """A section of INFO; nothing where this user may not ask."""
    if isinstance(answer, redis.ResponseError):
        return {}
    lines = (line.partition(":") for line in _text(answer).splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines}


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
