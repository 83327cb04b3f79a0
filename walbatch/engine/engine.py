"""The public face of the engine: checks who calls, and passes on.

What is not here: any of the work. `opening` puts the parts together, `assembly` holds them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self

from walbatch import limits
from walbatch.config import NS_PER_S, Lane, Settings
from walbatch.core.health import HealthFacts, assess
from walbatch.core.recovery import Case
from walbatch.engine.assembly import Assembly, Environment
from walbatch.engine.closing import NOTHING_TO_CLOSE, Closing
from walbatch.engine.opening import open_assembly
from walbatch.engine.requeueing import can_requeue, requeue
from walbatch.engine.submission import Payload, Submission
from walbatch.errors import ConfigError
from walbatch.metrics import CloseReport, EngineStats, Health
from walbatch.runtime.ticket import Ticket, timeout_to_ns
from walbatch.storage.survey import Progress
from walbatch.types import PRIORITY_NORMAL, DeadLetter, OperationStatus, When

if TYPE_CHECKING:
    from types import TracebackType

CHANGEABLE: Final = frozenset(
    {"trigger", "controller", "retry", "strategy", "timeout_s", "overdue", "cost", "batch_cost"}
)
"""Settings of a lane that may change while the store is open. The others decide where operations are, or in what order."""


class Engine:
    """A store that is open. Make one with `Engine.open`; all methods are safe from any thread.

    An engine belongs to the process that opened it: in a forked child every call raises EngineClosed.
    """

    def __init__(self, assembly: Assembly, lanes: Mapping[str, Lane]) -> None:
        """Not for users: see `Engine.open`."""
        self.path = assembly.path
        self.recovery: tuple[Case, ...] = assembly.store.plan.cases
        """What recovery found when the store was opened."""
        self._assembly = assembly
        self._committer = assembly.committer
        self._dispatcher = assembly.dispatcher
        self._letters = assembly.letters
        self._clock = assembly.environment.clock
        self._lanes = dict(lanes)
        # Guards _lanes while one of them is changed.
        self._configuring = assembly.environment.threads.condition()
        self._submission = Submission(assembly, self._lanes, self.status)
        self._closing = Closing(assembly)

    def __repr__(self) -> str:
        return (
            f"<Engine {self.path} {self._assembly.state}: submitted lsn {self._committer.submitted_lsn}, durable "
            f"{self._committer.durable_lsn}, settled {self._dispatcher.overview.settled_lsn()}>"
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
        assembly = open_assembly(
            path, lanes, settings=Settings() if settings is None else settings, environment=environment or Environment(),
            verify=verify, progress=progress,
        )  # fmt: skip
        engine = cls(assembly, lanes)
        _open_engines.add(engine)
        return engine

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
          nothing and returns a ticket of the first, also after a restart, whatever its payload is.
        - `not_before`, `deadline`: seconds since 1970, or an aware datetime. The operation is not delivered before the one, and
          becomes a dead letter after the other.

        Key and payload are copied. Raises ConfigError (also for a deadline that has passed), OperationTooLarge, Overloaded and
        EngineClosed (nothing was accepted); DurabilityUnknown and StorageError when the log failed.
        """
        options = self._submission.options(kind, idempotency_key, not_before, deadline)
        return self._submission.submit(kind, key, payload, priority, timeout, options, wait=True)

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
        options = self._submission.options(kind, idempotency_key, not_before, deadline)
        return self._submission.submit(kind, key, payload, priority, 0.0, options, wait=False)

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
        return self._submission.submit_many(kind, operations, priority, timeout)

    # --- control ---

    def flush(self, kind: str | None = None, *, timeout: float | None = None) -> None:
        """Wait until everything submitted so far is settled, cutting batches at once.

        `kind` names one lane; without it, all lanes that have a backend are flushed.

        Raises ResultTimeout (the flush goes on; it says what is in the way), ConfigError at once for a lane that has work and no
        backend, or is paused, BackendError when nothing is left but what waits in shards whose backend is broken, or the reason
        why the engine stopped. An open breaker is waited for.
        """
        self._assembly.check_owner()
        if kind is not None:
            self._submission.lane(kind)
        names = (
            [kind]
            if kind is not None
            else [name for name, lane in self._lanes.items() if lane.backend is not None]
        )
        self._dispatcher.flushing.flush(names, self._committer.submitted_lsn, timeout_to_ns(timeout))

    def pause(self, kind: str) -> None:
        """Flush nothing more of a lane; submitting goes on. Batches in flight are not recalled."""
        self._submission.lane(kind)
        self._dispatcher.pause(kind, paused=True)

    def resume(self, kind: str) -> None:
        """Flush a paused lane again, or one whose backend said that it was broken."""
        self._submission.lane(kind)
        self._dispatcher.pause(kind, paused=False)

    def configure(self, kind: str, **changes: Any) -> Lane:
        """Change settings of a lane at run time: those in `CHANGEABLE`.

        They hold from the next batch on, until the engine is closed; give them to `open` as well to keep them. Returns the lane as
        it is now. Raises ConfigError for anything else, and for what `Lane` refuses.
        """
        self._assembly.check_owner()
        self._submission.lane(kind)
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
        self._assembly.check_owner()
        self._check_lsn(lsn)
        self._committer.await_written(lsn)
        return self._dispatcher.finder.cancel(lsn)

    def status(
        self, lsn: int | None = None, *, kind: str | None = None, idempotency_key: Payload = b""
    ) -> OperationStatus:
        """Where an operation is, by its LSN, or by the idempotency key that it was submitted with to a lane.

        Also after a restart. What was settled long ago counts as applied unless its dead letter is still there; one whose dead
        letter was requeued or dropped counts as cancelled until it is trimmed. May read the log. Raises ConfigError for what
        names nothing.
        """
        self._assembly.check_owner()
        if (lsn is None) == (not idempotency_key) or (lsn is None and kind is None):
            raise ConfigError("status takes an LSN, or a kind and an idempotency key")
        if lsn is None:
            used = self._assembly.keys.find(kind or "", bytes(idempotency_key), self._clock.wall_ns())
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
        self._assembly.check_owner()
        return [letter for letter in self._letters.read() if kind is None or letter.lane == kind]

    def requeue(self, lsns: Iterable[int] | None = None, *, per_second: float = 100.0) -> int:
        """Submit dead letters again, and drop them; None means all. Returns how many there were.

        Each gets a new LSN and keeps its identity: `Operation.identity` is the LSN that it had first. At most `per_second` are
        submitted, so that what failed does not hit a backend that has just recovered all at once. A crash in the middle submits
        none twice, nor do two calls at once. What cannot be submitted, since its lane is not open here, say, stays, and ConfigError
        tells of it when all others are done. Raises otherwise as `submit`; what was requeued before stays so.
        """
        self._assembly.check_owner()
        if not per_second > 0:
            raise ConfigError(f"per_second is {per_second!r}, but must be above 0")
        wanted = None if lsns is None else frozenset(_checked_lsns(lsns))
        count = 0
        staying: Counter[str] = Counter()
        problems: list[str] = []
        for letter in self._letters.read():
            if wanted is not None and letter.lsn not in wanted:
                continue
            if not can_requeue(letter, self._lanes):
                staying[letter.lane] += 1
                continue
            if count:
                self._closing.pause_for(int(NS_PER_S / per_second))
                self._assembly.check_owner()
            with self._letters.claimed(letter.lsn) as is_mine:
                if not is_mine:
                    continue  # it was dropped, or somebody else submits it
                try:
                    requeue(letter, submission=self._submission, letters=self._letters)
                except ConfigError as error:
                    problems.append(f"the dead letter {letter.lsn} stays: {error}")
                else:
                    count += 1
        problems += [
            f"{'the dead letter' if stay == 1 else f'{stay:,} dead letters'} of lane {name!r} "
            f"{'stays' if stay == 1 else 'stay'}: the lane is not open here: open the store with it"
            for name, stay in staying.items()
        ]
        if problems:
            raise ConfigError(*problems)
        return count

    def drop(self, lsns: Iterable[int]) -> int:
        """Drop dead letters for good, but for those that are being requeued right now. Returns how many. Raises StorageError."""
        self._assembly.check_owner()
        return self._letters.remove(_checked_lsns(lsns))

    def stats(self) -> EngineStats:
        """A frozen snapshot.

        `pending` is exact once everything that was pending at the opening has been read back.
        """
        if self._assembly.pid != os.getpid():
            self._assembly.check_owner()  # in a forked child nobody would ever release the engine's locks
        assembly, committer = self._assembly, self._committer
        report = self._dispatcher.overview.report()
        committed = committer.committed  # after the report: whatever is settled has been committed
        pending = max(0, assembly.pending_at_open + committed - report.settled)
        return EngineStats(
            state=assembly.state, submitted_lsn=committer.submitted_lsn, durable_lsn=committer.durable_lsn,
            settled_lsn=report.settled_lsn, checkpointed_lsn=assembly.checkpointer.checkpointed_lsn, pending=pending,
            commits=committer.commits, syncs=committer.syncs, committed=committed, disk_bytes=assembly.log.disk_bytes,
            lanes=report.lanes, submitted=committed, pending_at_open=assembly.pending_at_open, applied=report.applied,
            dead=report.dead, cancelled=report.cancelled, unlogged=report.unlogged, memory_bytes=report.memory_bytes,
            peak_memory_bytes=report.peak_memory_bytes, batch_stats=report.batch_stats,
        )  # fmt: skip

    def health(self) -> Health:
        """The verdict on this engine, with a reason for everything that is not as it should be. Never blocks for long."""
        if self._assembly.pid != os.getpid():
            self._assembly.check_owner()
        assembly = self._assembly
        settings, failure = assembly.settings, assembly.failure
        self._dispatcher.look_around()
        facts = self._dispatcher.overview.facts()
        times = self._committer.sync_times.whole(now_ns=self._clock.monotonic_ns())
        return assess(
            HealthFacts(
                failure="" if failure is None else str(failure), closed=assembly.state in {"closing", "closed"},
                memory_bytes=facts.memory_bytes,
                memory_bytes_max=facts.memory_bytes_max, disk_bytes=assembly.log.disk_bytes, disk_bytes_max=settings.disk_bytes_max,
                syncs=times.count, sync_s_p99=times.quantile(0.99) / NS_PER_S, dead_letters=len(self._letters),
                dead_letters_max=settings.dead_letters_max, dead_letter_bytes=self._letters.bytes,
                dead_letter_bytes_max=settings.dead_letter_bytes_max, abandoned=facts.abandoned, abandoned_max=limits.ABANDONED_MAX,
                clock_jump_s=facts.clock_jump_s, lanes=facts.lanes, shards=facts.shards,
            )
        )  # fmt: skip

    # --- closing ---

    def close(self, *, drain: bool = True, timeout: float | None = 30.0) -> CloseReport:
        """Accept nothing more, make durable what was accepted, drain, checkpoint, release the store.

        `timeout` (seconds; None: for ever) bounds the drain; what is left stays in the log. Idempotent and callable from any
        thread. The work is done by a thread of its own: if the wait for it is interrupted, it goes on. Called from a backend,
        it does not wait and does not drain. A backend that does not return, from `apply` or from its own `close`, keeps the store
        locked until it does, so that nobody else delivers at the same time. Returns what it achieved.

        Callable from a signal handler. If that has cut into another call of this engine (one that does not just wait), it does not
        wait either, since that call cannot go on before the handler returns: the report says "closing", and the engine is closed
        as soon as the call goes on. Raising an exception in the handler, so that `with Engine.open(...)` closes, is simpler.
        """
        if self._assembly.pid != os.getpid():
            return NOTHING_TO_CLOSE  # a forked child: neither the files nor the threads are here
        return self._closing.close(drain=drain, timeout=timeout, engine=self)


def _checked_lsns(lsns: object) -> list[int]:
    """LSNs as a list. Raises ConfigError."""
    found = list(lsns) if isinstance(lsns, Iterable) and not isinstance(lsns, (str, bytes)) else None
    if found is None or not all(type(lsn) is int for lsn in found):
        raise ConfigError(f"dead letters are named by LSNs, in a list of int, not by {lsns!r}")
    return found


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_at_exit() -> None:
    """The interpreter ends: engines that were not closed leave their work in the log, in order."""
    for engine in list(_open_engines):
        with contextlib.suppress(Exception):
            engine.close(drain=False, timeout=1.0)


atexit.register(_close_at_exit)
