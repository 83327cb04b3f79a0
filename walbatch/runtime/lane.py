"""A lane at run time: its shards, each with its queue, its ledger, and its place in the log while it reads back.

What is not here: threads and locks. The dispatcher owns all of it, and calls nothing here without its lock.

The idea needed to read it: a shard is either *live* (every durable operation of it that is not settled is in its queue) or
*reading back* (its next operation is in the log at its cursor, since its queue was full).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from walbatch.core.batcher import CutLimits, ShardQueue
from walbatch.core.settlement import ShardLedger
from walbatch.ports import Backend
from walbatch.types import Durability, Mark, Order, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSetup:
    """A lane as the dispatcher needs it.

    `backend` is None for a held lane. `initial` has one mark per shard: what was settled
    before this run; `counted` is the part of it that the checkpoint had counted.
    """

    name: str
    backend: Backend | None
    transactional: bool
    shards: int
    order: Order
    durability: Durability
    cut_limits: CutLimits
    retry_base_s: float
    retry_ceiling_s: float
    initial: tuple[Mark, ...]
    counted: tuple[Mark, ...]


@dataclass(slots=True)
class Cursor:
    """Where a shard's next operation is in the log: at `position` or later, with an LSN of at least `next_lsn`."""

    position: Position
    next_lsn: int


class Shard:
    """One shard: queue, ledger, and its cursor while it is reading back (None: live)."""

    __slots__ = ("cursor", "flush_lsn", "index", "lane", "ledger", "memory_bytes_max", "queue")

    def __init__(self, lane: Lane, index: int, *, memory_bytes_max: int) -> None:
        self.lane = lane
        self.index = index
        self.queue = ShardQueue(order=lane.setup.order, cut_limits=lane.setup.cut_limits)
        self.ledger = ShardLedger(lane.setup.initial[index], lane.setup.counted[index])
        self.cursor: Cursor | None = None
        self.flush_lsn = 0
        self.memory_bytes_max = memory_bytes_max

    def __repr__(self) -> str:
        where = "live" if self.cursor is None else f"reading back at {self.cursor.position}"
        return f"<Shard {self.lane.setup.name}/{self.index} {where} {self.queue!r}>"

    @property
    def has_room(self) -> bool:
        """Whether the queue takes one more operation."""
        return self.queue.memory_bytes < self.memory_bytes_max

    def misses(self, lsn: int) -> bool:
        """Whether it is reading back and has not seen this operation of its own yet."""
        return self.cursor is not None and lsn >= self.cursor.next_lsn and lsn > self.ledger.frontier

    @property
    def wants_refill(self) -> bool:
        """Whether to read for it: half empty, so that a frame is not read again for each operation."""
        return self.cursor is not None and self.queue.memory_bytes * 2 <= self.memory_bytes_max


class Lane:
    """A lane's shards and counters."""

    def __init__(self, setup: LaneSetup, index: int, *, shard_bytes_max: int) -> None:
        self.setup = setup
        self.index = index
        self.logged = setup.durability is not Durability.NONE
        self.held = setup.backend is None
        self.paused = False
        # A held lane takes one operation: enough to pin the log where its backlog begins.
        self.shards = [
            Shard(self, i, memory_bytes_max=1 if self.held else shard_bytes_max) for i in range(setup.shards)
        ]
        self.submitted = self.applied = self.retried = self.batches = self.failed_batches = 0
        self.cut_reasons: Counter[str] = Counter()
        self.last_error: str | None = None
        self.sequence = 0
