"""What happened to a store, as its user and its backends saw it: a list of events over all of its lives.

What is not here: the judgement (`oracle`). Nothing of it comes from inside the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from walbatch.testing.simulation.images import Cut
from walbatch.types import Checkpoint, DeadLetter, OperationStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """One operation in the log, as a look from outside finds it."""

    lsn: int
    lane: str
    key: bytes
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A look at the store, right before it is opened: what opening it will do. Nothing may be written by looking."""

    refusal: str = ""
    """The class of the error that opening will raise."""
    cases: tuple[str, ...] = ()
    next_lsn: int = 1
    torn_bytes: int = 0
    torn_count: int = 0
    quarantine_bytes: int = 0
    logged: tuple[Logged, ...] | None = None
    """The operations that recovery keeps, settled ones included; None: nobody counted."""
    wrote: bool = False
    """The look changed something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The engine was opened: what it recovered is exposed. None: nobody looked."""

    cases: tuple[str, ...] | None = None
    next_lsn: int | None = None
    quarantine_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Opening raised an error of this class, which says what is wrong with the store.

    It speaks for the LSNs from `first_lsn` to `last_lsn`; None: for all that it does not exclude.
    """

    error: str
    first_lsn: int | None = None
    last_lsn: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """The bytes of an operation on the disk were changed from outside."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A submit was called. Payloads are distinct over a whole history, so they name operations."""

    lane: str
    key: bytes
    payload: bytes
    grace_ns: int | None
    """How long after its acknowledgement a power cut may still lose it; None: for ever."""
    syncs: int | None = None
    """Syncs of files that had succeeded in this incarnation, before the first that failed; None: nobody counted."""
    not_before_ns: int = 0
    """Wall time before which no backend may see it; 0: none."""
    deadline_ns: int = 0
    """Wall time after which no backend may see it; 0: none."""
    idempotency_key: bytes = b""
    """Whoever has the same one in the same lane is the first of them; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledged:
    """The submit returned, or a ticket said durable."""

    payload: bytes
    lsn: int | None
    at_ns: int
    syncs: int | None = None
    """As in `Submitted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A backend was called with operations. The wall clock said something between these two times, jumps included."""

    lane: str
    operations: tuple[tuple[int | None, bytes], ...]
    """LSN and payload of each."""
    earliest_wall_ns: int
    latest_wall_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedTo:
    """A backend made an operation durable."""

    lane: str
    store: bytes
    lsn: int | None
    key: bytes
    payload: bytes
    identity: int | None = None
    """What names the operation for ever; None: nobody looked, or it has no LSN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blamed:
    """A backend said that an operation failed by its own fault, or failed in a way that may have been its fault."""

    payload: bytes
    applied: tuple[int, ...] = ()
    """LSNs of those that it applied in the same call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lied:
    """A backend said that it had applied an operation, and had not: no engine can save it."""

    payload: bytes
    lsn: int | None


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A checkpoint became durable."""

    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Buried:
    """Dead letters became durable, or were found durable by an opening."""

    letters: tuple[DeadLetter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unburied:
    """Dead letters were removed, durably."""

    lsns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """The engine was asked for its dead letters, and this was all of them."""

    letters: tuple[DeadLetter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequeueAsked:
    """Somebody wants a dead letter to be submitted again: from now on it may be there, or its operation, or both."""

    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropAsked:
    """Somebody wants a dead letter to be dropped: from now on it may be gone."""

    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    """Somebody wants an operation back: from now on nobody knows, until one of the next two, or for ever."""

    payload: bytes
    lsn: int | None = None
    """As its ticket has shown it, perhaps before it was durable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The engine said that it is cancelled."""

    payload: bytes
    told: bool = True
    """Whether its ticket, if somebody has it, was resolved by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRefused:
    """The engine said that it is not cancelled: it is in flight, or settled."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusTold:
    """The engine was asked where an operation is, and said this."""

    payload: bytes
    status: OperationStatus
    lsn: int | None = None
    """By which it was asked for: it may have had another one since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLost:
    """The state was taken away from outside: nobody remembers what was given up, nor the letters."""


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
    dead: bool = False
    cancelled: bool = False
    times: int | None = None
    """How often its ticket told its listener; None: nobody listened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """The engine was closed and said that nothing is left to deliver."""

    segments: int | None = None
    """Segments that were left then; None: nobody counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The process ended, and how."""

    cut: Cut
    at_ns: int


Event = (
    Predicted | Opened | Refused | Damaged | Submitted | Acknowledged | Given | AppliedTo | Blamed | Lied | Checkpointed | Buried
    | Unburied | Letters | RequeueAsked | DropAsked | CancelAsked | Cancelled | CancelRefused | StatusTold | StateLost | SyncFailed
    | Resolved | Drained | Ended
)  # fmt: skip
