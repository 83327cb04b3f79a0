"""A lane at run time: its shards, each with its queue, its ledger, its controller, its breaker, and its place in the log.

What is not here: threads and locks. The dispatcher owns all of it, and calls nothing here without its lock.

The idea needed to read it: a shard is either *live* (every durable operation of it that is not settled is in its queue) or
*reading back* (its next operation is in the log at its cursor, since its queue was full).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from walbatch import limits
from walbatch.config import NS_PER_S, Adaptive, Aimd, Fixed
from walbatch.config import Lane as LaneSettings
from walbatch.core.batcher import CutPolicy, Entry, Flight, ShardQueue, Situation
from walbatch.core.breaker import Breaker
from walbatch.core.budget import RetryBudget
from walbatch.core.checksum import crc32c
from walbatch.core.concurrency import Concurrency
from walbatch.core.controller import START_COUNT, FixedSize, LatencyAimd, SizeController
from walbatch.core.entry import options_of, priority_of
from walbatch.core.history import Expectation
from walbatch.core.run import Run
from walbatch.core.settlement import ShardLedger
from walbatch.core.statistics import ShardTally
from walbatch.core.surface import ResponseSurface
from walbatch.ports import Backend
from walbatch.types import (
    NO_OPTIONS,
    CutReason,
    DeathReason,
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
RUN_COUNT_MIN: Final = 8
"""From so many operations on that are alike it costs less to take them in at once."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """Operations that are given up, and why; they were taken out of the queue. `deaths` has one for each."""

    entries: Sequence[Entry]
    deaths: Sequence[tuple[DeathReason, str]]


class Shard:
    """One shard."""

    __slots__ = (
        "_samples_saved",
        "after_gap",
        "breaker",
        "broken",
        "controller",
        "cursor",
        "flush_lsn",
        "index",
        "lane",
        "ledger",
        "memory_bytes_max",
        "nonsense",
        "queue",
        "refused_until_ns",
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
        self.breaker = Breaker(**breaker_limits(settings))
        self.broken: str | None = None
        self.tally = ShardTally(now_ns=now_ns)
        self._samples_saved = self.controller.describe().samples
        # The next batch says nothing of what its size costs: the backend was idle, or away.
        self.after_gap = True
        self.nonsense = 0
        """Answers in a row that were none."""
        self.unburied: deque[tuple[int, Doomed]] = deque()
        """What is given up and could not be buried: when to try again."""
        self.refused_until_ns = 0
        """When what could not be buried last is tried again at the earliest."""

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

    def take_in_many(self, entries: Sequence[Entry], *, now_ns: int, wall_ns: int) -> int:
        """New operations, in LSN order, as long as there is room for them. Returns how many."""
        taken = 0
        for (_, are_bare), group in groupby(entries, _kinship):
            alike = list(group)
            count = 0
            if are_bare and len(alike) >= RUN_COUNT_MIN:
                lsns, keys, payloads, (priority, *_), (arrival_ns, *_), _ = zip(*alike, strict=True)
                count = self.take_in_run(Run(lsns, keys, payloads, priority, arrival_ns))
            else:
                while count < len(alike) and self.has_room:
                    self.take_in(alike[count], now_ns=now_ns, wall_ns=wall_ns)
                    count += 1
            taken += count
            if count < len(alike):
                break
        return taken

    def take_in_run(self, run: Run) -> int:
        """New operations without options, in LSN order, as long as there is room for them. Returns how many."""
        count, room = len(run), self.memory_bytes_max - self.queue.memory_bytes
        if room <= 0:
            return 0
        if run.bytes + limits.OPERATION_OVERHEAD_BYTES * count > room:
            # The last one may exceed it, like one that comes alone.
            fitting = run.count_within(0, count, room - 1, limits.OPERATION_OVERHEAD_BYTES) + 1
            if fitting < count:
                run, count = run.part(0, fitting), fitting
        self.queue.push_run(run)
        self.ledger.admit_many(run.lsns)
        return count

    def take_in_ahead(self, entries: Sequence[Entry], *, now_ns: int, wall_ns: int) -> None:
        """Operations from further back in the log, in LSN order, which go before those that are here."""
        self.queue.push_ahead(
            (
                entry,
                _monotonic(entry[5].not_before_ns, now_ns, wall_ns),
                _monotonic(entry[5].deadline_ns, now_ns, wall_ns),
            )
            for entry in entries
        )
        for entry in entries:
            self.ledger.admit_ahead(entry[0])

    def next_due_ns(self, situation: Situation, *, may_cut: bool) -> int | None:
        """When time alone will make something due, or a deadline pass; None if it will not. `may_cut`: batches are cut at all."""
        times = [self.queue.next_expiry_ns, self.unburied[0][0] if self.unburied else None]
        if may_cut:
            at = self.queue.next_due_ns(situation)
            times.append(None if at is None else max(at, self.breaker.reopens_at_ns or 0))
        return min((at for at in times if at is not None), default=None)

    def can_drain(self, now_ns: int) -> bool:
        """Whether a drain has to wait for it.

        What is delayed, whose backend does not work, or what waits for room among the dead letters stays in the log.
        """
        if not self.delivers or (self.breaker.allows(now_ns) is None and not self.queue.flights):
            return False
        if self.is_clogged or self._lacks_room(now_ns):
            return False
        return self.cursor is not None or len(self.queue) > len(self.queue.delayed_lsns)

    @property
    def is_clogged(self) -> bool:
        """Whether delayed operations take all of its memory that there is before it is read for again.

        What is behind them in the log waits as they do. O(delayed).
        """
        if self.cursor is None or self.wants_refill:
            return False
        return len(self.queue) == len(self.queue.delayed_lsns)

    def _lacks_room(self, now_ns: int) -> bool:
        """Whether all that it could do is to give up what it had no room for of late among the dead letters."""
        if now_ns >= self.refused_until_ns or self.queue.flights or self.wants_refill:
            return False
        situation = self.situation(now_ns, draining=True, memory_pressed=False, probing=False)
        if self.queue.due(situation) is not None:
            return False
        next_ns = self.queue.next_due_ns(situation)
        return next_ns is None or next_ns >= self.refused_until_ns

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

    @property
    def has_news(self) -> bool:
        """Whether those who wait until it is flushed, or drained, should look again.

        Each of several flushes waits for an LSN of its own, and for none that is delayed: they know best.
        """
        return not self.queue.ready or self.flush_lsn > 0

    @property
    def starves(self) -> bool:
        """Whether it has nothing to do until it is read for."""
        return self.wants_refill and not self.queue.ready and not self.queue.flights

    def aim(self) -> None:
        """Ask the controller for the size of the next batch."""
        target = self.controller.target()
        self.target, self.target_reason = target.count, target.reason

    def situation(self, now_ns: int, *, draining: bool, memory_pressed: bool, probing: bool) -> Situation:
        """What the queue cannot know."""
        target = max(1, self.target // 2) if memory_pressed else self.target
        window_full = self.cursor is not None and not self.has_room
        # Situation(...) in half the time.
        return tuple.__new__(
            Situation, (now_ns, target, self.flush_lsn, draining, window_full, memory_pressed, probing)
        )

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

    def reconfigure(self, before: LaneSettings) -> None:
        """Take over settings of the lane that were changed. What the breaker has seen and the controller has learnt stays."""
        settings = self.lane.settings
        self.queue.policy = cut_policy(settings)
        self.queue.attempts_max = settings.retry.attempts
        self.breaker.adjust(**breaker_limits(settings))
        aims = settings.controller, settings.trigger, settings.cost, settings.batch_cost
        if aims != (before.controller, before.trigger, before.cost, before.batch_cost):
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
        before, self.settings = self.settings, settings
        if settings.retry.budget != before.retry.budget:
            self.budget = RetryBudget(settings.retry.budget)
        limiter = getattr(self.setup.backend, "limit_time", None)
        if settings.timeout_s != before.timeout_s and callable(limiter):
            limiter(settings.timeout_s)
        for shard in self.shards:
            shard.reconfigure(before)

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
        harmless = self.setup.transactional or self.order is Order.NONE
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
    def has_slot_for_each(self) -> bool:
        """Whether no shard has to wait until another gives up its slot."""
        return len(self.shards) == 1 or (
            self.concurrency is None and self.settings.strategy is not Strategy.SERIAL
        )

    @property
    def has_slot(self) -> bool:
        """Whether one more batch may be in flight."""
        return self.in_flight < self.slots


def _kinship(entry: Entry) -> tuple[int, bool]:
    """What operations share that are taken in at once: their priority, and that there is nothing else to say of them."""
    return priority_of(entry), options_of(entry) is NO_OPTIONS


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


def breaker_limits(settings: LaneSettings) -> dict[str, Any]:
    """The limits of a breaker that a lane's retry policy asks for."""
    retry = settings.retry
    return {
        "failures_max": retry.breaker_failures, "open_ns": int(retry.breaker_s * NS_PER_S),
        "open_ns_max": int(retry.breaker_s_max * NS_PER_S), "deaths_share_max": retry.deaths_share_max,
    }  # fmt: skip
