"""From durable to settled: fills queues, cuts batches, hands them to backends, settles, reads back.

What is not here: when to cut and what to retry (`core.batcher`, `core.delivery`), what is pending
(`core.settlement`).

The idea needed to read it: a shard is either *live* (every durable operation of it that is not settled is in
its queue) or *reading back* (its queue is full; its next operation is in the log at its cursor). New
operations enter live shards directly; the reader thread fills the others from the log until they have caught
up with its end. So memory is bounded whatever the backlog.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from walbatch.core.batcher import Entry
from walbatch.core.delivery import Verdict, backoff_ns, judge
from walbatch.errors import (
    BackendError,
    ConfigError,
    EngineClosed,
    Fenced,
    Overloaded,
    ResultTimeout,
    WalbatchError,
)
from walbatch.metrics import LaneStats
from walbatch.ports import Clock, Entropy, Log, Thread, Threads
from walbatch.runtime.committer import Committed
from walbatch.runtime.lane import Cursor, Lane, LaneSetup, Shard
from walbatch.runtime.readback import NOTHING_FED, ReadBack
from walbatch.runtime.ticket import Promise
from walbatch.types import Batch, CutReason, LaneMark, Mark, Position

_logger = logging.getLogger("walbatch")

TICK_FLOOR_NS = 1_000_000
"""Shortest tick: a linger of nothing must not make the timer spin while batches are in flight."""
DUE_FLOOR_NS = 100_000
"""Shortest sleep of the timer, so that no mistake about a deadline can make it spin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSettings:
    """What the dispatcher needs of the settings. Times in ns."""

    timer_ns: int
    in_flight_max: int
    memory_bytes_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A batch on its way to a backend."""

    shard: Shard
    entries: Sequence[Entry]
    batch: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the checkpointer needs, taken at one moment."""

    watermark: int
    lanes: Mapping[str, LaneMark]
    settled_count: int


class Dispatcher:
    """Delivers durable operations. All methods are safe from any thread."""

    def __init__(
        self, *, log: Log, clock: Clock, threads: Threads, entropy: Entropy, settings: DispatchSettings, store: bytes, epoch: int,
        lanes: Sequence[LaneSetup], start: Position, end_lsn: int, watermark: int,
        on_failure: Callable[[WalbatchError], None],
    ) -> None:  # fmt: skip
        self._log = log
        self._clock = clock
        self._threads = threads
        self._entropy = entropy
        self._settings = settings
        self._store = store
        self._epoch = epoch
        self._on_failure = on_failure
        # Guards all below, the lanes and their shards included. Never held over I/O or a backend.
        self._cond = threads.condition()
        shards = sum(lane.shards for lane in lanes if lane.backend is not None)
        share = settings.memory_bytes_max // max(1, shards)
        self._lanes = [Lane(setup, index, shard_bytes_max=share) for index, setup in enumerate(lanes)]
        self._by_name = {lane.setup.name: lane for lane in self._lanes}
        self._shards = [shard for lane in self._lanes for shard in lane.shards]
        self._read_back = ReadBack(self._lanes)
        self._end = log.end
        self._end_lsn = end_lsn
        for shard in self._shards:
            if shard.lane.logged:
                shard.cursor = Cursor(start, 0)
                shard.ledger.frontier = watermark
        self._settled_count = 0
        self._first_shard = 0
        self._in_flight = 0
        self._draining = False
        self._hurried = False
        self._stopping = False
        self._failure: WalbatchError | None = None
        self._idle = False
        self._workers: list[Thread] = []
        self._threads_running: list[Thread] = []
        # Guards _jobs: workers wait here.
        self._work = threads.condition()
        self._jobs: deque[_Job] = deque()
        self._workers_stopping = False
        self._workers_free = 0
        # Guards the inbox: the leader must not wait for a dispatcher that is busy.
        self._inbox_guard = threads.condition()
        self._inbox: deque[Committed] = deque()
        self._inbox_bytes = 0
        self._inbox_count = 0
        self._urgent_count = min((lane.cut_limits.count for lane in lanes), default=1)
        self._urgent_bytes = min([lane.cut_limits.bytes for lane in lanes] + [settings.memory_bytes_max // 4])
        self._tick_ns = max(
            TICK_FLOOR_NS, min([lane.cut_limits.linger_ns for lane in lanes] + [settings.timer_ns])
        )
        self._promises: weakref.WeakValueDictionary[tuple[int, int], Promise] = weakref.WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<Dispatcher {len(self._lanes)} lanes, {self._in_flight} in flight, end lsn {self._end_lsn}>"

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
        self._promises[(-1 if self._lanes[lane].logged else lane), lsn] = promise

    def on_durable(self, committed: Committed) -> None:
        """A group became durable. Called in LSN order by the leader; a repeated call is recognised."""
        group = committed.group
        with self._inbox_guard:
            self._inbox.append(committed)
            self._inbox_bytes += group.bytes
            self._inbox_count += len(group)
            urgent = self._inbox_count >= self._urgent_count or self._inbox_bytes >= self._urgent_bytes
        if urgent or self._idle:
            with self._cond:
                self._cond.notify_all()

    def submit_unlogged(
        self, lane: int, shards: Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, *,
        timeout_ns: int | None, register: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        """Queue operations of a lane with durability "none", or raise Overloaded with nothing accepted."""
        target = self._lanes[lane]
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
            for shard, key, payload in zip(shards, keys, payloads, strict=True):
                target.sequence += 1
                if register is not None:
                    register(target.sequence)
                target.shards[shard].queue.push((target.sequence, key, payload, priority, now))
                target.shards[shard].ledger.admit(target.sequence)
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
        now = self._clock.monotonic_ns()
        for committed in inbox:
            group = committed.group
            if group.last_lsn <= self._end_lsn:
                continue  # handed over twice by an interrupted leader
            lanes = self._lanes
            rows = zip(group.lanes, group.shards, group.keys, group.payloads, group.priorities, strict=True)
            for lsn, (lane_index, shard_index, key, payload, priority) in enumerate(rows, group.first_lsn):
                lane = lanes[lane_index]
                lane.submitted += 1
                shard = lane.shards[shard_index]
                if shard.cursor is not None:
                    continue
                if shard.has_room:
                    shard.queue.push((lsn, key, payload, priority, now))
                    shard.ledger.admit(lsn)
                else:
                    shard.cursor = Cursor(committed.position, lsn)
                    shard.ledger.advance(lsn - 1)
            self._end = committed.end
            self._end_lsn = group.last_lsn

    # --- the timer ---

    def _run_timer(self) -> None:
        """Cut what is due, sleep until something will be."""
        while True:
            with self._cond:
                self._idle = False
                if self._inbox:
                    self._absorb()
                    self._cond.notify_all()
                if self._stopping:
                    return
                now = self._clock.monotonic_ns()
                jobs = self._cut_due(now)
                if not jobs:
                    wake = self._next_wake(now)
                    self._idle = wake is None
                    if self._idle and self._inbox:
                        continue  # a group came between absorbing and going idle
                    self._cond.wait(wake)
                    continue
            self._hand_out(jobs)

    def _next_wake(self, now: int) -> int | None:
        """How long the timer may sleep: to the next deadline, a tick at most; None without one."""
        due = [
            at for shard in self._shards
            if len(shard.queue) and not shard.lane.held and not shard.lane.paused and (at := shard.queue.next_due_ns()) is not None
        ]  # fmt: skip
        if self._in_flight >= self._settings.in_flight_max:
            return self._tick_ns
        if due:
            return max(DUE_FLOOR_NS, min(min(due) - now, self._tick_ns))
        return self._tick_ns if self._in_flight else None

    def _cut_due(self, now: int) -> list[_Job]:
        """Cut a batch from every shard that is due, while flush slots are free. Rounds start in turn."""
        jobs: list[_Job] = []
        count = len(self._shards)
        for step in range(count):
            if self._in_flight >= self._settings.in_flight_max:
                break
            shard = self._shards[(self._first_shard + step) % count]
            lane = shard.lane
            if lane.held or lane.paused or not len(shard.queue):
                continue
            shard.queue.release(now)
            reason = shard.queue.due(
                now, flush_lsn=shard.flush_lsn, draining=self._draining,
                window_full=shard.cursor is not None and not shard.has_room,
            )  # fmt: skip
            if reason is None:
                continue
            entries = shard.queue.cut()
            if not entries:
                continue
            jobs.append(self._job(shard, entries, reason))
            self._in_flight += 1
        self._first_shard = (self._first_shard + 1) % max(1, count)
        return jobs

    def _job(self, shard: Shard, entries: Sequence[Entry], reason: CutReason) -> _Job:
        """The batch of cut entries, with the mark that holds once they are applied."""
        lane = shard.lane
        lsns, keys, payloads, priorities, _ = zip(*entries, strict=True)
        mark = None
        if lane.logged and lane.setup.transactional:
            if shard.cursor is None:
                shard.ledger.advance(self._end_lsn)
            mark = shard.ledger.mark(epoch=self._epoch, settling=frozenset(lsns))
        lane.batches += 1
        lane.cut_reasons[reason.value] += 1
        batch = Batch(
            lane=lane.setup.name, shard=shard.index, store=self._store, lsns=lsns if lane.logged else (), keys=keys,
            payloads=payloads, priorities=priorities, attempt=shard.queue.failures + 1, reason=reason, mark=mark,
        )  # fmt: skip
        return _Job(shard=shard, entries=entries, batch=batch)

    def _hand_out(self, jobs: Sequence[_Job]) -> None:
        """Give jobs to workers; start workers up to the number of batches that may be in flight."""
        with self._work:
            self._jobs.extend(jobs)
            missing = min(
                len(self._jobs) - self._workers_free, self._settings.in_flight_max - len(self._workers)
            )
            self._work.notify_all()
        for _ in range(missing):
            number = len(self._workers) + 1
            self._workers.append(
                self._threads.spawn(f"walbatch-flush-{number}", self._guarded(self._run_worker))
            )

    # --- the workers ---

    def _run_worker(self) -> None:
        """Apply batches until told to stop."""
        while True:
            with self._work:
                while not self._jobs and not self._workers_stopping:
                    self._workers_free += 1
                    self._work.wait()
                    self._workers_free -= 1
                if self._workers_stopping:
                    return  # a job that nobody took stays in the log
                job = self._jobs.popleft()
            self._apply(job)

    def _apply(self, job: _Job) -> None:
        """One call of a backend. Whatever it does, the batch ends settled or queued again."""
        setup = job.shard.lane.setup
        assert setup.backend is not None
        try:
            answer = setup.backend.apply(job.batch)
            verdict = judge(job.batch, answer, setup.order)  # type: ignore[arg-type]  # wrapped backends answer synchronously
            self._check_mark(job, verdict)
        except (Fenced, BackendError) as error:
            self._fail_batch(job, error)
            self._on_failure(error)
        except BaseException as error:  # noqa: BLE001 - a backend may raise anything; its batch is tried again
            _logger.warning("%r failed and will be tried again: %r", job.batch, error)
            self._fail_batch(job, error)
        else:
            if verdict.retry:
                _logger.warning(
                    "%r: %d operations will be tried again: %s", job.batch, len(verdict.retry), verdict.error
                )
            self._settle(job, verdict.applied, verdict.retry, verdict.error)

    def _check_mark(self, job: _Job, verdict: Verdict) -> None:
        """A transactional backend may leave operations for later only if the mark that it stored leaves them out, too.

        Otherwise it would take them for applied when they come again, and they would be lost. So the engine stops.
        """
        setup = job.shard.lane.setup
        if not verdict.retry or job.batch.mark is None:
            return
        stored: Mark = setup.backend.applied_mark(job.shard.index)  # type: ignore[union-attr]  # it is transactional
        covered = [lsn for index in verdict.retry if stored.covers(lsn := job.batch.lsns[index])]
        if covered:
            raise BackendError(
                f"the backend of lane {setup.name!r} asked to try operation {covered[0]} again, but the mark it stored says "
                "that it is applied: it would be lost. Correct the backend (raise to undo the whole batch, or leave such "
                "operations out of the mark); the operations are safe in the log"
            )

    def _fail_batch(self, job: _Job, error: BaseException) -> None:
        """The whole batch goes back in front of its shard."""
        setup = job.shard.lane.setup
        with self._cond:
            delay = backoff_ns(
                job.shard.queue.failures, base_s=setup.retry_base_s, ceiling_s=setup.retry_ceiling_s,
                chance=self._entropy.uniform(),
            )  # fmt: skip
            job.shard.queue.fail(retry_at_ns=self._clock.monotonic_ns() + delay)
            self._count_failure(job, len(job.entries), f"{type(error).__name__}: {error}")

    def _count_failure(self, job: _Job, retried: int, error: str | None) -> None:
        """Common end of a try that left something. Called with the lock held."""
        lane = job.shard.lane
        lane.failed_batches += 1
        lane.retried += retried
        lane.last_error = error
        self._in_flight -= 1
        self._cond.notify_all()

    def _settle(
        self, job: _Job, applied: Mapping[int, object], retry: Mapping[int, float], error: str | None
    ) -> None:
        """Operations are final; the others wait. Their promises are resolved after the lock is given back."""
        shard, entries = job.shard, job.entries
        lane = shard.lane
        with self._cond:
            if not retry:
                shard.queue.finish()
                shard.ledger.settle(job.batch.lsns or [entry[0] for entry in entries])
            else:
                now = self._clock.monotonic_ns()
                setup = lane.setup
                delay = backoff_ns(
                    shard.queue.failures, base_s=setup.retry_base_s, ceiling_s=setup.retry_ceiling_s,
                    chance=self._entropy.uniform(),
                )  # fmt: skip
                times = {index: now + max(delay, int(after * 1e9)) for index, after in retry.items()}
                shard.queue.finish_partly(applied, times)
                shard.ledger.settle([entries[index][0] for index in applied])
            lane.applied += len(applied)
            if lane.logged:
                self._settled_count += len(applied)
            if retry:
                self._count_failure(job, len(retry), error)
            else:
                self._in_flight -= 1
                self._cond.notify_all()
        if self._promises:
            scope = -1 if lane.logged else lane.index
            for index, result in applied.items():
                promise = self._promises.pop((scope, entries[index][0]), None)
                if promise is not None:
                    promise.resolve(result)

    # --- reading back ---

    def _run_reader(self) -> None:
        """Fill shards that are reading back, oldest first. One frame at a time, so its memory is one frame."""
        while True:
            with self._cond:
                while not (cohort := self._cohort()):
                    if self._stopping:
                        return
                    self._cond.wait()
                if self._stopping:
                    return
                assert cohort[0].cursor is not None
                position = cohort[0].cursor.position
                end, end_lsn = self._end, self._end_lsn
            wanted = frozenset(shard.lane.setup.name for shard in cohort)
            frame = self._log.read_frame(position, wanted=wanted) if position < end else None
            with self._cond:
                if frame is None or frame.position >= end:
                    self._read_back.catch_up(cohort, end, end_lsn, grown=self._end != end)
                    fed = NOTHING_FED
                else:
                    fed = self._read_back.feed(
                        cohort, frame, end=self._end, now_ns=self._clock.monotonic_ns()
                    )
                self._settled_count += fed.counted
                self._cond.notify_all()
            for lsn in fed.passed_over:
                self._resolve_settled(lsn)
            for name, lsn in fed.waiting:  # not under the lock: a handler may call the engine
                _logger.warning(
                    "lane %r has no backend: its operations wait in the log from lsn %d on", name, lsn
                )

    def _cohort(self) -> list[Shard]:
        """The shards to read for next. Called with the lock held."""
        return self._read_back.cohort()

    def _resolve_settled(self, lsn: int) -> None:
        promise = self._promises.pop((-1, lsn), None)
        if promise is not None:
            promise.resolve(None)

    # --- control --------------------------------------------------------------------------------------------
    # -------------

    def pause(self, name: str, *, paused: bool) -> None:
        """Stop or go on flushing a lane. Batches in flight are not recalled."""
        with self._cond:
            self._by_name[name].paused = paused
            self._cond.notify_all()

    def flush(self, names: Sequence[str], lsn: int, timeout_ns: int | None) -> None:
        """Wait until every operation of these lanes up to `lsn` is settled. They are cut at once.

        Raises ResultTimeout, ConfigError for a lane without backend that has work, or why the engine stopped.
        """
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            lanes = [self._by_name[name] for name in names]
            targets = {lane.index: lsn if lane.logged else lane.sequence for lane in lanes}
            while True:
                waiting = [
                    shard for lane in lanes for shard in lane.shards
                    if self._watermark(shard) < targets[lane.index] and not (not lane.logged and not len(shard.ledger))
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

    def drain(self, timeout_ns: int | None) -> bool:
        """Flush everything that has a backend, lingers cut short. Returns whether nothing is left."""
        deadline = None if timeout_ns is None else self._clock.monotonic_ns() + timeout_ns
        with self._cond:
            self._draining = True
            self._cond.notify_all()
            while True:
                left = bool(self._inbox) or any(
                    len(shard.queue) or shard.cursor is not None
                    for shard in self._shards if not shard.lane.held and not shard.lane.paused
                )  # fmt: skip
                if not left or self._failure is not None or self._stopping or self._hurried:
                    return not left
                now = self._clock.monotonic_ns()
                if deadline is not None and now >= deadline:
                    return False
                self._cond.wait(None if deadline is None else deadline - now)

    def fail(self, error: WalbatchError) -> None:
        """Stop delivering for ever; everybody who waits is told."""
        with self._cond:
            self._failure = self._failure or error
            self._stopping = True
            self._cond.notify_all()
        self._resolve_all(error)

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
        with self._work:
            self._workers_stopping = True
            self._work.notify_all()
        return joined(self._workers) and ended

    def is_own_thread(self) -> bool:
        """Whether the caller runs in a thread of the dispatcher: a backend, for example."""
        return any(thread.is_current() for thread in [*self._threads_running, *self._workers])

    def abandon(self) -> None:
        """Tell everybody who still waits that the engine is closed."""
        with self._cond:
            self._cond.notify_all()
        self._resolve_all(
            EngineClosed(
                "the engine was closed before the operation was settled; it is in the log and will be replayed"
            )
        )

    def _resolve_all(self, error: WalbatchError) -> None:
        for reference in self._promises.valuerefs():  # a list made in one step: other threads may register
            promise = reference()
            if promise is not None:
                promise.resolve(error=error)
        self._promises.clear()

    # --- looking --------------------------------------------------------------------------------------------
    # -------------

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
                for lane in self._lanes if lane.logged
            }  # fmt: skip
            return Settled(
                watermark=min(watermarks, default=self._end_lsn),
                lanes=lanes,
                settled_count=self._settled_count,
            )

    def settled_lsn(self) -> int:
        """The settled watermark over all lanes."""
        with self._cond:
            return min((self._watermark(s) for s in self._shards if s.lane.logged), default=self._end_lsn)

    def settled_count(self) -> int:
        """Logged operations settled since this engine was opened, those that a backend's mark reported included."""
        with self._cond:
            return self._settled_count

    def unlogged_count(self) -> int:
        """Operations of lanes that log nothing which are left: they end with the engine."""
        with self._cond:
            return sum(len(shard.queue) for shard in self._shards if not shard.lane.logged)

    def lane_stats(self) -> dict[str, LaneStats]:
        """Every lane's figures."""
        with self._cond:
            return {
                lane.setup.name: LaneStats(
                    submitted=lane.submitted, applied=lane.applied, retried=lane.retried, batches=lane.batches,
                    failed_batches=lane.failed_batches, cut_reasons=dict(lane.cut_reasons),
                    in_memory=sum(len(shard.queue) for shard in lane.shards),
                    in_memory_bytes=sum(shard.queue.memory_bytes for shard in lane.shards),
                    in_flight=sum(len(shard.queue.in_flight) for shard in lane.shards),
                    reading_back=sum(shard.cursor is not None for shard in lane.shards),
                    settled_lsn=min(self._watermark(shard) for shard in lane.shards),
                    paused=lane.paused, held=lane.held, last_error=lane.last_error,
                )
                for lane in self._lanes
            }  # fmt: skip
