"""The hand-written workloads: small lives of a store, each of which stresses one row of what can go wrong.

What is not here: where they are made to crash. Each is short (some tens to a few hundred port calls), because each of its crash
points is multiplied by all images of the disk, and by the crash points inside recovery.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import walbatch as wb
from walbatch.config import RetryPolicy, Trigger
from walbatch.errors import (
    BatchTooLarge,
    CorruptionError,
    OperationTooLarge,
    Overloaded,
    RetryBatch,
    StorageError,
    StoreLocked,
    Throttled,
    WalbatchError,
)
from walbatch.limits import KEY_BYTES_MAX, MIB
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Fault, LanePlan, Machine, Manner, Session, Workload
from walbatch.testing.simulation.backend import Poison, Reaction
from walbatch.testing.simulation.looks import STORE, file_bytes, names_in
from walbatch.testing.simulation.verify import await_delayed, verify_by_use
from walbatch.testing.simulation.workload import QUICK
from walbatch.types import PRIORITY_CRITICAL, Applied, Batch, Rejected, Retry

HOUR_NS: Final = 3_600 * 10**9
INCOMPRESSIBLE: Final = replace(QUICK, compress_bytes_min=None)
COMPACTING: Final = replace(INCOMPRESSIBLE, checkpoint_ms=10)
EXACT: Final = LanePlan(transactional=True, shards=2)
HASTY: Final = RetryPolicy(base_s=0.002, ceiling_s=0.01)
STRICT: Final = RetryPolicy(base_s=0.002, ceiling_s=0.01, attempts=2, batch_retries=1)
POISON: Final = b"poison"
BAD: Final = b"bad"
WORSE: Final = b"bad/1"


def unreliable(_batch: Batch, call: int) -> Manner:
    """One of everything that a backend may do, but lie."""
    manners = (Manner.FAIL, Manner.PART, Manner.ANSWER_PART, Manner.TIMEOUT, Manner.APPLY, Manner.SLOW)
    return manners[(call - 1) % len(manners)]


def failing_first(_batch: Batch, call: int) -> Manner:
    """Away at first, then back."""
    return Manner.FAIL if call <= 4 else Manner.APPLY


def answering_in_part(batch: Batch, call: int) -> Reaction:
    """At first without one of the keys, then with everything that a backend may ask for."""
    match call:
        case 1 | 2:
            locked = max(batch.keys)
            return [Retry(after=0.002, error="locked") if key == locked else Applied() for key in batch.keys]
        case 3:
            return RetryBatch("again", after=0.003)
        case 4:
            return Throttled("slower", after=0.004)
        case 5 | 6:
            return BatchTooLarge("too many", count=1) if len(batch) > 1 else Manner.APPLY
        case _:
            return Manner.APPLY


def poisoned(batch: Batch, _call: int) -> Reaction:
    """Fails as a whole, and does not say why, with a poisonous operation in it."""
    culprits = [payload for payload in batch.payloads if payload.startswith(POISON)]
    return Poison(culprits) if culprits else Manner.APPLY


def rejecting(batch: Batch, _call: int) -> Reaction:
    """Takes nothing that is bad, unless it comes again and is less bad."""
    return [
        Rejected("bad")
        if operation.payload.startswith(WORSE if operation.options.origin else BAD)
        else Applied()
        for operation in batch
    ]


def hanging_first(_batch: Batch, call: int) -> Reaction:
    """Two calls come back long after their time limit."""
    return Manner.HANG if call <= 2 else Manner.APPLY


# --- submitting ---


def single(session: Session) -> None:
    session.open()
    for key in (b"a", b"b", b"a"):
        session.submit(key)
    session.close()


def many(session: Session) -> None:
    session.open()
    session.submit_many([b"a", b"b", b"a"])
    session.submit_many([b"b"] * 5, size=300)
    session.close()


def interval(session: Session) -> None:
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    session.pause(0.05)
    session.submit(b"a")
    session.close()


def mixed(session: Session) -> None:
    """A sync makes durable what the interval lane has written before it, and the other way round."""
    session.open()
    session.submit(b"a", "later")
    session.submit(b"a")
    session.submit(b"b", "later")
    session.pause(0.03)
    session.submit(b"b")
    session.submit(b"a", "later")
    session.close()


def unlogged(session: Session) -> None:
    session.open()
    session.submit(b"a", "free")
    session.submit(b"a")
    session.submit_many([b"a", b"b"], "free")
    session.submit(b"b")
    session.close()


def nowait(session: Session) -> None:
    session.open()
    waits = [session.submit_nowait(b"k%d" % (number % 2)) for number in range(4)]
    for wait in waits[:2]:
        wait()
    session.close()


def twice(session: Session, key: bytes) -> Callable[[], None]:
    def run() -> None:
        session.submit(key)
        session.submit(key)

    return run


def threads(session: Session) -> None:
    session.open()
    session.together(twice(session, b"a"), twice(session, b"b"), twice(session, b"a"))
    session.close()


def close_while_submitting(session: Session) -> None:
    session.open()
    engine = session.engine
    session.together(twice(session, b"a"), lambda: engine.close(timeout=60), twice(session, b"b"))
    session.close()


# --- payloads ---


def odd_payloads(session: Session) -> None:
    """Empty, of one byte, all zeros."""
    session.open()
    session.submit(b"a", payload=b"")
    session.submit_many([b"", b"a"], payloads=[b"\0", b"x"])
    session.submit(b"", payload=bytes(600))
    session.close()


def frames_as_payload(session: Session) -> None:
    """A store that stores its own segments: what was a frame is data now, in another place and in the same."""
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    segment = max(names_in(session.process.machine, f"{STORE}/wal"))
    content = file_bytes(session.process.machine, f"{STORE}/wal/{segment}").rstrip(b"\0")
    # The frames of the copy stand on sectors again: the body begins 64 bytes behind the frame's header.
    session.submit(b"a", payload=content)
    session.submit(b"b", payload=bytes(512 - 64 - 64) + content[512:])
    session.close()


def largest(session: Session) -> None:
    """More than a segment holds, the longest key, and one byte more than that."""
    session.open()
    session.submit(b"k" * KEY_BYTES_MAX)
    with contextlib.suppress(OperationTooLarge):
        session.submit(b"k" * (KEY_BYTES_MAX + 1))
    session.submit(b"a", size=5000)
    session.submit(b"a")
    session.close()


def compressible(session: Session) -> None:
    """Large groups that are small on the disk."""
    session.open()
    keys = [b"%d" % (number % 5) for number in range(40)]
    session.submit_many(keys, payloads=[b"first %d " % number + b"-" * 400 for number in range(40)])
    session.submit_many(keys[:9], payloads=[b"then %d " % number + b"=" * 900 for number in range(9)])
    session.close()


# --- segments ---


def roll(session: Session) -> None:
    """Eight operations fill two segments; the pause lets the first ones be checkpointed and trimmed."""
    session.open()
    for number in range(8):
        session.submit(b"k%d" % (number % 3), size=900)
    session.pause(0.1)
    session.submit(b"k1", size=900)
    session.close()


def exactly_full(session: Session) -> None:
    """Each frame ends where its segment does."""
    session.open()
    for number in range(3):
        session.submit(b"k%d" % number, size=3400)
    session.close(drain=False)
    session.open()
    session.submit(b"k0", size=3400)
    session.close()


def trim_many(session: Session) -> None:
    """Several segments become superfluous at once."""
    session.open()
    session.engine.pause("put")
    for number in range(6):
        session.submit(b"k%d" % number, size=1800)
    session.engine.resume("put")
    session.engine.flush(timeout=60)
    session.pause(0.07)
    session.submit(b"k0", size=1800)
    session.close()


def straggler(session: Session) -> None:
    """A lane that does not move pins the first segment, while another one goes on."""
    session.open()
    session.engine.pause("slow")
    session.submit(b"a", "slow")
    for number in range(5):
        session.submit(b"k%d" % (number % 2), size=1800)
    session.pause(0.05)
    session.close(drain=False)
    session.open()
    session.submit(b"a", "slow")
    session.close()


def checkpoint_around_roll(session: Session) -> None:
    session.open()
    session.submit(b"a", size=2500)
    session.pause(0.021)  # checkpointed right before the roll
    session.submit(b"a", size=2500)
    session.engine.flush(timeout=60)
    session.pause(0.021)  # and right behind it
    session.submit(b"b", size=2500)
    session.close()


def idle(session: Session) -> None:
    """The log goes quiet again and again, and proves its end each time."""
    session.open()
    for key in (b"a", b"b", b"a"):
        session.submit(key)
        session.pause(0.04)
    session.close(drain=False)
    session.open()
    session.pause(0.04)
    session.close()


def disk_full(session: Session) -> None:
    """The backend is away until the disk is full; it comes back, delivery makes room, and the writer that waits goes on."""
    session.open()
    session.engine.pause("put")

    def fill() -> None:
        for number in range(5):
            session.submit(b"k%d" % (number % 2), size=1800)

    def drain() -> None:
        session.pause(0.3)
        session.engine.resume("put")

    session.together(fill, drain)
    with contextlib.suppress(WalbatchError):
        session.submit(b"a")
    session.close()


def small_disk(machine: Machine) -> None:
    machine.fs.capacity_bytes = 9_000


def verify_with_room(session: Session) -> None:
    """Somebody has made room meanwhile."""
    session.process.machine.fs.capacity_bytes = None
    verify_by_use(session)


def log_at_its_limit(session: Session) -> None:
    """The log's own bound: submitting is refused, delivering makes room."""
    session.open()
    session.engine.pause("put")
    with contextlib.suppress(Overloaded):
        for number in range(12):
            session.submit(b"k%d" % (number % 2), size=1800)
    session.engine.resume("put")
    session.engine.flush(timeout=60)
    session.pause(0.05)
    session.submit(b"a")
    session.close()


def verify_behind_backlog(session: Session) -> None:
    """While the log is at its limit, nothing more is taken; the backlog makes room."""
    session.open()
    session.engine.flush(timeout=60)
    session.pause(0.1)
    session.submit(b"after")
    session.close()


# --- lives ---


def reopen(session: Session) -> None:
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    session.close(drain=False)
    session.open()
    session.submit(b"a")
    session.close()
    session.open()
    session.close()


def after_failed_sync(session: Session) -> None:
    """The engine stops, the store is opened again, LSNs jump; and the same once more."""
    for _ in range(3):
        session.open()
        with contextlib.suppress(StorageError):
            for key in (b"a", b"b", b"a"):
                session.submit(key)
        session.close()


def paused(session: Session) -> None:
    """A lane is paused over the end of its engine; its backlog is read back by the next one."""
    session.open()
    session.engine.pause("put")
    session.submit_many([b"a", b"b", b"a"])
    session.submit(b"b")
    session.pause(0.03)
    session.close(drain=False)
    session.open()
    session.engine.pause("put")
    session.submit(b"a")
    session.engine.resume("put")
    session.close()


def backlog(session: Session) -> None:
    """More waits in the log than memory may hold."""
    session.open()
    session.engine.pause("put")
    for number in range(6):
        keys = [b"k%d" % (count % 3) for count in range(10)]
        session.submit_many(
            keys, payloads=[b"%d/%d" % (number, count) + bytes(24_000) for count in range(10)]
        )
    session.engine.resume("put")
    session.engine.flush(timeout=100)
    session.close()


def held(session: Session) -> None:
    """A lane has no backend yet: its operations wait in the log for an engine that has one."""
    session.open()
    session.submit(b"a", "kept")
    session.submit(b"a")
    session.submit(b"b", "kept")
    session.close()
    session.open(kept=LanePlan())
    session.submit(b"a", "kept")
    session.close()


def verify_with_backend(session: Session) -> None:
    """Open with a backend for the lane that had none."""
    session.open(kept=LanePlan())
    for lane in ("put", "kept"):
        session.submit(b"after", lane)
    session.close()


def second_opener(session: Session) -> None:
    session.open()
    session.submit(b"a")
    for _ in range(2):
        try:
            open_engine(session.process, {"put": wb.Lane()}, QUICK)
        except StoreLocked:
            continue
        raise AssertionError("two engines have the store open")
    session.submit(b"a")
    session.close()


def wall_clock(session: Session) -> None:
    """The wall clock jumps by hours, either way, in the middle of everything."""
    session.open()
    for hours in (5, -30, 12):
        session.submit(b"a", size=1500)
        session.process.clock.jump_wall(hours * HOUR_NS)
        session.submit(b"b", "later")
        session.pause(0.025)
    session.close(drain=False)
    session.process.clock.jump_wall(-100 * HOUR_NS)
    session.open()
    session.submit(b"a")
    session.close()


def put_file(machine: Machine, path: str, content: bytes) -> None:
    """A file that somebody else has written, durably and unseen by the process."""
    quiet = machine.fs.twin(machine.fs.root)
    file = quiet.create(path)
    file.write([content], 0)
    file.datasync()
    file.close()
    quiet.sync_directory(path.rpartition("/")[0])
    machine.fs.changed()


def remove_file(machine: Machine, path: str) -> None:
    """The same for a file that somebody has removed."""
    quiet = machine.fs.twin(machine.fs.root)
    quiet.unlink(path)
    quiet.sync_directory(path.rpartition("/")[0])
    machine.fs.changed()


def leftovers(session: Session) -> None:
    """Temporary files of an opening that was cut off, and files that are none of ours."""
    session.open()
    session.submit(b"a")
    session.close(drain=False)
    for name in (
        "wal/0000000000000000002.seg.tmp",
        "identity.tmp",
        "wal/0000000000000000002.seg~",
        "notes.txt",
    ):
        put_file(session.process.machine, f"{STORE}/{name}", b"left over " * 70)
    session.open()
    session.submit(b"a")
    session.close()


def lost_identity(session: Session) -> None:
    """Without its identity the store is refused, and nothing is changed; with it, it goes on."""
    machine = session.process.machine
    session.open()
    session.submit(b"a")
    session.close(drain=False)
    identity = file_bytes(machine, f"{STORE}/identity")
    remove_file(machine, f"{STORE}/identity")
    try:
        session.open()
    except CorruptionError:
        put_file(machine, f"{STORE}/identity", identity)
    else:
        raise AssertionError("a store without its identity was opened")
    session.open()
    session.submit(b"a")
    session.close()


def verify_unless_identity_is_lost(session: Session) -> None:
    """A crash may fall between the loss of the identity and its return."""
    machine = session.process.machine
    if "identity" not in names_in(machine, STORE) and names_in(machine, f"{STORE}/wal"):
        try:
            session.open()
        except CorruptionError:
            return
        raise AssertionError("a store without its identity was opened")
    verify_by_use(session)


def lost_state(session: Session) -> None:
    """Without state/ everything in the log is delivered again, and transactional backends leave it out."""
    for _ in range(2):
        session.open()
        session.submit(b"a")
        session.submit(b"b", "exact")
        session.pause(0.03)
        session.close()
        remove_file(session.process.machine, f"{STORE}/state/data.mdb")
    session.open()
    session.submit(b"a", "exact")
    session.close()


# --- what is given up, and what waits ---


def poison(session: Session) -> None:
    """One of six operations makes their batch fail: it is found, and buried, and the others are applied."""
    session.open()
    session.submit_many(
        [b"a", b"b", b"c", b"a", b"b", b"c"],
        payloads=[b"fine/%d" % number if number != 3 else POISON for number in range(6)],
    )  # fmt: skip
    session.engine.flush(timeout=60)
    session.submit(b"a")
    session.close()


def requeue(session: Session) -> None:
    """What was rejected is submitted again: once in its life, and once in the next."""
    session.open()
    session.submit_many([b"a", b"b", b"a"], payloads=[b"bad/0", b"fine", b"bad/1"])
    session.engine.flush(timeout=60)
    letters = session.look_at_letters()
    session.requeue(letter.lsn for letter in letters[:1])
    session.submit(b"a")
    session.close()
    session.open()
    session.requeue(letter.lsn for letter in session.look_at_letters())
    session.close()


def requeue_cut_off(session: Session) -> None:
    """The letter of what was requeued could not be dropped: the next opening does it."""
    session.open()
    session.submit_many([b"a", b"b"], payloads=[b"bad/0", b"bad/2"])
    session.engine.flush(timeout=60)
    with contextlib.suppress(StorageError):
        session.requeue(letter.lsn for letter in session.look_at_letters()[:1])
    session.close()
    session.open()
    session.look_at_letters()
    session.submit(b"a")
    session.close()


def verify_requeued(session: Session) -> None:
    """Whoever finds dead letters submits them again."""
    session.open()
    session.requeue(letter.lsn for letter in session.look_at_letters())
    session.submit(b"after")
    session.close()


def drop(session: Session) -> None:
    """One of the dead letters is dropped, and the others stay, also when the state is written again and again."""
    session.open()
    session.submit_many([b"a", b"b", b"a"], payloads=[b"bad/0", b"bad/1", b"bad/2"])
    session.engine.flush(timeout=60)
    session.drop([letter.lsn for letter in session.look_at_letters()][1:2])
    session.submit(b"a")
    session.pause(0.05)
    session.close()


def cancel(session: Session) -> None:
    """Of a paused lane, from its queue; of a lane without backend, from the log, where nobody has read it yet."""
    session.open(kept=LanePlan(held=True))
    session.engine.pause("put")
    queued = session.submit_many([b"a", b"b", b"a"])
    kept = [session.submit(key, "kept") for key in (b"a", b"b", b"a")]
    session.cancel(queued[0])
    session.cancel(kept[1].lsn)
    session.engine.resume("put")
    session.engine.flush("put", timeout=60)
    session.cancel(queued[2])  # too late
    session.pause(0.05)
    session.close()
    session.open()
    session.submit(b"a", "kept")
    session.close()


def delayed(session: Session) -> None:
    """Two operations wait for their time, one of them over the end of its engine, while the log rolls and is compacted."""
    session.open()
    session.submit(b"late", not_before_s=0.12)
    session.submit(b"late")  # behind it
    for number in range(6):
        session.submit(b"k%d" % (number % 2), size=1500)
        session.pause(0.012)
    session.submit(b"later", not_before_s=0.2)
    session.close(drain=False)
    session.open()
    session.submit(b"k0", size=1500)
    await_delayed(session)
    session.close()


def deadlines(session: Session) -> None:
    """A lane is paused beyond the deadlines of its operations."""
    session.open()
    session.engine.pause("put")
    session.submit(b"a", deadline_s=0.02)
    session.submit(b"a")
    session.submit(b"b", deadline_s=600.0)
    session.submit(b"b", deadline_s=0.03, not_before_s=0.01)
    session.pause(0.05)
    session.engine.resume("put")
    session.submit(b"a")
    session.close()


def repeat(session: Session) -> None:
    """The same orders, again and again: while they are in the log, when it is trimmed, and after a restart."""
    session.open()
    for _ in range(2):
        session.submit(b"a", idempotency_key=b"first")
    for number in range(4):
        session.submit(b"k%d" % number, size=1800)
    session.submit(b"b", idempotency_key=b"second")
    session.engine.flush(timeout=60)
    session.pause(0.07)
    session.submit(b"a", idempotency_key=b"first")
    session.close(drain=False)
    session.open()
    for name in (b"first", b"second", b"third"):
        session.submit(b"a", idempotency_key=name)
    session.close()


def verify_repeats(session: Session) -> None:
    """Whoever does not know whether an order was accepted gives it again."""
    session.open()
    for name in (b"first", b"second", b"third"):
        session.submit(b"a", idempotency_key=name)
    session.close()
    verify_by_use(session)


def backlog_of(session: Session, groups: int) -> None:
    """Submit more than memory may hold to a paused lane."""
    session.engine.pause("put")
    for number in range(groups):
        session.submit_many(
            [b"k%d" % (count % 3) for count in range(20)],
            payloads=[b"%d/%d" % (number, count) + bytes(24_000) for count in range(20)],
        )  # fmt: skip


def urgent(session: Session) -> None:
    """An urgent operation at the end of a backlog that is read back from the log, behind an elder one of its key."""
    session.open()
    backlog_of(session, 3)
    session.submit(b"vip")
    session.submit(b"k1")
    session.submit(b"vip", priority=PRIORITY_CRITICAL)
    session.submit(b"vip")
    session.engine.resume("put")
    session.engine.flush(timeout=100)
    session.close()


def urgent_until(session: Session) -> None:
    """The same, and it is urgent because it has a deadline, which passes meanwhile."""
    session.open()
    backlog_of(session, 3)
    session.submit(b"vip", priority=PRIORITY_CRITICAL, deadline_s=0.03)
    session.submit(b"vip", priority=PRIORITY_CRITICAL)
    session.pause(0.05)
    session.engine.resume("put")
    session.engine.flush(timeout=100)
    session.close()


def compaction(session: Session) -> None:
    """One lane is paused, another flows: what flowed leaves the middle of the log; then the paused one is read back."""
    session.open()
    session.engine.pause("slow")
    for number in range(6):
        session.submit(b"k%d" % (number % 3), size=1500)
        if number % 3 == 0:
            session.submit(b"a", "slow", size=300)
        session.pause(0.012)
    session.pause(0.1)
    session.engine.resume("slow")
    session.close()


def merge(session: Session) -> None:
    """Each opening leaves a segment with a straggler: they are merged, and what was merged is read back by the last life."""
    for number in range(3):
        session.open()
        session.engine.pause("slow")
        session.submit(b"a", "slow", size=200)
        session.submit(b"k%d" % number, size=1800)
        session.pause(0.07)
        session.close(drain=False)
    session.open()
    session.close()


def learning(session: Session) -> None:
    """Sizes and concurrency adapt, and what was learnt is kept over a restart."""
    for _ in range(2):
        session.open()
        session.engine.pause("put")
        for number in range(3):
            session.submit_many([b"k%d" % (count % 3) for count in range(70)], "put")
            session.submit_many([b"k%d" % count for count in range(number + 2)], "free")
        session.engine.resume("put")
        session.close()


# --- backends ---


def storm(session: Session) -> None:
    """Submits of every kind in three lanes, flushes, pauses, and a close in the middle of it."""
    session.open()
    engine = session.engine

    def some(number: int) -> Callable[[], None]:
        def run() -> None:
            for count in range(4):
                lane = ("put", "interval", "free")[(number + count) % 3]
                session.submit(b"k%d" % ((number + count) % 3), lane, size=number * count * 200 % 1500)

        return run

    def in_time() -> None:
        for wait in [session.submit_nowait(b"k%d" % (count % 3)) for count in range(4)]:
            wait()

    def hold() -> None:
        engine.pause("put")
        session.pause(0.01)
        engine.resume("put")

    session.together(
        some(0), some(1), some(2), in_time, hold,
        lambda: engine.flush(timeout=100), lambda: engine.close(timeout=60), lambda: session.submit_many([b"k0", b"k1"]),
    )  # fmt: skip
    session.close()


def _put(**plan: Any) -> dict[str, LanePlan]:
    return {"put": LanePlan(**plan)}


LATER: Final = LanePlan(durability="interval")
FREE: Final = LanePlan(durability="none")
STORM: Final = Workload(
    name="storm", run=storm, settings=INCOMPRESSIBLE, manners=unreliable,
    lanes={
        "put": LanePlan(shards=3), "interval": LATER, "free": LanePlan(order="none", trigger=Trigger(count=2, linger_ms=0)),
    },
)  # fmt: skip

WORKLOADS: Final[dict[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload(name="single", run=single),
        Workload(name="many", run=many),
        Workload(name="interval", run=interval, lanes={"put": LATER}),
        Workload(name="interval_and_sync", run=mixed, lanes={"put": LanePlan(), "later": LATER}),
        Workload(name="unlogged", run=unlogged, lanes={"put": LanePlan(), "free": FREE}),
        Workload(name="nowait", run=nowait),
        Workload(name="threads", run=threads),
        Workload(name="close_while_submitting", run=close_while_submitting),
        Workload(name="odd_payloads", run=odd_payloads),
        Workload(name="frames_as_payload", run=frames_as_payload, settings=INCOMPRESSIBLE),
        Workload(name="largest", run=largest, settings=INCOMPRESSIBLE),
        Workload(name="compressible", run=compressible, lanes=_put(trigger=Trigger(count=20, linger_ms=1))),
        Workload(name="roll", run=roll, settings=INCOMPRESSIBLE),
        Workload(name="exactly_full", run=exactly_full, settings=INCOMPRESSIBLE),
        Workload(name="trim_many", run=trim_many, settings=INCOMPRESSIBLE),
        Workload(name="straggler", run=straggler, settings=INCOMPRESSIBLE, lanes={"put": LanePlan(), "slow": LanePlan()}),
        Workload(name="checkpoint_around_roll", run=checkpoint_around_roll, settings=INCOMPRESSIBLE),
        Workload(name="idle", run=idle),
        Workload(
            name="disk_full", run=disk_full, settings=INCOMPRESSIBLE, prepare=small_disk, verify=verify_with_room,
        ),
        Workload(
            name="full_at_roll", run=roll, settings=INCOMPRESSIBLE,
            faults=[
                Fault(call="write", path="2.seg.tmp", error=errno.ENOSPC),
                Fault(call="preallocate", number=2, error=errno.EDQUOT),
            ],
        ),
        Workload(
            name="log_at_its_limit", run=log_at_its_limit,
            settings=replace(INCOMPRESSIBLE, disk_bytes_max=4 * 4096, submit_timeout_s=0.02),
            verify=verify_behind_backlog,
        ),
        Workload(name="reopen", run=reopen),
        Workload(
            name="learning", run=learning,
            lanes={
                "put": LanePlan(transactional=True, trigger=Trigger(linger_ms=1)),
                "free": LanePlan(order="none", trigger=Trigger()),
            },
        ),
        Workload(
            name="after_failed_sync", run=after_failed_sync,
            faults=[Fault(call="datasync", number=4), Fault(call="datasync", number=12, error=errno.ENOSPC)],
        ),
        Workload(name="paused", run=paused),
        Workload(name="backlog", run=backlog, settings=replace(QUICK, memory_bytes_max=MIB)),
        Workload(
            name="held", run=held, lanes={"put": LanePlan(), "kept": LanePlan(held=True)}, verify=verify_with_backend,
        ),
        Workload(name="second_opener", run=second_opener),
        Workload(
            name="wall_clock", run=wall_clock, settings=INCOMPRESSIBLE, lanes={"put": LanePlan(), "later": LATER},
        ),
        Workload(name="leftovers", run=leftovers),
        Workload(name="lost_identity", run=lost_identity, verify=verify_unless_identity_is_lost),
        Workload(name="lost_state", run=lost_state, lanes={"put": LanePlan(), "exact": EXACT}),
        Workload(name="transactional", run=reopen, lanes={"put": EXACT}),
        Workload(name="many_shards", run=many, lanes=_put(shards=8)),
        Workload(name="order_of_a_shard", run=threads, lanes=_put(order="shard", retry=HASTY), manners=unreliable),
        Workload(name="no_order", run=many, lanes=_put(order="none", shards=2, retry=HASTY), manners=unreliable),
        Workload(name="failing_backend", run=single, lanes=_put(retry=HASTY), manners=failing_first),
        Workload(name="unreliable_backend", run=roll, settings=INCOMPRESSIBLE, manners=unreliable),
        Workload(name="unreliable_transactional_backend", run=threads, lanes={"put": EXACT}, manners=unreliable),
        Workload(
            name="part_answers", run=many, lanes=_put(retry=HASTY, trigger=Trigger(count=8, linger_ms=1)),
            manners=answering_in_part,
        ),
        Workload(
            name="transactional_part_answers", run=many, manners=answering_in_part,
            lanes=_put(transactional=True, retry=HASTY, trigger=Trigger(count=8, linger_ms=1)),
        ),
        Workload(
            name="calls_given_up", run=many, lanes=_put(transactional=True, retry=HASTY, timeout_s=0.1), manners=hanging_first,
        ),
        Workload(name="poison", run=poison, lanes=_put(retry=STRICT, trigger=Trigger(count=8, linger_ms=1)), manners=poisoned),
        Workload(
            name="poison_in_a_shard", run=poison, lanes=_put(retry=STRICT, order="shard", trigger=Trigger(count=8, linger_ms=1)),
            manners=poisoned,
        ),
        Workload(name="requeue", run=requeue, manners=rejecting, verify=verify_requeued),
        Workload(
            name="requeue_to_an_interval_lane", run=requeue, lanes={"put": LATER}, manners=rejecting, verify=verify_requeued,
        ),
        Workload(
            name="transactional_requeue", run=requeue, lanes=_put(transactional=True), manners=rejecting,
            verify=verify_requeued,
        ),
        Workload(
            name="requeue_cut_off", run=requeue_cut_off, manners=rejecting, faults=[Fault(call="unbury", error=errno.ENOSPC)],
        ),
        Workload(name="drop", run=drop, manners=rejecting),
        Workload(name="cancel", run=cancel, lanes={"put": LanePlan(), "kept": LanePlan()}),
        Workload(name="delayed", run=delayed, settings=COMPACTING, lanes=_put(shards=2)),
        Workload(name="deadlines", run=deadlines),
        Workload(name="repeat", run=repeat, settings=INCOMPRESSIBLE, verify=verify_repeats),
        Workload(name="urgent", run=urgent, settings=replace(QUICK, memory_bytes_max=MIB)),
        Workload(name="urgent_until", run=urgent_until, settings=replace(QUICK, memory_bytes_max=MIB)),
        Workload(
            name="compaction", run=compaction, settings=COMPACTING, lanes={"put": LanePlan(shards=2), "slow": LanePlan()},
        ),
        Workload(
            name="compaction_given_up", run=compaction, settings=COMPACTING,
            lanes={"put": LanePlan(shards=2), "slow": LanePlan()}, faults=[Fault(call="rename", path="3.seg", number=2)],
        ),
        Workload(name="merge", run=merge, settings=COMPACTING, lanes={"put": LanePlan(shards=2), "slow": LanePlan()}),
    )
}  # fmt: skip
