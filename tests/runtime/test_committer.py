"""Group commit: who is acknowledged by which sync, at what bounds, and what happens when something fails."""

from __future__ import annotations

import errno
import threading
from itertools import pairwise
from typing import Any

import pytest

import walbatch as wb
from tests.runtime.fakes import Caller, FakeLog, Gate, Rig
from tests.support import wait_until
from walbatch import limits
from walbatch.errors import DurabilityUnknown
from walbatch.ports import Log
from walbatch.runtime.clock import RealCondition, RealThreads
from walbatch.runtime.ticket import Promise


def queued(rig: Rig) -> int:
    """Operations that wait in groups behind the one that is being committed."""
    return sum(len(pending.group) for pending in list(rig.committer._queue)[1:])


# --- who is acknowledged by what -------------------------------------------------------------------------------------


def test_a_lonely_submit_is_one_write_and_one_sync() -> None:
    rig = Rig()
    lsn, durable = rig.submit(b"a", b"b")
    assert lsn == 1
    assert durable.kept
    assert rig.log.events == [("append", 1, [b"a", b"b"]), ("sync", 2)]
    assert [committed.group.first_lsn for committed in rig.durable] == [1]
    assert (rig.committer.durable_lsn, rig.committer.submitted_lsn) == (2, 2)
    rig.stop()


def test_late_arrivals_share_the_next_sync_and_are_never_acknowledged_by_the_earlier_one() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    first = Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()
    late = [Caller(lambda n=n: rig.submit(b"%d" % n)) for n in range(10)]  # type: ignore[misc]
    wait_until(lambda: queued(rig) == 10, what="all late ones have joined a group")
    gate.allowed.release()
    first.wait()
    gate.wait_reached()
    assert rig.committer.durable_lsn == 1
    assert not any(caller.done for caller in late), "the sync that covers them has not ended"
    gate.open()
    for caller in late:
        assert caller.wait().error is None
    assert rig.committer.commits == 2
    assert rig.committer.durable_lsn == 11
    assert sorted(caller.result[0] for caller in late) == list(range(2, 12))
    rig.stop()


def test_an_operation_that_arrives_during_the_write_is_not_acknowledged_by_the_sync_after_it() -> None:
    rig = Rig()
    gate = Gate(rig.log, "append")
    first = Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()
    lsn, durable = rig.submit(b"late", wait=False)
    gate.allowed.release()
    first.wait()
    gate.wait_reached()
    assert not durable.done
    gate.open()
    assert durable.wait(30 * 10**9)
    assert rig.log.events[0] == ("append", 1, [b"first"])
    assert rig.log.of("append")[1] == ("append", lsn, [b"late"])
    rig.stop()


def test_a_leader_who_waits_is_handed_the_log_when_its_group_is_the_head() -> None:
    rig = Rig(start=False)
    gate = Gate(rig.log, "sync")
    callers = [Caller(lambda: rig.submit(b"0"))]
    gate.wait_reached()
    for number in range(1, 4):
        # Each opens a group of its own: two do not fit in one.
        callers.append(Caller(lambda: rig.submit(bytes(limits.GROUP_BYTES_MAX - 10))))
        wait_until(lambda number=number: queued(rig) == number, what="it has opened its group")  # type: ignore[misc]
    gate.open()
    assert [caller.wait().result[0] for caller in callers] == [1, 2, 3, 4]
    assert rig.committer.commits == 4


def test_a_group_stops_taking_company_at_its_bounds() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()
    for _ in range(7):
        rig.submit(bytes(3 * limits.MIB), wait=False)
    for _ in range(5):
        rig.submit(*[b""] * 30_000, wait=False)
    gate.open()
    rig.stop()
    groups = [payloads for _, _, payloads in rig.log.of("append")]
    assert sum(map(len, groups)) == 1 + 7 + 150_000
    assert max(map(len, groups)) <= limits.FRAME_COUNT_MAX
    assert max(sum(map(len, group)) for group in groups) <= limits.GROUP_BYTES_MAX
    assert len(groups) < 10


def test_the_dispatcher_hears_of_every_group_once_and_in_order() -> None:
    rig = Rig()

    def submit(thread: int) -> None:
        for number in range(60):
            rig.submit(b"%d" % number, wait=number % 3 != 0, needs_sync=number % 5 != 0)

    callers = [Caller(lambda n=n: submit(n)) for n in range(8)]  # type: ignore[misc]
    for caller in callers:
        assert caller.wait().error is None
    rig.clock.advance(10)
    rig.stop()
    spans = [(committed.group.first_lsn, committed.group.last_lsn) for committed in rig.durable]
    assert spans[0][0] == 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(spans))
    assert spans[-1][1] == 480
    assert all(a.end <= b.position for a, b in pairwise(rig.durable))
    assert all(committed.group.last_lsn <= rig.log.synced_lsn for committed in rig.durable)


# --- intervals and stamps --------------------------------------------------------------------------------------------


def test_an_interval_lane_is_acknowledged_when_written_and_handed_on_after_its_sync() -> None:
    rig = Rig(interval_ms=50)
    _, durable = rig.submit(b"soon", needs_sync=False)
    assert durable.kept
    assert rig.log.events == [("append", 1, [b"soon"])]
    assert rig.committer.durable_lsn == 0
    assert rig.durable == []
    rig.clock.advance(50)
    wait_until(lambda: rig.committer.durable_lsn == 1, what="the interval is over")
    wait_until(lambda: len(rig.durable) == 1, what="the group is handed on")
    rig.stop()
    assert rig.log.of("sync") == [("sync", 1)]


def test_a_sync_for_one_lane_covers_what_another_has_written() -> None:
    rig = Rig(interval_ms=3_600_000)
    rig.submit(b"soon", needs_sync=False)
    rig.submit(b"now")
    assert [committed.group.first_lsn for committed in rig.durable] == [1, 2]
    assert rig.committer.durable_lsn == 2
    rig.stop()


def test_unsynced_bytes_are_bounded() -> None:
    rig = Rig(interval_ms=3_600_000)
    for _ in range(40):
        rig.submit(bytes(limits.MIB), needs_sync=False)
        assert rig.committer._written_bytes <= limits.UNSYNCED_BYTES_MAX
    assert len(rig.log.of("sync")) == 2
    rig.stop()
    assert rig.committer.durable_lsn == 40


@pytest.mark.parametrize("needs_sync", [False, True])
def test_what_is_written_is_not_acknowledged_any_more_once_the_log_has_failed(
    monkeypatch: pytest.MonkeyPatch, needs_sync: bool
) -> None:
    rig = Rig(interval_ms=3_600_000)
    take = Promise.take

    def fail_meanwhile(promise: Promise) -> Any:
        rig.committer.halt(DurabilityUnknown("a sync failed"))
        return take(promise)

    with monkeypatch.context() as patch:
        patch.setattr(Promise, "take", fail_meanwhile)
        if needs_sync:
            assert rig.submit(b"a", needs_sync=True)[0] == 1, "it was synced before"
        else:
            with pytest.raises(DurabilityUnknown):
                rig.submit(b"a", needs_sync=False)
    rig.stop()


def test_stopping_syncs_what_an_interval_lane_has_written() -> None:
    rig = Rig(interval_ms=3_600_000)
    rig.submit(b"soon", needs_sync=False)
    rig.stop()
    assert rig.committer.durable_lsn == 1
    assert len(rig.durable) == 1


def test_a_quiet_log_is_stamped_once() -> None:
    rig = Rig(idle_stamp_ms=5)
    rig.submit(b"a")
    assert rig.log.of("stamp") == []
    rig.clock.advance(5)
    wait_until(lambda: rig.log.of("stamp") == [("stamp", 2)], what="the log is stamped")
    rig.clock.advance(500)
    rig.submit(b"b")
    assert rig.log.of("stamp") == [("stamp", 2)]
    rig.clock.advance(5)
    wait_until(lambda: rig.log.of("stamp") == [("stamp", 2), ("stamp", 3)], what="it is stamped again")
    rig.stop()


def test_a_new_log_is_not_stamped() -> None:
    rig = Rig(idle_stamp_ms=1)
    rig.clock.advance(100)
    rig.stop()
    assert rig.log.events == []


def test_a_stamp_that_finds_the_disk_full_is_tried_again_later() -> None:
    rig = Rig(idle_stamp_ms=1)
    tries = 0

    def full(call: str) -> None:
        nonlocal tries
        if call == "stamp":
            tries += 1
            if tries == 1:
                raise OSError(errno.ENOSPC, "no space")

    rig.log.before = full
    rig.submit(b"a")
    rig.clock.advance(1)
    wait_until(lambda: tries == 1, what="the first try is made")
    rig.submit(b"b")
    rig.clock.advance(2000)
    wait_until(lambda: rig.log.of("stamp") == [("stamp", 3)], what="it is stamped")
    rig.stop()
    assert not rig.failures


def test_a_stamp_that_fails_otherwise_stops_the_committer() -> None:
    rig = Rig(idle_stamp_ms=1)
    rig.submit(b"a")
    rig.log.before = failing("stamp", OSError(errno.EIO, "broken"))
    rig.clock.advance(1)
    wait_until(lambda: bool(rig.failures), what="the failure is told")
    with pytest.raises(wb.StorageError, match="stopped"):
        rig.submit(b"b")


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_at_each_bound_a_submit_is_refused_with_the_limits_name_and_nothing_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(queue_bytes_max=100, disk_bytes_max=1000)
    rig.submit(b"unsettled")
    gate = Gate(rig.log, "sync")
    Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()

    def refused(limit: str, *payloads: bytes) -> None:
        before = rig.committer.submitted_lsn
        for wait in (False, True):
            with pytest.raises(wb.Overloaded) as caught:
                rig.submit(*payloads, wait=wait, timeout_ms=0)
            assert caught.value.limit == limit
        assert rig.committer.submitted_lsn == before

    refused("queue_bytes_max", bytes(100))
    monkeypatch.setattr(limits, "UNSYNCED_COUNT_MAX", 3)
    refused("UNSYNCED_COUNT_MAX", b"", b"", b"")
    rig.log.disk_bytes = 990
    refused("disk_bytes_max", bytes(10))
    rig.log.disk_bytes = 0
    gate.open()
    rig.stop()


def test_a_log_that_holds_only_what_is_settled_is_not_full() -> None:
    rig = Rig(disk_bytes_max=1000)
    rig.submit(b"a")
    rig.log.disk_bytes = 5000
    with pytest.raises(wb.Overloaded):
        rig.submit(b"b", timeout_ms=0)
    rig.log.checkpointed_lsn = 1
    assert rig.submit(b"b", timeout_ms=0)[0] == 2
    rig.stop()


def test_a_submit_that_waits_for_room_goes_on_when_there_is_some_and_gives_up_at_its_timeout() -> None:
    rig = Rig(queue_bytes_max=100)
    gate = Gate(rig.log, "sync")
    Caller(lambda: rig.submit(bytes(90)))
    gate.wait_reached()
    patient = Caller(lambda: rig.submit(bytes(50)))
    hasty = Caller(lambda: rig.submit(bytes(50), timeout_ms=20))
    wait_until(lambda: rig.committer._sleepers == 2, what="both wait")
    rig.clock.advance(20)
    assert isinstance(hasty.wait().error, wb.Overloaded)
    assert not patient.done
    gate.open()
    assert patient.wait().error is None
    rig.stop()
    assert rig.committer.committed == 2


def test_one_call_larger_than_the_queue_is_taken_when_the_queue_is_empty() -> None:
    rig = Rig(queue_bytes_max=10)
    assert rig.submit(bytes(1000), timeout_ms=0)[0] == 1
    rig.stop()


def test_what_does_not_fit_in_a_frame_is_refused_at_once() -> None:
    rig = Rig()
    with pytest.raises(wb.OperationTooLarge, match="smaller parts"):
        rig.submit(*[b""] * (limits.FRAME_COUNT_MAX + 1))
    with pytest.raises(wb.OperationTooLarge, match="smaller parts"):
        rig.submit(*[bytes(16 * limits.MIB)] * 4)
    rig.stop()
    assert rig.log.events == []


# --- refusing and stopping -------------------------------------------------------------------------------------------


def test_after_refuse_everybody_is_told_and_what_was_accepted_is_committed() -> None:
    rig = Rig(queue_bytes_max=100)
    gate = Gate(rig.log, "sync")
    first = Caller(lambda: rig.submit(bytes(50)))
    gate.wait_reached()
    _, accepted = rig.submit(bytes(40), wait=False)
    waiting = Caller(lambda: rig.submit(bytes(50)))
    wait_until(lambda: rig.committer._sleepers == 1, what="it waits for room")
    rig.committer.refuse("over and out")
    assert isinstance(waiting.wait().error, wb.EngineClosed)
    with pytest.raises(wb.EngineClosed, match="over and out"):
        rig.submit(b"late")
    stopping = Caller(lambda: rig.committer.stop(None))
    gate.open()
    assert stopping.wait().result is True
    assert first.wait().error is None
    assert accepted.kept
    assert rig.committer.durable_lsn == 2


def test_stop_gives_up_at_its_timeout() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    Caller(lambda: rig.submit(b"a"))
    gate.wait_reached()
    rig.committer.refuse("closed")
    assert not rig.committer.stop(1_000_000)
    gate.open()
    assert rig.committer.stop(30 * 10**9)


# --- failures --------------------------------------------------------------------------------------------------------


def failing(wanted: str, error: BaseException) -> Any:
    def before(call: str) -> None:
        if call == wanted:
            raise error

    return before


@pytest.mark.parametrize("call", ["append", "sync"])
def test_a_failed_write_or_sync_is_told_to_everybody_and_nothing_is_acknowledged_after_it(call: str) -> None:
    rig = Rig()
    gate = Gate(rig.log, call)
    first = Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()
    late = [Caller(lambda: rig.submit(b"late")) for _ in range(5)]
    _, nobody_waits = rig.submit(b"late", wait=False)
    wait_until(lambda: queued(rig) == 6, what="all have joined")
    rig.log.before = failing(call, OSError(errno.EIO, "broken"))
    gate.allowed.release()
    # The call that was held goes through; the next one fails.
    assert first.wait().error is None
    for caller in late:
        assert isinstance(caller.wait().error, wb.DurabilityUnknown)
    assert nobody_waits.wait(30 * 10**9)
    assert not nobody_waits.kept
    rig.log.before = lambda call: None
    with pytest.raises(wb.StorageError, match="stopped"):
        rig.submit(b"after")
    assert len(rig.failures) == 1
    assert [committed.group.last_lsn for committed in rig.durable] == [1]
    assert rig.committer.durable_lsn == 1
    rig.stop()


def test_a_full_disk_is_waited_for() -> None:
    rig = Rig(disk_full_wait_ms=60_000)
    tries = 0

    def full(call: str) -> None:
        nonlocal tries
        if call == "append":
            tries += 1
            if tries < 3:
                raise OSError(errno.ENOSPC, "no space")

    rig.log.before = full
    assert rig.submit(b"a")[1].kept
    assert tries == 3
    rig.stop()


def test_a_disk_that_stays_full_is_a_failure_at_the_deadline() -> None:
    rig = Rig(disk_full_wait_ms=1000)
    rig.log.before = failing("append", OSError(errno.ENOSPC, "no space"))
    caller = Caller(lambda: rig.submit(b"a"))
    wait_until(lambda: rig.committer._sleepers == 1, what="it waits for room")
    rig.clock.advance(1000)
    assert isinstance(caller.wait().error, wb.DurabilityUnknown)
    rig.stop()


def test_a_failure_elsewhere_ends_the_wait_for_room_and_what_was_acknowledged_is_synced() -> None:
    rig = Rig(disk_full_wait_ms=3_600_000, interval_ms=3_600_000)
    rig.submit(b"soon", needs_sync=False)
    rig.log.before = failing("append", OSError(errno.ENOSPC, "no space"))
    caller = Caller(lambda: rig.submit(b"a"))
    wait_until(lambda: rig.committer._sleepers == 1, what="it waits for room")
    assert rig.log.synced_lsn == 1
    tries = 0

    def count(call: str) -> None:
        nonlocal tries
        tries += call == "append"

    rig.committer.halt(wb.StorageError("the checkpoint failed"))
    rig.log.before = count
    assert isinstance(caller.wait().error, wb.StorageError)
    wait_until(lambda: rig.committer._owner is None, what="the log is given back")
    rig.stop()
    assert rig.log.of("append") == [("append", 1, [b"soon"])], "a group that was given up is not written"
    assert len(rig.failures) == 1


def test_what_was_acknowledged_is_synced_before_the_wait_for_room_although_the_engine_has_failed() -> None:
    rig = Rig(disk_full_wait_ms=3_600_000, interval_ms=3_600_000, start=False)
    rig.submit(b"soon", needs_sync=False)

    def full(call: str) -> None:
        if call == "append":
            rig.committer.halt(wb.StorageError("the checkpoint failed"))
            raise OSError(errno.ENOSPC, "no space")

    rig.log.before = full
    assert isinstance(Caller(lambda: rig.submit(b"a")).wait().error, wb.StorageError)
    assert rig.log.synced_lsn == 1


@pytest.mark.parametrize("call", ["append", "sync"])
def test_a_committers_thread_that_dies_syncs_what_was_acknowledged(call: str) -> None:
    rig = Rig(interval_ms=3_600_000)
    rig.submit(b"soon", needs_sync=False)
    deaths = iter([MemoryError("of anything")])

    def die(name: str) -> None:
        if name == call and (error := next(deaths, None)):
            raise error

    rig.log.before = die
    _, durable = rig.submit(b"a", wait=False)
    assert durable.wait(30 * 10**9)
    rig.stop()
    assert rig.log.synced_lsn == rig.log.last_lsn
    assert rig.committer._owner is None


def test_a_committers_thread_that_dies_leaves_the_log_to_the_leader_who_has_it() -> None:
    died = threading.Event()

    class Dying(RealCondition):
        """Kills the committer's thread while a leader is at work."""

        def wait(self, timeout_ns: int | None = None) -> bool:
            if armed.is_set() and rig.committer.is_own_thread() and not died.is_set():
                died.set()
                raise MemoryError("of anything")
            return super().wait(timeout_ns)

    class Threads(RealThreads):
        def condition(self) -> RealCondition:
            return Dying()

    armed = threading.Event()
    rig = Rig(threads=Threads())
    gate = Gate(rig.log, "append")
    leader = Caller(lambda: rig.submit(b"a"))
    gate.wait_reached()
    owner = rig.committer._owner
    armed.set()
    rig.submit(b"b", wait=False, needs_sync=False)  # wakes the thread
    with rig.committer._cond:
        rig.committer._cond.notify_all()
    wait_until(lambda: bool(rig.failures), what="the death is told")
    assert rig.committer._owner is owner
    gate.open()
    assert leader.wait().error is not None
    rig.stop()
    assert rig.log.synced_lsn == rig.log.last_lsn


@pytest.mark.parametrize("call", ["append", "sync"])
def test_the_death_of_the_committers_thread_is_loud(call: str) -> None:
    rig = Rig()
    rig.log.before = failing(call, MemoryError("of anything"))
    _, durable = rig.submit(b"a", wait=False)
    assert durable.wait(30 * 10**9), "whoever waits is told"
    assert not durable.kept
    assert len(rig.failures) == 1
    with pytest.raises(wb.StorageError, match="stopped"):
        rig.submit(b"b")
    rig.stop()


def test_an_error_of_its_own_code_under_a_leader_is_told_to_the_others_of_its_group() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    first = Caller(lambda: rig.submit(b"first"))
    gate.wait_reached()
    late = [Caller(lambda: rig.submit(b"late")) for _ in range(5)]
    wait_until(lambda: queued(rig) == 5, what="all have joined")
    rig.log.before = failing("append", MemoryError("of anything"))
    gate.open()
    assert first.wait().error is None
    assert all(caller.wait().error is not None for caller in late)
    assert rig.failures
    rig.stop()


@pytest.mark.parametrize("call", ["append", "sync"])
def test_an_interrupted_leader_hands_its_group_to_the_committers_thread(call: str) -> None:
    rig = Rig()
    gate = Gate(rig.log, call)
    first = Caller(lambda: rig.submit(b"0"))
    gate.wait_reached()
    leader = Caller(lambda: rig.submit(b"1"))
    wait_until(lambda: queued(rig) == 1, what="the leader has opened its group")
    follower = Caller(lambda: rig.submit(b"2"))
    wait_until(lambda: queued(rig) == 2, what="the follower has joined it")
    interrupts = iter([KeyboardInterrupt()])

    def interrupt(name: str) -> None:
        if name == call and (error := next(interrupts, None)):
            raise error

    rig.log.before = interrupt
    gate.allowed.release()
    first.wait()
    assert isinstance(leader.wait().error, KeyboardInterrupt)
    assert follower.wait().error is None
    assert rig.submit(b"3")[0] == 4
    rig.stop()
    assert [payloads for _, _, payloads in rig.log.of("append")] == [[b"0"], [b"1", b"2"], [b"3"]]
    assert [committed.group.first_lsn for committed in rig.durable] == [1, 2, 4]


def test_a_leader_that_is_interrupted_while_it_tells_the_dispatcher_leaves_nobody_waiting() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    first = Caller(lambda: rig.submit(b"0"))
    gate.wait_reached()
    leader = Caller(lambda: rig.submit(b"1"))
    wait_until(lambda: queued(rig) == 1, what="the leader has opened its group")
    follower = Caller(lambda: rig.submit(b"2"))
    wait_until(lambda: queued(rig) == 2, what="the follower has joined it")
    interrupts = iter([None, KeyboardInterrupt()])

    def interrupt(committed: object) -> None:
        if error := next(interrupts, None):
            raise error

    rig.on_durable = interrupt
    gate.open()
    first.wait()
    assert isinstance(leader.wait().error, KeyboardInterrupt)
    rig.clock.advance(10)
    assert follower.wait().error is None
    rig.stop()
    assert [committed.group.first_lsn for committed in rig.durable] == [1, 2]


def test_a_leader_that_is_interrupted_after_its_work_does_not_take_the_log_from_its_successor() -> None:
    armed = threading.Event()

    class Interrupting(RealCondition):
        """Interrupts the leader at the moment when it has given the log back."""

        def __exit__(self, *exc: object) -> None:
            super().__exit__(*exc)
            if armed.is_set() and rig.committer._owner is None and rig.committer.committed:
                armed.clear()
                rig.committer._owner = successor  # somebody was faster
                raise KeyboardInterrupt

    class Threads(RealThreads):
        def condition(self) -> RealCondition:
            return Interrupting()

    successor = object()
    rig = Rig(threads=Threads(), start=False)
    armed.set()
    with pytest.raises(KeyboardInterrupt):
        rig.submit(b"a")
    assert rig.committer._owner is successor


def test_a_failure_elsewhere_ends_a_wait_for_a_sync_that_never_returns() -> None:
    rig = Rig()
    gate = Gate(rig.log, "sync")
    first = Caller(lambda: rig.submit(b"a"))
    gate.wait_reached()
    _, durable = rig.submit(b"b", wait=False)
    rig.committer.halt(wb.StorageError("the checkpoint failed"))
    assert durable.wait(30 * 10**9)
    with pytest.raises(wb.StorageError, match="checkpoint"):
        durable.take()
    gate.open()
    assert isinstance(first.wait().error, wb.StorageError)
    assert rig.durable == []
    rig.stop()


def test_a_committer_says_what_it_does() -> None:
    rig = Rig()
    rig.submit(b"a")
    assert repr(rig.committer) == "<Committer next lsn 2, durable 1, 0 groups queued>"
    assert not rig.committer.is_own_thread()
    rig.stop()


def test_the_fake_log_is_a_log() -> None:
    log: Log = FakeLog()
    assert log.trim(0) == 0
    assert log.read_frame(log.end, next_lsn=0) is None
