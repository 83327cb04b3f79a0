"""What PostgreSQL's errors mean: of a row, of the whole batch, of the connection, or of something that somebody has to repair.

What is not here: what is done about it.

The idea needed to read it: the five characters of SQLSTATE decide, by their class (the first two) or whole. An error without
them comes from the client: the connection is gone, or a value cannot be sent.

Codes: PostgreSQL's documentation, appendix "PostgreSQL Error Codes".
"""

from __future__ import annotations

from typing import Final

import psycopg

from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    RetryBatch,
    StorageError,
)

_ROW_CLASSES: Final = frozenset({"22", "23", "44"})
"""A value that its type cannot have; a constraint; a view's WITH CHECK OPTION."""

_ROW_CODES: Final = frozenset({"P0001", "54000", "21000"})
"""A function or trigger says RAISE; a value too long for its index; two keys of a statement that are one to the table."""

_LATER_CLASSES: Final = frozenset({"08", "40", "53", "55", "57", "58"})
"""Connection; serialization failure and deadlock; out of memory, disk, connections; locked; shut down or cancelled; I/O."""

_LATER_CODES: Final = frozenset({"25006", "25P03", "25P04", "XX000"})
"""Read only, as a standby is; time-outs of transactions; an internal error."""

_BROKEN_CLASSES: Final = frozenset({"0A", "28", "3D", "3F", "42", "XX"})
"""Not supported; not authorised; no such database, schema, table or column; a damaged page."""

_CANCELLED: Final = "57014"
"""By `statement_timeout`, or by somebody's pg_cancel_backend."""

_ADVICE: Final = {
    "28": "check user and password (PGPASSWORD, or a password file)",
    "3D": "make the database, or name another one",
    "42501": "grant this user what it needs: to make tables, or to use those that are there",
}


def refusal(error: BaseException) -> str | None:
    """What PostgreSQL says of a row that it refuses; None where an error is about something else."""
    if isinstance(error, UnicodeEncodeError):
        return f"{type(error).__name__}: {error}"
    if not isinstance(error, psycopg.Error):
        return None
    code = error.sqlstate
    if code is None:
        return said(error) if isinstance(error, psycopg.DataError) else None
    return said(error) if code[:2] in _ROW_CLASSES or code in _ROW_CODES else None


def for_batch(error: psycopg.Error, count: int, place: str) -> Exception:
    """What the engine is to do about an error that speaks for a whole batch of `count` operations."""
    text = f"{place}: {said(error)}"
    code = error.sqlstate
    if code is None:
        # A connection that is gone, or was closed under us. What else a client says is the program's fault: as it is.
        return (
            RetryBatch(text)
            if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError))
            else error
        )
    if code == _CANCELLED and count > 1:
        return BatchTooLarge(f"{text}: it takes longer than the lane allows")
    if code in _LATER_CODES or code[:2] in _LATER_CLASSES:
        return RetryBatch(text)
    if refusal(error) is not None:  # at the commit, from a trigger that was deferred: it names no row
        return BatchRejected(text)
    if code[:2] in _BROKEN_CLASSES:
        return BackendBroken(text)
    return error


def at_connecting(error: psycopg.Error, place: str) -> Exception:
    """What the engine is to do where a batch finds no connection."""
    code = error.sqlstate or _code_in(error)
    text = f"{place}: {said(error)}"
    if code[:2] in _BROKEN_CLASSES:
        advice = _ADVICE.get(code[:2], "")
        return BackendBroken(f"{text}{': ' if advice else ''}{advice}")
    return RetryBatch(text)


def at_opening(error: psycopg.Error, place: str) -> Exception:
    """What whoever opens the engine is told."""
    code = error.sqlstate or _code_in(error)
    advice = _ADVICE.get(code, _ADVICE.get(code[:2], ""))
    text = f"{place}: {said(error)}{': ' if advice else ''}{advice}"
    if code[:2] in _BROKEN_CLASSES:
        return ConfigError(text)
    if not advice:
        text += ": is the server running, and can it be reached? Open again"
    return StorageError(text)


def is_lost(connection: psycopg.Connection[tuple[object, ...]], error: BaseException) -> bool:
    """Whether the connection went away with this error, so that what the last statement did is unknown."""
    if connection.closed or connection.broken:
        return True
    return isinstance(error, psycopg.OperationalError) and error.sqlstate is None


def said(error: psycopg.Error) -> str:
    """The database's own message, with its detail and its code."""
    primary, detail = error.diag.message_primary, error.diag.message_detail
    text = " ".join(str(primary or error).split())
    if detail:
        text += f"; {' '.join(detail.split())}"
    return f"{text} (SQLSTATE {error.sqlstate})" if error.sqlstate else text


def _code_in(error: psycopg.Error) -> str:
    """libpq tells no code of a connection that was refused by the server, only its words."""
    text = str(error)
    if "password" in text or "authentication" in text or "no pg_hba.conf entry" in text:
        return "28000"
    if "database" in text and "does not exist" in text:
        return "3D000"
    return "28000" if "role" in text and "does not exist" in text else "08001"
