"""A lane at run time: its shards, each with its queue, its ledger, its controller, its breaker, and its place in the log.

What is not here: threads and locks. The dispatcher owns all of it, and calls nothing here without its lock.

The idea needed to read it: a shard is either *live* (every durable operation of it that is not settled is in its queue) or
*reading back* (its next operation is in the log at its cursor, since its queue was full).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.config import NS_PER_S, Adaptive, Aimd, Fixed
from walbatch.config import Lane as LaneSettings
from walbatch.core.batcher import CutPolicy, Entry, Flight, ShardQueue, Situation
from walbatch.core.breaker import Breaker
from walbatch.core.budget import RetryBudget
from walbatch.core.checksum import crc32c
from walbatch.core.concurrency import Concurrency
from walbatch.core.controller import START_COUNT, FixedSize, LatencyAimd, SizeController
from walbatch.core.history import Expectation
from walbatch.core.settlement import ShardLedger
from walbatch.core.statistics import ShardTally
from walbatch.core.surface import ResponseSurface
from walbatch.ports import Backend
from walbatch.types import (
    NO_OPTIONS,
    CutReason,
    Durability,
    FailureOrder,
    Mark,
    Order,
    Overdue,
    Position,
    Strategy,
    TriggerMode,
)

FLIGHTS_MAX: Final = 64
"""Batches of one shard in flight, where order allows more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSetup:
    """A lane as the dispatcher needs it.

    `backend` is None for a held lane. `initial` has one mark per shard: what was settled before this run; `counted` is the
    part of it that the checkpoint had counted. `snapshots` are what the controllers had learnt, by shard.
    """

    name: str
    backend: Backend | None
    transactional: bool
    interruptible: bool
    """Whether a call of `apply` can be ended from outside (it is a coroutine)."""
    settings: LaneSettings
    initial: tuple[Mark, ...]
    counted: tuple[Mark, ...]
    snapshots: tuple[bytes | None, ...] = ()

    @property
    def shards(self) -> int:
        """The number of shards, stable for ever."""
        return self.settings.shards


@dataclass(slots=True)
class Cursor:
    """Where a shard's next operation is in the log: at `position` or later, with an LSN of at least `next_lsn`."""

    position: Position
    next_lsn: int


class Shard:
    """One shard."""

    __slots__ = (
        "_samples_saved",
        "after_gap",
        "breaker",
        "broken",
        "burying",
        "controller",
        "cursor",
        "flush_lsn",
        "index",
        "lane",
        "ledger",
        "memory_bytes_max",
        "nonsense",
        "queue",
        "tally",
        "target",
        "target_reason",
        "unburied",
    )  # fmt: skip

    def __init__(self, lane: Lane, index: int, *, memory_bytes_max: int, now_ns: int) -> None:
        self.lane = lane
        self.index = index
        settings = lane.settings
        self.queue = ShardQueue(
            order=lane.order, on_failure=lane.on_failure, policy=cut_policy(settings),
            attempts_max=settings.retry.attempts, flights_max=FLIGHTS_MAX if lane.overlaps else 1,
        )  # fmt: skip
        self.ledger = ShardLedger(lane.setup.initial[index], lane.setup.counted[index])
        self.cursor: Cursor | None = None
        self.flush_lsn = 0
        self.memory_bytes_max = memory_bytes_max
        expected = lane.expected
        self.controller = controller_of(
            settings, seed=crc32c(b"%d" % index, crc32c(lane.setup.name.encode(), 0)),
            start=round(expected.count) if expected else None,
        )  # fmt: skip
        if expected:
            self.queue.observe_duration(expected.seconds)
        snapshot = lane.setup.snapshots[index] if lane.setup.snapshots else None
        if snapshot is not None:
            self.controller.restore(snapshot)  # what is not of this controller is left aside
        self.target = 0
        self.target_reason = ""
        self.aim()
        self.breaker = breaker_of(settings)
        self.broken: str | None = None
        self.tally = ShardTally(now_ns=now_ns)
        self._samples_saved = self.controller.describe().samples
        # The next batch says nothing of what its size costs: the backend was idle, or away.
        self.after_gap = True
        self.nonsense = 0
        """Answers in a row that were none."""
        self.burying = 0
        """Burials of what has missed its deadline that are under way."""
        self.unburied: deque[tuple[int, Sequence[Entry]]] = deque()
        """What has missed its deadline and could not be buried: when to try again."""

    def __repr__(self) -> str:
        where = "live" if self.cursor is None else f"reading back at {self.cursor.position}"
        return f"<Shard {self.lane.setup.name}/{self.index} {where} {self.queue!r}>"

    @property
    def has_room(self) -> bool:
        """Whether the queue takes one more operation."""
        return self.queue.memory_bytes < self.memory_bytes_max

    @property
    def delivers(self) -> bool:
        """Whether anything of it may be cut at all."""
        lane = self.lane
        return not (lane.held or lane.paused or self.broken)

    def take_in(self, entry: Entry, *, now_ns: int, wall_ns: int) -> None:
        """A new operation, in LSN order. Its wall-clock times become monotonic ones: from here on the clock may jump."""
        options = entry[5]
        if options is NO_OPTIONS:
            self.queue.push(entry)
        else:
            self.queue.push(
                entry, not_before_ns=_monotonic(options.not_before_ns, now_ns, wall_ns),
                deadline_ns=_monotonic(options.deadline_ns, now_ns, wall_ns),
            )  # fmt: skip
        self.ledger.admit(entry[0])

    def next_due_ns(self, situation: Situation) -> int | None:
        """When time alone will make something due; None if it will not."""
        at = self.queue.next_due_ns(situation)
        reopens = self.breaker.reopens_at_ns
        at = at if at is None or reopens is None else max(at, reopens)
        if self.unburied:
            at = self.unburied[0][0] if at is None else min(at, self.unburied[0][0])
        return at

    def can_drain(self, now_ns: int) -> bool:
        """Whether a drain has to wait for it: what is delayed, or whose backend does not work, stays in the log."""
        if not self.delivers or (self.breaker.allows(now_ns) is None and not self.queue.flights):
            return False
        return self.cursor is not None or len(self.queue) > len(self.queue.delayed_lsns)

    def mend(self) -> None:
        """Somebody says that the backend works again."""
        if self.broken is not None:
            self.broken = None
            self.after_gap = True

    def misses(self, lsn: int) -> bool:
        """Whether it is reading back and has not seen this operation of its own yet."""
        return self.cursor is not None and lsn >= self.cursor.next_lsn and lsn > self.ledger.frontier

    @property
    def wants_refill(self) -> bool:
        """Whether to read for it: half empty, so that a frame is not read again for each operation."""
        return self.cursor is not None and self.queue.memory_bytes * 2 <= self.memory_bytes_max

    def aim(self) -> None:
        """Ask the controller for the size of the next batch."""
        target = self.controller.target()
        self.target, self.target_reason = target.count, target.reason

    def situation(self, now_ns: int, *, draining: bool, memory_pressed: bool, probing: bool) -> Situation:
        """What the queue cannot know."""
        return Situation(
            now_ns=now_ns, target=max(1, self.target // 2) if memory_pressed else self.target, flush_lsn=self.flush_lsn,
            draining=draining, window_full=self.cursor is not None and not self.has_room, memory_pressed=memory_pressed,
            probing=probing,
        )  # fmt: skip

    def teaches(self, flight: Flight) -> bool:
        """Whether the controller may learn from a batch: it was as large as it should be, and more was waiting.

        Asked when the batch has been cut.
        """
        full = flight.reason in {CutReason.COUNT, CutReason.BYTES}
        learnable = full and not self.after_gap and (self.queue.ready > 0 or self.cursor is not None)
        self.after_gap = False
        return learnable

    @property
    def has_learnt(self) -> bool:
        """Whether the controller knows more than when its snapshot was taken last."""
        return self.controller.describe().samples != self._samples_saved

    def snapshot(self) -> bytes:
        """What the controller has learnt."""
        self._samples_saved = self.controller.describe().samples
        return self.controller.snapshot()

    def reconfigure(self) -> None:
        """Take over settings of the lane that were changed."""
        settings = self.lane.settings
        self.queue.policy = cut_policy(settings)
        self.queue.attempts_max = settings.retry.attempts
        self.breaker = breaker_of(settings)
        fresh = controller_of(settings, seed=self.index)
        fresh.restore(self.controller.snapshot())
        self.controller = fresh
        self.aim()


class Lane:
    """A lane's shards and counters."""

    def __init__(
        self,
        setup: LaneSetup,
        index: int,
        *,
        shard_bytes_max: int,
        now_ns: int,
        expected: Expectation | None = None,
    ) -> None:
        """`expected`: what the history says of it, which warms what knows nothing yet."""
        self.setup = setup
        self.settings = setup.settings
        self.index = index
        self.logged = setup.settings.durability is not Durability.NONE
        self.held = setup.backend is None
        self.paused = False
        self.expected = expected
        self.in_flight = 0
        self.budget = RetryBudget(setup.settings.retry.budget)
        self.concurrency = Concurrency(limit_max=FLIGHTS_MAX * setup.shards) if self.overlaps else None
        # A held lane takes one operation: enough to pin the log where its backlog begins.
        self.shards = [
            Shard(self, i, memory_bytes_max=1 if self.held else shard_bytes_max, now_ns=now_ns)
            for i in range(setup.shards)
        ]
        self.submitted = self.applied = self.retried = self.batches = self.failed_batches = self.dead = (
            self.cancelled
        ) = 0
        self.retries_waiting = 0
        self.last_error: str | None = None
        self.sequence = 0

    def reconfigure(self, settings: LaneSettings) -> None:
        """Take over settings that were checked."""
        self.settings = settings
        self.budget = RetryBudget(settings.retry.budget)
        for shard in self.shards:
            shard.reconfigure()

    @property
    def order(self) -> Order:
        """What order it keeps."""
        return Order(self.settings.order)

    @property
    def on_failure(self) -> FailureOrder:
        """What waits while an operation waits for its retry."""
        if self.settings.on_failure is not None:
            return FailureOrder(self.settings.on_failure)
        return {
            Order.KEY: FailureOrder.HOLD_KEY, Order.SHARD: FailureOrder.BLOCK, Order.NONE: FailureOrder.CONTINUE,
        }[self.order]  # fmt: skip

    @property
    def overlaps(self) -> bool:
        """Whether several batches of one shard may be in flight: nothing of it is in any order, and nobody counts on one call."""
        return (
            self.order is Order.NONE
            and self.settings.strategy is Strategy.PARALLEL
            and not self.setup.transactional
        )

    @property
    def overdue(self) -> Overdue:
        """What happens when a call has not returned in time."""
        if self.settings.overdue is not None:
            return Overdue(self.settings.overdue)
        harmless = self.setup.transactional or self.setup.interruptible or self.order is Order.NONE
        return Overdue.RETRY if harmless else Overdue.WAIT

    @property
    def timeout_ns(self) -> int | None:
        """The time limit of a call; None: none."""
        return None if self.settings.timeout_s is None else int(self.settings.timeout_s * NS_PER_S)

    @property
    def slots(self) -> int:
        """Batches that may be in flight at once."""
        if self.settings.strategy is Strategy.SERIAL:
            return 1
        return self.setup.shards if self.concurrency is None else self.concurrency.limit

    @property
    def has_slot(self) -> bool:
        """Whether one more batch may be in flight."""
        return self.in_flight < self.slots


def _monotonic(wall_time_ns: int, now_ns: int, wall_ns: int) -> int:
    """A wall-clock time on the monotonic clock; 0 stays 0, and what has passed is the smallest time there is."""
    return max(1, now_ns + wall_time_ns - wall_ns) if wall_time_ns else 0


def cut_policy(settings: LaneSettings) -> CutPolicy:
    """The trigger in the units of the core, with the count that the cost of an operation allows."""
    trigger = settings.trigger
    affordable = None
    if settings.cost is not None and settings.batch_cost is not None:
        affordable = settings.cost.count_max(settings.batch_cost)
    count_max = min(limits.BATCH_COUNT_MAX, affordable or limits.BATCH_COUNT_MAX)
    return CutPolicy(
        mode=TriggerMode(trigger.mode), count=trigger.count, bytes=trigger.bytes, linger_ns=trigger.linger_ns, count_max=count_max
    )  # fmt: skip


def controller_of(settings: LaneSettings, *, seed: int, start: int | None = None) -> SizeController:
    """The controller that a lane asks for: a fixed size where its trigger has one. `start`: the size to begin with."""
    begin = max(1, start or START_COUNT)
    chosen = settings.controller
    ceiling = min(settings.trigger.count or limits.BATCH_COUNT_MAX, cut_policy(settings).count_max)
    if chosen is None:
        chosen = Adaptive() if settings.trigger.count is None else Fixed(settings.trigger.count)
    match chosen:
        case Fixed():
            return FixedSize(count=min(chosen.count, ceiling))
        case Aimd():
            return LatencyAimd(
                count_min=min(chosen.count_min, ceiling), count_max=min(chosen.count_max, ceiling),
                latency_target_s=chosen.latency_ms / 1e3, start=begin,
            )  # fmt: skip
        case Adaptive():
            return ResponseSurface(
                count_min=min(chosen.count_min, ceiling), count_max=min(chosen.count_max, ceiling),
                multiple_of=chosen.multiple_of, latency_quantile=chosen.quantile, seed=seed, start=begin,
                latency_target_s=None if chosen.latency_ms is None else chosen.latency_ms / 1e3,
            )  # fmt: skip


def breaker_of(settings: LaneSettings) -> Breaker:
    """The breaker that a lane's retry policy asks for."""
    retry = settings.retry
    return Breaker(
        failures_max=retry.breaker_failures, open_ns=int(retry.breaker_s * NS_PER_S),
        open_ns_max=int(retry.breaker_s_max * NS_PER_S),
    )  # fmt: skip
