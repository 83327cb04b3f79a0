"""Exit codes, and the one place where errors become them."""

from __future__ import annotations

import enum
import os

from walbatch.errors import (
    ConfigError,
    CorruptionError,
    StorageError,
    StoreLocked,
    UnsupportedFormat,
    WalbatchError,
)


class Exit(enum.IntEnum):
    """What a script can rely on."""

    DONE = 0
    """Consistent and drained; a torn tail that was never acknowledged included."""
    INTERNAL = 1
    USAGE = 2
    WORK_LEFT = 3
    """Consistent, but operations are left: a backend fails, is not known, or time ran out."""
    CORRUPT = 4
    """Corruption found; nothing was changed."""
    LOCKED = 5
    NEWER_FORMAT = 6
    SALVAGED = 7
    """Made consistent with a stated loss."""
    IO_ERROR = 8


def exit_code(error: BaseException) -> Exit:
    """The exit code that an error means."""
    match error:
        case CorruptionError():
            return Exit.CORRUPT
        case StoreLocked():
            return Exit.LOCKED
        case UnsupportedFormat():
            return Exit.NEWER_FORMAT
        case ConfigError():
            return Exit.USAGE
        case StorageError() | OSError():
            return Exit.IO_ERROR
        case WalbatchError():
            return Exit.WORK_LEFT
        case _:
            return Exit.INTERNAL


def explain(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, WalbatchError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'input/output'}: {error.strerror or error}"
    hint = "" if os.environ.get("WALBATCH_DEBUG") else "; set WALBATCH_DEBUG=1 to see where"
    return f"this is a bug in walbatch ({type(error).__name__}: {error}){hint}. The store is as safe as before; please report it"
