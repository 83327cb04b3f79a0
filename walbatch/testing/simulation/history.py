"""What happened to a store, as its user and its backends saw it: a list of events over all of its lives.

What is not here: the judgement (`oracle`). Nothing of it comes from inside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from walbatch.testing.simulation.images import Cut
from walbatch.types import Checkpoint


@dataclass(frozen=True, slots=True)
class Opened:
    """The engine was opened: what it recovered is exposed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A submit was called. Payloads are distinct over a whole history, so they name operations."""

    lane: str
    key: bytes
    payload: bytes
    grace_ns: int | None
    """How long after its acknowledgement a power cut may still lose it; None: for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """The submit returned, or a ticket said durable."""

    payload: bytes
    lsn: int | None
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedTo:
    """A backend made an operation durable."""

    lane: str
    store: bytes
    lsn: int | None
    key: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A checkpoint became durable."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class SyncFailed:
    """A sync of a file or directory of the store reported an error."""

    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The engine is closed; whether the ticket of this operation was resolved by then."""

    payload: bytes
    done: bool
    applied: bool
    """Whether its result says that the backend applied it."""


@dataclass(frozen=True, slots=True)
class Drained:
    """The engine said that nothing is left to deliver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process ended, and how."""

    cut: Cut
    at_ns: int


Event = Opened | Submitted | Acknowledged | AppliedTo | Checkpointed | SyncFailed | Resolved | Drained | Ended
