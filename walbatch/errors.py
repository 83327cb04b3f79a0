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
