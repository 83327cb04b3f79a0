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
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

from walbatch import limits
from walbatch.config import Lane as LaneSettings
from walbatch.core.batcher import Entry, Situation
from walbatch.core.history import History
from walbatch.core.pressure import Pressure
from walbatch.core.run import Run, dealt
from walbatch.errors import EngineClosed, Overloaded, WalbatchError
from walbatch.ports import Clock, Entropy, Log, Memory, StateStore, Thread, Threads
from walbatch.runtime.bell import Bells
from walbatch.runtime.calls import Job
from walbatch.runtime.committer import Committed
from walbatch.runtime.delivery import MISSED, Delivery
from walbatch.runtime.express import Express
from walbatch.runtime.finding import Finder
from walbatch.runtime.flow import Flow
from walbatch.runtime.flushing import Flushing
from walbatch.runtime.lane import Cursor, Doomed, Lane, LaneSetup, Shard
from walbatch.runtime.letters import DeadLetters
from walbatch.runtime.overview import Overview
from walbatch.runtime.promises import Promises
from walbatch.runtime.readback import ReadBack
from walbatch.runtime.reader import Reader
from walbatch.runtime.watch import Watch
from walbatch.runtime.workers import Workers
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, Options, Position

_logger = logging.getLogger("walbatch")

TICK_FLOOR_NS = 1_000_000
"""Shortest tick: a linger of nothing must not make the timer spin while batches are in flight."""
LOOK_WAIT_NS = 20_000_000
"""How long a look at everything waits for what is just being taken over."""
DUE_FLOOR_NS = 100_000
"""Shortest sleep of the timer, so that no mistake about a deadline can make it spin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSettings:
    """What the dispatcher needs of the settings. Times in ns."""

    timer_ns: int
    in_flight_max: int
    memory_bytes_max: int


@dataclass(frozen=True, slots=True)
class Unlogged:
    """Operations that are not logged, on their way to their shards."""

    rows: Sequence[tuple[Shard, Entry]]


class Dispatcher:
    """Delivers durable operations. All methods are safe from any thread."""

    def __init__(
        self, *, log: Log, clock: Clock, threads: Threads, entropy: Entropy, settings: DispatchSettings, store: bytes, epoch: int,
        lanes: Sequence[LaneSetup], start: Position, end_lsn: int, watermark: int, letters: DeadLetters,
        memory: Memory, state: StateStore, history: History, given_up: Iterable[int],
        on_failure: Callable[[WalbatchError], None],
    ) -> None:  # fmt: skip
        self._clock = clock
        self._threads = threads
        self._settings = settings
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
        self._flow = Flow(end=log.end, end_lsn=end_lsn)
        for shard in self._shards:
            if shard.lane.logged:
                shard.cursor = Cursor(start, 0)
                shard.ledger.frontier = watermark
        self._first_shard = 0
        self._idle = False
        # Whether a shard with nothing in flight had to do without a flush slot when the timer looked last.
        self._crowded = False
        self._bells = Bells(threads, self._cond)
        self._threads_running: list[Thread] = []
        self._asides: list[Thread] = []
        # Guards the inbox: the leader must not wait for a dispatcher that is busy.
        self._inbox_guard = threads.condition()
        self._inbox: deque[Committed | Unlogged] = deque()
        self._inbox_bytes = 0
        self._inbox_count = 0
        self.promises = Promises()
        self._delivery = Delivery(
            cond=self._cond, flow=self._flow, clock=clock, entropy=entropy, promises=self.promises, letters=letters, store=store,
            epoch=epoch, history=history, given_up=self._read_back.given_up, on_failure=on_failure, bells=self._bells,
            run_on=self._run_on,
        )  # fmt: skip
        self._history = history
        self._watch = Watch(memory=memory, clock=clock, lanes=self.lanes)
        self.overview = Overview(
            cond=self._cond, flow=self._flow, clock=clock, lanes=self.lanes, calls=self._delivery.calls, history=history,
            watch=self._watch, epoch=epoch, await_taking_over=self._await_taking_over,
        )  # fmt: skip
        self.flushing = Flushing(
            cond=self._cond,
            flow=self._flow,
            clock=clock,
            lanes=self._by_name,
            is_taking_over=lambda: bool(self._inbox),
            wake=self._bells.everybody,
        )
        # Held while the log is read: by the reader, and by whoever looks for one operation.
        reading = threads.condition()
        self.finder = Finder(
            cond=self._cond, lanes=self.lanes, read_back=self._read_back, delivery=self._delivery, log=log, reading=reading,
            state=state, flow=self._flow, threads=threads, aside=self._aside, wake=self._bells.everybody,
            is_absorbed=self._is_absorbed, settled_lsn=self.overview.settled_lsn,
        )  # fmt: skip
        self._reader = Reader(
            cond=self._cond, reading=reading, flow=self._flow, log=log, read_back=self._read_back, express=self._express,
            promises=self.promises, overview=self.overview, is_pressed=lambda: self._is_pressed, look_around=self.look_around,
            bells=self._bells,
        )  # fmt: skip
        self._workers = Workers(
            threads,
            count_max=lambda: settings.in_flight_max + len(self.lanes) + self._flow.abandoned,
            guarded=self._guarded,
        )
        self._pace()

    def __repr__(self) -> str:
        return f"<Dispatcher {len(self.lanes)} lanes, {self._flow.in_flight} in flight, end lsn {self._flow.end_lsn}>"

    def _pace(self) -> None:
        """What wakes the timer, and how often it looks: from the settings of all lanes. With the lock held, or before the start."""
        settings = self._settings
        triggers = [lane.settings.trigger for lane in self.lanes]
        awake = [lane.settings.trigger for lane in self.lanes if not (lane.paused or lane.held)]
        self._urgent_count = min(
            (trigger.count or 64 for trigger in awake), default=limits.UNSYNCED_COUNT_MAX
        )
        self._urgent_bytes = min([*(trigger.bytes for trigger in awake), settings.memory_bytes_max // 4])
        self._resting = not awake
        lingers = [trigger.linger_ns for trigger in triggers if trigger.linger_ns is not None]
        self._eager = len(lingers) < len(triggers)
        self._tick_ns = max(TICK_FLOOR_NS, min([*lingers, settings.timer_ns]))

    def start(self) -> None:
        """Start the timer and the reader. Workers start when there is work for them."""
        self._threads_running = [
            self._threads.spawn("walbatch-timer", self._guarded(self._run_timer)),
            self._threads.spawn("walbatch-reader", self._guarded(self._reader.run)),
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

    def _aside(self, job: Callable[[], None]) -> None:
        """Do something in a thread of the engine's: a user's may be interrupted anywhere. Raises EngineClosed."""
        with self._cond:
            if self._flow.stopping:
                raise self._flow.failure or EngineClosed("the engine was closed: nothing was changed")
            self._asides = [thread for thread in self._asides if not thread.join(0)]
            self._asides.append(self._threads.spawn("walbatch-aside", self._guarded(job)))

    # --- taking operations in ---

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
            self._bells.timer.ring()

    def submit_unlogged(
        self, lane: int, shards: Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, *,
        timeout_ns: int | None, register: Callable[[int], None] | None, options: Options = NO_OPTIONS,
    ) -> None:  # fmt: skip
        """Queue operations of a lane with durability "none", or raise Overloaded with nothing accepted."""
        target = self.lanes[lane]
        deadline = None
        with self._cond:
            while True:
                if self._flow.stopping or self._flow.failure is not None or self._flow.draining:
                    raise EngineClosed("the engine is closing or has stopped: nothing was accepted")
                full = next((s for s in {target.shards[i] for i in shards} if not s.has_room), None)
                if full is None and self._inbox_bytes <= self._settings.memory_bytes_max:
                    break
                now = self._clock.monotonic_ns()
                deadline = now + timeout_ns if deadline is None and timeout_ns is not None else deadline
                if deadline is not None and now >= deadline:
                    raise Overloaded(
                        "memory_bytes_max", value=full.queue.memory_bytes if full else self._inbox_bytes,
                        maximum=full.memory_bytes_max if full else self._settings.memory_bytes_max,
                        hint=f"the backend of lane {target.setup.name!r} is slower than its producers",
                    )  # fmt: skip
                self._cond.wait(None if deadline is None else deadline - now)
            now = self._clock.monotonic_ns()
            first = target.sequence + 1
            target.sequence += len(keys)  # cut short from here on, numbers are missing, and nothing else
            rows = [
                (target.shards[shard], (sequence, key, payload, priority, now, options))
                for sequence, (shard, key, payload) in enumerate(
                    zip(shards, keys, payloads, strict=True), first
                )
            ]
            if register is not None:
                for _, entry in rows:
                    register(entry[0])
            with self._inbox_guard:
                self._flow.unlogged_inbox += len(rows)
                self._inbox_bytes += sum(len(entry[1]) + len(entry[2]) for _, entry in rows)
                self._inbox.append(Unlogged(rows))
        self._bells.timer.ring()

    def _absorb(self) -> None:
        """Move the inbox into the shards. Called with the lock held, and by the engine's own threads only.

        A user's thread may be interrupted at any bytecode by a signal handler's exception, and would lose what it holds.
        """
        with self._inbox_guard:
            whole, self._inbox = self._inbox, deque()
            self._inbox_bytes = self._inbox_count = self._flow.unlogged_inbox = 0
        now, wall = self._clock.monotonic_ns(), self._clock.wall_ns()
        for committed in whole:
            # One that an interrupted leader handed over twice is passed over.
            if isinstance(committed, Committed) and committed.group.last_lsn > self._flow.end_lsn:
                self._absorb_group(committed, now, wall)
                self._flow.end, self._flow.end_lsn = committed.end, committed.group.last_lsn
        for one in whole:
            for shard, entry in one.rows if isinstance(one, Unlogged) else ():
                shard.lane.submitted += 1
                shard.take_in(entry, now_ns=now, wall_ns=wall)

    def _absorb_group(self, committed: Committed, now_ns: int, wall_ns: int) -> None:
        """Move a group into its shards: in columns where all of its operations are alike, else one by one. With the lock held."""
        group, lanes = committed.group, self.lanes
        lane, priority = group.sole_lane, group.sole_priority
        lsns = range(group.first_lsn, group.last_lsn + 1)
        # What was cancelled while it was written, and not durable yet, is passed over by the reader.
        if (
            lane is not None
            and priority is not None
            and not group.options
            and not self._read_back.has_taken_back
        ):
            run = Run(lsns, group.keys, group.payloads, priority, now_ns, size=group.bytes)
            shards = lanes[lane].shards
            sole = group.sole_shard
            hands = dealt(run, group.shards, len(shards)) if sole is None else {sole: run}
            for index, mine in hands.items():
                taken = shards[index].take_in_run(mine) if shards[index].cursor is None else 0
                self._arrived(
                    shards[index], committed, mine.lsns, taken, is_urgent=priority >= PRIORITY_URGENT
                )
            return
        arrived: defaultdict[Shard, list[Entry]] = defaultdict(list)
        rows = zip(
            lsns, group.keys, group.payloads, group.priorities, repeat(now_ns), group.options or repeat(NO_OPTIONS), strict=False
        )  # fmt: skip
        for entry, lane_index, shard_index in zip(rows, group.lanes, group.shards, strict=True):
            arrived[lanes[lane_index].shards[shard_index]].append(entry)
        for shard, entries in arrived.items():
            able = self._read_back.before_taken_back(entries) if shard.cursor is None else ()
            taken = shard.take_in_many(able, now_ns=now_ns, wall_ns=wall_ns)
            is_urgent = any(entry[3] >= PRIORITY_URGENT for entry in entries[taken:])
            self._arrived(shard, committed, [entry[0] for entry in entries], taken, is_urgent=is_urgent)

    def _arrived(
        self, shard: Shard, committed: Committed, lsns: Sequence[int], taken: int, *, is_urgent: bool
    ) -> None:
        """A shard has taken in so many of its operations of a group; the others it has to read back."""
        shard.lane.submitted += len(lsns)
        if taken == len(lsns):
            return
        if shard.cursor is None:
            shard.cursor = Cursor(committed.position, lsns[taken])
            shard.ledger.advance(lsns[taken] - 1)
        if is_urgent:
            self._express.want()

    # --- the timer ---

    def _run_timer(self) -> None:
        """Cut what is due, sleep until something will be."""
        while True:
            self.look_around()
            wake: int | None = None
            with self._cond:
                self._idle = False
                absorbed = self._absorb_any()
                if self._flow.stopping:
                    return
                now = self._clock.monotonic_ns()
                self._delivery.look_at_time_limits(now)
                jobs = self._due(now)
                if not jobs:
                    wake = self._next_wake(now)
                    self._idle = wake is None or (self._eager and not self._flow.in_flight)
                    if self._resting and absorbed:
                        # Nothing of what comes next can go, so it may come in many groups at once.
                        self._idle, wake = False, self._tick_ns
                    if self._idle and self._inbox:
                        continue  # a group came between absorbing and going idle
            if jobs:
                self._workers.hand_out(jobs)
            else:
                self._bells.timer.sleep(wake)

    def _absorb_any(self) -> bool:
        """Move the inbox into the shards, if there is anything in it. Returns whether there was. As `_absorb`."""
        if not self._inbox and not self._flow.unlogged_inbox:
            return False
        self._absorb()
        self.overview.note_memory()
        self._cond.notify_all()
        self._bells.reader.ring()
        return True

    def look_around(self) -> None:
        """Look at memory and the clocks, if nobody has of late."""
        now_ns = self._clock.monotonic_ns()
        if not self._watch.is_due(now_ns):
            return
        seen = self._watch.look()
        with self._cond:
            if self._watch.is_due(now_ns):
                self._watch.take_in(now_ns, seen)
                self._history.watch(self._clock.wall_ns())

    def _next_wake(self, now: int) -> int | None:
        """How long the timer may sleep: to the next deadline, a tick at most; None without one."""
        due = [
            at for shard in self._shards if len(shard.queue) and not shard.lane.held
            if (at := shard.next_due_ns(self._situation(shard, now), may_cut=self._may_cut(shard, now))) is not None
        ]  # fmt: skip
        limit = self._delivery.calls.next_limit_ns()
        if limit is not None:
            due.append(limit)
        if self._flow.in_flight >= self._settings.in_flight_max:
            return self._tick_ns
        if due:
            return max(DUE_FLOOR_NS, min(min(due) - now, self._tick_ns))
        return self._tick_ns if self._flow.in_flight else None

    @staticmethod
    def _may_cut(shard: Shard, now: int) -> bool:
        """Whether a batch of the shard is cut when time makes one due, and not only when another comes back."""
        breaker = shard.breaker
        waits_for_probe = breaker.allows(now) is None and breaker.reopens_at_ns is None
        return shard.delivers and shard.lane.has_slot and not waits_for_probe

    def _due(self, now: int) -> list[Callable[[], None]]:
        """What there is to do for workers: batches that are due, and what has missed its deadline."""
        jobs: list[Callable[[], None]] = []
        self._crowded = False
        count = len(self._shards)
        for step in range(count):
            shard = self._shards[(self._first_shard + step) % count]
            if shard.lane.held or not len(shard.queue):
                continue
            shard.queue.release(now)
            missed = shard.queue.expire(now)
            doomed = [Doomed(entries=missed, deaths=[MISSED] * len(missed))] if missed else []
            while shard.unburied and shard.unburied[0][0] <= now:
                doomed.append(shard.unburied.popleft()[1])
            jobs += [self._delivery.give_up(shard, some) for some in doomed]
            if shard.delivers:
                jobs += [self._delivery.deliver(job) for job in self._cut(shard, now)]
                self._crowded = self._crowded or not (shard.queue.flights or self._has_slot(shard.lane))
        self._first_shard = (self._first_shard + 1) % max(1, count)
        return jobs

    def _cut(self, shard: Shard, now: int) -> Iterator[Job]:
        """The batches of a shard that are due, while flush slots are free."""
        while self._has_slot(shard.lane):
            job = self._cut_one(shard, now)
            if job is None:
                break
            yield job

    def _has_slot(self, lane: Lane) -> bool:
        """Whether a flush slot is free for a lane.

        One batch of each lane may be in flight whatever the others do: a lane whose backend hangs must not stop the rest.
        """
        has_any = self._flow.in_flight < self._settings.in_flight_max or not lane.in_flight
        return has_any and lane.has_slot

    def _cut_one(self, shard: Shard, now: int) -> Job | None:
        """The next batch of a shard that has a flush slot, if one is due."""
        allowed = shard.breaker.allows(now)
        if allowed is None:
            return None
        probing = allowed == "probe"
        situation = self._situation(shard, now, probing=probing)
        reason = shard.queue.due(situation)
        if reason is None:
            return None
        flight = shard.queue.cut(situation, reason)
        if probing:
            shard.breaker.probe_cut()
        self._flow.in_flight += 1
        shard.lane.in_flight += 1
        return self._delivery.job(shard, flight, now_ns=now, end_lsn=self._flow.end_lsn)

    def _run_on(self, shard: Shard, now: int) -> Job | None:
        """The next batch of a shard one of whose batches has just been applied: for the same worker. With the lock held.

        None where the timer has to decide: others may wait for the flush slot, or there is something else to do.
        """
        if self._crowded or not shard.lane.has_slot_for_each or not self._has_slot(shard.lane):
            self._bells.timer.ring()
            return None
        job = self._next_of(shard, now)
        if job is None and not self._flow.in_flight:
            # The timer sleeps until its next tick, and what comes from here on has to wake it; what came before is seen below.
            self._idle = True
        if job is None and self._absorb_any():
            self._bells.timer.ring()  # the other shards have got something, too
            job = self._next_of(shard, self._clock.monotonic_ns())
        if job is None and len(shard.queue):
            self._bells.timer.ring()  # it lingers otherwise while nothing is in flight
        return job

    def _next_of(self, shard: Shard, now: int) -> Job | None:
        """The next batch of a shard that has a slot, unless something else is to be done first."""
        queue = shard.queue
        if not len(queue) or self._flow.stopping or not shard.delivers:
            return None
        expiry_ns = queue.next_expiry_ns
        if expiry_ns is not None and expiry_ns <= now:
            return None
        queue.release(now)
        return self._cut_one(shard, now)

    @property
    def _is_pressed(self) -> bool:
        """Whether memory is short."""
        return self._watch.pressure is not Pressure.NONE

    @property
    def pressure(self) -> Pressure:
        """How short memory is."""
        return self._watch.pressure

    def _situation(self, shard: Shard, now: int, *, probing: bool = False) -> Situation:
        return shard.situation(
            now, draining=self._flow.draining, memory_pressed=self._is_pressed, probing=probing
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
            self._pace()
            self._bells.everybody()

    def configure(self, name: str, settings: LaneSettings) -> None:
        """Take over settings that were checked."""
        with self._cond:
            self._by_name[name].reconfigure(settings)
            self._pace()
            self._bells.everybody()

    def forget_given_up(self, lsn: int) -> None:
        """The checkpoint covers everything up to here: nobody reads it again."""
        with self._cond:
            given_up = self._read_back.given_up
            given_up -= {one for one in given_up if one <= lsn}

    def _await_taking_over(self) -> None:
        """Wait until what is in the inbox is in the shards, but not for long: the timer may be busy. With the lock held."""
        last_lsn = max(
            (one.group.last_lsn for one in list(self._inbox) if isinstance(one, Committed)), default=0
        )
        until_ns = self._clock.monotonic_ns() + LOOK_WAIT_NS
        while not self._is_absorbed(last_lsn) and (left_ns := until_ns - self._clock.monotonic_ns()) > 0:
            self._bells.timer.ring()
            self._cond.wait(left_ns)

    def _is_absorbed(self, lsn: int) -> bool:
        """Whether everything committed up to `lsn` is in its shards, or nothing more will be. With the lock held."""
        return lsn <= self._flow.end_lsn or not self._inbox or self._flow.stopping

    def fail(self, error: WalbatchError) -> None:
        """Stop delivering for ever; everybody who waits is told."""
        with self._cond:
            self._flow.failure = self._flow.failure or error
            self._flow.stopping = True
            self._bells.everybody()
        self.promises.resolve_all(error)

    def stop(self, timeout_ns: int | None) -> bool:
        """Cut nothing more, wait for batches in flight, end the threads. Returns whether all ended in time.

        May be called again, to wait longer. Not from a thread of the engine.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            self._flow.stopping = True
            self._bells.everybody()

        def joined(threads: Sequence[Thread]) -> bool:
            return all(
                thread.join(None if deadline is None else max(0, deadline - self._clock.monotonic_ns()))
                for thread in threads
            )

        # The timer first: it is the one that starts workers, so after it their list is complete.
        ended = joined([*self._threads_running, *self._asides])
        return joined(self._workers.stop()) and ended

    def interrupt(self) -> bool:
        """End the calls of backends that can be ended: coroutines. Returns whether there are any."""
        with self._cond:
            return self._delivery.interrupt()

    def is_own_thread(self) -> bool:
        """Whether the dispatcher would wait for the caller: one of its threads, or a backend, wherever that has taken its work."""
        own = [*self._threads_running, *self._asides]
        if any(thread.is_current() for thread in own) or self._workers.is_current():
            return True
        asked = (getattr(lane.setup.backend, "is_own_thread", None) for lane in self.lanes)
        return self._delivery.calls.is_inside() or any(ask() is True for ask in asked if ask is not None)

    def abandon(self) -> None:
        """Tell everybody who still waits that the engine is closed."""
        with self._cond:
            self._bells.everybody()
        self.promises.resolve_all(
            EngineClosed(
                "the engine was closed before the operation was settled; it is in the log and will be replayed"
            )
        )
