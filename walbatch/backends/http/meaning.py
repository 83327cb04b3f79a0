"""What a server's answer to a request means: a status, or an error instead of one.

What is not here: requests, and what becomes of a batch in which several things happened.

The idea needed to read it: an answer speaks of one operation, of nobody (too much is asked for, the server is away), or of
something that somebody has to repair. What is in doubt is tried again.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx

AFTER_S_MAX: Final = 3_600.0
"""The longest wait that a server can ask for: what the engine waits at most, too."""

SAID_CHARACTERS_MAX: Final = 300

UNSENDABLE_TEXT: Final = (
    "the request cannot be sent: its scheme is not http or https, a header holds what no header can, "
    "or its length is not as said"
)


class Meaning(enum.Enum):
    """What became of a request."""

    APPLIED = enum.auto()
    REJECTED = enum.auto()
    """It can never be applied."""
    THROTTLED = enum.auto()
    """The server asks for less. Nobody's fault."""
    AWAY = enum.auto()
    """It was not sent, or not taken. Nobody's fault."""
    UNKNOWN = enum.auto()
    """Nobody knows whether it took effect. The server's fault, unless only this operation has it."""
    FAILED = enum.auto()
    """The server failed at it, which may be this operation's fault."""
    TOO_LARGE = enum.auto()
    BROKEN = enum.auto()
    """Nothing can be applied until somebody repairs something."""


STATUSES: Final[Mapping[int, Meaning]] = {
    401: Meaning.BROKEN, 403: Meaning.BROKEN, 405: Meaning.BROKEN, 407: Meaning.BROKEN,
    301: Meaning.BROKEN, 302: Meaning.BROKEN, 303: Meaning.BROKEN, 307: Meaning.BROKEN, 308: Meaning.BROKEN,
    408: Meaning.UNKNOWN, 425: Meaning.AWAY, 429: Meaning.THROTTLED, 413: Meaning.TOO_LARGE,
    502: Meaning.UNKNOWN, 503: Meaning.THROTTLED, 504: Meaning.UNKNOWN,
}  # fmt: skip
"""What is not named: 2xx is applied, other 5xx failed, all else is rejected."""

_FIRST_SUCCESS, _FIRST_REDIRECT, _FIRST_SERVER = 200, 300, 500
NOT_FOUND: Final = frozenset({404, 410})
CONFLICT: Final = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What became of a request: `text` says why it was not applied, `after_s` is the shortest wait, `result` is the ticket's."""

    meaning: Meaning
    text: str = ""
    after_s: float = 0.0
    result: Any = None


def of_status(status: int, *, method: str, conflict_is_applied: bool, batch: bool) -> Meaning:
    """What a status means. In answer to a whole batch it says that the address is wrong where it could be a missing key."""
    if _FIRST_SUCCESS <= status < _FIRST_REDIRECT:
        return Meaning.APPLIED
    if status in NOT_FOUND and batch:
        return Meaning.BROKEN
    if (status in NOT_FOUND and method == "DELETE") or (status == CONFLICT and conflict_is_applied):
        return Meaning.APPLIED
    return STATUSES.get(status, Meaning.FAILED if status >= _FIRST_SERVER else Meaning.REJECTED)


def of_error(error: Exception, *, is_built: bool) -> Reply:
    """What it means that there was no answer. `is_built`: a function of the user's made the request, of that very operation."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)):
        return Reply(meaning=Meaning.AWAY, text=f"it was not sent: {text}")
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
        # What the library says repeats headers, and there may be a token in them.
        return Reply(meaning=Meaning.REJECTED if is_built else Meaning.BROKEN, text=UNSENDABLE_TEXT)
    return Reply(meaning=Meaning.UNKNOWN, text=f"whether it took effect is unknown: {text}")


def retry_after(value: str | None, now: datetime) -> float:
    """The seconds that a Retry-After asks for, as a number or a date; 0 where it says nothing that makes sense."""
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:10]), AFTER_S_MAX)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, min((date - now).total_seconds(), AFTER_S_MAX))


def said(status: int, reason: str, body: bytes, location: str | None) -> str:
    """A status as a person reads it, with the beginning of what stands behind it."""
    text = " ".join(body.decode("utf-8", "replace").split())
    if len(text) > SAID_CHARACTERS_MAX:
        text = f"{text[:SAID_CHARACTERS_MAX]}..."
    where = f", to {location!r}, which is not followed: name the new address" if location else ""
    return f"HTTP {status} {reason}{where}{': ' if text else ''}{text}"
