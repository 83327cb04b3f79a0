"""The engine: wires the log, the committer, the dispatcher and the checkpointer of one store, and is its public face.

What is not here: any of their work. Methods check their arguments, then pass on.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from walbatch import limits
from walbatch.config import NS_PER_MS, NS_PER_S, Lane, Settings
from walbatch.core.commit_group import fits_frame
from walbatch.core.recovery import Case
from walbatch.core.routing import shard_of, shards_of
from walbatch.errors import (
    ConfigError,
    EngineClosed,
    OperationTooLarge,
    StorageError,
    WalbatchError,
)
from walbatch.lanes import (
    OperationLimits,
    check_lanes,
    check_priority,
    check_remembered,
    close_backends,
    kinds_in_log,
    lane_memory,
    set_up,
    trimmed_count,
)
from walbatch.metrics import CloseReport, EngineStats
from walbatch.ports import Backend, Clock, Entropy, FileSystem, StateStore, Thread, Threads
from walbatch.runtime.checkpointer import CheckpointBase, Checkpointer
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.runtime.committer import CommitSettings, Committer
from walbatch.runtime.dispatcher import Dispatcher, DispatchSettings
from walbatch.runtime.lane import LaneSetup
from walbatch.runtime.ticket import Promise, Ticket, timeout_to_ns
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.store import OpenStore, open_store, storage_errors
from walbatch.storage.survey import Progress, segment_numbers
from walbatch.types import PRIORITY_NORMAL, Durability, Position

if TYPE_CHECKING:
    from types import TracebackType

Payload = bytes | bytearray | memoryview
_logger = logging.getLogger("walbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The ports an engine runs on. The default is the real machine; a simulation gives its own."""

    fs: FileSystem = field(default_factory=RealFileSystem)
    clock: Clock = field(default_factory=RealClock)
    threads: Threads = field(default_factory=RealThreads)
    entropy: Entropy = field(default_factory=RealEntropy)
    open_state: Callable[[str, bytes, str], StateStore] = LmdbState.open_for_engine
    """open_state(path, store UUID, quarantine): an empty quarantine means that nothing may be moved there."""


class Engine:
    """A store that is open. Make one with `Engine.open`; all methods are safe from any thread.

    An engine belongs to the process that opened it: in a forked child every call raises EngineClosed.
    """

    def __init__(
        self, *, store: OpenStore, log: Log, environment: Environment, lanes: Mapping[str, Lane], setups: Sequence[LaneSetup],
        settings: Settings,
    ) -> None:  # fmt: skip
        """Not for users: see `Engine.open`."""
        plan = store.plan
        self.path = store.layout.root
        self._store = store
        self._log = log
        self._environment = environment
        self._lanes = dict(lanes)
        self._settings = settings
        self._backends = [setup.backend for setup in setups if setup.backend is not None]
        self._index = {setup.name: index for index, setup in enumerate(setups)}
        self._ranges = {
            name: OperationLimits.of(setup) for name, setup in zip(self._index, setups, strict=True)
        }
        self._state = "open"
        self._failure: WalbatchError | None = None
        self._report: CloseReport | None = None
        self._closing = environment.threads.condition()
        self._closer: Thread | None = None
        self._pid = os.getpid()
        self._pending_at_open = plan.pending
        self.recovery: tuple[Case, ...] = plan.cases
        """What recovery found when the store was opened."""
        clock, threads = environment.clock, environment.threads
        checkpoint = store.facts.checkpoint
        watermark = checkpoint.watermark if checkpoint else 0
        self._dispatcher = Dispatcher(
            log=log, clock=clock, threads=threads, entropy=environment.entropy,
            settings=DispatchSettings(
                timer_ns=int(settings.timer_ms * NS_PER_MS), in_flight_max=settings.in_flight_max,
                memory_bytes_max=settings.memory_bytes_max,
            ),
            store=store.uuid, epoch=plan.epoch, lanes=setups, start=Position(plan.first_segment, limits.SECTOR_BYTES),
            end_lsn=plan.next_lsn - 1, watermark=watermark, on_failure=self._fail,
        )  # fmt: skip
        intervals = [lane.interval_ms for lane in lanes.values() if lane.durability is Durability.INTERVAL]
        self._committer = Committer(
            log=log, clock=clock, threads=threads,
            settings=CommitSettings(
                queue_bytes_max=settings.queue_bytes_max, disk_bytes_max=settings.disk_bytes_max,
                idle_stamp_ns=int(settings.idle_stamp_ms * NS_PER_MS),
                disk_full_wait_ns=int(settings.disk_full_wait_s * NS_PER_S),
                interval_ns=int(min(intervals, default=100.0) * NS_PER_MS),
            ),
            names=list(self._index), next_lsn=plan.next_lsn, on_durable=self._dispatcher.on_durable, on_failure=self._fail,
        )  # fmt: skip
        self._checkpointer = Checkpointer(
            log=log, state=store.state, clock=clock, threads=threads, interval_ns=int(settings.checkpoint_ms * NS_PER_MS),
            base=CheckpointBase(
                generation=checkpoint.generation if checkpoint else 0, epoch=plan.epoch,
                settled_count=checkpoint.settled_count if checkpoint else trimmed_count(store),
            ),
            settled=self._dispatcher.settled, durable_lsn=lambda: self._committer.durable_lsn, on_failure=self._fail,
        )  # fmt: skip
        self._checkpointer.checkpointed_lsn = watermark

    def __repr__(self) -> str:
        return (
            f"<Engine {self.path} {self._state}: submitted lsn {self._committer.submitted_lsn}, durable "
            f"{self._committer.durable_lsn}, settled {self._dispatcher.settled_lsn()}>"
        )

    # --- opening ---

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        lanes: Mapping[str, Lane],
        *,
        settings: Settings | None = None,
        environment: Environment | None = None,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Open a store (made if it does not exist), recover it, and start delivering what is pending.

        `lanes` maps a kind to its Lane. Lanes that the store remembers but that are not given are held: their
        operations stay in the log. With `verify`, every segment that is not settled is read and checked first
        (`progress(done, total)` in bytes); otherwise only the tail is, and the rest when it is read back.

        When it returns, the store is recovered and durable. Raises ConfigError, StoreLocked, CorruptionError
        (nothing was changed), UnsupportedFormat, StorageError.
        """
        settings = settings or Settings()
        environment = environment or Environment()
        check_lanes(lanes)
        fs, threads = environment.fs, environment.threads
        root = os.path.realpath(os.fspath(path))
        layout = Layout(root)

        def open_state(path: str, uuid: bytes) -> StateStore:
            # Without a log, a damaged state is the last that tells of it: moved aside, it would make the store look new.
            quarantine = layout.quarantine if segment_numbers(fs, layout) else ""
            return environment.open_state(path, uuid, quarantine)

        store = open_store(
            fs, root, clock=environment.clock, entropy=environment.entropy, note={"pid": os.getpid(), "host": socket.gethostname()},
            open_state=open_state, full=verify, progress=progress,
        )  # fmt: skip
        opened: list[Backend] = []
        try:
            remembered, lane_findings = store.state.load_lanes()
            state_is_whole = store.facts.checkpoint is not None and not lane_findings
            kinds = frozenset() if state_is_whole or not store.facts.segments else kinds_in_log(fs, store)
            check_remembered(lanes, remembered, kinds)
            setups = set_up(store, lanes, remembered, kinds, opened)
            # Lanes are remembered before the first of their operations can be logged.
            store.state.save_lanes(
                {
                    name: lane_memory(name, lane, remembered.get(name))
                    for name, lane in lanes.items() if lane.durability is not Durability.NONE
                }
            )  # fmt: skip
            with storage_errors(root):
                log = Log.open(
                    fs, store.layout, environment.clock, environment.entropy, threads,
                    LogSettings(
                        segment_bytes=settings.segment_bytes, compress_bytes_min=settings.compress_bytes_min,
                        compress_level=settings.compress_level,
                    ),
                    facts=store.facts, plan=store.plan,
                )  # fmt: skip
                try:
                    engine = cls(
                        store=store,
                        log=log,
                        environment=environment,
                        lanes=lanes,
                        setups=setups,
                        settings=settings,
                    )
                    engine._start()
                except BaseException:
                    log.close(next_lsn=None)
                    raise
        except BaseException:
            close_backends(opened)
            store.state.close()
            store.lock.release()
            raise
        for case in store.plan.cases:
            if case.is_noteworthy:
                _logger.warning(
                    "%s: %s: %s (segment %s, offset %d)",
                    root,
                    case.label,
                    case.message,
                    case.segment,
                    case.offset,
                )
        return engine

    def _start(self) -> None:
        """Save a first checkpoint, so that a later loss of state/ can be told from a store that never had one; start."""
        self._checkpointer.checkpoint()
        self._committer.start()
        self._dispatcher.start()
        self._checkpointer.start()
        _open_engines.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; drain first unless an exception is on its way."""
        self.close(drain=kind is None)

    # --- submitting ---

    def submit(
        self,
        kind: str,
        *,
        key: Payload,
        payload: Payload = b"",
        priority: int = PRIORITY_NORMAL,
        timeout: float | None = -1.0,
    ) -> Ticket:
        """Submit one operation; returns when it is durable in its lane's sense ("sync": synced to disk).

        `timeout` (seconds; default: `Settings.submit_timeout_s`; None: for ever) bounds the wait for room,
        not the commit itself. Key and payload are copied. Raises ConfigError, OperationTooLarge, Overloaded
        and EngineClosed (nothing was accepted); DurabilityUnknown and StorageError when the log failed.
        """
        return self._submit(kind, key, payload, priority, timeout, wait=True)

    def submit_nowait(
        self, kind: str, *, key: Payload, payload: Payload = b"", priority: int = PRIORITY_NORMAL
    ) -> Ticket:
        """Submit one operation without waiting; `ticket.wait_durable()` tells when it is durable.

        Raises as `submit`; Overloaded at once where that would wait.
        """
        return self._submit(kind, key, payload, priority, 0.0, wait=False)

    def submit_many(
        self,
        kind: str,
        operations: Iterable[tuple[Payload, Payload]],
        *,
        priority: int = PRIORITY_NORMAL,
        timeout: float | None = -1.0,
    ) -> range:
        """Submit (key, payload) pairs as one commit group, all or nothing; returns their LSNs when they are durable.

        At most 65,536 operations and 64 MiB. An empty iterable gives an empty range. On a lane with
        durability "none" the range is empty. Raises as `submit`.
        """
        limit, index, lane, shards_count = self._lane(kind)
        check_priority(priority)
        keys: list[bytes] = []
        payloads: list[bytes] = []
        for pair in operations:
            if not isinstance(pair, tuple) or len(pair) != 2:  # noqa: PLR2004 - a pair
                raise ConfigError(f"submit_many takes (key, payload) tuples, not {type(pair).__name__}")
            keys.append(limit.key(kind, pair[0]))
            payloads.append(limit.payload(kind, pair[1]))
        if not keys:
            return range(0)
        size = sum(map(len, keys)) + sum(map(len, payloads))
        if not fits_frame(len(keys), size):
            raise OperationTooLarge(
                f"{len(keys):,} operations of {size:,} bytes do not fit in one commit group "
                f"({limits.FRAME_COUNT_MAX:,} operations, {limits.FRAME_RAW_BYTES_MAX:,} bytes): submit them in smaller parts"
            )
        shards = shards_of(keys, shards_count)
        timeout_ns = self._timeout(timeout)
        if lane.durability is Durability.NONE:
            self._dispatcher.submit_unlogged(
                index, shards, keys, payloads, priority, timeout_ns=timeout_ns, register=None
            )
            return range(0)
        lsn, _ = self._committer.submit(
            index, shards, keys, payloads, priority, size, needs_sync=lane.durability is Durability.SYNC, timeout_ns=timeout_ns,
            wait=True,
        )  # fmt: skip
        return range(lsn, lsn + len(keys))

    def _submit(
        self, kind: str, key: Payload, payload: Payload, priority: int, timeout: float | None, *, wait: bool
    ) -> Ticket:
        limit, index, lane, shards = self._lane(kind)
        check_priority(priority)
        key = limit.key(kind, key)
        payload = limit.payload(kind, payload)
        shard = shard_of(key, shards) if shards > 1 else 0
        settled = Promise(self._environment.threads)
        dispatcher = self._dispatcher
        if lane.durability is Durability.NONE:
            dispatcher.submit_unlogged(
                index, [shard], [key], [payload], priority, timeout_ns=self._timeout(timeout),
                register=lambda sequence: dispatcher.register(index, sequence, settled),
            )  # fmt: skip
            return Ticket(lane=kind, lsn=None, durability=lane.durability, durable=None, settled=settled)
        lsn, durable = self._committer.submit(
            index, (shard,), (key,), (payload,), priority, len(key) + len(payload),
            needs_sync=lane.durability is Durability.SYNC, timeout_ns=self._timeout(timeout), wait=wait,
            register=lambda lsn, _: dispatcher.register(index, lsn, settled),
        )  # fmt: skip
        return Ticket(
            lane=kind, lsn=lsn, durability=Durability(lane.durability), durable=durable, settled=settled
        )

    def _lane(self, kind: str) -> tuple[OperationLimits, int, Lane, int]:
        self._check_owner()
        lane = self._lanes.get(kind) if isinstance(kind, str) else None
        if lane is None:
            raise ConfigError(
                f"unknown kind {kind!r}: the lanes are {', '.join(sorted(map(repr, self._lanes))) or 'none'}"
            )
        return self._ranges[kind], self._index[kind], lane, lane.shards

    def _check_owner(self) -> None:
        """Raise unless the store is this process's and open. Cheap: the lock knows of a fork."""
        if not self._store.lock.held:
            raise EngineClosed(
                f"the engine of {self.path} is closed, or was opened by the process that this one was forked from: open it again"
            )

    def _timeout(self, timeout: float | None) -> int | None:
        return timeout_to_ns(
            self._settings.submit_timeout_s if timeout is not None and timeout < 0 else timeout
        )

    # --- control ---

    def flush(self, kind: str | None = None, *, timeout: float | None = None) -> None:
        """Wait until everything submitted so far is settled, cutting batches at once.

        `kind` names one lane; without it, all lanes that have a backend are flushed.

        Raises ResultTimeout (the flush goes on), ConfigError for a lane that has no backend, or the reason
        why the engine stopped.
        """
        self._check_owner()
        if kind is not None:
            self._lane(kind)
        names = (
            [kind]
            if kind is not None
            else [name for name, lane in self._lanes.items() if lane.backend is not None]
        )
        self._dispatcher.flush(names, self._committer.submitted_lsn, timeout_to_ns(timeout))

    def pause(self, kind: str) -> None:
        """Flush nothing more of a lane; submitting goes on. Batches in flight are not recalled."""
        self._lane(kind)
        self._dispatcher.pause(kind, paused=True)

    def resume(self, kind: str) -> None:
        """Flush a paused lane again."""
        self._lane(kind)
        self._dispatcher.pause(kind, paused=False)

    def stats(self) -> EngineStats:
        """A frozen snapshot.

        `pending` is exact once everything that was pending at the opening has been read back.
        """
        if self._pid != os.getpid():
            self._check_owner()  # in a forked child nobody would ever release the engine's locks
        committer = self._committer
        lanes = self._dispatcher.lane_stats()
        pending = self._pending_at_open + committer.committed - self._dispatcher.settled_count()
        return EngineStats(
            state=self._state, submitted_lsn=committer.submitted_lsn, durable_lsn=committer.durable_lsn,
            settled_lsn=self._dispatcher.settled_lsn(), checkpointed_lsn=self._checkpointer.checkpointed_lsn,
            pending=max(0, pending), commits=committer.commits, syncs=committer.syncs, committed=committer.committed,
            disk_bytes=self._log.disk_bytes, lanes=lanes,
        )  # fmt: skip

    # --- closing ---

    def close(self, *, drain: bool = True, timeout: float | None = 30.0) -> CloseReport:
        """Accept nothing more, make durable what was accepted, drain, checkpoint, release the store.

        `timeout` (seconds; None: for ever) bounds the drain; what is left stays in the log. Idempotent and callable from any
        thread. The work is done by a thread of its own: if the wait for it is interrupted, it goes on. Called from a backend,
        it does not wait and does not drain. A backend that does not return keeps the store locked until it does, so that
        nobody else delivers at the same time. Returns what it achieved.
        """
        if self._pid != os.getpid():
            return _NOTHING_TO_CLOSE  # a forked child: neither the files nor the threads are here
        inside = self._dispatcher.is_own_thread() or self._committer.is_own_thread()
        with self._closing:
            if self._closer is None:
                self._state = "closing"
                timeout_ns = timeout_to_ns(timeout)
                self._closer = self._environment.threads.spawn(
                    "walbatch-close", lambda: self._close(drain=drain and not inside, timeout_ns=timeout_ns)
                )
        if inside or not drain:
            self._dispatcher.hurry()
        if inside:
            return self._report or replace(
                _NOTHING_TO_CLOSE, reason="closing: called from a backend, which must return first"
            )
        with self._closing:
            while self._report is None:
                self._closing.wait()
            return self._report

    def _close(self, *, drain: bool, timeout_ns: int | None) -> None:
        """The closing thread: close, report, and in the end release the store, whatever goes wrong."""
        report = replace(_NOTHING_TO_CLOSE, reason="failed")
        try:
            report = self._close_in_order(drain=drain, timeout_ns=timeout_ns)
        except BaseException as error:
            _logger.critical("closing %s failed", self.path, exc_info=True)
            report = replace(_NOTHING_TO_CLOSE, reason=f"failed: {error!r}")
        finally:
            self._dispatcher.abandon()
            with self._closing:
                self._report = report
                self._state = "failed" if self._failure is not None else "closed"
                self._closing.notify_all()
        # Whoever still works for this engine works on its files: only when all have ended may another engine have them.
        self._dispatcher.stop(None)
        self._committer.stop(None)
        self._checkpointer.stop(None)
        with contextlib.suppress(OSError, StorageError):
            self._log.close(next_lsn=None)
        self._release()

    def _close_in_order(self, *, drain: bool, timeout_ns: int | None) -> CloseReport:
        """Commit, drain, stop, checkpoint, stamp.

        Crash story: everything accepted is durable before the drain begins, so being cut off at any later point costs
        re-delivery of what the last checkpoint does not know, nothing else. The stamp of a clean end is written only when
        nobody else can be writing and no LSN was handed out that is not durable.
        """
        clock = self._environment.clock
        started = clock.monotonic_ns()
        before = self._dispatcher.settled_count()
        self._committer.refuse(f"the engine of {self.path} is closed: nothing was accepted")
        reason = "not drained"
        quiet = self._committer.stop(_COMMIT_GRACE_NS)
        if not quiet:
            self._fail(
                StorageError(
                    f"the disk of {self.path} did not answer within {_COMMIT_GRACE_NS // NS_PER_S} s"
                )
            )
        if drain and self._failure is None:
            left = None if timeout_ns is None else max(0, started + timeout_ns - clock.monotonic_ns())
            reason = "drained" if self._dispatcher.drain(left) else "timeout"
        grace = None
        if timeout_ns is not None:
            grace = max(_STOP_GRACE_NS, started + timeout_ns - clock.monotonic_ns())
        stopped = self._dispatcher.stop(grace)
        if not stopped:
            reason = "timeout: a backend has not returned; the store stays locked until it does"
        quiet = self._checkpointer.stop(_STOP_GRACE_NS) and quiet
        if quiet and self._failure is None:
            self._finish_log()
        if self._failure is not None:
            reason = f"failed: {self._failure}"
        if stopped and quiet:
            # The usual end: everything is released before anybody is told.
            with contextlib.suppress(OSError, StorageError):
                self._log.close(next_lsn=None)
            self._release()
        settled = self._dispatcher.settled_count()
        remaining = max(0, self._pending_at_open + self._committer.committed - settled)
        if reason == "drained" and (remaining or self._dispatcher.unlogged_count()):
            reason = "drained, except for lanes that are paused or have no backend"
        if remaining:
            _logger.log(
                logging.WARNING if drain else logging.INFO,
                "%s closed with %s undelivered (%s); %s in the log and will be replayed by the next open",
                self.path, "1 operation" if remaining == 1 else f"{remaining:,} operations", reason,
                "it is" if remaining == 1 else "they are",
            )  # fmt: skip
        return CloseReport(
            settled=settled - before,
            remaining=remaining,
            elapsed_s=(clock.monotonic_ns() - started) / NS_PER_S,
            reason=reason,
        )

    def _finish_log(self) -> None:
        """The last checkpoint, in both generations so that the log is trimmed up to it, and the stamp of a clean end."""
        committer = self._committer
        clean = committer.submitted_lsn == committer.durable_lsn
        try:
            self._checkpointer.checkpoint()
            self._checkpointer.checkpoint()
            self._log.close(next_lsn=committer.durable_lsn + 1 if clean else None)
        except (OSError, StorageError) as error:
            self._failure = StorageError(f"closing {self.path} failed: {error}. Nothing acknowledged is lost")

    def _release(self) -> None:
        """Give everything back, the lock last. Only when no thread of the engine is left. Idempotent."""
        if self._store.lock.held:
            close_backends(self._backends)
            self._store.state.close()
            self._store.lock.release()

    def _fail(self, error: WalbatchError) -> None:
        """Something below failed for good: stop acknowledging, stop delivering, tell everybody.

        Called from any thread.
        """
        if self._failure is None:
            self._failure = error
            if self._state == "open":
                self._state = "failed"
        self._committer.halt(error)
        self._dispatcher.fail(error)


_NOTHING_TO_CLOSE = CloseReport(
    settled=0, remaining=0, elapsed_s=0.0, reason="nothing to close in this process"
)
_COMMIT_GRACE_NS = 30 * NS_PER_S
"""How long close waits for the log to take what was accepted; a disk that takes longer is told as a failure."""
_STOP_GRACE_NS = 5 * NS_PER_S
"""How long close waits for batches in flight beyond its timeout: a backend must not be left in the middle lightly."""

_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_at_exit() -> None:
    """The interpreter ends: engines that were not closed leave their work in the log, in order."""
    for engine in list(_open_engines):
        with contextlib.suppress(Exception):
            engine.close(drain=False, timeout=1.0)


atexit.register(_close_at_exit)
