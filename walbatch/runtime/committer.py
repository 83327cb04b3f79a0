"""Group commit, leader style: the thread that opens a group writes and syncs it for all who join.

What is not here: files (behind `ports.Log`), and what happens to operations once they are durable (`dispatcher`).

The idea needed to read it: groups form a queue. The thread that opened a group is its leader: it waits until
its group is the head and nobody is committing, closes the group, writes, syncs, hands the lead on to the next one, and
wakes those who joined. A group that nobody waits for is led by the committer's own thread, which also syncs interval
lanes and stamps a quiet log. Whoever need not act is not woken.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from walbatch import limits
from walbatch.core.commit_group import CommitGroup, fits_frame
from walbatch.core.histogram import RecentHistogram
from walbatch.errors import (
    DurabilityUnknown,
    EngineClosed,
    OperationTooLarge,
    Overloaded,
    StorageError,
    WalbatchError,
)
from walbatch.ports import Clock, Event, Log, Thread, Threads
from walbatch.runtime.ticket import Fate, Promise
from walbatch.types import NO_OPTIONS, Options, Position

_logger = logging.getLogger("walbatch")

FULL_RETRY_NS = 50_000_000
"""Pause between tries to write on a full disk."""
STAMP_RETRY_NS = 1_000_000_000
REST_NS_MIN = 1_000_000
"""Shortest sleep of the committer's own thread, so that a deadline which has passed does not make it spin."""
FOREVER_NS = 2**63 - 1
SYNC_WINDOW_NS = 600 * 1_000_000_000
"""How long a slow sync is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A durable group: what the dispatcher needs to know of it."""

    group: CommitGroup
    position: Position
    end: Position


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitSettings:
    """What the committer needs of the settings. Times in ns."""

    queue_bytes_max: int
    disk_bytes_max: int
    idle_stamp_ns: int
    disk_full_wait_ns: int
    interval_ns: int
    """The shortest interval of the lanes with durability "interval"."""


class PendingGroup:
    """A group with its waiters, and the bytes that it has in the queue.

    `led` says that some thread has promised to commit it; `turn` wakes that one to look again.
    """

    __slots__ = ("durable", "fate", "group", "led", "position", "size", "turn")

    def __init__(self, group: CommitGroup, fate: Fate, durable: Promise, *, led: bool) -> None:
        self.group = group
        self.fate = fate
        self.durable = durable
        self.led = led
        self.size = 0
        self.position: Position | None = None
        self.turn: Event | None = None


class Committer:
    """Commits operations to the log. All methods are safe from any thread unless they say otherwise."""

    def __init__(
        self, *, log: Log, clock: Clock, threads: Threads, settings: CommitSettings, names: Sequence[str], next_lsn: int,
        on_durable: Callable[[Committed], None], on_failure: Callable[[WalbatchError], None],
        is_pressed: Callable[[], bool] = lambda: False, on_fate: Callable[[Fate], None] | None = None,
    ) -> None:  # fmt: skip
        """`is_pressed`: memory is so short that nothing is taken in beside what is being written.

        `on_fate` hears of each group before anything can happen to its operations.
        """
        self._on_fate = on_fate
        self._is_pressed = is_pressed
        self._log = log
        self._clock = clock
        self._threads = threads
        self._settings = settings
        self._names = names
        self._on_durable = on_durable
        self._on_failure = on_failure
        # Guards everything below. Held for bookkeeping only, never over I/O. _owner is who owns the log's append
        # side: the group whose leader is at work, or the committer itself. None: nobody.
        self._cond = threads.condition()
        self._queue: deque[PendingGroup] = deque()
        self._owner: object = None
        self._next_lsn = next_lsn
        self._queued_bytes = 0
        self._written: list[PendingGroup] = []
        self._written_bytes = 0
        self._written_since_ns = 0
        self._durable_lsn = next_lsn - 1
        self._stamped_lsn = next_lsn - 1
        self._last_commit_ns = clock.monotonic_ns()
        self._closed: str | None = None
        self._stopping = False
        self._taken: object = None
        self._failure: WalbatchError | None = None
        self._sleepers = 0
        # Until when the committer's own thread sleeps if nobody wakes it; 0 while it is awake.
        self._rests_until_ns = 0
        self.commits = 0
        self.syncs = 0
        self.committed = 0
        self.sync_times = RecentHistogram(window_ns=SYNC_WINDOW_NS, now_ns=clock.monotonic_ns())
        """In ns; whoever has the append side adds to it."""
        self._thread: Thread | None = None

    def __repr__(self) -> str:
        return f"<Committer next lsn {self._next_lsn}, durable {self._durable_lsn}, {len(self._queue)} groups queued>"

    @property
    def submitted_lsn(self) -> int:
        """The highest LSN handed out."""
        return self._next_lsn - 1

    @property
    def durable_lsn(self) -> int:
        """Every operation up to this LSN is synced."""
        return self._durable_lsn

    @property
    def failure(self) -> WalbatchError | None:
        """Why the committer accepts nothing more; None while it works."""
        return self._failure

    def start(self) -> None:
        """Start the committer's own thread."""
        self._thread = self._threads.spawn("walbatch-commit", self._run_guarded)

    # --- submitting ---

    def submit(
        self, lane: int, shards: int | Sequence[int], keys: Sequence[bytes], payloads: Sequence[bytes], priority: int, size: int, *,
        needs_sync: bool, timeout_ns: int | None, wait: bool,
        register: Callable[[int, Fate], None] | None = None, options: Options = NO_OPTIONS,
    ) -> tuple[int, Fate]:  # fmt: skip
        """Put operations into a group; returns the LSN of the first and the group's fate.

        With `wait`, returns when they are durable (or written, on an interval lane), or raises. `register` is
        called with the LSN before anything can happen to the operation. At a bound it waits up to
        `timeout_ns`, then raises Overloaded with nothing accepted; without `wait` it never waits.
        """
        count = len(keys)
        pending: PendingGroup | None = None
        opened = False
        try:
            with self._cond:
                self._admit(count, size, timeout_ns if wait else 0)
                pending = self._queue[-1] if self._queue else None
                if pending is None or pending.position is not None or not pending.group.accepts(count, size):
                    if pending is not None:
                        self._next_lsn = max(self._next_lsn, pending.group.last_lsn + 1)
                    pending = self._new_group(led=wait)
                    opened = True
                    self._queue.append(pending)
                group, fate = pending.group, pending.fate
                lsn = group.add(
                    lane, shards, keys, payloads, priority, size, needs_sync=needs_sync,
                    options=() if options is NO_OPTIONS else (options,) * count,
                )  # fmt: skip
                self._next_lsn = lsn + count
                self._queued_bytes += size
                pending.size += size
                fate.last = lsn + count - 1
                if register is not None:
                    register(lsn, fate)
                if opened and wait and self._is_free_for(pending):
                    self._take(pending)
                elif opened and not wait:
                    self._rouse()
            if wait and opened:
                self._lead(pending)
        except BaseException:
            if opened and pending is not None:  # a signal handler's exception: somebody else goes on
                self._leave(pending)
            raise
        if wait:
            durable = pending.durable
            if not durable.done:
                durable.wait(None)
            durable.take()
            if self._failure is not None and lsn > self._durable_lsn:
                raise self._failure  # it was written, and the log failed before its caller heard of it
        return lsn, fate

    def _new_group(self, *, led: bool) -> PendingGroup:
        """A group for the next LSNs. With the lock held."""
        durable = Promise(self._threads)
        fate = Fate(self._threads, self._next_lsn, self._next_lsn - 1, durable)
        if self._on_fate is not None:
            self._on_fate(fate)
        return PendingGroup(CommitGroup(self._next_lsn), fate, durable, led=led)

    def _leave(self, pending: PendingGroup) -> None:
        """The leader of a group has no more time for it: the committer's thread takes it over."""
        with self._cond:
            pending.led = False
            self._release(pending)
        if self._failure is None and self._is_handed_on(pending):
            pending.durable.resolve()

    def _is_handed_on(self, pending: PendingGroup) -> bool:
        """Whether a group is durable, and the dispatcher has it: then only its waiters may not know yet."""
        # Where its leader was cut off before there was anything in it, others may join it still.
        closed = pending.position is not None and pending not in self._queue
        return closed and pending.group.last_lsn <= self._durable_lsn and pending not in self._written

    def await_written(self, lsn: int) -> None:
        """Return when the operation is in the log, synced or not; or never will be."""
        with self._cond:
            while self._failure is None and self._queue and self._queue[0].group.first_lsn <= lsn:
                self._sleep(FULL_RETRY_NS)

    def _admit(self, count: int, size: int, timeout_ns: int | None) -> None:
        """Wait for room, or say why there is none. Called with the lock held."""
        if (count > limits.FRAME_COUNT_MAX or size > limits.GROUP_BYTES_MAX) and not fits_frame(count, size):
            raise OperationTooLarge(
                f"{count:,} operations of {size:,} bytes do not fit in one commit group "
                f"({limits.FRAME_COUNT_MAX:,} operations, {limits.FRAME_RAW_BYTES_MAX:,} bytes): submit them in smaller parts"
            )
        deadline = None
        while True:
            if self._closed is not None or self._failure is not None:
                self._refuse_if_over()
            refusal = self._refusal(count, size)
            if refusal is None:
                return
            now = self._clock.monotonic_ns()
            if deadline is None and timeout_ns is not None:
                deadline = now + timeout_ns
            if deadline is not None and now >= deadline:
                raise refusal
            self._sleep(None if deadline is None else deadline - now)

    def _refuse_if_over(self) -> None:
        if self._closed is not None:
            raise EngineClosed(self._closed)
        if self._failure is not None:
            raise StorageError(f"the engine has stopped: {self._failure}. Close it and open the store again")

    def _refusal(self, count: int, size: int) -> Overloaded | None:
        """The bound that forbids to accept now. An empty queue accepts any single call, so none waits for ever."""
        settings = self._settings
        if self._queued_bytes and self._is_pressed():
            return Overloaded(
                "memory", value=self._queued_bytes, maximum=self._queued_bytes,
                hint="the process is short of memory: try again later, or give it more",
            )  # fmt: skip
        if self._queued_bytes and self._queued_bytes + size > settings.queue_bytes_max:
            return Overloaded(
                "queue_bytes_max", value=self._queued_bytes, maximum=settings.queue_bytes_max,
                hint="the disk is slower than the producers: try again later",
            )  # fmt: skip
        unsynced = self._next_lsn - 1 - self._durable_lsn
        if unsynced + count > limits.UNSYNCED_COUNT_MAX and unsynced:
            return Overloaded(
                "UNSYNCED_COUNT_MAX", value=unsynced, maximum=limits.UNSYNCED_COUNT_MAX,
                hint="the disk is slower than the producers: try again later",
            )  # fmt: skip
        disk_bytes = self._log.disk_bytes
        if disk_bytes + self._queued_bytes + size <= settings.disk_bytes_max:
            return None
        if self._log.checkpointed_lsn >= self._durable_lsn:
            return None  # all that the log holds is settled: the next roll makes room
        return Overloaded(
            "disk_bytes_max", value=disk_bytes, maximum=settings.disk_bytes_max,
            hint="the log is full of operations that no backend has taken: see stats(), repair the backend or raise the limit",
        )  # fmt: skip

    def _sleep(self, timeout_ns: int | None) -> None:
        """Wait for a change, with the lock held. Bounded, so that room made elsewhere (trimming) is seen."""
        self._sleepers += 1
        try:
            self._cond.wait(FULL_RETRY_NS if timeout_ns is None else min(timeout_ns, FULL_RETRY_NS))
        finally:
            self._sleepers -= 1

    # --- committing ---

    def _is_free_for(self, pending: PendingGroup) -> bool:
        """Whether it is the turn of a group. With the lock held."""
        return self._owner is None and bool(self._queue) and self._queue[0] is pending

    def _take(self, pending: PendingGroup) -> None:
        """Take the append side for a group. With the lock held.

        From here on nobody joins the group: whoever arrives later is acknowledged by a later sync.
        """
        self._owner = pending
        if pending.position is None:
            pending.position = self._log.end
        group = pending.group
        group.trim_columns()
        self._next_lsn = max(self._next_lsn, group.last_lsn + 1)

    def _lead(self, pending: PendingGroup) -> None:
        """Commit a group once it is its turn.

        An exception of a signal handler may arrive at any bytecode. Then the group is handed to the
        committer's thread, which repeats what may have been done in part: the write goes to the same place,
        and the sync is simply done again. The one thing that must not be repeated is a failed sync, so an
        OSError hidden under the interruption stops the engine.
        """
        ambient = sys.exception()  # what the caller is handling has nothing to do with the log
        try:
            while self._owner is not pending:
                with self._cond:
                    if pending.durable.done or self._failure is not None:
                        return
                    if self._is_free_for(pending):
                        self._take(pending)
                        break
                    turn = pending.turn = self._threads.event()
                turn.wait(None)
            self._commit(pending)
        except BaseException as error:
            cause: BaseException | None = error
            while (
                cause is not None and cause is not ambient and not isinstance(cause, (OSError, StorageError))
            ):
                cause = cause.__context__
            if cause is ambient:
                cause = None
            if cause is not None and not pending.durable.done:
                self._fail(cause)
            raise

    def _commit(self, pending: PendingGroup) -> None:
        """Write and, if anybody in it needs that, sync the head group.

        The caller has taken the append side for it; it is free at return.
        """
        group = pending.group
        sync = False
        told: Sequence[PendingGroup] = ()
        try:
            if self._failure is None:
                self._append(pending)
                overdue = bool(self._written) and (
                    self._clock.monotonic_ns() >= self._written_since_ns + self._settings.interval_ns
                )
                # An interval that has passed is not put off by a log that is busy all the time.
                sync = (
                    group.needs_sync
                    or overdue
                    or self._written_bytes + group.bytes > limits.UNSYNCED_BYTES_MAX
                )
                if sync:
                    self._sync_log()
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if self._failure is None:
                told = self._finish(pending, synced=sync)
        self._give_back(told)

    def _sync_log(self) -> None:
        """Sync, and note how long it took. The caller has set _owner."""
        started_ns = self._clock.monotonic_ns()
        self._log.sync()
        ended_ns = self._clock.monotonic_ns()
        self.sync_times.add(ended_ns - started_ns, now_ns=ended_ns)

    def _release(self, owner: object) -> None:
        """The append side is free, if it was the owner's, and whoever has something to do next is told. With the lock held.

        May be repeated: it tells them to look, and they look for themselves.
        """
        # Only if it is still the owner's: it may have been given back, and taken by somebody else.
        if self._owner is owner:
            self._owner = None
        if self._owner is None and self._queue and self._queue[0].led:
            turn = self._queue[0].turn
            if turn is not None:
                turn.set()
        if self._sleepers or self._must_rise():
            self._cond.notify_all()

    def _must_rise(self) -> bool:
        """Whether the committer's own thread sleeps, and has something to do before it would wake. With the lock held."""
        if not self._rests_until_ns:
            return False
        if self._stopping or self._failure is not None or (self._queue and not self._queue[0].led):
            return True
        deadline = self._next_deadline()
        return deadline is not None and deadline < self._rests_until_ns

    def _rouse(self) -> None:
        """A group that nobody leads was opened. With the lock held."""
        if self._owner is None and self._must_rise():
            self._cond.notify_all()

    def _give_back(self, told: Sequence[PendingGroup]) -> None:
        """The append side is free; the dispatcher has `told`, and those who wait for them are woken.

        The lead is handed on before those of the last group wake: the next one is written meanwhile. A leader that is cut off in
        between tells them when it leaves.
        """
        for pending in told[:-1]:
            pending.durable.resolve()
        with self._cond:
            self._forget_written(told)
            self._release(self._owner)
        for pending in told[-1:]:
            pending.durable.resolve()

    def _forget_written(self, told: Sequence[PendingGroup]) -> None:
        """The dispatcher has these. With the lock held.

        Only now: if a signal's exception came between, all of it is handed on again, and recognised.
        """
        if told:
            del self._written[: len(told)]
            left = self._written
            self._written_bytes = sum(pending.group.bytes for pending in left) if left else 0

    def _append(self, pending: PendingGroup) -> None:
        """Write the group's frame, waiting for room on a full disk for a bounded time, or until the engine has failed.

        What interval lanes have acknowledged does not wait for room. One sync is enough: until the append side is given
        back nothing more is acknowledged.
        """
        group = pending.group
        if self._log.last_lsn >= group.last_lsn:
            return  # a leader that was interrupted had written it
        synced_lsn = self._durable_lsn
        kinds, kind_indexes = group.kind_columns(self._names)
        deadline = self._clock.monotonic_ns() + self._settings.disk_full_wait_ns
        synced = False
        while True:
            try:
                pending.position = self._log.append(
                    first_lsn=group.first_lsn, kinds=kinds, kind_indexes=kind_indexes, priorities=group.priorities,
                    keys=group.keys, payloads=group.payloads, options=group.options, synced_lsn=synced_lsn,
                )  # fmt: skip
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or self._clock.monotonic_ns() >= deadline:
                    raise
                if not synced:  # whatever `_written` says: `halt` empties it
                    self._log.sync()
                    self._finish_sync()
                    synced = True
                with self._cond:
                    if self._failure is None:
                        self._sleep(FULL_RETRY_NS)
                    if self._failure is not None:
                        raise
            else:
                return

    def _finish(self, pending: PendingGroup, *, synced: bool) -> Sequence[PendingGroup]:
        """Note that a group is written, and tell the dispatcher what is durable. Returns whose waiters are to be told.

        The dispatcher hears of it first, in LSN order.
        """
        group = pending.group
        with self._cond:
            now = self._clock.monotonic_ns()
            if not self._written:
                self._written_since_ns = now
            if not self._written or self._written[-1] is not pending:
                self._written.append(pending)
                self._written_bytes += group.bytes
            if self._queue and self._queue[0] is pending:
                self._queue.popleft()
                self._queued_bytes = max(0, self._queued_bytes - pending.size) if self._queue else 0
                self.commits += 1
                self.committed += len(group)
            self._last_commit_ns = now
            synced_now = self._note_synced() if synced else ()
        if not synced:
            pending.durable.resolve()
        self._hand_on(synced_now)
        return synced_now

    def _note_synced(self) -> Sequence[PendingGroup]:
        """Everything written is durable now: these. With the lock held, right after a successful sync."""
        self.syncs += 1
        if self._written:
            self._durable_lsn = max(self._durable_lsn, self._written[-1].group.last_lsn)
        return tuple(self._written)

    def _hand_on(self, synced: Sequence[PendingGroup]) -> None:
        """Tell the dispatcher what is durable, in LSN order. Called by the owner of the append side."""
        end = self._log.end
        for index, pending in enumerate(synced):
            assert pending.position is not None
            following = synced[index + 1].position if index + 1 < len(synced) else end
            assert following is not None
            self._on_durable(Committed(group=pending.group, position=pending.position, end=following))

    def _finish_sync(self) -> None:
        """Everything written is durable now, and whoever waits for it is told.

        Called by the owner of the append side, right after a successful sync.
        """
        with self._cond:
            synced = self._note_synced()
        self._hand_on(synced)
        with self._cond:
            self._forget_written(synced)
        for pending in synced:
            pending.durable.resolve()

    def _fail(self, cause: BaseException) -> None:
        """Stop for ever: nothing more is acknowledged, and every waiter is told "unknown"."""
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        self.halt(DurabilityUnknown(
            f"a write or sync of the log failed ({reason}): operations that were not acknowledged may or may not be durable. "
            "Repair the disk, close this engine and open the store again",
            errno=getattr(cause, "errno", None),
        ))  # fmt: skip

    def halt(self, failure: WalbatchError) -> None:
        """Stop for ever because of `failure`; the first one counts."""
        with self._cond:
            if self._failure is not None:
                return
            self._failure = failure
            failed = [*self._written, *self._queue]
            self._written = []
            self._queue.clear()
            self._cond.notify_all()
        _logger.error("%s", failure)
        for pending in failed:
            pending.durable.resolve(error=failure)
            if pending.turn is not None:
                pending.turn.set()
        self._on_failure(failure)

    # --- the committer's own thread ---

    def _run_guarded(self) -> None:
        """The thread's outermost frame: its death stops the engine loudly, or everybody would wait for ever."""
        try:
            self._run()
        except BaseException as error:
            _logger.critical("the committer died", exc_info=True)
            self._fail(error)
            with self._cond:
                if self._owner is self._taken:  # a leader who has it goes on, and gives it back
                    self._owner = None
                    self._cond.notify_all()
            with contextlib.suppress(Exception):
                self._sync_last()

    def _run(self) -> None:
        """Lead groups that nobody leads, sync interval lanes, stamp a quiet log."""
        while True:
            with self._cond:
                now = self._clock.monotonic_ns()
                pending = self._queue[0] if self._queue and not self._queue[0].led else None
                sync_due = bool(self._written) and now >= self._written_since_ns + self._settings.interval_ns
                sync_due = sync_due or bool(self._written and self._stopping)
                stamp_due = (
                    not self._queue and not self._written and self._stamped_lsn < self._durable_lsn
                    and now >= self._last_commit_ns + self._settings.idle_stamp_ns
                )  # fmt: skip
                idle = not self._queue and not self._written and self._owner is None
                if self._failure is not None and self._owner is None:
                    break
                if self._stopping and idle:
                    return
                if self._owner or self._failure or not (pending or sync_due or stamp_due):
                    self._rest(now)
                    continue
                self._owner = pending or self
                self._taken = self._owner
                if pending is not None:
                    pending.led = True
                    self._take(pending)
            if pending is not None:
                self._commit(pending)
            else:
                self._sync_quietly(stamp=stamp_due)
        self._sync_last()

    def _sync_last(self) -> None:
        """After a failure, when nobody is at work any more: sync what interval lanes have acknowledged.

        It was written before the failure, and nobody knows when the store will be opened again. After a failed sync the
        log refuses, and nothing is tried twice.
        """
        with self._cond:
            while self._owner is not None:
                self._sleep(None)
            self._owner = self._taken = self
        try:
            with contextlib.suppress(OSError, StorageError):
                self._log.sync()
        finally:
            self._give_back(())

    def _rest(self, now: int) -> None:
        """The committer's own thread sleeps until there is something to do for it. With the lock held."""
        # Groups on their way put the stamp off, so it is not worth while to wake before it could be due after them.
        deadline = (
            now + self._settings.idle_stamp_ns if self._queue and not self._written else self._next_deadline()
        )
        # While a leader is at work it will wake us; the floor keeps a deadline that has passed from spinning.
        wait_ns = None if deadline is None else max(deadline - now, REST_NS_MIN)
        self._rests_until_ns = FOREVER_NS if wait_ns is None else now + wait_ns
        try:
            self._cond.wait(wait_ns)
        finally:
            self._rests_until_ns = 0

    def _next_deadline(self) -> int | None:
        """When time alone gives the committer's own thread something to do; None if it does not. With the lock held."""
        if self._written:
            return self._written_since_ns + self._settings.interval_ns
        if self._stamped_lsn < self._durable_lsn:
            return self._last_commit_ns + self._settings.idle_stamp_ns
        return None

    def _sync_quietly(self, *, stamp: bool) -> None:
        """Sync what interval lanes have written, or write an idle stamp. The caller has set _owner."""
        told: Sequence[PendingGroup] = ()
        try:
            if stamp:
                self._stamp()
            else:
                self._sync_log()
        except (OSError, StorageError) as error:
            self._fail(error)
        else:
            if not stamp:
                with self._cond:
                    told = self._note_synced()
                self._hand_on(told)
        self._give_back(told)

    def _stamp(self) -> None:
        """Write an idle stamp. A full disk is no failure here: the stamp is tried again later."""
        try:
            self._log.stamp(next_lsn=self._durable_lsn + 1, clean=False)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            self._last_commit_ns = self._clock.monotonic_ns() + STAMP_RETRY_NS
        else:
            self._stamped_lsn = self._durable_lsn
            self.syncs += 1

    # --- closing --------------------------------------------------------------------------------------------
    # -------------

    def refuse(self, message: str) -> None:
        """Accept nothing more. What was accepted is still committed."""
        with self._cond:
            self._closed = self._closed or message
            self._cond.notify_all()

    def stop(self, timeout_ns: int | None) -> bool:
        """After `refuse`: wait until everything accepted is durable and the thread has ended.

        Returns whether it has.
        """
        with self._cond:
            self._stopping = True
            self._cond.notify_all()
        return self._thread is None or self._thread.join(timeout_ns)

    def is_own_thread(self) -> bool:
        """Whether the caller is the committer's thread."""
        return self._thread is not None and self._thread.is_current()
