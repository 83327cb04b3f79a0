"""The errors of walbatch, classed by what the caller should do next.

Every message says what happened, where, and what to do. All derive from `WalbatchError`.
"""

from __future__ import annotations


class WalbatchError(Exception):
    """Base of every error that walbatch raises on purpose."""


class ConfigError(WalbatchError):
    """Wrong settings or arguments: change the program. `problems` lists every one found."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class OperationTooLarge(ConfigError):
    """The operation exceeds a fixed limit and was not accepted. Make it smaller."""


class Overloaded(WalbatchError):
    """A bound is reached and the operation was not accepted. Try again later, or raise the limit.

    `limit` is the bound's name, `value` the present value, `maximum` the bound.
    """

    def __init__(self, limit: str, *, value: int, maximum: int, hint: str) -> None:
        self.limit = limit
        self.value = value
        self.maximum = maximum
        super().__init__(f"{limit} is at its limit ({value:,} of {maximum:,}): nothing was accepted; {hint}")


class EngineClosed(WalbatchError):
    """The engine is closed (or belongs to another process). Open it again."""


class StoreLocked(WalbatchError):
    """Another engine has the store open. `pid` and `host` name the holder where known."""

    def __init__(self, path: str, *, pid: int | None, host: str | None) -> None:
        self.path = path
        self.pid = pid
        self.host = host
        holder = f"process {pid} on {host}" if pid is not None else "another process"
        super().__init__(f"{path} is in use by {holder}: close that engine first, or open another store")


class StorageError(WalbatchError):
    """The file system failed. Nothing acknowledged is lost; repair the cause and reopen. `path` names the file."""

    def __init__(self, message: str, *, path: str = "", errno: int | None = None) -> None:
        self.path = path
        self.errno = errno
        super().__init__(message)


class DurabilityUnknown(StorageError):
    """The operation may or may not be durable: a write or sync failed under it. Reopen the store and look."""


class CorruptionError(StorageError):
    """Bytes that were acknowledged are damaged or gone. Nothing was changed.

    `path` and `offset` say where, `first_lsn` and `last_lsn` which operations (None where unknown), `expected` what
    should have been there.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str,
        offset: int = 0,
        first_lsn: int | None = None,
        last_lsn: int | None = None,
        expected: str = "",
    ) -> None:
        super().__init__(message, path=path)
        self.offset = offset
        self.first_lsn = first_lsn
        self.last_lsn = last_lsn
        self.expected = expected


class UnsupportedFormat(WalbatchError):
    """The store was written by a newer walbatch (or is no store). Upgrade walbatch; nothing was changed."""


class ResultTimeout(WalbatchError, TimeoutError):
    """The wait ended before what it waited for happened. The operation goes on; wait again."""


class Fenced(WalbatchError):
    """The backend holds the mark of a newer incarnation of the store: this engine is an old one. Close it."""


class BackendError(WalbatchError):
    """A backend answered with nonsense, or a backend URL cannot be opened. Correct the backend."""


# --- what a backend may raise, speaking for the whole batch --------------------------------------------------------


class BatchFailure(WalbatchError):
    """Base of what a backend raises to say why a batch was not applied. Nothing of the batch may have taken effect.

    `after` is the shortest wait in seconds before the next try.
    """

    after: float = 0.0  # also of a class derived from it whose `__init__` does not call ours

    def __init__(self, message: str = "", *, after: float = 0.0) -> None:
        self.after = after
        super().__init__(message or type(self).__name__)


class RetryBatch(BatchFailure):
    """Try the batch again. No operation of it is to blame: none loses an attempt."""


class Throttled(BatchFailure):
    """The backend asks for less. The batch is tried again, with fewer batches in flight."""


class BatchTooLarge(BatchFailure):
    """The batch exceeds what the backend takes at once: `count` operations or `bytes` (None: unknown). It is cut smaller."""

    count: int | None = None
    bytes: int | None = None

    def __init__(
        self, message: str = "", *, count: int | None = None, bytes: int | None = None, after: float = 0.0
    ) -> None:
        self.count = count
        self.bytes = bytes
        super().__init__(message, after=after)


class BatchRejected(BatchFailure):
    """Some operation of the batch can never be applied: it is searched for by splitting, and becomes a dead letter."""


class BackendBroken(BatchFailure):
    """Nothing can be applied until somebody repairs something (wrong credentials, say): the shard stops and keeps its work."""


# --- how an operation ended, where it was not applied --------------------------------------------------------------


class OperationDead(WalbatchError):
    """The operation was given up and is kept as a dead letter: see `Engine.dead_letters`, requeue it or drop it."""

    def __init__(self, lsn: int | None, reason: str, error: str) -> None:
        self.lsn = lsn
        self.reason = reason
        self.error = error
        super().__init__(
            f"operation {lsn} was given up ({reason}): {error}. It is kept among the dead letters: see engine.dead_letters() or "
            "'walbatch dlq', and requeue it when the cause is gone"
        )


class OperationCancelled(WalbatchError):
    """The operation was cancelled before it was delivered."""

    def __init__(self, lsn: int | None) -> None:
        self.lsn = lsn
        super().__init__(f"operation {lsn} was cancelled before it was delivered")
