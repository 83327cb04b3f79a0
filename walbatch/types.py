"""The values that cross walbatch's boundaries: operations, batches, outcomes, marks and positions.

All are frozen. Nothing here does I/O or knows a clock.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

PRIORITY_LOW = 2
PRIORITY_NORMAL = 5
PRIORITY_HIGH = 7
PRIORITY_URGENT = 8
"""From here on an operation does not wait for company: its batch is cut at once."""
PRIORITY_CRITICAL = 9
PRIORITY_MAX = 10


class Durability(enum.StrEnum):
    """When a lane acknowledges an operation."""

    SYNC = "sync"
    """Synced to disk: survives a power cut."""
    INTERVAL = "interval"
    """Written, and synced within the lane's interval: survives a kill at once, a power cut after the interval."""
    NONE = "none"
    """Not logged: lost when the process ends."""


class Order(enum.StrEnum):
    """What order a lane keeps between the operations of one shard."""

    KEY = "key"
    """Operations with equal key are applied in LSN order; a key that waits for a retry does not hold up others."""
    SHARD = "shard"
    """All operations of a shard are applied in LSN order."""
    NONE = "none"
    """Any order."""


class TriggerMode(enum.StrEnum):
    """Which conditions cut a batch. The age bound, urgent operations, flush and drain cut it in every mode."""

    SIZE = "size"
    """The count or the bytes are reached."""
    TIMEOUT = "timeout"
    """The oldest operation has waited its linger."""
    ANY = "any"
    """Either."""
    ALL = "all"
    """Both."""


class FailureOrder(enum.StrEnum):
    """What waits while an operation waits for its retry."""

    BLOCK = "block"
    """The whole shard: the default for order "shard"."""
    HOLD_KEY = "hold_key"
    """Operations with the same key: the default for order "key"."""
    CONTINUE = "continue"
    """Nothing else: the default, and the only choice, for order "none"."""


class Strategy(enum.StrEnum):
    """How many batches of a lane may be in flight."""

    SERIAL = "serial"
    """One at a time, over all shards."""
    PARALLEL = "parallel"
    """One for each shard; with order "none" as many as the concurrency loop allows."""


class Overdue(enum.StrEnum):
    """What happens to a shard whose `apply` has not returned within its time limit."""

    RETRY = "retry"
    """The call is given up, whatever it still does, and the batch is tried again."""
    WAIT = "wait"
    """The shard waits until the call returns: nothing overtakes it. It is reported as stuck."""


class CutReason(enum.StrEnum):
    """Why a batch was cut."""

    COUNT = "count"
    """The size target (the trigger's count, or the controller's) is reached."""
    BYTES = "bytes"
    LINGER = "linger"
    AGE = "age"
    """The oldest operation has waited twice its linger: the hard bound of every trigger mode."""
    IDLE = "idle"
    """Nothing was in flight, and the adaptive linger does not keep an idle backend waiting."""
    URGENT = "urgent"
    """An operation with a priority of at least PRIORITY_URGENT is in it."""
    MEMORY = "memory"
    """Memory presses."""
    BACKLOG = "backlog"
    """More operations of the shard wait in the log than fit in memory."""
    RETRY = "retry"
    """It was cut before, failed, and has waited for its retry."""
    SPLIT = "split"
    """A part of a batch that failed, on the search for the operation that makes it fail."""
    PROBE = "probe"
    """A small batch, to see whether a backend works again."""
    FLUSH = "flush"
    DRAIN = "drain"


class OperationStatus(enum.StrEnum):
    """Where an operation is."""

    PENDING = "pending"
    IN_FLIGHT = "in_flight"
    APPLIED = "applied"
    DEAD = "dead"
    CANCELLED = "cancelled"


class DeathReason(enum.StrEnum):
    """Why an operation became a dead letter."""

    REJECTED = "rejected"
    """The backend said that it can never be applied."""
    ATTEMPTS = "attempts"
    """It failed by itself as often as the lane's retry policy allows."""
    DEADLINE = "deadline"
    """Its deadline passed before it was applied."""
    LEFT_OUT = "left out"
    """The backend said that it did not apply it, and stored a mark which says that it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What few operations have. Times are wall-clock nanoseconds since 1970; 0, 0, 0 and b"" mean none."""

    not_before_ns: int = 0
    """It is not delivered before this time."""
    deadline_ns: int = 0
    """It is not delivered after this time, but becomes a dead letter."""
    origin: int = 0
    """The LSN under which it was submitted first, where it is a dead letter that was requeued."""
    idempotency_key: bytes = b""
    """A second submission with the same key, within the window, is the first one."""


NO_OPTIONS = Options()

When = float | datetime | None
"""A point in time: seconds since 1970, or an aware datetime."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One submitted operation, as a backend sees it. `lsn` is None on a lane with durability "none"."""

    lsn: int | None
    key: bytes
    payload: bytes
    priority: int = PRIORITY_NORMAL
    options: Options = NO_OPTIONS

    @property
    def identity(self) -> int | None:
        """What names it for ever, together with its store: the LSN under which it was submitted first."""
        return self.options.origin or self.lsn


Range = tuple[int, int]
"""First and last LSN, both included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What of one shard is settled: every LSN up to `watermark`, and those in `ranges` above it.

    `epoch` is the incarnation of the store that wrote it; a backend refuses a mark of an older epoch than the one it
    holds (fencing). Ranges are disjoint, ascending, and above the watermark.
    """

    epoch: int = 0
    watermark: int = 0
    ranges: tuple[Range, ...] = ()

    def covers(self, lsn: int) -> bool:
        """Whether `lsn` is settled by this mark. O(log ranges)."""
        if lsn <= self.watermark:
            return True
        index = bisect_right(self.ranges, (lsn, 2**64)) - 1
        return index >= 0 and self.ranges[index][0] <= lsn <= self.ranges[index][1]

    def union(self, other: Mark) -> Mark:
        """The mark that covers what either covers, with the larger epoch."""
        watermark = max(self.watermark, other.watermark)
        return Mark(
            epoch=max(self.epoch, other.epoch),
            watermark=watermark,
            ranges=merge_ranges([*self.ranges, *other.ranges], watermark),
        )


def merge_ranges(ranges: Iterable[Range], watermark: int) -> tuple[Range, ...]:
    """Sort ranges, join neighbours, and cut off what lies at or below `watermark`."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if last <= watermark:
            continue
        start = max(first, watermark + 1)
        if merged and start <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((start, last))
    return tuple(merged)


def ranges_of(lsns: Iterable[int]) -> list[Range]:
    """The ranges of an ascending sequence of LSNs."""
    ranges: list[Range] = []
    for lsn in lsns:
        if ranges and ranges[-1][1] == lsn - 1:
            ranges[-1] = (ranges[-1][0], lsn)
        else:
            ranges.append((lsn, lsn))
    return ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Operations of one shard, handed to a backend in one call. Columnar, and iterable as `Operation`s.

    `lsns`, `keys`, `payloads` and `priorities` are parallel and in the order in which to apply them; several
    operations may have the same key, oldest first. `lsns` is empty on a lane with durability "none". `mark` is what
    a transactional backend commits together with the batch (None on such a lane).
    """

    lane: str
    shard: int
    store: bytes
    """The store's UUID, 16 bytes: (store, lsn) names an operation for ever."""
    lsns: Sequence[int]
    keys: Sequence[bytes]
    payloads: Sequence[bytes]
    priorities: Sequence[int]
    attempt: int
    """1 for the first try; above it, an operation of the batch failed before, alone or with its batch."""
    reason: CutReason
    mark: Mark | None
    options: Sequence[Options] = ()
    """Parallel to the others; empty where no operation of the batch has any."""

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Operation]:
        lsns: Iterable[int | None] = self.lsns or [None] * len(self.keys)
        options = self.options or [NO_OPTIONS] * len(self.keys)
        rows = zip(lsns, self.keys, self.payloads, self.priorities, options, strict=True)
        for lsn, key, payload, priority, option in rows:
            yield Operation(lsn=lsn, key=key, payload=payload, priority=priority, options=option)

    def __repr__(self) -> str:
        span = f" lsn {self.lsns[0]}..{self.lsns[-1]}" if self.lsns else ""
        return f"<Batch {self.lane}/{self.shard} of {len(self)}{span} attempt {self.attempt} cut by {self.reason}>"


# --- a backend's answer ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Applied:
    """The operation took effect (or had before). `result` is what `ticket.result()` returns."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class Retry:
    """The operation did not take effect; try it again, not before `after` seconds."""

    after: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The operation did not take effect and never will: it becomes a dead letter at once."""

    error: str = ""


Outcome = Applied | Retry | Rejected


@dataclass(frozen=True, slots=True)
class Failures:
    """A backend's answer that names the exceptions by index and says that all others were applied."""

    outcomes: Mapping[int, Outcome]


Answer = Sequence[Outcome] | Failures | None


# --- places in the log ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the log: the segment's number and the offset in bytes of a frame in it. Ordered by age."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneMark:
    """What the checkpoint knows of one lane: a mark for each shard, by shard number."""

    shards: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The persisted settled state of a store.

    Every operation with an LSN up to `watermark` is settled, and so is what the lanes' marks cover above it.
    `durable_lsn` and `segment` say how far the log reached when it was taken: a log that is shorter has lost its end.
    """

    generation: int
    epoch: int
    watermark: int
    durable_lsn: int
    segment: int
    settled_count: int
    """Operations settled since the store was made."""
    lanes: Mapping[str, LaneMark] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An operation that was given up, with everything that is needed to try it again. Times are wall-clock ns."""

    lsn: int
    lane: str
    key: bytes
    payload: bytes
    priority: int
    options: Options
    reason: DeathReason
    error: str
    """Class and text of the last error."""
    attempts: int
    """Tries that failed for a reason of its own."""
    died_wall_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUse:
    """An idempotency key that was used: by which operation, and when (wall-clock ns)."""

    key: bytes
    lane: str
    lsn: int
    used_wall_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneMemory:
    """What the store remembers of a lane: its shards (stable for ever) and the URL of its backend, if it has one."""

    name: str
    shards: int
    url: str | None = None
