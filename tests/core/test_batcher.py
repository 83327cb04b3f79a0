"""The queue of a shard: nothing is lost, nothing is in flight twice, and each order is kept through every failure."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.segments import STORE
from walbatch import limits
from walbatch.core.batcher import CutLimits, Entry, ShardQueue, entry_bytes
from walbatch.core.delivery import judge
from walbatch.core.settlement import ShardLedger
from walbatch.types import Batch, CutReason, Failures, Mark, Order, Retry

LINGER_NS = 100
FAR_NS = 10**18


def queue_of(
    order: Order = Order.KEY, *, count: int = 4, size: int = 1000, linger_ns: int = LINGER_NS
) -> ShardQueue:
    return ShardQueue(order=order, cut_limits=CutLimits(count=count, bytes=size, linger_ns=linger_ns))


def entry(lsn: int, key: bytes = b"k", *, payload: bytes = b"", now_ns: int = 0) -> Entry:
    return (lsn, key, payload, 5, now_ns)


def push(queue: ShardQueue, *keys: bytes, first_lsn: int = 1) -> None:
    for lsn, key in enumerate(keys, first_lsn):
        queue.push(entry(lsn, key))


def lsns(entries: list[Entry]) -> list[int]:
    return [lsn for lsn, *_ in entries]


def due(
    queue: ShardQueue,
    now_ns: int = 0,
    *,
    flush_lsn: int = 0,
    draining: bool = False,
    window_full: bool = False,
) -> CutReason | None:
    queue.release(now_ns)
    return queue.due(now_ns, flush_lsn=flush_lsn, draining=draining, window_full=window_full)


# --- the model ----------------------------------------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """Random pushes, cuts and answers, against a list of what is unsettled. The ranges limit is small here."""

    RANGES = 5

    @initialize(
        order=st.sampled_from(Order),
        count=st.integers(1, 6),
        size=st.sampled_from([1, 10, 1000]),
        linger_ns=st.sampled_from([0, LINGER_NS]),
    )
    def start(self, order: Order, count: int, size: int, linger_ns: int) -> None:
        self.patched = mock.patch.object(limits, "RANGES_MAX", self.RANGES)
        self.patched.start()
        self.order = order
        self.queue = queue_of(order, count=count, size=size, linger_ns=linger_ns)
        self.ledger = ShardLedger(Mark())
        self.unsettled: dict[int, Entry] = {}
        self.flying: list[Entry] = []
        self.not_before: dict[int, int] = {}
        self.settled: list[int] = []
        self.next_lsn = 1
        self.now_ns = 0

    def teardown(self) -> None:
        """Once faults stop, everything is settled and the memory is free."""
        if not hasattr(self, "queue"):
            return
        try:
            if self.flying:
                self.settle_all()
            self.now_ns = FAR_NS
            for _ in range(2 * len(self.unsettled) + 1):
                if self.take(draining=True):
                    self.settle_all()
            assert not self.unsettled
            assert sorted(self.settled) == sorted(set(self.settled)), "settled twice"
            assert (len(self.queue), self.queue.ready, self.queue.memory_bytes) == (0, 0, 0)
            assert (self.queue._ready_bytes, self.queue._stragglers, self.queue.next_due_ns()) == (0, 0, None)
            assert not self.queue._held
            assert not self.queue._timers
        finally:
            self.patched.stop()

    # --- what happens

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=8), gap=st.integers(1, 2))
    def push(self, keys: list[bytes], gap: int) -> None:
        for key in keys:
            pushed = entry(self.next_lsn, key, payload=bytes(self.next_lsn % 4), now_ns=self.now_ns)
            self.queue.push(pushed)
            self.ledger.admit(self.next_lsn)
            self.unsettled[self.next_lsn] = pushed
            self.next_lsn += gap

    @rule(step_ns=st.integers(1, 2 * LINGER_NS))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule()
    @precondition(lambda self: not self.flying)
    def sleep_until_something_is_due(self) -> None:
        """A timer that trusts `next_due_ns` misses nothing and does not spin."""
        wake_ns = self.queue.next_due_ns()
        if wake_ns is None:
            assert not self.unsettled or self.queue._is_full()
            return
        self.now_ns = max(self.now_ns, wake_ns)
        before = self.queue.ready
        self.queue.release(self.now_ns)
        assert self.queue.ready > before or due(self.queue, self.now_ns) is not None

    @rule(flush=st.booleans(), draining=st.booleans(), window_full=st.booleans())
    @precondition(lambda self: not self.flying)
    def cut(self, *, flush: bool, draining: bool, window_full: bool) -> None:
        self.take(flush_lsn=self.next_lsn if flush else 0, draining=draining, window_full=window_full)

    def take(self, *, flush_lsn: int = 0, draining: bool = False, window_full: bool = False) -> list[Entry]:
        reason = due(self.queue, self.now_ns, flush_lsn=flush_lsn, draining=draining, window_full=window_full)
        if reason is None:
            return []
        taken = self.queue.cut()
        self.check_batch(taken)
        settling = frozenset(lsns(taken))
        assert len(self.ledger.mark(epoch=1, settling=settling).ranges) <= self.RANGES
        self.flying = taken
        return taken

    def check_batch(self, taken: list[Entry]) -> None:
        bounds = self.queue.limits
        assert len(taken) <= bounds.count
        assert len(taken) <= 1 or sum(len(e[1]) + len(e[2]) for e in taken) <= bounds.bytes
        assert len(set(lsns(taken))) == len(taken)
        for e in taken:
            assert self.unsettled[e[0]] is e
            assert self.not_before.get(e[0], 0) <= self.now_ns, "tried again too early"
        if self.order is Order.SHARD:
            assert lsns(taken) == list(self.unsettled)[: len(taken)]
        if self.order is Order.KEY:
            for key in {e[1] for e in taken}:
                mine = [e[0] for e in taken if e[1] == key]
                assert mine == [lsn for lsn, e in self.unsettled.items() if e[1] == key][: len(mine)]

    @rule()
    @precondition(lambda self: self.flying)
    def settle_all(self) -> None:
        assert self.queue.finish() == self.flying
        self.settle(self.flying)
        assert self.queue.failures == 0

    @rule(wait_ns=st.integers(0, 3 * LINGER_NS))
    @precondition(lambda self: self.flying)
    def fail_all(self, wait_ns: int) -> None:
        failures = self.queue.failures
        self.queue.fail(retry_at_ns=self.now_ns + wait_ns)
        for e in self.unsettled.values():  # the whole shard waits
            self.not_before[e[0]] = max(self.not_before.get(e[0], 0), self.now_ns + wait_ns)
        self.flying = []
        assert self.queue.failures == failures + 1

    @rule(data=st.data())
    @precondition(lambda self: self.flying)
    def fail_some(self, data: st.DataObject) -> None:
        indexes = data.draw(st.sets(st.integers(0, len(self.flying) - 1), min_size=1))
        batch = Batch(
            lane="put",
            shard=0,
            store=STORE,
            lsns=lsns(self.flying),
            keys=[e[1] for e in self.flying],
            payloads=[e[2] for e in self.flying],
            priorities=[e[3] for e in self.flying],
            attempt=1,
            reason=CutReason.COUNT,
            mark=None,
        )
        verdict = judge(batch, Failures({index: Retry() for index in indexes}), self.order)
        waits = {index: self.now_ns + data.draw(st.integers(0, 3 * LINGER_NS)) for index in verdict.retry}
        failures = self.queue.failures
        self.queue.finish_partly(verdict.applied, waits)
        for index, until_ns in waits.items():
            self.not_before[self.flying[index][0]] = until_ns
        self.settle([self.flying[index] for index in verdict.applied])
        assert self.queue.failures == (0 if verdict.applied else failures + 1)

    def settle(self, entries: list[Entry]) -> None:
        for e in entries:
            del self.unsettled[e[0]]
        self.settled += lsns(entries)
        self.ledger.settle(lsns(entries))
        self.flying = []

    # --- what always holds

    @invariant()
    def nothing_is_lost_and_memory_is_accounted_for(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.unsettled)
        assert self.queue.memory_bytes == sum(map(entry_bytes, self.unsettled.values()))
        assert self.queue.in_flight == self.flying
        assert self.queue._ready_bytes == sum(map(entry_bytes, self.queue._ready))

    @invariant()
    def each_order_is_kept_in_what_was_settled(self) -> None:
        if not hasattr(self, "queue"):
            return
        highest = max(self.settled, default=0)
        if self.order is Order.SHARD:
            assert self.settled == sorted(self.settled)
        # A mark has one range for each straggler at most, and there is a limit to its ranges.
        assert sum(lsn < highest for lsn in self.unsettled) <= self.RANGES
        assert len(self.ledger.mark(epoch=1).ranges) <= self.RANGES


QueueMachine.TestCase.settings = settings(stateful_step_count=30)
TestQueueAgainstAModel = QueueMachine.TestCase


# --- triggers -----------------------------------------------------------------------------------------------


def test_an_empty_queue_is_never_due() -> None:
    queue = queue_of()
    assert due(queue, FAR_NS, flush_lsn=99, draining=True, window_full=True) is None
    assert (queue.next_due_ns(), len(queue), queue.ready) == (None, 0, 0)


def test_a_batch_is_cut_by_count() -> None:
    queue = queue_of(count=2)
    push(queue, b"a")
    assert due(queue) is None
    push(queue, b"b", first_lsn=2)
    assert due(queue) is CutReason.COUNT


def test_a_batch_is_cut_by_bytes_of_keys_and_payloads() -> None:
    queue = queue_of(size=10)
    queue.push(entry(1, b"key", payload=b"123456"))
    assert due(queue) is None
    queue.push(entry(2, b"k"))
    assert due(queue) is CutReason.BYTES


def test_a_batch_is_cut_by_linger_of_its_oldest_operation() -> None:
    queue = queue_of()
    queue.push(entry(1, now_ns=50))
    queue.push(entry(2, now_ns=149))
    assert queue.next_due_ns() == 150
    assert due(queue, 149) is None
    assert due(queue, 150) is CutReason.LINGER


def test_a_flush_cuts_what_was_submitted_before_it_and_no_more() -> None:
    queue = queue_of()
    push(queue, b"a", first_lsn=7)
    assert due(queue, flush_lsn=6) is None
    assert due(queue, flush_lsn=7) is CutReason.FLUSH


def test_a_drain_and_a_full_window_cut_at_once() -> None:
    queue = queue_of()
    push(queue, b"a")
    assert due(queue, draining=True) is CutReason.DRAIN
    assert due(queue, window_full=True) is CutReason.BACKLOG


def test_one_batch_is_in_flight_at_a_time() -> None:
    queue = queue_of(count=1)
    push(queue, b"a", b"b")
    assert lsns(queue.cut()) == [1]
    assert due(queue, draining=True) is None
    assert queue.next_due_ns() is None
    assert repr(queue) == "<ShardQueue 1 ready, 0 held, 1 in flight>"
    with pytest.raises(AssertionError):
        queue.cut()


# --- cutting ------------------------------------------------------------------------------------------------

CUTS = {
    "up to the count": (3, 1000, [1, 1, 1, 1], [1, 2, 3]),
    "up to the bytes": (9, 10, [4, 5, 1, 1], [1, 2, 3]),
    "one that is too large goes alone": (9, 10, [11, 1], [1]),
    "one that is too large waits for its turn": (9, 10, [1, 11, 1], [1]),
    "all there is": (9, 1000, [1, 1], [1, 2]),
    "empty ones cost no bytes": (9, 1, [0, 0, 1, 0], [1, 2, 3, 4]),
}


@pytest.mark.parametrize(("count", "size", "payloads", "expected"), CUTS.values(), ids=CUTS.keys())
def test_a_cut_takes(count: int, size: int, payloads: list[int], expected: list[int]) -> None:
    queue = queue_of(count=count, size=size)
    for lsn, payload in enumerate(payloads, 1):
        queue.push(entry(lsn, b"", payload=bytes(payload)))
    assert lsns(queue.cut()) == expected


# --- failures -----------------------------------------------------------------------------------------------


def test_a_failed_batch_goes_back_in_front_and_the_shard_waits() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b", b"c")
    queue.cut()
    queue.fail(retry_at_ns=500)
    assert due(queue, 499, draining=True) is None
    assert queue.next_due_ns() == 500
    assert due(queue, 500) is CutReason.COUNT
    assert (lsns(queue.cut()), queue.failures) == ([1, 2], 1)


def test_a_key_that_waits_does_not_hold_up_the_others() -> None:
    queue = queue_of(count=3)
    push(queue, b"a", b"b", b"c")
    queue.cut()
    queue.finish_partly([1, 2], {0: 500})
    push(queue, b"a", b"b", b"a", b"c", first_lsn=4)
    assert due(queue, 10) is CutReason.COUNT
    assert lsns(queue.cut()) == [5, 7]
    queue.finish()
    assert due(queue, 499, draining=True) is None
    assert due(queue, 500, draining=True) is CutReason.COUNT
    assert lsns(queue.cut()) == [1, 4, 6]


def test_an_operation_without_order_waits_alone() -> None:
    queue = queue_of(Order.NONE, count=2)
    push(queue, b"a", b"a", b"a")
    queue.cut()
    queue.finish_partly([1], {0: 500})
    assert due(queue, 10, draining=True) is CutReason.DRAIN
    assert lsns(queue.cut()) == [3]


def test_a_shard_in_order_waits_as_a_whole() -> None:
    queue = queue_of(Order.SHARD, count=3)
    push(queue, b"a", b"b", b"c", b"d")
    queue.cut()
    queue.finish_partly([0], {1: 500, 2: 0})
    assert due(queue, 499, draining=True) is None
    assert lsns(queue.cut() if due(queue, 500) else []) == [2, 3, 4]


@pytest.mark.parametrize("waits", [{0: 100, 1: 500}, {0: 500, 1: 100}], ids=["later one", "earlier one"])
def test_a_key_waits_as_long_as_any_of_its_operations_asked_for(waits: dict[int, int]) -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"a")
    queue.cut()
    queue.finish_partly([], waits)
    assert due(queue, 499, draining=True) is None
    assert queue.next_due_ns() == 500
    assert due(queue, 500) is CutReason.COUNT
    assert lsns(queue.cut()) == [1, 2]


def test_what_waited_for_its_retry_does_not_linger_again() -> None:
    queue = queue_of(count=2, linger_ns=FAR_NS)
    push(queue, b"a", b"b")
    queue.cut()
    queue.finish_partly([0], {1: 500})
    assert queue.next_due_ns() == 500
    assert due(queue, 500) is CutReason.LINGER
    assert lsns(queue.cut()) == [2]


def test_a_flush_does_not_wait_behind_a_later_operation_that_was_tried_again() -> None:
    queue = queue_of(count=2, linger_ns=FAR_NS)
    push(queue, b"a", first_lsn=10)
    push(queue, b"b", first_lsn=50)
    queue.cut()
    queue.finish_partly([], {0: 500, 1: 501})
    queue.limits = CutLimits(count=9, bytes=1000, linger_ns=FAR_NS)
    assert due(queue, 501, flush_lsn=20) is not None
    assert set(lsns(queue.cut())) == {10, 50}


def test_nothing_is_cut_where_all_that_is_ready_has_a_waiting_key() -> None:
    queue = queue_of(count=1)
    push(queue, b"a", b"a")
    queue.cut()
    queue.finish_partly([], {0: 500})
    assert due(queue, draining=True) is CutReason.COUNT
    assert queue.cut() == []
    assert (len(queue), queue.ready) == (2, 0)
    assert due(queue, 500, draining=True) is CutReason.COUNT


def test_an_answer_must_speak_for_the_whole_batch() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b")
    queue.cut()
    with pytest.raises(AssertionError):
        queue.finish_partly([0], {})


@pytest.mark.parametrize("order", [Order.KEY, Order.NONE], ids=lambda order: order.value)
def test_stragglers_stop_the_shard_before_its_mark_grows_over_its_limit(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LSNs between them belong to other shards, so that each straggler costs a range."""
    monkeypatch.setattr(limits, "RANGES_MAX", 10)
    queue, ledger = queue_of(order, count=6), ShardLedger(Mark())
    for lsn in range(1, 200, 2):
        queue.push(entry(lsn, b"%d" % lsn))
        ledger.admit(lsn)
    rounds = 0
    while due(queue, draining=True) is not None:
        *failed, last = queue.cut()
        if failed:
            queue.finish_partly([len(failed)], dict.fromkeys(range(len(failed)), 500))
            ledger.settle([last[0]])
        else:
            queue.finish_partly([], {0: 500})
        assert len(ledger.mark(epoch=1).ranges) <= 10
        rounds += 1
        assert rounds < 100
    assert queue.ready
    assert queue.next_due_ns() == 500
    highest = queue._highest_cut
    assert due(queue, 500, draining=True) is not None
    assert max(lsns(queue.cut())) <= highest


def test_a_hot_key_that_waits_is_no_way_around_that_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RANGES_MAX", 10)
    queue, ledger = queue_of(count=8, size=10**6), ShardLedger(Mark())
    for lsn in range(1, 400, 2):
        queue.push(entry(lsn, b"hot" if lsn % 3 else b"%d" % lsn))
        ledger.admit(lsn)
    taken = queue.cut()
    hot = {index: 500 for index, e in enumerate(taken) if e[1] == b"hot"}
    queue.finish_partly([index for index in range(len(taken)) if index not in hot], hot)
    ledger.settle([e[0] for index, e in enumerate(taken) if index not in hot])
    while due(queue, draining=True) is not None:
        ledger.settle(lsns(queue.cut()))
        queue.finish()
        assert len(ledger.mark(epoch=1).ranges) <= 10


@given(order=st.sampled_from(Order), rounds=st.integers(1, 5), size=st.integers(0, 10))
def test_memory_returns_to_zero(order: Order, rounds: int, size: int) -> None:
    queue = queue_of(order, count=2)
    for lsn in range(1, 6):
        queue.push(entry(lsn, b"%d" % (lsn % 2), payload=bytes(size)))
    assert queue.memory_bytes == 5 * (1 + size + limits.OPERATION_OVERHEAD_BYTES)
    for _ in range(rounds):
        if due(queue, FAR_NS, draining=True):
            queue.cut()
            queue.fail(retry_at_ns=0)
    while due(queue, FAR_NS, draining=True):
        queue.cut()
        queue.finish()
    assert queue.memory_bytes == 0
