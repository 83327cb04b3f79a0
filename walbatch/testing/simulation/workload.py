"""Workloads: what a user does with an engine, written down for the oracle.

What is not here: where they are made to crash (`explore`).

The idea needed to read it: a workload is a function of a `Session`, which opens the engine it was given on the ports of
a simulated process, and notes what is submitted and acknowledged at the moment when the user learns of it.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from walbatch.config import Lane, Settings
from walbatch.errors import (
    ConfigError,
    CorruptionError,
    OperationCancelled,
    OperationDead,
    UnsupportedFormat,
    WalbatchError,
)
from walbatch.testing.simulation.backend import Manners
from walbatch.testing.simulation.faults import Fault
from walbatch.testing.simulation.history import (
    Acknowledged,
    CancelAsked,
    Cancelled,
    CancelRefused,
    Drained,
    DropAsked,
    Event,
    Letters,
    Opened,
    Predicted,
    Refused,
    RequeueAsked,
    Resolved,
    StatusTold,
    Submitted,
)
from walbatch.testing.simulation.laneplan import LanePlan
from walbatch.testing.simulation.looks import STORE, case_text, names_in, tree_bytes
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.testing.simulation.oracle import Oracle
from walbatch.types import PRIORITY_NORMAL, DeadLetter, Durability, OperationStatus

OpenEngine = Callable[[Process, Mapping[str, Lane], Settings], Any]
"""open_engine(process, lanes, settings): opens the engine under test on the ports of the process."""

Predict = Callable[[Machine], Predicted | None]
"""predict(machine): what opening the store on this machine would do; None where there is no store. It may write nothing."""

CLOSE_S = 120.0
"""Virtual time for a drain: beyond it the backlog is taken not to drain."""

REQUEUES_PER_S = 1e6

NOISE_BYTES = 4096
_NOISE = random.Random("payloads").randbytes(NOISE_BYTES)

QUICK = Settings(segment_bytes=4096, disk_bytes_max=2**24, timer_ms=5, checkpoint_ms=20, idle_stamp_ms=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A named life of a store: `run` is called with a session, and may open and close the engine as it likes."""

    name: str
    run: Callable[[Session], None]
    lanes: Mapping[str, LanePlan] = field(default_factory=lambda: {"put": LanePlan()})
    settings: Settings = QUICK
    faults: Sequence[Fault] = ()
    manners: Manners | None = None
    prepare: Callable[[Machine], None] | None = None
    """Turn the knobs of the new machine."""
    predict: Predict | None = None
    """Looks at the store before each opening; the oracle compares what it predicts."""
    verify: Callable[[Session], None] | None = None
    """What follows each crash; None: `verify_by_use`."""

    def oracle(self) -> Oracle:
        """An oracle that knows what these lanes promise."""
        return Oracle(
            exactly_once={name for name, lane in self.lanes.items() if lane.transactional},
            unordered={name for name, lane in self.lanes.items() if lane.order == "none"},
            by_shard={name for name, lane in self.lanes.items() if lane.order == "shard"},
            shards={name: lane.shards for name, lane in self.lanes.items()},
        )


class Session:
    """One process that uses the engine, and writes down what a user can know."""

    def __init__(self, process: Process, open_engine: OpenEngine, workload: Workload, life: str) -> None:
        self.process = process
        self.workload = workload
        self.life = life
        self.engine: Any = None
        self.is_damaged = False
        """Bytes on the disk were changed on purpose: the engine may stop."""
        self.is_verifying = False
        self._paused_meanwhile = False
        """A workload's own `verify` runs, and may call `verify_by_use` for the end."""
        self._resumed_late = False
        self._has_delayed = False
        self._open_engine = open_engine
        self._history: list[Event] = process.history
        self._tickets: list[tuple[bytes, Any, list[bool] | None]] = []
        self._payloads: dict[int, bytes] = {}
        """By LSN, of what this session has submitted."""
        self._count = 0

    def __repr__(self) -> str:
        return f"<Session {self.workload.name} life {self.life}, {self._count} submitted, {self.engine!r}>"

    def run(self, use: Callable[[Session], None]) -> None:
        """Use the store; where calls of the file system failed, the engine may refuse, and is closed then."""
        try:
            use(self)
        except WalbatchError:
            # Its threads would go on for ever, and hide what happened.
            with contextlib.suppress(WalbatchError):
                if self.engine is not None:
                    self.close()
            if not self.process.faults.hits:
                raise

    def open(self, **lanes: LanePlan) -> None:
        """Open the store. `lanes` are opened in another way than the workload says."""
        plans = {**self.workload.lanes, **lanes}
        made = {name: plan.lane(name, self.process) for name, plan in plans.items()}
        predicted = self._predict()
        self.process.faults.sync_failed = self._resumed_late = False
        hits = self.process.faults.hits
        try:
            self.engine = self._open_engine(self.process, made, self.workload.settings)
        except (CorruptionError, UnsupportedFormat) as error:
            self._history.append(
                Refused(
                    error=type(error).__name__, first_lsn=getattr(error, "first_lsn", None),
                    last_lsn=getattr(error, "last_lsn", None),
                )
            )  # fmt: skip
            raise
        if predicted is None or self.process.faults.hits != hits:
            self._history.append(Opened())
            return
        self._history.append(Opened(
            cases=tuple(case_text(case) for case in self.engine.recovery), next_lsn=self.engine.stats().submitted_lsn + 1,
            quarantine_bytes=tree_bytes(self.process.machine, f"{STORE}/quarantine"),
        ))  # fmt: skip

    def _predict(self) -> Predicted | None:
        """Look at a copy of the machine, where nobody is disturbed."""
        if self.workload.predict is None:
            return None
        machine = self.process.machine
        twin = machine.clone()
        before = twin.fingerprint()
        predicted = self.workload.predict(twin)
        if predicted is not None:
            predicted = replace(
                predicted, wrote=twin.fingerprint() != before,
                quarantine_bytes=tree_bytes(machine, f"{STORE}/quarantine"),
            )  # fmt: skip
            self._history.append(predicted)
        return predicted

    def submit(
        self, key: bytes = b"k", lane: str = "put", *, size: int = 0, payload: bytes | None = None, priority: int = PRIORITY_NORMAL,
        idempotency_key: bytes = b"", not_before_s: float | None = None, deadline_s: float | None = None,
    ) -> Any:  # fmt: skip
        """One operation; its payload has `size` bytes, or is given. Times are seconds from now. Returns its ticket."""
        options: dict[str, Any] = {}
        if priority != PRIORITY_NORMAL:
            options["priority"] = priority
        if idempotency_key:
            options["idempotency_key"] = idempotency_key
        now_s = self.process.clock.wall_ns() / 1e9
        options |= {
            name: now_s + seconds
            for name, seconds in (("not_before", not_before_s), ("deadline", deadline_s)) if seconds is not None
        }  # fmt: skip
        self._has_delayed = self._has_delayed or not_before_s is not None
        payload = self._begin(lane, key, size, payload, **options)
        ticket = self.engine.submit(lane, key=key, payload=payload, **options)
        self._acknowledge(payload, ticket.lsn)
        self._keep(payload, ticket, is_keyed=bool(idempotency_key))  # whose LSN may be that of another one
        return ticket

    def submit_many(
        self, keys: Sequence[bytes], lane: str = "put", *, size: int = 0, payloads: Sequence[bytes] = (),
        priority: int = PRIORITY_NORMAL,
    ) -> range:  # fmt: skip
        """Several at once, all or nothing."""
        given: Sequence[bytes | None] = payloads or [None] * len(keys)
        pairs = [
            (key, self._begin(lane, key, size, payload)) for key, payload in zip(keys, given, strict=True)
        ]
        options = {} if priority == PRIORITY_NORMAL else {"priority": priority}
        lsns: range = self.engine.submit_many(lane, pairs, **options)
        for (_, payload), lsn in zip(pairs, lsns, strict=False):  # a lane that logs nothing gives no LSNs
            self._acknowledge(payload, lsn)
            self._payloads[lsn] = payload
        return lsns

    def submit_nowait(self, key: bytes = b"k", lane: str = "put", *, size: int = 0) -> Callable[[], None]:
        """One without waiting; the function that is returned waits for durability, and notes it."""
        payload = self._begin(lane, key, size, None)
        ticket = self.engine.submit_nowait(lane, key=key, payload=payload)
        self._keep(payload, ticket)

        def wait() -> None:
            if ticket.lsn is not None:
                ticket.wait_durable()
            self._acknowledge(payload, ticket.lsn)

        return wait

    def _keep(self, payload: bytes, ticket: Any, *, is_keyed: bool = False) -> None:
        """Remember the ticket, and count what it tells its listener."""
        if ticket.lsn is not None and not is_keyed:
            self._payloads.setdefault(ticket.lsn, payload)
        promises = getattr(ticket, "promises", None)
        told: list[bool] | None = None
        if promises is not None:
            told = []
            promises[1].listen(functools.partial(told.append, True))
        self._tickets.append((payload, ticket, told))

    # --- what is given up ---

    @property
    def submitted_lsns(self) -> list[int]:
        """Of this session, as far as it was told, in the order in which it was."""
        return list(self._payloads)

    def cancel(self, lsn: int) -> bool:
        """Take back an operation of this session."""
        payload = self._payloads[lsn]
        self._history.append(CancelAsked(payload=payload, lsn=lsn))
        try:
            cancelled: bool = self.engine.cancel(lsn)
        except ConfigError:
            cancelled = False  # nothing was done
        if cancelled:
            told = all(ticket.done for name, ticket, _ in self._tickets if name == payload)
            self._history.append(Cancelled(payload=payload, told=told))
        else:
            self._history.append(CancelRefused(payload=payload))
        return cancelled

    def ask(self, lsn: int) -> OperationStatus:
        """Where an operation of this session is."""
        status: OperationStatus = self.engine.status(lsn)
        self._history.append(StatusTold(payload=self._payloads[lsn], status=status, lsn=lsn))
        return status

    def look_at_letters(self) -> list[DeadLetter]:
        """All dead letters. An engine without any such thing has none."""
        ask = getattr(self.engine, "dead_letters", None)
        letters: list[DeadLetter] = [] if ask is None else ask()
        self._history.append(Letters(letters=tuple(letters)))
        for letter in letters:
            status = self.engine.status(letter.lsn)
            if status is not OperationStatus.DEAD:
                raise AssertionError(f"operation {letter.lsn} has a dead letter, and is said to be {status}")
        return letters

    def requeue(self, lsns: Iterable[int]) -> int:
        """Submit dead letters again. Returns how many there were."""
        lsns = list(lsns)
        self._history.extend(RequeueAsked(lsn=lsn) for lsn in lsns)
        count: int = self.engine.requeue(lsns, per_second=REQUEUES_PER_S)
        return count

    def drop(self, lsns: Iterable[int]) -> int:
        """Drop dead letters. Returns how many there were."""
        lsns = list(lsns)
        self._history.extend(DropAsked(lsn=lsn) for lsn in lsns)
        count: int = self.engine.drop(lsns)
        return count

    # --- time, threads, the end ---

    def together(self, *actions: Callable[[], object]) -> None:
        """Run them in threads of their own, and wait for all. What the engine refuses is no breach."""

        def quietly(action: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                with contextlib.suppress(WalbatchError):
                    action()

            return run

        threads = [
            self.process.threads.spawn(f"user-{index}", quietly(action))
            for index, action in enumerate(actions)
        ]
        for thread in threads:
            thread.join()

    def pause(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.process.threads.event().wait(int(seconds * 1e9))

    def pause_lane(self, lane: str) -> None:
        """Flush nothing more of a lane. Another thread may be closing the engine."""
        self.engine.pause(lane)
        self._paused_meanwhile = True

    def resume_lane(self, lane: str) -> None:
        """Flush a paused lane again. An engine that is being closed may have passed it by."""
        self.engine.resume(lane)
        self._resumed_late = self._resumed_late or self.engine.stats().state != "open"

    def close(self, *, drain: bool = True) -> None:
        """Close the engine. Then every ticket must have been resolved, and nothing may have stopped it that did not fail."""
        stats = getattr(self.engine, "stats", None)
        self._paused_meanwhile = False
        # What is delayed stays, too; what is being read back may be.
        idle = stats is not None and any(
            lane.paused or lane.held or getattr(lane, "delayed", 0) or lane.reading_back for lane in stats().lanes.values()
        )  # fmt: skip
        # Nobody waits until a lane that delivers nothing has read to the end of the log, so that it can be trimmed.
        is_behind = stats is not None and any(
            (lane.paused or lane.held) and lane.reading_back for lane in stats().lanes.values()
        )
        report = self.engine.close(drain=drain, timeout=CLOSE_S)
        self.engine = None
        # Whose breaker is open, or who is broken, is not waited for either.
        idle = idle or self.process.misbehaves or self._has_delayed
        self._check_reason(report, idle=idle or self._paused_meanwhile or self._resumed_late)
        if report.reason == "drained" and (lost := self._stats_after(stats)):
            raise AssertionError(f"the engine has lost count of {lost} operations")
        tickets, self._tickets = self._tickets, []
        for payload, ticket, told in tickets:
            times = None if told is None else len(told)
            fate = _fate(ticket)
            self._history.append(
                Resolved(
                    payload=payload, done=ticket.done, applied=fate is OperationStatus.APPLIED, times=times,
                    dead=fate is OperationStatus.DEAD, cancelled=fate is OperationStatus.CANCELLED,
                )
            )  # fmt: skip
        if report.reason == "drained":
            whole = not (self.process.faults.hits or self.process.machine.fs.capacity_bytes or is_behind)
            self._history.append(Drained(segments=self._segments() if whole else None))
        elif report.reason == "timeout" and report.elapsed_s >= CLOSE_S / 2 and not self.process.faults.hits:
            raise AssertionError(f"the engine did not drain in {CLOSE_S} s of virtual time: {report}")

    @staticmethod
    def _stats_after(stats: Callable[[], Any] | None) -> int:
        """Operations that entered and are neither settled nor pending, as the engine counts."""
        return 0 if stats is None else getattr(stats(), "unaccounted", 0)

    def _check_reason(self, report: Any, *, idle: bool) -> None:
        """What the report may say. `idle`: a lane was paused or has no backend."""
        if report.reason.startswith("failed") and not self.may_fail:
            raise AssertionError(f"the engine stopped, and nothing had failed: {report}")
        if report.reason.startswith("drained,") and not idle:
            raise AssertionError(f"the engine left operations, and no lane was idle: {report}")

    @property
    def may_fail(self) -> bool:
        """Whether anything may stop an engine: damage, a failed call, a full disk, no descriptors left."""
        fs = self.process.machine.fs
        return bool(self.is_damaged or self.process.faults.hits or fs.capacity_bytes or fs.files_max)

    def _segments(self) -> int | None:
        """Segments in the store, if it is made as the shipped engine makes it."""
        names = names_in(self.process.machine, f"{STORE}/wal")
        return sum(name.endswith(".seg") for name in names) if names else None

    def _begin(
        self, lane: str, key: bytes, size: int, payload: bytes | None, *, not_before: float = 0, deadline: float = 0,
        idempotency_key: bytes = b"", priority: int = PRIORITY_NORMAL,
    ) -> bytes:  # fmt: skip
        given, payload = payload, f"{self.life}/{self._count}".encode()
        self._count += 1
        if given is not None:
            payload = given
        elif size > len(payload):  # what does not compress, so that the size on disk is what was asked for
            wanted = size - len(payload) - 1
            start = self._count * 97 % NOISE_BYTES
            payload += b":" + (_NOISE[start:] + _NOISE * (wanted // NOISE_BYTES + 1))[:wanted]
        plan = self.workload.lanes[lane]
        durability = Durability(plan.durability)
        grace_ns = (
            {Durability.SYNC: 0, Durability.NONE: None}[durability]
            if durability is not Durability.INTERVAL
            else int(plan.interval_ms * 1e6)
        )
        self._history.append(
            Submitted(
                lane=lane, key=key, payload=payload, grace_ns=grace_ns, syncs=self.process.faults.syncs,
                not_before_ns=int(not_before * 1_000_000_000), deadline_ns=int(deadline * 1_000_000_000),
                idempotency_key=idempotency_key,
            )
        )  # fmt: skip
        return payload

    def _acknowledge(self, payload: bytes, lsn: int | None) -> None:
        self._history.append(
            Acknowledged(
                payload=payload, lsn=lsn, at_ns=self.process.clock.now_ns, syncs=self.process.faults.syncs
            )
        )


def _fate(ticket: Any) -> OperationStatus | None:
    """What a ticket says of its operation; None: nothing, or that it is not known."""
    if not ticket.done:
        return None
    try:
        ticket.result(timeout=0)
    except OperationDead:
        return OperationStatus.DEAD
    except OperationCancelled:
        return OperationStatus.CANCELLED
    except WalbatchError:
        return None
    return OperationStatus.APPLIED
