"""From durable to a backend: fills queues, cuts batches when they are due, and reads back what did not fit in memory.

What is not here: when to cut (`core.batcher`), what becomes of a batch (`runtime.delivery`), what is pending
(`core.settlement`).

The idea needed to read it: a shard is either *live* (every durable operation of it that is not settled is in
its queue) or *reading back* (its queue is full; its next operation is in the log at its cursor). New
operations enter live shards directly; the reader thread fills the others from the log until they have caught
up with its end. So memory is bounded whatever the backlog.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.config import Lane as LaneSettings
from walbatch.core.batcher import Entry, Situation
from walbatch.core.health import LaneFacts, ShardFacts
from walbatch.core.history import History
from walbatch.core.pressure import Pressure
from walbatch.core.statistics import batch_stats
from walbatch.errors import ConfigError, EngineClosed, Overloaded, ResultTimeout, WalbatchError
from walbatch.ports import Clock, Entropy, Log, Memory, StateStore, Thread, Threads
from walbatch.runtime.committer import Committed
from walbatch.runtime.delivery import Delivery, Expiry, Flow, Job
from walbatch.runtime.express import Express
from walbatch.runtime.finding import Finder
from walbatch.runtime.lane import Cursor, Lane, LaneSetup, Shard
from walbatch.runtime.letters import DeadLetters
from walbatch.runtime.promises import LOGGED, Promises
from walbatch.runtime.readback import NOTHING_FED, ReadBack
from walbatch.runtime.report import Report, lane_stats
from walbatch.runtime.ticket import Promise
from walbatch.runtime.watch import Watch
from walbatch.runtime.workers import Workers
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, LaneMark, Options, Order, Position

_logger = logging.getLogger("walbatch")

TICK_FLOOR_NS = 1_000_000
"""Shortest tick: a linger of nothing must not make the timer spin while batches are in flight."""
HISTORY: Final = ("\0history", 0)
"""Where the history is kept among the snapshots of controllers: no lane has such a name."""
SEARCHED_FRAMES = 16
"""Frames of the search for urgent operations to each one that fills shards: it must gain on them."""
SNAPSHOT_NS = 10_000_000_000
"""How often what the size controllers have learnt goes to state/."""
PRESSED_WAIT_NS = 100_000_000
"""How often the reader looks whether memory is not short any more."""
DUE_FLOOR_NS = 100_000
"""Shortest sleep of the timer, so that no mistake about a deadline can make it spin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSettings:
    """What the dispatcher needs of the settings. Times in ns."""

    timer_ns: int
    in_flight_max: int
    memory_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the checkpointer needs, taken at one moment."""

    watermark: int
    lanes: Mapping[str, LaneMark]
    settled_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a verdict on health needs of the dispatcher, taken at one moment."""

    memory_bytes: int
    memory_bytes_max: int
    abandoned: int
    clock_jump_s: float
    lanes: tuple[LaneFacts, ...]
    shards: tuple[ShardFacts, ...]


class Dispatcher:
    """Delivers durable operations. All methods are safe from any thread."""

    def __init__(
        self, *, log: Log, clock: Clock, threads: Threads, entropy: Entropy, settings: DispatchSettings, store: bytes, epoch: int,
        lanes: Sequence[LaneSetup], start: Position, end_lsn: int, watermark: int, letters: DeadLetters,
        memory: Memory, state: StateStore, history: History, given_up: Iterable[int],
        on_failure: Callable[[WalbatchError], None],
    ) -> None:  # fmt: skip
        self._log = log
        self._clock = clock
        self._threads = threads
        self._settings = settings
        self._epoch = epoch
        self._state = state
        self._letters = letters
        self._on_failure = on_failure
        # Guards all below, the lanes and their shards included. Never held over I/O or a backend.
        self._cond = threads.condition()
        shards = sum(lane.shards for lane in lanes if lane.backend is not None)
        share = settings.memory_bytes_max // max(1, shards)
        now_ns = clock.monotonic_ns()
        self.lanes = [
            Lane(
                setup,
                index,
                shard_bytes_max=share,
                now_ns=now_ns,
                expected=history.expect(setup.name, clock.wall_ns()),
            )
            for index, setup in enumerate(lanes)
        ]
        self._by_name = {lane.setup.name: lane for lane in self.lanes}
        self._shards = [shard for lane in self.lanes for shard in lane.shards]
        self._read_back = ReadBack(self.lanes, given_up=set(given_up), is_dead=letters.holds, clock=clock)
        self._express = Express(self.lanes, read_back=self._read_back, clock=clock)
        self._end = log.end
        self._end_lsn = end_lsn
        for shard in self._shards:
            if shard.lane.logged:
                shard.cursor = Cursor(start, 0)
                shard.ledger.frontier = watermark
        self._flow = Flow()
        self._peak_memory_bytes = 0
        self._snapshots_due_ns = 0
        self._first_shard = 0
        self._draining = False
        self._hurried = False
        self._stopping = False
        self._failure: WalbatchError | None = None
        self._idle = False
        self._threads_running: list[Thread] = []
        # Held while the log is read: by the reader, and by whoever looks for one operation.
        self._reading = threads.condition()
        # Guards the inbox: the leader must not wait for a dispatcher that is busy.
        self._inbox_guard = threads.condition()
        self._inbox: deque[Committed] = deque()
        self._inbox_bytes = 0
        self._inbox_count = 0
        self.promises = Promises()
        self._delivery = Delivery(
            cond=self._cond, flow=self._flow, clock=clock, entropy=entropy, promises=self.promises, letters=letters, store=store,
            epoch=epoch, history=history, given_up=self._read_back.given_up, on_failure=on_failure,
        )  # fmt: skip
        self._history = history
        self._watch = Watch(memory=memory, clock=clock, lanes=self.lanes)
        self.finder = Finder(
            cond=self._cond, lanes=self.lanes, read_back=self._read_back, delivery=self._delivery, log=log, reading=self._reading,
            state=state, is_absorbed=self._is_absorbed, settled_lsn=self.settled_lsn,
        )  # fmt: skip
        self._workers = Workers(
            threads, count_max=lambda: settings.in_flight_max + self._flow.abandoned, guarded=self._guarded
        )
        self._pace()

    def __repr__(self) -> str:
        return (
            f"<Dispatcher {len(self.lanes)} lanes, {self._flow.in_flight} in flight, end lsn {self._end_lsn}>"
        )

    def _pace(self) -> None:
        """What wakes the timer, and how often it looks: from the settings of all lanes. With the lock held, or before the start."""
        settings = self._settings
        triggers = [lane.settings.trigger for lane in self.lanes]
        self._urgent_count = min((trigger.count or 64 for trigger in triggers), default=1)
        self._urgent_bytes = min([*(trigger.bytes for trigger in triggers), settings.memory_bytes_max // 4])
        lingers = [trigger.linger_ns for trigger in triggers if trigger.linger_ns is not None]
        self._eager = len(lingers) < len(triggers)
        self._tick_ns = max(TICK_FLOOR_NS, min([*lingers, settings.timer_ns]))

    def start(self) -> None:
        """Start the timer and the reader. Workers start when there is work for them."""
        self._threads_running = [
            self._threads.spawn("walbatch-timer", self._guarded(self._run_timer)),
            self._threads.spawn("walbatch-reader", self._guarded(self._run_reader)),
        ]

    def _guarded(self, loop: Callable[[], None]) -> Callable[[], None]:
        """A thread's loop whose death stops the engine loudly: an operation nobody delivers must not go unnoticed."""

        def run() -> None:
            try:
                loop()
            except WalbatchError as error:
                self._on_failure(error)
            except BaseException as error:  # the thread's outermost frame
                _logger.critical("a thread of the engine died", exc_info=True)
                self._on_failure(
                    WalbatchError(
                        f"a thread of the engine died ({error!r}): close the engine and report this"
                    )
                )

        return run

    # --- taking operations in ---

    def register(self, lane: int, lsn: int, promise: Promise) -> None:
        """Whoever settles the operation resolves `promise`, as long as somebody keeps it."""
        self.promises.register(LOGGED if self.lanes[lane].logged else lane, lsn, promise)

    def on_durable(self, committed: Committed) -> None:
        """A group became durable. Called in LSN order by the leader; a repeated call is recognised."""
        group = committed.group
        with self._inbox_guard:
            self._inbox.append(committed)
            self._inbox_bytes += group.bytes
            self._inbox_count += len(group)
            urgent = self._inbox_count >= self._urgent_count or self._inbox_bytes >= self._urgent_bytes
            urgent = urgent or group.is_urgent
        if urgent or self._idle:
            with self._cond:
                self._cond.notify_all()

    def submit_unlogged(
        self, lane: int, shards: Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, *,
        timeout_ns: int | None, register: Callable[[int], None] | None, options: Options = NO_OPTIONS,
    ) -> None:  # fmt: skip
        """Queue operations of a lane with durability "none", or raise Overloaded with nothing accepted."""
        target = self.lanes[lane]
        deadline = None
        with self._cond:
            while True:
                if self._stopping or self._failure is not None or self._draining:
                    raise EngineClosed("the engine is closing or has stopped: nothing was accepted")
                full = next((s for s in {target.shards[i] for i in shards} if not s.has_room), None)
                if full is None:
                    break
                now = self._clock.monotonic_ns()
                deadline = now + timeout_ns if deadline is None and timeout_ns is not None else deadline
                if deadline is not None and now >= deadline:
                    raise Overloaded(
                        "memory_bytes_max", value=full.queue.memory_bytes, maximum=full.memory_bytes_max,
                        hint=f"the backend of lane {target.setup.name!r} is slower than its producers",
                    )  # fmt: skip
                self._cond.wait(None if deadline is None else deadline - now)
            now = self._clock.monotonic_ns()
            wall = self._clock.wall_ns()
            for shard, key, payload in zip(shards, keys, payloads, strict=True):
                target.sequence += 1
                if register is not None:
                    register(target.sequence)
                entry = (target.sequence, key, payload, priority, now, options)
                target.shards[shard].take_in(entry, now_ns=now, wall_ns=wall)
            target.submitted += len(keys)
            self._cond.notify_all()

    def _absorb(self) -> None:
        """Move the inbox into the shards. Called with the lock held, and by the engine's own threads only.

        A user's thread may be interrupted at any bytecode by a signal handler's exception, and would lose what it holds.
        """
        with self._inbox_guard:
            if not self._inbox:
                return
            inbox, self._inbox = self._inbox, deque()
            self._inbox_bytes = self._inbox_count = 0
        now, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        lanes = self.lanes
        # Cancelled while it was written and not durable yet: the reader passes it over.
        are_taken_back = self._read_back.has_taken_back
        for committed in inbox:
            group = committed.group
            if group.last_lsn <= self._end_lsn:
                continue  # handed over twice by an interrupted leader
            options = group.options or [NO_OPTIONS] * len(group)
            rows = zip(
                group.lanes, group.shards, group.keys, group.payloads, group.priorities, options, strict=True
            )
            for lsn, (lane_index, shard_index, key, payload, priority, option) in enumerate(
                rows, group.first_lsn
            ):
                lane = lanes[lane_index]
                lane.submitted += 1
                shard = lane.shards[shard_index]
                if shard.cursor is not None:
                    if priority >= PRIORITY_URGENT:
                        self._express.want()
                    continue
                if shard.has_room and not (are_taken_back and self._read_back.is_taken_back(lsn)):
                    shard.take_in((lsn, key, payload, priority, now, option), now_ns=now, wall_ns=wall)
                else:
                    shard.cursor = Cursor(committed.position, lsn)
                    shard.ledger.advance(lsn - 1)
            self._end = committed.end
            self._end_lsn = group.last_lsn

    # --- the timer ---

    def _run_timer(self) -> None:
        """Cut what is due, sleep until something will be."""
        while True:
            if self._watch.is_due(self._clock.monotonic_ns()):
                seen = self._watch.look()
                with self._cond:
                    self._watch.take_in(self._clock.monotonic_ns(), seen)
                    self._history.watch(self._clock.wall_ns())
            with self._cond:
                self._idle = False
                if self._inbox:
                    self._absorb()
                    held = sum(shard.queue.memory_bytes for shard in self._shards)
                    self._peak_memory_bytes = max(self._peak_memory_bytes, held)
                    self._cond.notify_all()
                if self._stopping:
                    return
                now = self._clock.monotonic_ns()
                self._delivery.look_at_time_limits(now)
                jobs = self._due(now)
                if not jobs:
                    wake = self._next_wake(now)
                    self._idle = wake is None or (self._eager and not self._flow.in_flight)
                    if self._idle and self._inbox:
                        continue  # a group came between absorbing and going idle
                    self._cond.wait(wake)
                    continue
            self._workers.hand_out(jobs)

    def _next_wake(self, now: int) -> int | None:
        """How long the timer may sleep: to the next deadline, a tick at most; None without one."""
        due = [
            at for shard in self._shards
            if len(shard.queue) and shard.delivers and (at := shard.next_due_ns(self._situation(shard, now))) is not None
        ]  # fmt: skip
        limit = self._delivery.next_limit_ns()
        if limit is not None:
            due.append(limit)
        if self._flow.in_flight >= self._settings.in_flight_max:
            return self._tick_ns
        if due:
            return max(DUE_FLOOR_NS, min(min(due) - now, self._tick_ns))
        return self._tick_ns if self._flow.in_flight else None

    def _due(self, now: int) -> list[Callable[[], None]]:
        """What there is to do for workers: batches that are due, and what has missed its deadline."""
        jobs: list[Callable[[], None]] = []
        count = len(self._shards)
        for step in range(count):
            shard = self._shards[(self._first_shard + step) % count]
            if not shard.delivers or not len(shard.queue):
                continue
            shard.queue.release(now)
            missed = shard.queue.expire(now)
            expired: list[Sequence[Entry]] = [missed] if missed else []
            while shard.unburied and shard.unburied[0][0] <= now:
                expired.append(shard.unburied.popleft()[1])
            shard.burying += len(expired)
            jobs += [self._delivery.expire(Expiry(shard=shard, entries=entries)) for entries in expired]
            jobs += [self._delivery.deliver(job) for job in self._cut(shard, now)]
        self._first_shard = (self._first_shard + 1) % max(1, count)
        return jobs

    def _cut(self, shard: Shard, now: int) -> list[Job]:
        """The batches of a shard that are due, while flush slots are free.

        None while it buries what has missed its deadline: if power failed between the application of a younger operation and the
        burial of its elder, and the wall clock came back earlier, the elder would be delivered behind the younger.
        """
        jobs: list[Job] = []
        lane = shard.lane
        if shard.burying and lane.order is not Order.NONE:
            return jobs
        while self._flow.in_flight < self._settings.in_flight_max and lane.has_slot:
            allowed = shard.breaker.allows(now)
            if allowed is None:
                break
            probing = allowed == "probe"
            situation = self._situation(shard, now, probing=probing)
            reason = shard.queue.due(situation)
            if reason is None:
                break
            flight = shard.queue.cut(situation, reason)
            if probing:
                shard.breaker.probe_cut()
            jobs.append(self._delivery.job(shard, flight, now_ns=now, end_lsn=self._end_lsn))
            self._flow.in_flight += 1
            lane.in_flight += 1
        return jobs

    @property
    def _is_pressed(self) -> bool:
        """Whether memory is short."""
        return self._watch.pressure is not Pressure.NONE

    @property
    def pressure(self) -> Pressure:
        """How short memory is."""
        return self._watch.pressure

    def facts(self) -> Facts:
        """What a verdict on health needs of here."""
        now_ns = self._clock.monotonic_ns()
        with self._cond:
            used, limit = self._watch.memory_bytes
            return Facts(
                memory_bytes=used, memory_bytes_max=limit, abandoned=self._flow.abandoned, clock_jump_s=self._watch.jump_s(now_ns),
                lanes=self._watch.lane_facts(), shards=self._watch.shard_facts(now_ns, self._delivery),
            )  # fmt: skip

    def _situation(self, shard: Shard, now: int, *, probing: bool = False) -> Situation:
        return shard.situation(now, draining=self._draining, memory_pressed=self._is_pressed, probing=probing)

    # --- reading back ---

    def _run_reader(self) -> None:
        """Fill shards that are reading back, oldest first. One frame at a time, so its memory is one frame.

        In turns with the search for urgent operations, while there is one.
        """
        while True:
            with self._cond:
                while True:
                    if self._stopping:
                        return
                    cohort = [] if self._is_pressed else self._read_back.cohort()
                    wish = None if self._is_pressed else self._express.step(self._end)
                    if cohort or wish:
                        break
                    self._cond.wait(PRESSED_WAIT_NS if self._is_pressed else None)
            for _ in range(SEARCHED_FRAMES):
                if wish is None:
                    break
                self._search(*wish)
                with self._cond:
                    wish = None if self._stopping or self._is_pressed else self._express.step(self._end)
            if cohort:
                self._refill(cohort)

    def _search(self, position: Position, next_lsn: int, wanted: frozenset[str], priority_min: int) -> None:
        """One step of the search for urgent operations."""
        with self._reading:
            frame = self._log.read_frame(
                position, next_lsn=next_lsn, wanted=wanted, priority_min=priority_min
            )
        with self._cond:
            if self._express.take(frame):
                self._cond.notify_all()

    def _refill(self, cohort: Sequence[Shard]) -> None:
        """Read one frame for shards that are at the same place of the log."""
        with self._cond:
            cohort = [shard for shard in cohort if shard.cursor is not None]
            cursors = [shard.cursor for shard in cohort if shard.cursor is not None]
            position = cursors[0].position
            next_lsn = min(cursor.next_lsn for cursor in cursors)
            end, end_lsn = self._end, self._end_lsn
        wanted = frozenset(shard.lane.setup.name for shard in cohort)
        frame = None
        if position < end:
            with self._reading:
                frame = self._log.read_frame(position, next_lsn=next_lsn, wanted=wanted)
        with self._cond:
            if frame is None or frame.position >= end:
                self._read_back.catch_up(cohort, end, end_lsn, grown=self._end != end)
                fed = NOTHING_FED
            else:
                fed = self._read_back.feed(cohort, frame, end=self._end)
            self._flow.settled += fed.applied + fed.dead + fed.cancelled
            self._flow.found_applied += fed.applied
            self._flow.found_dead += fed.dead
            self._flow.found_cancelled += fed.cancelled
            self._cond.notify_all()
        for lsn in fed.passed_over:
            self.promises.resolve(LOGGED, lsn)
        for name, lsn in fed.waiting:  # not under the lock: a handler may call the engine
            _logger.warning(
                "lane %r has no backend: its operations wait in the log from lsn %d on", name, lsn
            )

    # --- control ----------------------------------------------------------------------------------------------------

    def pause(self, name: str, *, paused: bool) -> None:
        """Stop or go on flushing a lane. Batches in flight are not recalled. Going on also mends shards that broke."""
        with self._cond:
            lane = self._by_name[name]
            lane.paused = paused
            if not paused:
                for shard in lane.shards:
                    shard.mend()
            self._cond.notify_all()

    def configure(self, name: str, settings: LaneSettings) -> None:
        """Take over settings that were checked."""
        with self._cond:
            self._by_name[name].reconfigure(settings)
            self._pace()
            self._cond.notify_all()

    def forget_given_up(self, lsn: int) -> None:
        """The checkpoint covers everything up to here: nobody reads it again."""
        with self._cond:
            given_up = self._read_back.given_up
            given_up -= {one for one in given_up if one <= lsn}

    def _is_absorbed(self, lsn: int) -> bool:
        """Whether everything committed up to `lsn` is in its shards, or nothing more will be. With the lock held."""
        return lsn <= self._end_lsn or not self._inbox or self._stopping

    def flush(self, names: Sequence[str], lsn: int, timeout_ns: int | None) -> None:
        """Wait until every operation of these lanes up to `lsn` is settled, but for delayed ones. They are cut at once.

        Raises ResultTimeout, ConfigError for a lane without backend that has work, or why the engine stopped.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            lanes = [self._by_name[name] for name in names]
            targets = {lane.index: lsn if lane.logged else lane.sequence for lane in lanes}
            while True:
                waiting = [
                    shard for lane in lanes for shard in lane.shards
                    if self._flushed_lsn(shard) < targets[lane.index] and not (not lane.logged and not len(shard.ledger))
                ]  # fmt: skip
                if not waiting:
                    return
                if self._failure is not None:
                    raise self._failure
                if self._stopping:
                    raise EngineClosed("the engine was closed; what is not settled stays in the log")
                held = next((s.lane for s in waiting if s.lane.held and len(s.ledger)), None)
                if held is not None:
                    raise ConfigError(
                        f"lane {held.setup.name!r} has no backend, so it cannot be flushed: open it with one"
                    )
                raised = [shard for shard in waiting if shard.flush_lsn < targets[shard.lane.index]]
                for shard in raised:
                    shard.flush_lsn = targets[shard.lane.index]
                if raised:  # and not whenever it is woken: two flushes would wake one another for ever
                    self._cond.notify_all()
                now = self._clock.monotonic_ns()
                if deadline is not None and now >= deadline:
                    raise ResultTimeout(
                        f"not everything is settled after {timeout_ns or 0:,} ns; it goes on in the background"
                    )
                self._cond.wait(None if deadline is None else deadline - now)

    def _flushed_lsn(self, shard: Shard) -> int:
        """Every operation up to this LSN is settled or delayed. Called with the lock held."""
        if shard.cursor is None and shard.lane.logged:
            shard.ledger.advance(self._end_lsn)
        return shard.ledger.watermark(without=shard.queue.delayed_lsns)

    def drain(self, timeout_ns: int | None) -> bool:
        """Flush everything that has a backend which works, lingers and retry waits cut short, and nothing that is delayed.

        Returns whether nothing else is left.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            self._draining = True
            self._cond.notify_all()
            while True:
                now = self._clock.monotonic_ns()
                left = bool(self._inbox) or any(shard.can_drain(now) for shard in self._shards)
                if not left or self._failure is not None or self._stopping or self._hurried:
                    return not left
                if deadline is not None and now >= deadline:
                    return False
                self._cond.wait(None if deadline is None else deadline - now)

    def fail(self, error: WalbatchError) -> None:
        """Stop delivering for ever; everybody who waits is told."""
        with self._cond:
            self._failure = self._failure or error
            self._stopping = True
            self._cond.notify_all()
        self.promises.resolve_all(error)

    def hurry(self) -> None:
        """End a drain that is under way."""
        with self._cond:
            self._hurried = True
            self._cond.notify_all()

    def stop(self, timeout_ns: int | None) -> bool:
        """Cut nothing more, wait for batches in flight, end the threads. Returns whether all ended in time.

        May be called again, to wait longer. Not from a thread of the engine.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            self._stopping = True
            self._cond.notify_all()

        def joined(threads: Sequence[Thread]) -> bool:
            return all(
                thread.join(None if deadline is None else max(0, deadline - self._clock.monotonic_ns()))
                for thread in threads
            )

        # The timer first: it is the one that starts workers, so after it their list is complete.
        ended = joined(self._threads_running)
        return joined(self._workers.stop()) and ended

    def is_own_thread(self) -> bool:
        """Whether the caller runs in a thread of the dispatcher: a backend, for example."""
        return any(thread.is_current() for thread in self._threads_running) or self._workers.is_current()

    def abandon(self) -> None:
        """Tell everybody who still waits that the engine is closed."""
        with self._cond:
            self._cond.notify_all()
        self.promises.resolve_all(
            EngineClosed(
                "the engine was closed before the operation was settled; it is in the log and will be replayed"
            )
        )

    # --- looking ----------------------------------------------------------------------------------------------------

    def _watermark(self, shard: Shard) -> int:
        """Every operation of the shard up to this LSN is settled. Called with the lock held."""
        if shard.cursor is None and shard.lane.logged:
            shard.ledger.advance(self._end_lsn)
        return shard.ledger.watermark()

    def settled(self) -> Settled:
        """The settled state, consistent at one moment."""
        with self._cond:
            watermarks = [self._watermark(shard) for shard in self._shards if shard.lane.logged]
            lanes = {
                lane.setup.name: LaneMark(shards=tuple(shard.ledger.checkpoint_mark(epoch=self._epoch) for shard in lane.shards))
                for lane in self.lanes if lane.logged
            }  # fmt: skip
            return Settled(
                watermark=min(watermarks, default=self._end_lsn),
                lanes=lanes,
                settled_count=self._flow.settled,
            )

    def controllers(self, now_ns: int, *, last: bool) -> dict[tuple[str, int], bytes]:
        """What the size controllers of logged lanes have learnt, now and then and at the `last`: snapshots by lane and shard."""
        with self._cond:
            if now_ns < self._snapshots_due_ns and not last:
                return {}
            self._snapshots_due_ns = now_ns + SNAPSHOT_NS
            changed = [
                shard for lane in self.lanes if lane.logged for shard in lane.shards if shard.has_learnt
            ]
            if not changed:
                return {}
            learnt = {(shard.lane.setup.name, shard.index): shard.snapshot() for shard in changed}
            return {**learnt, HISTORY: self._history.encode()}

    def report(self) -> Report:
        """Every lane's figures, at one moment."""
        now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        with self._cond:
            lanes = {
                lane.setup.name: lane_stats(
                    lane,
                    now_ns=now_ns,
                    watermark=self._watermark,
                    expected=self._history.expect(lane.setup.name, wall_ns),
                )
                for lane in self.lanes
            }
            logged = [lane for lane in self.lanes if lane.logged]
            flow = self._flow
            memory_bytes = sum(shard.queue.memory_bytes for shard in self._shards)
            self._peak_memory_bytes = max(self._peak_memory_bytes, memory_bytes)
            return Report(
                lanes=lanes, settled=flow.settled, applied=flow.found_applied + sum(lane.applied for lane in logged),
                settled_lsn=min((self._watermark(s) for s in self._shards if s.lane.logged), default=self._end_lsn),
                dead=flow.found_dead + sum(lane.dead for lane in logged),
                cancelled=flow.found_cancelled + sum(lane.cancelled for lane in logged),
                unlogged=sum(len(shard.queue) for shard in self._shards if not shard.lane.logged),
                memory_bytes=memory_bytes, peak_memory_bytes=self._peak_memory_bytes,
                batch_stats=batch_stats([shard.tally for shard in self._shards], now_ns=now_ns),
            )  # fmt: skip

    def settled_lsn(self) -> int:
        """The settled watermark over all lanes."""
        with self._cond:
            return min((self._watermark(s) for s in self._shards if s.lane.logged), default=self._end_lsn)

    def settled_count(self) -> int:
        """Logged operations settled since this engine was opened, those that a backend's mark reported included."""
        with self._cond:
            return self._flow.settled

    def unlogged_count(self) -> int:
        """Operations of lanes that log nothing which are left: they end with the engine."""
        with self._cond:
            return sum(len(shard.queue) for shard in self._shards if not shard.lane.logged)
