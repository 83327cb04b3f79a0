"""Workloads that were missing: each makes a mistake visible that no other one does.

What is not here: what is done to their disks and threads (`probes`, `rot`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from tools.modes.workloads import HASTY, hanging_first, rejecting, remove_file
from walbatch.config import RetryPolicy, Trigger
from walbatch.core.routing import shard_of
from walbatch.errors import CorruptionError, EngineClosed, StorageError, StoreLocked, WalbatchError
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Cut, Fault, LanePlan, Machine, Manner, Process, Session, Workload
from walbatch.testing.simulation.looks import STORE, names_in
from walbatch.testing.simulation.workload import QUICK
from walbatch.types import Batch

RAW: Final = replace(QUICK, compress_bytes_min=None)
EXACT: Final = LanePlan(transactional=True, shards=2)
ONE_BY_ONE: Final = Trigger(count=1, linger_ms=0)
SECTOR_PAYLOAD_BYTES: Final = 400
"""A frame with one such operation fills one sector."""


def mixed(session: Session) -> None:
    """Lanes that sync and lanes that do not, in the same groups."""
    session.open()

    def both(key: bytes, first: str, second: str) -> Callable[[], None]:
        def run() -> None:
            session.submit(key, first)
            session.submit(key, second)

        return run

    session.together(both(b"a", "put", "lazy"), both(b"b", "lazy", "put"), both(b"a", "lazy", "lazy"))
    session.pause(0.02)
    session.together(both(b"a", "put", "lazy"), both(b"b", "lazy", "put"), both(b"a", "lazy", "lazy"))
    session.pause(0.02)
    session.submit(b"a")
    session.close()


def on_the_dot(session: Session) -> None:
    """Submits that come the very moment when an interval ends."""
    session.open()
    for number in range(12):
        session.submit(b"a", "lazy")
        session.pause(0.02 - 1e-6 + number * 1e-7)
        session.submit(b"a")
    session.close()


def busy_interval(session: Session) -> None:
    """An interval lane that is never quiet for as long as its interval."""
    session.open()
    for _ in range(6):
        session.submit(b"a")
        session.pause(0.01)
    session.close()


def slow_interval(session: Session) -> None:
    """The log is quiet long before the interval is over."""
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    session.pause(0.2)
    session.submit(b"a")
    session.close()


def stubborn(session: Session) -> None:
    """A caller who goes on whatever he is told."""
    session.open()
    for key in (b"a", b"b", b"a", b"b"):
        with contextlib.suppress(WalbatchError):
            session.submit(key)
    session.close()


def steady(session: Session) -> None:
    """Submits while checkpoints are taken."""
    session.open()

    def often(key: bytes) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                session.submit(key)
                session.pause(0.01)

        return run

    session.together(often(b"a"), often(b"b"), often(b"c"))
    session.close()


def eleven_segments(session: Session) -> None:
    """More segments than one digit counts, none of them settled."""
    session.open()
    session.engine.pause("put")
    for number in range(40):
        session.submit(b"k%d" % (number % 2), size=900)
    session.close(drain=False)


def full_frame(session: Session) -> None:
    """As many operations as a frame may hold, read back from the log."""
    session.open()
    session.engine.pause("put")
    session.submit_many([b"k"] * 65_536)
    session.close(drain=False)
    session.open()
    session.close()


def smallest(session: Session) -> None:
    """Short payloads, read back from the log."""
    session.open()
    session.engine.pause("put")
    for _ in range(3):
        session.submit(b"")
    session.close(drain=False)
    session.open()
    session.close()


def exactly_full(session: Session) -> None:
    """Frames of one sector each that fill a segment to its last byte."""
    session.open()
    session.engine.pause("put")
    for _ in range(QUICK.segment_bytes // 512 - 1):
        session.submit(b"k", size=SECTOR_PAYLOAD_BYTES)
    session.engine.resume("put")
    session.close()


def keyed(session: Session) -> None:
    """Several operations of each of several keys in every batch."""
    session.open()
    for _ in range(3):
        session.submit_many([b"a", b"a", b"b", b"a", b"b", b"c"])
        session.pause(0.03)
    session.close()


def holes(_batch: Batch, call: int) -> Manner:
    """Parts are applied, and the rest comes again."""
    return Manner.APPLY if call % 3 == 0 else Manner.ANSWER_PART


def away(_batch: Batch, call: int) -> Manner:
    """Fails now and then, and not so often that a breaker opens: a drain would not wait for it."""
    return Manner.FAIL if call % 3 == 1 else Manner.APPLY


def half(_batch: Batch, call: int) -> Manner:
    """The connection breaks in the middle of a batch, as often as a breaker allows; others come back in part."""
    return (Manner.APPLY, Manner.PART, Manner.ANSWER_PART)[call % 3]


def sick(batch: Batch, call: int) -> Manner:
    """One lane is away for a while, but not for as long as opens its breaker; the other is well."""
    return Manner.FAIL if batch.lane == "sick" and call < 5 else Manner.APPLY


def two_lanes(session: Session) -> None:
    session.open()
    for _ in range(4):
        session.submit(b"a", "well", size=900)
        session.submit(b"a", "sick", size=900)
        session.pause(0.03)
    session.close()


def awaited(session: Session) -> None:
    """Results are waited for, and nothing else happens that could wake anybody."""
    session.open()
    for _ in range(3):
        session.submit(b"a").result(timeout=None)
    tickets: list[object] = []

    def one(key: bytes) -> Callable[[], None]:
        def run() -> None:
            ticket = session.submit(key)
            ticket.result(timeout=None)
            tickets.append(ticket)

        return run

    session.together(one(b"a"), one(b"b"), one(b"c"))
    if len(tickets) != 3:
        raise AssertionError(f"{len(tickets)} of 3 results came")
    session.close()


def bounded(session: Session) -> None:
    """More goes through a small log than it holds."""
    session.open()
    for _ in range(24):
        session.submit(b"a", size=900)
    session.engine.flush(timeout=60)
    session.submit(b"a", size=900)
    session.close()


def full_disk(session: Session) -> None:
    """A disk without room for another segment, and a backlog whose delivery would make some."""
    session.open()
    session.engine.pause("put")
    for _ in range(3):
        session.submit(b"a", size=900)
    session.close(drain=False)
    fs = session.process.machine.fs
    fs.capacity_bytes = sum(inode.size for inode in fs.inodes(fs.root)) + 2_048
    session.open()
    session.close()


def overflow(session: Session) -> None:
    """A queue that is full all the time, and operations that come while it is read back."""
    session.open()

    def many() -> None:
        for _ in range(6):
            session.submit(b"a", size=900)

    session.together(many, many, lambda: session.submit_many([b"a"] * 8, size=700))
    session.submit(b"a")
    session.close()


def two_engines(session: Session) -> None:
    """A second engine on the same store is refused, whatever it is called."""
    session.open()
    session.submit(b"a")
    engine = session.engine
    try:
        session.open()
    except StoreLocked:
        pass
    else:
        session.close()
        engine.close()
        raise AssertionError("a second engine had the store open")
    session.engine = engine
    session.submit(b"a")
    session.close()


def successor(session: Session) -> None:
    """Somebody waits for the store, and opens it the moment that he can."""
    session.open()
    for _ in range(4):
        session.submit(b"a")
    first = session.engine
    lanes = {name: plan.lane(name, session.process) for name, plan in session.workload.lanes.items()}

    def follow() -> None:
        for _ in range(400):
            try:
                second = open_engine(session.process, lanes, session.workload.settings)
            except StoreLocked:
                session.pause(0.001)
                continue
            state = first.stats().state
            second.close(timeout=60)
            if state not in {"closed", "failed"}:
                raise AssertionError(f"the store was opened while another engine was {state}")
            return

    session.together(session.close, follow)


def abandoned(session: Session) -> None:
    """Closed with operations that nobody delivers."""
    session.open()
    session.engine.pause("put")
    for _ in range(3):
        session.submit(b"a")
    session.submit_nowait(b"b")()
    session.close(drain=False)


def closing(session: Session) -> None:
    """Submits that meet a close."""
    session.open()

    def some(key: bytes) -> Callable[[], None]:
        def run() -> None:
            for _ in range(3):
                session.submit(key)
                session.submit_nowait(key)

        return run

    engine = session.engine
    session.together(some(b"a"), some(b"b"), lambda: engine.close(timeout=60), some(b"c"))
    try:
        engine.submit("put", key=b"k", payload=b"late")
    except EngineClosed:
        pass
    else:
        raise AssertionError("a closed engine has accepted an operation")
    session.close()


def too_large_for_the_log(session: Session) -> None:
    """One operation larger than the log may be, and others behind it."""
    session.open()
    session.submit(b"a", size=4 * RAW.segment_bytes + 2_000)
    session.engine.flush(timeout=60)
    session.pause(0.1)
    session.submit(b"a", size=900)
    session.submit(b"a", size=900)
    session.close()


class _Unsynced:
    """A file system on which the directory sync after a rename fails."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self._renamed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def rename(self, source: str, target: str) -> None:
        self._renamed = True
        self._wrapped.rename(source, target)

    def sync_directory(self, path: str) -> None:
        if self._renamed:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        self._wrapped.sync_directory(path)


def half_named(machine: Machine) -> None:
    """A store whose last opener was killed when its segment had a name that was not durable yet."""
    base = Machine()
    killed: list[Machine] = []
    lanes = {"put": LanePlan()}

    def live(process: Process) -> None:
        plans = {name: plan.lane(name, process) for name, plan in lanes.items()}
        engine = open_engine(process, plans, QUICK)
        killed.extend(image for _, image in process.machine.clone().images(Cut.KILL))
        engine.close()

    first = Process(base, [], seed=0, life="first")
    first.run(lambda: live(first))
    half = Process(killed[0], [], seed=0, life="half", wrap_fs=_Unsynced)  # type: ignore[arg-type]

    def open_in_vain() -> None:
        with contextlib.suppress(StorageError):
            live(half)

    half.run(open_in_vain)
    machine.fs, machine.states, machine.backends = half.machine.fs, half.machine.states, half.machine.backends
    machine.fs.locks.clear()


def once(session: Session) -> None:
    """As little as possible."""
    session.open()
    session.submit(b"a")
    session.close()


def few_descriptors(session: Session) -> None:
    """The log rolls more often than there are descriptors."""
    session.open()
    for number in range(24):
        session.submit(b"k%d" % (number % 3), size=900)
    session.close()


def at_most_eight(machine: Machine) -> None:
    """Eight open files."""
    machine.fs.files_max = 8


TWO_LANES: Final = {"put": LanePlan(), "slow": LanePlan()}
LAZY: Final = LanePlan(durability="interval")
SECOND_LIFE_CHECKPOINT_MS: Final = 10_000.0


def compacted_backlog(session: Session) -> None:
    """A lane has more in the log than fits in memory, and waits in the middle of segments that are compacted meanwhile."""
    session.open()
    session.engine.pause("slow")
    # As many as make the segment in which the lane waits the last one that is closed: what is merged gets its number.
    for number in range(21):
        session.submit(b"a%d" % (number % 3), "slow", size=28_500)
        for _ in range(2):
            session.submit(b"k%d" % (number % 3), size=30_000)
    session.pause(0.2)
    session.engine.resume("slow")
    session.close()


def one_shard_at_first(batch: Batch, call: int) -> Manner:
    """The other one fails for a while."""
    return Manner.FAIL if batch.shard and call <= 4 else Manner.APPLY


def half_settled(session: Session) -> None:
    """One shard of a lane flows and the other does not: what is dropped of the one is not the other's."""
    session.open()
    keys = sorted((b"k%d" % number for number in range(16)), key=lambda key: shard_of(key, 2))
    for number in range(12):  # one in four is of the other shard
        session.submit(keys[number % 4 - 1], size=900)
    session.pause(0.1)
    session.close(drain=False)
    session.open()
    session.close()


def compacted_without_state(session: Session) -> None:
    """An older operation of a key stands where nothing is compacted, a newer one is dropped; then state/ is lost."""
    compacted_middle(session)
    verify_without_state(session)


def compacted_middle(session: Session) -> None:
    """What is compacted and merged stands behind a segment that is not."""
    session.open()
    session.engine.pause("slow")
    session.submit(b"a", "slow", size=1400)
    session.submit(b"a", "slow", size=1400)
    session.submit(b"k", size=100)
    for _ in range(3):
        session.submit(b"k", size=900)
    # Meanwhile the first segment is read: most of it is needed. All that the second one holds is settled before it is closed.
    session.pause(0.1)
    for _ in range(3):
        session.submit(b"z", size=1500)
    session.pause(0.1)
    session.close(drain=False)


def verify_without_state(session: Session) -> None:
    """Open the store without its state/: what is delivered of a key ends with the newest operation of it."""
    machine = session.process.machine
    if "data.mdb" in names_in(machine, f"{STORE}/state"):
        remove_file(machine, f"{STORE}/state/data.mdb")
    try:
        session.open()
    except CorruptionError:
        return  # a power cut has undone a part of a trim: without state/ nobody can tell that from a loss
    session.submit(b"after")
    session.submit(b"after", "slow")
    session.close()
    disk = session.process.machine.backends["put"]
    # The operations of this key have the LSNs 3 to 6, and the payloads 0/2 to 0/5.
    applied = [lsn for _, lsn in disk.counts if lsn in range(3, 7)]
    if applied and not disk.content[b"k"].startswith(b"0/%d:" % (max(applied) - 1)):
        raise AssertionError(
            f"{disk.content[b'k'][:4]!r} was applied last, and LSN {max(applied)} had been before"
        )


def asked(session: Session) -> None:
    """Where an operation is, again and again, while it becomes durable and is taken over for delivery."""
    session.open()
    for _ in range(30):
        session.submit_nowait(b"a")
        for _ in range(10):
            session.ask(session.submitted_lsns[-1])
    session.close()


def rejected(session: Session) -> None:
    """What is rejected cannot be buried."""
    session.open()
    session.submit(b"a", payload=b"bad/0")
    session.pause(0.05)
    session.look_at_letters()
    session.close()


def missed(session: Session) -> None:
    """What has missed its deadline cannot be buried at once."""
    session.open()
    session.engine.pause("put")
    session.submit(b"a", deadline_s=0.02)
    session.submit(b"a")
    session.pause(0.05)
    session.engine.resume("put")
    session.engine.flush(timeout=10)
    session.close()


WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload(name="mixed", run=mixed, lanes={"put": LanePlan(), "lazy": LAZY}),
        Workload(name="on_the_dot", run=on_the_dot, lanes={"put": LanePlan(), "lazy": LAZY}),
        Workload(name="busy_interval", run=busy_interval, lanes={"put": LAZY}),
        Workload(
            name="slow_interval",
            run=slow_interval,
            lanes={"put": LanePlan(durability="interval", interval_ms=80)},
        ),
        Workload(
            name="exact_interval",
            run=slow_interval,
            lanes={"put": LanePlan(durability="interval", interval_ms=80, transactional=True)},
        ),
        Workload(name="stubborn", run=stubborn),
        Workload(name="steady", run=steady),
        Workload(name="eleven_segments", run=eleven_segments, settings=RAW),
        Workload(
            name="full_frame",
            run=full_frame,
            settings=replace(RAW, segment_bytes=2**23, disk_bytes_max=2**26),
            lanes={"put": LanePlan(trigger=Trigger(count=65_536, bytes=2**26, linger_ms=1))},
        ),
        Workload(name="smallest", run=smallest, settings=RAW),
        Workload(name="exactly_full", run=exactly_full, settings=RAW),
        Workload(name="partial", run=keyed, manners=holes, lanes={"put": LanePlan(shards=2, retry=HASTY)}),
        Workload(name="holes", run=keyed, manners=half, lanes={"put": LanePlan(retry=HASTY)}),
        Workload(name="unanswered", run=keyed, manners=away, lanes={"put": LanePlan(retry=HASTY)}),
        Workload(name="careless", run=keyed, manners=holes, lanes={"put": replace(EXACT, retry=HASTY)}),
        Workload(
            name="sick_lane",
            run=two_lanes,
            manners=sick,
            lanes={"well": LanePlan(), "sick": LanePlan()},
            settings=RAW,
        ),
        Workload(name="awaited", run=awaited),
        Workload(name="asked", run=asked),
        Workload(
            name="rejected", run=rejected, manners=rejecting, faults=[Fault(call="bury", error=errno.EIO)]
        ),
        Workload(name="missed", run=missed, faults=[Fault(call="bury", error=errno.ENOSPC)]),
        Workload(
            name="bounded",
            run=bounded,
            settings=replace(RAW, disk_bytes_max=4 * RAW.segment_bytes, submit_timeout_s=5.0),
        ),
        Workload(
            name="too_large_for_the_log",
            run=too_large_for_the_log,
            settings=replace(RAW, disk_bytes_max=4 * RAW.segment_bytes, submit_timeout_s=5.0),
        ),
        Workload(name="exact_keys", run=keyed, lanes={"put": EXACT}),
        Workload(name="full_disk", run=full_disk, settings=RAW),
        Workload(
            name="overflow",
            run=overflow,
            lanes={"put": LanePlan(shards=256)},
            settings=replace(RAW, memory_bytes_max=2**20),
        ),
        Workload(name="two_engines", run=two_engines),
        Workload(
            name="successor",
            run=successor,
            # Calls that were given up return while the engine stops: so that takes its time.
            lanes={"put": LanePlan(transactional=True, retry=HASTY, timeout_s=0.1)},
            manners=hanging_first,
        ),
        Workload(name="half_named", run=once, prepare=half_named),
        Workload(name="abandoned", run=abandoned),
        Workload(name="closing", run=closing),
        Workload(name="few_descriptors", run=few_descriptors, settings=RAW, prepare=at_most_eight),
        Workload(
            name="compacted_backlog",
            run=compacted_backlog,
            lanes=TWO_LANES,
            settings=replace(RAW, segment_bytes=2**17, memory_bytes_max=2**20, checkpoint_ms=10),
        ),
        Workload(
            name="half_settled",
            run=half_settled,
            lanes={"put": LanePlan(shards=2, retry=RetryPolicy(base_s=5, ceiling_s=5))},
            manners=one_shard_at_first,
            settings=replace(RAW, checkpoint_ms=10),
        ),
        Workload(
            name="compacted_middle",
            run=compacted_middle,
            lanes=TWO_LANES,
            settings=replace(RAW, checkpoint_ms=10),
        ),
        Workload(
            name="compacted_without_state",
            run=compacted_without_state,
            lanes=TWO_LANES,
            verify=verify_without_state,
            settings=replace(RAW, checkpoint_ms=10),
        ),
    )
}
