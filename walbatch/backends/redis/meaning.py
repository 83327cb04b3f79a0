"""What Redis' errors mean: of the whole batch, of the connection, or of something that somebody has to repair.

What is not here: errors of one operation, which never leave the script but as text, and what is done about any of them.

The idea needed to read it: an error's first word is its code, where it has one. What is not known is taken for something to repair:
nothing is lost while the shard stands still.
"""

from __future__ import annotations

from typing import Final

import redis

from walbatch.errors import BackendBroken, ConfigError, RetryBatch, StorageError, Throttled

LATER: Final = frozenset({
    "LOADING", "BUSY", "MASTERDOWN", "READONLY", "MISCONF", "NOREPLICAS", "TRYAGAIN", "CLUSTERDOWN", "EXECABORT",
})  # fmt: skip
"""It passes: a script of somebody else's, a replica that becomes the master, a disk that is full."""

_CLUSTER: Final = frozenset({"MOVED", "ASK", "CROSSSLOT"})
_CODES: Final[tuple[tuple[type[redis.RedisError], str], ...]] = (
    (redis.exceptions.OutOfMemoryError, "OOM"),
    (redis.exceptions.ReadOnlyError, "READONLY"),
    (redis.exceptions.NoPermissionError, "NOPERM"),
    (redis.exceptions.MovedError, "MOVED"),
    (redis.exceptions.AskError, "ASK"),
    (redis.exceptions.TryAgainError, "TRYAGAIN"),
    (redis.exceptions.MasterDownError, "MASTERDOWN"),
    (redis.exceptions.ClusterDownError, "CLUSTERDOWN"),
    (redis.exceptions.ClusterCrossSlotError, "CROSSSLOT"),
    (redis.exceptions.NoScriptError, "NOSCRIPT"),
)  # fmt: skip
"""redis-py takes the code off the text of these."""

CLUSTER_TEXT: Final = (
    "it belongs to a cluster, which RedisBackend cannot use: a batch and its mark must stand in one place"
)
PASSWORD_VARIABLE: Final = "REDISCLI_AUTH"  # noqa: S105 - its name, as redis-cli reads it
_ADVICE: Final = {
    "NOPERM": "grant this user its keys, those that begin with walbatch:, EVALSHA, EVAL, CONFIG GET and INFO",
    "OOM": "give Redis more memory (maxmemory), or delete data",
    "MISCONF": "look at the disk of the server",
}


class UnfitError(redis.RedisError):
    """A server that does not promise what was asked for. Raised where a connection is made."""


class UnreadyError(redis.RedisError):
    """A server that does not promise it yet, but will without anybody's doing. Raised where the other one is."""


def for_batch(error: redis.RedisError, place: str) -> Exception:
    """What the engine is to do about an error that speaks for a whole batch."""
    if isinstance(error, UnfitError):
        return BackendBroken(str(error))
    if isinstance(error, UnreadyError):
        return RetryBatch(str(error))
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        return BackendBroken(f"{place}: {said(error)}: check user and password ({PASSWORD_VARIABLE})")
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        return RetryBatch(f"{place}: {said(error)}")
    return for_text(said(error), place)


def for_text(text: str, place: str) -> Exception:
    """The same for an error that begins with its code."""
    code = "NOPERM" if "user executing the script" in text else text.partition(" ")[0]
    advice = f": {_ADVICE[code]}" if code in _ADVICE else ""
    if code in _CLUSTER:
        return BackendBroken(f"{place}: {text}: {CLUSTER_TEXT}")
    if code == "OOM":
        return Throttled(f"{place}: {text}{advice}")
    if code in LATER or "max number of clients" in text:
        return RetryBatch(f"{place}: {text}{advice}")
    return BackendBroken(f"{place}: {text}{advice}")


def at_opening(error: redis.RedisError, place: str) -> Exception:
    """What whoever opens the engine is told."""
    if isinstance(error, UnfitError):
        return ConfigError(str(error))
    if isinstance(error, UnreadyError):
        return StorageError(f"{error}. Open again")
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        return ConfigError(f"{place}: {said(error)}: check user and password ({PASSWORD_VARIABLE})")
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        return StorageError(
            f"{place}: {said(error)}: is the server running, and can it be reached? Open again"
        )
    found = for_text(said(error), place)
    return ConfigError(str(found)) if isinstance(found, BackendBroken) else StorageError(str(found))


def said(error: redis.RedisError) -> str:
    """Redis' own message, in one line, beginning with its code."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = next((code for cls, code in _CODES if isinstance(error, cls)), "")
    return text if text.startswith(code) else f"{code} {text}"
