"""Workloads: what a user does with an engine, written down for the oracle.

What is not here: where they are made to crash (`explore`).

The idea needed to read it: a workload is a function of a `Session`, which opens the engine it was given on the ports of
a simulated process, and notes what is submitted and acknowledged at the moment when the user learns of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from walbatch.config import Lane, Settings, Trigger
from walbatch.errors import WalbatchError
from walbatch.testing.simulation.backend import Manners
from walbatch.testing.simulation.faults import Fault
from walbatch.testing.simulation.history import Acknowledged, Drained, Event, Opened, Resolved, Submitted
from walbatch.testing.simulation.machine import Machine, Process
from walbatch.types import Durability

OpenEngine = Callable[[Process, Mapping[str, Lane], Settings], Any]
"""open_engine(process, lanes, settings): opens the engine under test on the ports of the process."""

STORE = "/store"
CLOSE_S = 120.0
"""Virtual time for a drain: beyond it the backlog is taken not to drain."""

PROMPT = Trigger(count=4, linger_ms=1)
QUICK = Settings(segment_bytes=4096, disk_bytes_max=2**24, timer_ms=5, checkpoint_ms=20, idle_stamp_ms=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """A lane of a workload: everything of a `Lane` but its backend."""

    transactional: bool = False
    shards: int = 1
    order: str = "key"
    durability: str = "sync"
    interval_ms: float = 20.0
    trigger: Trigger = PROMPT

    def lane(self, name: str, process: Process) -> Lane:
        """The lane, with a model backend."""
        return Lane(
            process.backend(name, transactional=self.transactional), shards=self.shards, order=self.order,
            durability=self.durability, interval_ms=self.interval_ms, trigger=self.trigger,
        )  # fmt: skip


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


class Session:
    """One process that uses the engine, and writes down what a user can know."""

    def __init__(self, process: Process, open_engine: OpenEngine, workload: Workload, life: str) -> None:
        self.process = process
        self.workload = workload
        self.life = life
        self.engine: Any = None
        self._open_engine = open_engine
        self._history: list[Event] = process.history
        self._tickets: list[tuple[bytes, Any]] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<Session {self.workload.name} life {self.life}, {self._count} submitted, {self.engine!r}>"

    def run(self, use: Callable[[Session], None]) -> None:
        """Use the store; where calls of the file system failed, the engine may refuse, and is closed then."""
        try:
            use(self)
        except WalbatchError:
            if not self.process.faults.hits:
                raise
            if self.engine is not None:
                self.close()

    def open(self) -> None:
        """Open the store."""
        lanes = {name: plan.lane(name, self.process) for name, plan in self.workload.lanes.items()}
        self.engine = self._open_engine(self.process, lanes, self.workload.settings)
        self._history.append(Opened())

    def submit(self, key: bytes = b"k", lane: str = "put", *, size: int = 0) -> Any:
        """One operation; its payload is distinct and has at least `size` bytes."""
        payload = self._begin(lane, key, size)
        ticket = self.engine.submit(lane, key=key, payload=payload)
        self._acknowledge(payload, ticket.lsn)
        self._tickets.append((payload, ticket))
        return ticket

    def submit_many(self, keys: Sequence[bytes], lane: str = "put", *, size: int = 0) -> range:
        """Several at once, all or nothing."""
        pairs = [(key, self._begin(lane, key, size)) for key in keys]
        lsns: range = self.engine.submit_many(lane, pairs)
        for (_, payload), lsn in zip(pairs, lsns, strict=True):
            self._acknowledge(payload, lsn)
        return lsns

    def submit_nowait(self, key: bytes = b"k", lane: str = "put", *, size: int = 0) -> Callable[[], None]:
        """One without waiting; the function that is returned waits for durability, and notes it."""
        payload = self._begin(lane, key, size)
        ticket = self.engine.submit_nowait(lane, key=key, payload=payload)
        self._tickets.append((payload, ticket))

        def wait() -> None:
            ticket.wait_durable()
            self._acknowledge(payload, ticket.lsn)

        return wait

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

    def close(self, *, drain: bool = True) -> None:
        """Close the engine. Then every ticket must have been resolved."""
        report = self.engine.close(drain=drain, timeout=CLOSE_S)
        self.engine = None
        for payload, ticket in self._tickets:
            applied = False
            if ticket.done:
                with contextlib.suppress(WalbatchError):
                    ticket.result(timeout=0)
                    applied = True
            self._history.append(Resolved(payload=payload, done=ticket.done, applied=applied))
        self._tickets.clear()
        if report.reason == "drained":
            self._history.append(Drained())
        elif report.reason == "timeout" and not self.process.faults.hits:
            raise AssertionError(f"the engine did not drain in {CLOSE_S} s of virtual time: {report}")

    def _begin(self, lane: str, key: bytes, size: int) -> bytes:
        payload = f"{self.life}/{self._count}".encode()
        self._count += 1
        if size > len(payload):  # what does not compress, so that the size on disk is what was asked for
            payload += b":" + bytes((31 * i * i + self._count) % 251 for i in range(size - len(payload) - 1))
        plan = self.workload.lanes[lane]
        durability = Durability(plan.durability)
        grace_ns = (
            {Durability.SYNC: 0, Durability.NONE: None}[durability]
            if durability is not Durability.INTERVAL
            else int(plan.interval_ms * 1e6)
        )
        self._history.append(Submitted(lane=lane, key=key, payload=payload, grace_ns=grace_ns))
        return payload

    def _acknowledge(self, payload: bytes, lsn: int | None) -> None:
        self._history.append(Acknowledged(payload=payload, lsn=lsn, at_ns=self.process.clock.now_ns))


def verify_by_use(session: Session) -> None:
    """What follows each crash: open, submit one more to every lane, wait until all is delivered, close."""
    session.open()
    for name in session.workload.lanes:
        session.submit(b"after", name)
    session.close()
    if not session.process.faults.faults and Drained() not in session.process.history[-1:]:
        raise AssertionError("the engine closed without having drained, and nothing had failed")
