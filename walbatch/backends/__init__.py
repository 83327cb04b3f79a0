"""Where batches go: functions, LMDB, and what a URL names.

LMDB is imported when `LmdbBackend` is first asked for, so that who delivers elsewhere does without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from walbatch.backends.function import FunctionBackend, as_backend
from walbatch.backends.urls import open_backend, strip_password, url_of

if TYPE_CHECKING:
    from walbatch.backends.lmdb import LmdbBackend

__all__ = ["FunctionBackend", "LmdbBackend", "as_backend", "open_backend", "strip_password", "url_of"]


def __getattr__(name: str) -> Any:
    if name == "LmdbBackend":
        from walbatch.backends.lmdb import LmdbBackend  # noqa: PLC0415 - see above

        return LmdbBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
