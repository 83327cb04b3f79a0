"""The values that cross walbatch's boundaries: operations, batches, outcomes, marks and positions.

All are frozen. Nothing here does I/O or knows a clock.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PRIORITY_NORMAL = 5
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


class CutReason(enum.StrEnum):
    """Why a batch was cut."""

    COUNT = "count"
    BYTES = "bytes"
    LINGER = "linger"
    BACKLOG = "backlog"
    """More operations of the shard wait in the log than fit in memory."""
    FLUSH = "flush"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One submitted operation, as a backend sees it. `lsn` is None on a lane with durability "none"."""

    lsn: int | None
    key: bytes
    payload: bytes
    priority: int = PRIORITY_NORMAL


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
    """1 for the first try; counts tries of the shard since its last success."""
    reason: CutReason
    mark: Mark | None

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Operation]:
        lsns: Iterable[int | None] = self.lsns or [None] * len(self.keys)
        for lsn, key, payload, priority in zip(lsns, self.keys, self.payloads, self.priorities, strict=True):
            yield Operation(lsn=lsn, key=key, payload=payload, priority=priority)

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


Outcome = Applied | Retry


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
class LaneMemory:
    """What the store remembers of a lane: its shards (stable for ever) and the URL of its backend, if it has one."""

    name: str
    shards: int
    url: str | None = None
