"""The engine: wires the log, the committer, the dispatcher and the checkpointer of one store, and is its public face.

What is not here: any of their work. Methods check their arguments, then pass on.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import socket
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from walbatch import limits
from walbatch.config import NS_PER_MS, NS_PER_S, Lane, Settings
from walbatch.core.commit_group import fits_frame
from walbatch.core.health import HealthFacts, assess
from walbatch.core.history import History
from walbatch.core.pressure import Pressure
from walbatch.core.recovery import Case
from walbatch.core.routing import shard_of, shards_of
from walbatch.errors import (
    ConfigError,
    EngineClosed,
    OperationCancelled,
    OperationDead,
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
    make_options,
    set_up,
    trimmed_count,
)
from walbatch.metrics import CloseReport, EngineStats, Health
from walbatch.ports import Backend, Clock, Entropy, FileSystem, Memory, StateStore, Thread, Threads
from walbatch.runtime.checkpointer import CheckpointBase, Checkpointer
from walbatch.runtime.clock import RealClock, RealEntropy, RealThreads
from walbatch.runtime.committer import CommitSettings, Committer
from walbatch.runtime.dispatcher import HISTORY, Dispatcher, DispatchSettings
from walbatch.runtime.identities import KeyIndex
from walbatch.runtime.lane import LaneSetup
from walbatch.runtime.letters import DeadLetters, LetterSettings
from walbatch.runtime.ticket import Promise, Ticket, kept_promise, timeout_to_ns
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.log import Log, LogSettings
from walbatch.storage.memory import RealMemory
from walbatch.storage.store import OpenStore, open_store, storage_errors
from walbatch.storage.survey import Progress, segment_numbers
from walbatch.types import (
    NO_OPTIONS,
    PRIORITY_NORMAL,
    DeadLetter,
    Durability,
    OperationStatus,
    Options,
    Position,
    When,
)

if TYPE_CHECKING:
    from types import TracebackType

Payload = bytes | bytearray | memoryview
REQUEUE_PREFIX = b"\0requeue "
"""Of the idempotency keys under which dead letters are submitted again. No user's key begins with a zero byte."""
CHANGEABLE = frozenset(
    {"trigger", "controller", "retry", "strategy", "timeout_s", "overdue", "cost", "batch_cost"}
)
"""Settings of a lane that may change while the store is open. The others decide where operations are, or in what order."""
_logger = logging.getLogger("walbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The ports an engine runs on. The default is the real machine; a simulation gives its own."""

    fs: FileSystem = field(default_factory=RealFileSystem)
    clock: Clock = field(default_factory=RealClock)
    threads: Threads = field(default_factory=RealThreads)
    entropy: Entropy = field(default_factory=RealEntropy)
    memory: Memory = field(default_factory=RealMemory)
    open_state: Callable[[str, bytes, str], StateStore] = LmdbState.open_for_engine
    """open_state(path, store UUID, quarantine): an empty quarantine means that nothing may be moved there."""


class Engine:
    """A store that is open. Make one with `Engine.open`; all methods are safe from any thread.

    An engine belongs to the process that opened it: in a forked child every call raises EngineClosed.
    """

    def __init__(
        self, *, store: OpenStore, log: Log, environment: Environment, lanes: Mapping[str, Lane], setups: Sequence[LaneSetup],
        settings: Settings, letters: Sequence[DeadLetter], given_up: frozenset[int], keys: KeyIndex, history: History,
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
        # Guards _lanes while one of them is changed.
        self._configuring = environment.threads.condition()
        self._closer: Thread | None = None
        self._pid = os.getpid()
        self._pending_at_open = plan.pending
        self._keys = keys
        self.recovery: tuple[Case, ...] = plan.cases
        """What recovery found when the store was opened."""
        clock, threads = environment.clock, environment.threads
        checkpoint = store.facts.checkpoint
        watermark = checkpoint.watermark if checkpoint else 0
        self._letters = DeadLetters(
            state=store.state, threads=threads, clock=clock, letters=letters,
            settings=LetterSettings(
                count_max=settings.dead_letters_max, bytes_max=settings.dead_letter_bytes_max,
                age_ns=None if settings.dead_letter_age_s is None else int(settings.dead_letter_age_s * NS_PER_S),
            ),
        )  # fmt: skip
        self._dispatcher = Dispatcher(
            log=log, clock=clock, threads=threads, entropy=environment.entropy,
            settings=DispatchSettings(
                timer_ns=int(settings.timer_ms * NS_PER_MS), in_flight_max=settings.in_flight_max,
                memory_bytes_max=settings.memory_bytes_max,
            ),
            store=store.uuid, epoch=plan.epoch, lanes=setups, start=Position(plan.first_segment, limits.SECTOR_BYTES),
            end_lsn=plan.next_lsn - 1, watermark=watermark, letters=self._letters,
            memory=environment.memory, state=store.state, history=history, given_up=given_up, on_failure=self._fail,
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
            is_pressed=lambda: self._dispatcher.pressure is Pressure.PAUSE,
        )  # fmt: skip
        self._checkpointer = Checkpointer(
            log=log, state=store.state, clock=clock, threads=threads, interval_ns=int(settings.checkpoint_ms * NS_PER_MS),
            base=CheckpointBase(
                generation=checkpoint.generation if checkpoint else 0, epoch=plan.epoch,
                settled_count=checkpoint.settled_count if checkpoint else trimmed_count(store),
            ),
            settled=self._dispatcher.settled, durable_lsn=lambda: self._committer.durable_lsn, on_failure=self._fail,
            before=self._save_beside,
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
            snapshots, controller_findings = store.state.load_controllers()
            setups = set_up(store, lanes, remembered, kinds, opened, snapshots)
            history = _decode_history(snapshots.get(HISTORY))
            letters, letter_findings = store.state.load_letters()
            given_up, given_up_findings = store.state.load_given_up()
            uses, keys_lsn, key_findings = store.state.load_keys()
            findings = [*controller_findings, *letter_findings, *given_up_findings, *key_findings]
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
                    keys = KeyIndex(
                        threads=threads,
                        age_ns=int(settings.idempotency_window_s * NS_PER_S),
                        uses=uses,
                        saved_lsn=keys_lsn,
                    )
                    keys.read_log(log, Position(store.plan.first_segment, limits.SECTOR_BYTES))
                    letters = _without_requeued(store.state, letters, keys)
                    engine = cls(
                        store=store, log=log, environment=environment, lanes=lanes, setups=setups, settings=settings,
                        letters=letters, given_up=given_up, keys=keys, history=history,
                    )  # fmt: skip
                    engine._start()
                except BaseException:
                    log.close(next_lsn=None)
                    raise
        except BaseException:
            close_backends(opened)
            store.state.close()
            store.lock.release()
            raise
        for finding in findings:
            _logger.warning("%s: %s", root, finding)
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
        idempotency_key: Payload = b"",
        not_before: When = None,
        deadline: When = None,
    ) -> Ticket:
        """Submit one operation; returns when it is durable in its lane's sense ("sync": synced to disk).

        - `timeout` (seconds; default: `Settings.submit_timeout_s`; None: for ever) bounds the wait for room, not the commit itself.
        - `idempotency_key`: a second submission to the lane with the same key, within `Settings.idempotency_window_s`, accepts
          nothing and returns a ticket of the first, also after a restart.
        - `not_before`, `deadline`: seconds since 1970, or an aware datetime. The operation is not delivered before the one, and
          becomes a dead letter after the other.

        Key and payload are copied. Raises ConfigError (also for a deadline that has passed), OperationTooLarge, Overloaded and
        EngineClosed (nothing was accepted); DurabilityUnknown and StorageError when the log failed.
        """
        options = self._options(kind, idempotency_key, not_before, deadline)
        return self._submit(kind, key, payload, priority, timeout, options, wait=True)

    def submit_nowait(
        self,
        kind: str,
        *,
        key: Payload,
        payload: Payload = b"",
        priority: int = PRIORITY_NORMAL,
        idempotency_key: Payload = b"",
        not_before: When = None,
        deadline: When = None,
    ) -> Ticket:
        """Submit one operation without waiting; `ticket.wait_durable()` tells when it is durable.

        Raises as `submit`; Overloaded at once where that would wait.
        """
        options = self._options(kind, idempotency_key, not_before, deadline)
        return self._submit(kind, key, payload, priority, 0.0, options, wait=False)

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

    def _options(self, kind: str, idempotency_key: Payload, not_before: When, deadline: When) -> Options:
        """What few operations have, checked."""
        if not idempotency_key and not_before is None and deadline is None:
            return NO_OPTIONS
        return make_options(
            kind, idempotency_key=idempotency_key, not_before=not_before, deadline=deadline,
            wall_ns=self._environment.clock.wall_ns(),
        )  # fmt: skip

    def _submit(
        self, kind: str, key: Payload, payload: Payload, priority: int, timeout: float | None, options: Options, *, wait: bool,
        synced: bool = False,
    ) -> Ticket:  # fmt: skip
        """Submit one operation. `synced`: it is synced when this returns, also on a lane that syncs later."""
        limit, index, lane, shards = self._lane(kind)
        check_priority(priority)
        key = limit.key(kind, key)
        payload = limit.payload(kind, payload)
        shard = shard_of(key, shards) if shards > 1 else 0
        settled = Promise(self._environment.threads)
        dispatcher = self._dispatcher
        if lane.durability is Durability.NONE:
            if options.idempotency_key:
                raise ConfigError(f"lane {kind!r} logs nothing, so it remembers no idempotency keys")
            dispatcher.submit_unlogged(
                index, [shard], [key], [payload], priority, timeout_ns=self._timeout(timeout), options=options,
                register=lambda sequence: dispatcher.register(index, sequence, settled),
            )  # fmt: skip
            return Ticket(lane=kind, lsn=None, durability=lane.durability, durable=None, settled=settled)

        def submit(register: Callable[[int, Promise], None]) -> tuple[int, Promise]:
            return self._committer.submit(
                index, (shard,), (key,), (payload,), priority, len(key) + len(payload), options=options,
                needs_sync=synced or lane.durability is Durability.SYNC, timeout_ns=self._timeout(timeout), wait=wait,
                register=register,
            )  # fmt: skip

        def register(lsn: int, _: Promise) -> None:
            dispatcher.register(index, lsn, settled)

        durability = Durability(lane.durability)
        if options.idempotency_key:
            return self._submit_once(
                kind, durability, options.idempotency_key, submit, register, settled, wait=wait
            )
        lsn, durable = submit(register)
        return Ticket(lane=kind, lsn=lsn, durability=durability, durable=durable, settled=settled)

    def _submit_once(
        self, kind: str, durability: Durability, key: bytes,
        submit: Callable[[Callable[[int, Promise], None]], tuple[int, Promise]],
        register: Callable[[int, Promise], None], settled: Promise, *, wait: bool,
    ) -> Ticket:  # fmt: skip
        """Submit unless the idempotency key was used: then a ticket of the operation that used it."""
        clock = self._environment.clock
        used = self._keys.reserve(kind, key, clock.wall_ns())
        if used is None:

            def register_both(lsn: int, durable: Promise) -> None:
                register(lsn, durable)
                self._keys.use(kind, key, lsn, clock.wall_ns(), durable=durable, settled=settled)

            try:
                lsn, durable = submit(register_both)
            finally:
                self._keys.release(kind, key)
            return Ticket(lane=kind, lsn=lsn, durability=durability, durable=durable, settled=settled)
        if wait and used.durable is not None:
            used.durable.wait(None)
            used.durable.take()
        first = used.settled or self._settled_promise(kind, used.lsn)
        durable = used.durable or kept_promise(self._environment.threads)
        return Ticket(lane=kind, lsn=used.lsn, durability=durability, durable=durable, settled=first)

    def _settled_promise(self, kind: str, lsn: int) -> Promise:
        """A promise for an operation that was submitted before, by somebody else or an earlier process."""
        promise = self._dispatcher.promises.find(lsn)
        if promise is not None:
            return promise
        promise = Promise(self._environment.threads)
        self._dispatcher.register(self._index[kind], lsn, promise)
        # Registered first, and asked then: whoever settles it in between resolves it.
        match self.status(lsn):
            case OperationStatus.APPLIED:
                promise.resolve(None)
            case OperationStatus.DEAD:
                promise.resolve(error=OperationDead(lsn, "earlier", "see its dead letter"))
            case OperationStatus.CANCELLED:
                promise.resolve(error=OperationCancelled(lsn))
            case _:
                pass
        return promise

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
        """Flush a paused lane again, or one whose backend said that it was broken."""
        self._lane(kind)
        self._dispatcher.pause(kind, paused=False)

    def configure(self, kind: str, **changes: Any) -> Lane:
        """Change settings of a lane at run time: those in `CHANGEABLE`.

        They hold from the next batch on, until the engine is closed; give them to `open` as well to keep them. Returns the lane as
        it is now. Raises ConfigError for anything else, and for what `Lane` refuses.
        """
        self._check_owner()
        self._lane(kind)
        fixed = sorted(set(changes) - CHANGEABLE)
        if fixed:
            raise ConfigError(
                f"{', '.join(fixed)} of lane {kind!r} cannot change while the store is open: open it anew; "
                f"what can: {', '.join(sorted(CHANGEABLE))}"
            )
        with self._configuring:
            lane = replace(self._lanes[kind], **changes)
            self._dispatcher.configure(kind, lane)
            self._lanes[kind] = lane
        return lane

    def cancel(self, lsn: int) -> bool:
        """Take back an operation that is not in flight. Durable when it returns.

        Returns whether it was cancelled: False if it is in flight or settled. Its ticket's `result` raises OperationCancelled.
        Raises ConfigError for an LSN that names nothing, StorageError (then it goes on).
        """
        self._check_owner()
        self._check_lsn(lsn)
        return self._dispatcher.finder.cancel(lsn)

    def status(
        self, lsn: int | None = None, *, kind: str | None = None, idempotency_key: Payload = b""
    ) -> OperationStatus:
        """Where an operation is, by its LSN, or by the idempotency key that it was submitted with to a lane.

        Also after a restart. What was settled long ago counts as applied unless its dead letter is still there; one whose dead
        letter was requeued or dropped counts as cancelled until it is trimmed. May read the log. Raises ConfigError for what
        names nothing.
        """
        self._check_owner()
        if (lsn is None) == (not idempotency_key) or (lsn is None and kind is None):
            raise ConfigError("status takes an LSN, or a kind and an idempotency key")
        if lsn is None:
            used = self._keys.find(kind or "", bytes(idempotency_key), self._environment.clock.wall_ns())
            if used is None:
                raise ConfigError(
                    f"lane {kind!r} does not remember the idempotency key {bytes(idempotency_key)!r}"
                )
            lsn = used
        self._check_lsn(lsn)
        if self._letters.holds(lsn):
            return OperationStatus.DEAD
        if lsn > self._committer.durable_lsn and not self._dispatcher.finder.is_cancelled(lsn):
            return OperationStatus.PENDING
        return self._dispatcher.finder.status(lsn)

    def _check_lsn(self, lsn: int) -> None:
        if type(lsn) is not int or not 0 < lsn <= self._committer.submitted_lsn:
            raise ConfigError(
                f"no operation has LSN {lsn!r}: they go from 1 to {self._committer.submitted_lsn:,}"
            )

    # --- dead letters ---

    def dead_letters(self, kind: str | None = None) -> list[DeadLetter]:
        """The dead letters, of one lane or of all, oldest operation first. Raises StorageError."""
        self._check_owner()
        return [letter for letter in self._letters.read() if kind is None or letter.lane == kind]

    def requeue(self, lsns: Iterable[int] | None = None, *, per_second: float = 100.0) -> int:
        """Submit dead letters again, and drop them; None means all. Returns how many there were.

        Each gets a new LSN and keeps its identity: `Operation.identity` is the LSN that it had first. At most `per_second` are
        submitted, so that what failed does not hit a backend that has just recovered all at once. A crash in the middle submits
        none twice. Raises as `submit`; what was requeued before stays so.
        """
        self._check_owner()
        if not per_second > 0:
            raise ConfigError(f"per_second is {per_second!r}, but must be above 0")
        wanted = None if lsns is None else frozenset(lsns)
        count = 0
        for letter in self._letters.read():
            if wanted is not None and letter.lsn not in wanted:
                continue
            if count:
                self._pause_for(int(NS_PER_S / per_second))
            self._requeue(letter)
            count += 1
        return count

    def _requeue(self, letter: DeadLetter) -> None:
        """Submit one letter, then drop it.

        Crash story: in between, both are there; the next opening, or requeueing again, finds the operation by its idempotency key,
        which is made of the letter's LSN, and drops the letter. The operation is synced before that, whatever its lane: the letter
        was durable.
        """
        lane = self._lanes.get(letter.lane)
        if lane is None or lane.durability is Durability.NONE:
            raise ConfigError(
                f"the dead letter {letter.lsn} is of lane {letter.lane!r}, which is not open here: open the store with it"
            )
        options = replace(
            letter.options, origin=letter.options.origin or letter.lsn, deadline_ns=0, not_before_ns=0,
            idempotency_key=REQUEUE_PREFIX + b"%d" % letter.lsn,
        )  # fmt: skip
        self._submit(
            letter.lane, letter.key, letter.payload, letter.priority, -1.0, options, wait=True, synced=True
        )
        self._letters.remove([letter.lsn])

    def drop(self, lsns: Iterable[int]) -> int:
        """Drop dead letters for good. Returns how many there were. Raises StorageError."""
        self._check_owner()
        return self._letters.remove(list(lsns))

    def _pause_for(self, pause_ns: int) -> None:
        """Wait, unless the engine is closed meanwhile."""
        with self._closing:
            self._closing.wait(pause_ns)
        self._check_owner()

    def stats(self) -> EngineStats:
        """A frozen snapshot.

        `pending` is exact once everything that was pending at the opening has been read back.
        """
        if self._pid != os.getpid():
            self._check_owner()  # in a forked child nobody would ever release the engine's locks
        committer = self._committer
        report = self._dispatcher.report()
        committed = committer.committed  # after the report: whatever is settled has been committed
        return EngineStats(
            state=self._state, submitted_lsn=committer.submitted_lsn, durable_lsn=committer.durable_lsn,
            settled_lsn=report.settled_lsn, checkpointed_lsn=self._checkpointer.checkpointed_lsn,
            pending=max(0, self._pending_at_open + committed - report.settled), commits=committer.commits, syncs=committer.syncs,
            committed=committed, disk_bytes=self._log.disk_bytes, lanes=report.lanes, submitted=committed,
            pending_at_open=self._pending_at_open, applied=report.applied, dead=report.dead, cancelled=report.cancelled,
            unlogged=report.unlogged, memory_bytes=report.memory_bytes, peak_memory_bytes=report.peak_memory_bytes,
            batch_stats=report.batch_stats,
        )  # fmt: skip

    def health(self) -> Health:
        """The verdict on this engine, with a reason for everything that is not as it should be. Never blocks for long."""
        if self._pid != os.getpid():
            self._check_owner()
        facts = self._dispatcher.facts()
        times = self._committer.sync_times.whole(now_ns=self._environment.clock.monotonic_ns())
        settings = self._settings
        return assess(
            HealthFacts(
                failure="" if self._failure is None else str(self._failure), memory_bytes=facts.memory_bytes,
                memory_bytes_max=facts.memory_bytes_max, disk_bytes=self._log.disk_bytes, disk_bytes_max=settings.disk_bytes_max,
                syncs=times.count, sync_s_p99=times.quantile(0.99) / NS_PER_S, dead_letters=len(self._letters),
                dead_letters_max=settings.dead_letters_max, dead_letter_bytes=self._letters.bytes,
                dead_letter_bytes_max=settings.dead_letter_bytes_max, abandoned=facts.abandoned, abandoned_max=limits.ABANDONED_MAX,
                clock_jump_s=facts.clock_jump_s, lanes=facts.lanes, shards=facts.shards,
            )
        )  # fmt: skip

    def _save_beside(self, covered_lsn: int) -> None:
        """What goes to state/ with a checkpoint. `covered_lsn`: both generations cover everything up to it.

        Crash story: idempotency keys are saved before the checkpoint that lets their operations be trimmed, so each is in the
        log or in state/. What controllers have learnt may be lost: they learn again.
        """
        state = self._store.state
        self._keys.save(
            state, up_to_lsn=self._committer.durable_lsn, wall_ns=self._environment.clock.wall_ns()
        )
        snapshots = self._dispatcher.controllers(
            self._environment.clock.monotonic_ns(), last=self._state != "open"
        )
        if snapshots:
            state.save_controllers(snapshots)
        state.forget_given_up(covered_lsn)
        self._dispatcher.forget_given_up(covered_lsn)

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
            reason = "drained, except for what is delayed, paused, or has no backend that works"
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


def _decode_history(data: bytes | None) -> History:
    """The history that was kept; a new one where there is none, or where it says nothing."""
    with contextlib.suppress(ValueError):
        if data is not None:
            return History.decode(data)
    return History()


def _without_requeued(state: StateStore, letters: Sequence[DeadLetter], keys: KeyIndex) -> list[DeadLetter]:
    """Drop the letters whose operations were submitted again by a process that was cut off before it dropped them.

    Later their keys may have left the window, and requeueing would submit them twice. Returns the other letters; without room on
    the disk, all.
    """
    requeued = {
        letter.lsn for letter in letters if (letter.lane, REQUEUE_PREFIX + b"%d" % letter.lsn) in keys.own
    }
    if requeued:
        try:
            state.unbury(requeued)
        except StorageError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            return list(letters)
    return [letter for letter in letters if letter.lsn not in requeued]


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
