"""The queue of a shard: nothing is lost, nothing is in flight twice, and each order is kept through every failure."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.core.segments import STORE
from walbatch import limits
from walbatch.core.batcher import CutPolicy, Entry, Flight, ShardQueue, Situation, entry_bytes
from walbatch.core.delivery import judge
from walbatch.core.run import Run
from walbatch.core.settlement import ShardLedger
from walbatch.types import (
    NO_OPTIONS,
    PRIORITY_URGENT,
    Batch,
    CutReason,
    FailureOrder,
    Failures,
    Mark,
    Order,
    Retry,
    TriggerMode,
)

LINGER_NS = 100
FAR_NS = 10**18
NORMAL = {
    Order.KEY: FailureOrder.HOLD_KEY,
    Order.SHARD: FailureOrder.BLOCK,
    Order.NONE: FailureOrder.CONTINUE,
}


def queue_of(
    order: Order = Order.KEY, *, count: int | None = 4, size: int = 1000, linger_ns: int | None = LINGER_NS,
    mode: TriggerMode = TriggerMode.ANY, on_failure: FailureOrder | None = None, attempts: int | None = 3, flights: int = 1,
) -> ShardQueue:  # fmt: skip
    return ShardQueue(
        order=order, on_failure=on_failure or NORMAL[order], attempts_max=attempts, flights_max=flights,
        policy=CutPolicy(mode=mode, count=count, bytes=size, linger_ns=linger_ns),
    )  # fmt: skip


def entry(lsn: int, key: bytes = b"k", *, payload: bytes = b"", now_ns: int = 0, priority: int = 5) -> Entry:
    return (lsn, key, payload, priority, now_ns, NO_OPTIONS)


def push(queue: ShardQueue, *keys: bytes, first_lsn: int = 1, priority: int = 5) -> None:
    for lsn, key in enumerate(keys, first_lsn):
        queue.push(entry(lsn, key, priority=priority))


def push_ahead(queue: ShardQueue, entries: Iterable[Entry]) -> None:
    """Operations without times, ahead of their turn."""
    queue.push_ahead((e, 0, 0) for e in entries)


def lsns(entries: Iterable[Entry]) -> list[int]:
    return [e[0] for e in entries]


def at(now_ns: int = 0, **facts: object) -> Situation:
    return Situation(now_ns=now_ns, target=10_000)._replace(**facts)  # type: ignore[arg-type]  # as the test says


def due(queue: ShardQueue, now_ns: int = 0, **facts: object) -> CutReason | None:
    queue.release(now_ns)
    return queue.due(at(now_ns, **facts))


def cut(queue: ShardQueue, now_ns: int = 0, **facts: object) -> Flight:
    """The next batch, which must be due."""
    reason = due(queue, now_ns, **facts)
    assert reason is not None
    return queue.cut(at(now_ns, **facts), reason)


def drained(queue: ShardQueue, now_ns: int = 0) -> list[list[int]]:
    """The batches of a drain in which everything is applied."""
    batches: list[list[int]] = []
    while due(queue, now_ns, draining=True) is not None:
        batches.append(lsns(queue.finish(cut(queue, now_ns, draining=True).number)))
    return batches


def places(queue: ShardQueue) -> list[int]:
    """Every operation in the queue, as often as it is in some place."""
    found = [*queue._places.line, *queue._places.holds, *queue._beyond, *queue._out.values()]
    for parcel in queue._places.parcels:
        found += parcel.entries
    for flight in queue.flights.values():
        found += flight.entries
    return lsns(found)


def assert_empty(queue: ShardQueue) -> None:
    """Nothing is left of what was in the queue."""
    assert (len(queue), queue.ready, queue.memory_bytes, places(queue)) == (0, 0, 0, [])
    assert (queue.next_due_ns(), queue.oldest_arrival_ns) == (None, None)
    inner = queue._places
    assert (inner.line.bytes, inner.line.urgent, queue._inside) == (0, 0, 0)
    for left in (inner.holds, inner.parcels, inner.eager, inner.retried, inner.alone):
        assert not left, queue
    for more in (queue._deadlines, queue._attempts, queue._out):
        assert not more, queue
    assert not inner.holds._blocks
    assert not inner.holds._until
    assert queue._calm


# --- the model ----------------------------------------------------------------------------------------------

KEYS = [b"a", b"b", b"c"]
AHEAD_LSN = 1_000_000


class QueueMachine(RuleBasedStateMachine):
    """Random pushes, cuts, answers and cancellations, against a list of what is unsettled. The ranges limit is small here."""

    RANGES = 12

    @initialize(
        order=st.sampled_from(Order),
        block=st.booleans(),
        count=st.sampled_from([None, 1, 2, 4, 6]),
        size=st.sampled_from([1, 10, 1000]),
        linger_ns=st.sampled_from([0, LINGER_NS, None]),
        mode=st.sampled_from(TriggerMode),
        priorities=st.sampled_from([[5], [5, 2], [2, 5, 7, 9], [9]]),
        attempts=st.sampled_from([None, 1, 2]),
        flights=st.integers(1, 3),
    )
    def start(
        self, order: Order, *, block: bool, count: int | None, size: int, linger_ns: int | None, mode: TriggerMode,
        priorities: list[int], attempts: int | None, flights: int,
    ) -> None:  # fmt: skip
        self.patched = mock.patch.object(limits, "WINDOW_COUNT_MAX", self.RANGES)
        self.patched.start()
        self.order = order
        self.on_failure = FailureOrder.BLOCK if block else NORMAL[order]
        self.queue = queue_of(
            order, count=count, size=size, linger_ns=linger_ns, mode=mode, on_failure=self.on_failure,
            attempts=attempts, flights=flights,
        )  # fmt: skip
        self.priorities = priorities
        self.unsettled: dict[int, Entry] = {}
        self.not_before: dict[int, int] = {}
        self.deadlines: dict[int, int] = {}
        self.attempts: dict[int, int] = {}
        self.count_max: dict[int, int] = {}
        self.cancelled: dict[int, Entry] = {}
        self.expired: dict[int, Entry] = {}
        self.keys = list(KEYS)
        self.settled: list[int] = []
        self.next_lsn = 1
        self.next_ahead = AHEAD_LSN
        self.ahead = 0
        self.now_ns = 0

    def teardown(self) -> None:
        """Once faults stop, everything is settled and the memory is free."""
        if not hasattr(self, "queue"):
            return
        try:
            self.now_ns = FAR_NS
            self.drop_all()
            for number in list(self.queue.flights):
                self.settle_all(number)
            for _ in range(2 * len(self.unsettled) + 2):
                self.expire()
                self.drop_all()
                if self.take(draining=True) is not None:
                    self.settle_all(next(iter(self.queue.flights)))
            assert not self.unsettled
            assert sorted(self.settled) == sorted(set(self.settled)), "settled twice"
            assert_empty(self.queue)
        finally:
            self.patched.stop()

    # --- what comes in

    @rule(data=st.data(), gap=st.integers(1, 2))
    def push(self, data: st.DataObject, gap: int) -> None:
        rows = st.tuples(
            st.sampled_from(self.keys or [b"d"]), st.sampled_from(self.priorities), st.sampled_from([0, 0, 0, 50, 250]),
            st.sampled_from([0, 0, 0, 120, 400]),
        )  # fmt: skip
        for key, priority, delay, limit in data.draw(st.lists(rows, min_size=1, max_size=8)):
            lsn = self.next_lsn
            self.next_lsn += gap
            pushed = entry(lsn, key, payload=bytes(lsn % 4), now_ns=self.now_ns, priority=priority)
            not_before = self.now_ns + delay if delay else 0
            deadline = self.now_ns + limit if limit else 0
            self.queue.push(pushed, not_before_ns=not_before, deadline_ns=deadline)
            self.unsettled[lsn] = pushed
            self.set_times(lsn, not_before, deadline)

    @rule(data=st.data(), priority=st.integers(0, 3))
    def push_run(self, data: st.DataObject, priority: int) -> None:
        """What came at once goes in at once."""
        keys = data.draw(st.lists(st.sampled_from(self.keys or [b"d"]), min_size=1, max_size=8))
        lsns = range(self.next_lsn, self.next_lsn + len(keys))
        self.next_lsn += len(keys)
        payloads = [b"run"] * len(keys)
        run = Run(lsns, keys, payloads, self.priorities[priority % len(self.priorities)], self.now_ns)
        self.unsettled.update((e[0], e) for e in run)
        self.queue.push_run(run)

    def set_times(self, lsn: int, not_before: int, deadline: int) -> None:
        if not_before:
            self.not_before[lsn] = not_before
        if deadline:
            self.deadlines[lsn] = deadline

    @rule(data=st.data(), elders=st.integers(0, 2))
    @precondition(lambda self: self.order is not Order.SHARD)
    def fetch_ahead(self, data: st.DataObject, elders: int) -> None:
        """An urgent operation of the backlog, with its elders. What is pushed later with its key would be younger."""
        key = data.draw(st.sampled_from([*self.keys, b"z%d" % self.next_ahead]))
        self.keys = [other for other in self.keys if other != key]
        found = [
            entry(self.next_ahead + i, key, now_ns=self.now_ns, priority=9 if i == elders else 2)
            for i in range(elders + 1)
        ]
        self.next_ahead += elders + 1
        self.ahead += len(found)
        rows: list[tuple[Entry, int, int]] = []
        for e in found:
            delay = data.draw(st.sampled_from([0, 0, 0, 50, 250]))
            limit = data.draw(st.sampled_from([0, 0, 0, 120, 400]))
            rows.append((e, delay and self.now_ns + delay, limit and self.now_ns + limit))
        self.queue.push_ahead(rows)
        for e, not_before, deadline in rows:
            self.unsettled[e[0]] = e
            self.set_times(e[0], not_before, deadline)

    # --- time

    @rule(step_ns=st.integers(1, 2 * LINGER_NS))
    def time_passes(self, step_ns: int) -> None:
        self.now_ns += step_ns

    @rule(probing=st.booleans())
    def sleep_until_something_is_due(self, *, probing: bool) -> None:
        """A timer that trusts `next_due_ns` misses nothing and does not spin."""
        situation = at(self.now_ns, probing=probing)
        wake_ns = self.queue.next_due_ns(situation)

        def look(now_ns: int) -> tuple[bool, ShardQueue]:
            queue = copy.deepcopy(self.queue)
            queue.release(now_ns)
            expired = queue.expire(now_ns)
            return bool(expired) or queue.due(situation._replace(now_ns=now_ns)) is not None, queue

        if wake_ns is None:
            assert not look(FAR_NS)[0]
            return
        if wake_ns - 1 > self.now_ns:
            assert not look(wake_ns - 1)[0], "woken too late"
        self.now_ns = max(self.now_ns, wake_ns)
        something, after = look(self.now_ns)
        if not something:
            later = after.next_due_ns(situation)
            assert later is None or later > self.now_ns, "it would spin"

    @rule()
    def expire(self) -> None:
        taken = self.queue.expire(self.now_ns)
        flying = {lsn for flight in self.queue.flights.values() for lsn in lsns(flight.entries)}
        flying |= set(lsns(self.queue._beyond))
        late = [
            lsn for lsn, deadline in self.deadlines.items()
            if deadline <= self.now_ns and lsn not in flying and lsn not in self.cancelled and lsn not in self.expired
        ]  # fmt: skip
        assert lsns(taken) == sorted(late)
        self.expired.update((e[0], e) for e in taken)

    # --- cutting

    @rule(
        flush=st.booleans(), draining=st.booleans(), window_full=st.booleans(), probing=st.booleans(),
        memory_pressed=st.booleans(), aim=st.integers(1, 9),
    )  # fmt: skip
    def cut(
        self, *, flush: bool, aim: int, draining: bool, window_full: bool, probing: bool, memory_pressed: bool
    ) -> None:
        self.take(
            flush_lsn=self.next_lsn if flush else 0,
            target=aim,
            draining=draining,
            window_full=window_full,
            probing=probing,
            memory_pressed=memory_pressed,
        )

    def take(self, **facts: object) -> Flight | None:
        situation = at(self.now_ns, **facts)
        self.queue.release(self.now_ns)
        reason = self.queue.due(situation)
        if reason is None:
            return None
        flight = self.queue.cut(situation, reason)
        assert flight.reason is reason
        self.check_batch(flight.entries, situation)
        return flight

    def check_batch(self, taken: Sequence[Entry], situation: Situation) -> None:
        policy = self.queue.policy
        assert 1 <= len(taken) <= policy.limit(situation.target)
        if self.queue.flights[self.queue._number].parcel:  # what left its parcel meanwhile joins others
            assert len(taken) <= min(self.count_max.get(e[0], 10**6) for e in taken)
        assert not situation.probing or len(taken) <= 8
        assert len(taken) == 1 or sum(len(e[1]) + len(e[2]) for e in taken) <= policy.bytes
        assert len(set(lsns(taken))) == len(taken)
        others = {
            lsn
            for flight in self.queue.flights.values()
            if flight.entries is not taken
            for lsn in lsns(flight.entries)
        }
        for e in taken:
            assert self.unsettled[e[0]] == e
            assert e[0] not in others, "in flight twice"
            assert e[0] not in self.cancelled
            assert e[0] not in self.expired
            assert self.not_before.get(e[0], 0) <= self.now_ns, "tried again too early"
        if self.order is Order.SHARD:
            assert not self.cancelled
            assert not self.expired
            assert lsns(taken) == list(self.unsettled)[: len(taken)]
        if self.order is Order.KEY:
            for key in {e[1] for e in taken}:
                mine = [e[0] for e in taken if e[1] == key]
                left = sorted(lsn for lsn, e in self.unsettled.items() if e[1] == key)
                assert mine == left[: len(mine)], "nothing overtakes what is unsettled, out or not"

    # --- what becomes of it

    def some_flight(self, data: st.DataObject) -> Flight:
        return self.queue.flights[data.draw(st.sampled_from(sorted(self.queue.flights)))]

    @rule(data=st.data())
    @precondition(lambda self: self.queue.flights)
    def finish(self, data: st.DataObject) -> None:
        self.settle_all(self.some_flight(data).number)

    def settle_all(self, number: int) -> None:
        entries = self.queue.flights[number].entries
        assert self.queue.finish(number).entries is entries
        self.settle(entries)
        assert self.queue.failures == 0

    @rule(
        data=st.data(),
        wait_ns=st.integers(0, 3 * LINGER_NS),
        how=st.sampled_from(["fail", "unsplit", "shrink"]),
    )
    @precondition(lambda self: self.queue.flights)
    def comes_back(self, data: st.DataObject, wait_ns: int, how: str) -> None:
        flight = self.some_flight(data)
        until_ns = self.now_ns + wait_ns
        failures = self.queue.failures
        match how:
            case "fail":
                self.queue.fail(flight.number, retry_at_ns=until_ns)
            case "unsplit":
                self.queue.unsplit(flight.number, retry_at_ns=until_ns)
            case _:
                count = data.draw(st.integers(1, 6))
                self.queue.shrink(flight.number, count, retry_at_ns=until_ns)
                for e in flight.entries:
                    self.count_max[e[0]] = count
        self.wait(flight.entries, dict.fromkeys(lsns(flight.entries), until_ns))
        assert self.queue.failures == failures + 1

    def wait(self, entries: Sequence[Entry], until_ns: dict[int, int]) -> None:
        """These wait, and with them what must not overtake them."""
        for e in entries:
            self.not_before[e[0]] = max(self.not_before.get(e[0], 0), until_ns[e[0]])
        if self.on_failure is FailureOrder.BLOCK and until_ns:
            for lsn in self.unsettled:
                self.not_before[lsn] = max([self.not_before.get(lsn, 0), *until_ns.values()])

    @rule(data=st.data())
    @precondition(lambda self: self.queue.flights)
    def split(self, data: st.DataObject) -> None:
        flight = self.some_flight(data)
        searched = self.queue.split(flight.number)
        assert searched == (len(flight.entries) > 1)

    @rule(data=st.data())
    @precondition(lambda self: self.queue.flights)
    def fail_some(self, data: st.DataObject) -> None:
        flight = self.some_flight(data)
        entries = flight.entries
        indexes = data.draw(st.sets(st.integers(0, len(entries) - 1), min_size=1))
        verdict = judge(batch_of(entries), Failures({index: Retry() for index in indexes}), self.order)
        blamed = sorted(verdict.errors)
        used_up = self.queue.blame(flight.number, blamed)
        for index in blamed:
            lsn = entries[index][0]
            self.attempts[lsn] = self.attempts.get(lsn, 0) + 1
            assert self.queue.attempts(lsn) == self.attempts[lsn]
        most = self.queue.attempts_max
        assert used_up == [i for i in blamed if most is not None and self.attempts[entries[i][0]] >= most]
        buried = used_up if data.draw(st.booleans()) else []
        waits = {
            index: self.now_ns + data.draw(st.integers(0, 3 * LINGER_NS)) for index in verdict.retry if index not in buried
        }  # fmt: skip
        failures = self.queue.failures
        gone = [*verdict.applied, *buried]
        some = st.sets(st.sampled_from(gone)) if gone else st.just(set[int]())
        out: set[int] = data.draw(some)
        gone = [index for index in gone if index not in out]
        self.queue.partly(flight.number, settled=gone, retry_at_ns=waits, out=out)
        for index in out:
            self.count_max.pop(entries[index][0], None)
            self.expired[entries[index][0]] = entries[index]
        left = [entries[index] for index in waits]
        for e in left:
            self.count_max.pop(e[0], None)  # it was answered for, so it was not too large
        self.settle([entries[index] for index in gone])
        self.wait(left, {entries[index][0]: time for index, time in waits.items()})
        assert self.queue.failures == (0 if gone else failures + 1)

    # --- taking out

    @rule(data=st.data())
    @precondition(lambda self: self.unsettled)
    def cancel(self, data: st.DataObject) -> None:
        lsn = data.draw(st.sampled_from([*self.unsettled, 10**9]))
        flying = any(lsn in lsns(flight.entries) for flight in self.queue.flights.values())
        flying |= lsn in lsns(self.queue._beyond)
        found = self.queue.cancel(lsn)
        if flying or lsn in self.cancelled or lsn in self.expired or lsn not in self.unsettled:
            assert found is None
        else:
            assert found == self.unsettled[lsn]
            self.cancelled[lsn] = found

    @rule(data=st.data())
    @precondition(lambda self: self.cancelled)
    def restore(self, data: st.DataObject) -> None:
        lsn = data.draw(st.sampled_from(sorted(self.cancelled)))
        self.count_max.pop(lsn, None)
        self.queue.restore(self.cancelled.pop(lsn))

    @rule()
    def drop_all(self) -> None:
        out = [*self.cancelled.values(), *self.expired.values()]
        self.queue.drop(lsns(out))
        self.cancelled.clear()
        self.expired.clear()
        self.settle(out)

    def settle(self, entries: Iterable[Entry]) -> None:
        for e in entries:
            del self.unsettled[e[0]]
            self.deadlines.pop(e[0], None)
            self.settled.append(e[0])

    # --- what always holds

    @invariant()
    def nothing_is_lost_and_memory_is_accounted_for(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        assert sorted(places(queue)) == sorted(self.unsettled), "each operation is in one place"
        assert len(queue) == len(self.unsettled)
        assert queue.memory_bytes == sum(map(entry_bytes, self.unsettled.values()))
        line, holds = queue._places.line, queue._places.holds
        ready = list(line)
        assert len(line) == len(ready)
        assert line.bytes == sum(len(e[1]) + len(e[2]) for e in ready)
        assert line.urgent == sum(e[3] >= PRIORITY_URGENT for e in ready)
        assert queue._places.eager == queue._places.retried & set(lsns(ready))
        assert holds.count == len(list(holds))
        if not self.ahead:  # else lines may be out of order, and only their fronts are looked at
            assert queue.oldest_arrival_ns == min((e[4] for e in self.unsettled.values()), default=None)
        if queue._calm:
            assert sorted(places(queue)) == sorted(
                lsns([*ready, *queue._beyond, *(e for f in queue.flights.values() for e in f.entries)])
            )

    @invariant()
    def what_is_settled_out_of_turn_is_bounded(self) -> None:
        """A mark has one range for each such operation at most, and there is a limit to its ranges."""
        if not hasattr(self, "queue"):
            return
        highest = max((lsn for lsn in self.settled if lsn < AHEAD_LSN), default=0)
        assert sum(lsn < highest for lsn in self.unsettled) <= self.RANGES


QueueMachine.TestCase.settings = settings(stateful_step_count=40)
TestQueueAgainstAModel = QueueMachine.TestCase


def batch_of(entries: Sequence[Entry]) -> Batch:
    return Batch(
        lane="put", shard=0, store=STORE, lsns=lsns(entries), keys=[e[1] for e in entries], payloads=[e[2] for e in entries],
        priorities=[e[3] for e in entries], attempt=1, reason=CutReason.COUNT, mark=None,
    )  # fmt: skip


# --- triggers -----------------------------------------------------------------------------------------------


def test_an_empty_queue_is_never_due() -> None:
    queue = queue_of()
    assert (
        due(queue, FAR_NS, flush_lsn=99, draining=True, window_full=True, memory_pressed=True, probing=True)
        is None
    )
    assert (queue.next_due_ns(), len(queue), queue.ready) == (None, 0, 0)
    assert_empty(queue)


def test_a_batch_is_in_flight_until_it_is_answered() -> None:
    queue = queue_of(count=1)
    push(queue, b"a", b"b")
    flight = cut(queue)
    assert (flight.number, lsns(flight.entries), flight.reason, flight.tries) == (1, [1], CutReason.COUNT, 0)
    assert due(queue, draining=True) is None
    assert queue.next_due_ns() is None
    assert repr(queue) == "<ShardQueue 1 ready, 0 waiting, 1 in flight>"
    with pytest.raises(AssertionError):
        queue.cut(at(), CutReason.COUNT)
    assert queue.finish(1).entries == [entry(1, b"a")]
    assert cut(queue).number == 2


def test_a_policy_may_be_replaced_at_run_time() -> None:
    queue = queue_of(count=9)
    push(queue, b"a", b"b")
    assert due(queue) is None
    queue.policy = replace(queue.policy, count=2)
    assert due(queue) is CutReason.COUNT
    assert queue.policy.count == 2


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_several_batches_fly_only_without_order(order: Order) -> None:
    queue = queue_of(order, count=1, flights=2)
    push(queue, b"a", b"b", b"c")
    cut(queue)
    assert (due(queue) is not None) == (order is Order.NONE)
    if order is Order.NONE:
        flight = cut(queue)
        assert set(queue.flights) == {1, 2}
        assert due(queue) is None
        queue.finish(1)
        assert lsns(flight.entries) == [2]
        assert lsns(cut(queue).entries) == [3]


def test_an_urgent_operation_is_due_at_once_and_goes_first() -> None:
    queue = queue_of(count=2)
    push(queue, b"a")
    assert due(queue) is None
    push(queue, b"b", first_lsn=2, priority=9)
    push(queue, b"c", first_lsn=3)
    queue.policy = replace(queue.policy, count=9)
    assert due(queue) is CutReason.URGENT
    assert lsns(cut(queue).entries) == [2, 1, 3]


def test_an_urgent_operation_pulls_its_elders_forward() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b", b"a")
    push(queue, b"a", first_lsn=4, priority=9)
    assert drained(queue) == [[1, 3], [4, 2]]
    assert_empty(queue)


def test_an_urgent_operation_of_a_shard_in_order_makes_all_before_it_due() -> None:
    queue = queue_of(Order.SHARD, count=4, linger_ns=FAR_NS)
    push(queue, b"a", b"b", b"c", b"d", b"e")
    push(queue, b"f", first_lsn=6, priority=9)
    push(queue, b"g", first_lsn=7)
    queue.policy = replace(queue.policy, count=2)
    for expected in ([1, 2], [3, 4], [5, 6]):
        flight = cut(queue)
        assert lsns(queue.finish(flight.number)) == expected
    assert due(queue) is None
    assert queue.ready == 1


def test_an_urgent_operation_that_is_held_is_not_due() -> None:
    queue = queue_of(count=2, linger_ns=FAR_NS)
    push(queue, b"a")
    queue.push(entry(2, b"b"), not_before_ns=500)
    push(queue, b"b", first_lsn=3, priority=9)
    assert due(queue) is None
    assert due(queue, 500) is CutReason.COUNT


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_low_priorities_keep_a_tenth_of_the_flow(batch: int) -> None:
    """Over a long backlog of urgent operations, whatever the size of the batches."""
    queue = queue_of(count=batch, size=10**6)
    for lsn in range(1, 1001):
        queue.push(entry(lsn, b"%d" % lsn, priority=9 if lsn % 2 else 2))
    order: list[Entry] = []
    while len(order) < 300:
        order += queue.finish(cut(queue).number)
    low = [e[3] == 2 for e in order]
    assert all(sum(low[start : start + 10]) == 1 for start in range(0, 300, 10))


def test_a_probe_takes_a_few_operations_at_once() -> None:
    queue = queue_of(count=None, linger_ns=FAR_NS)
    push(queue, *(b"%d" % i for i in range(20)))
    assert due(queue, probing=True) is CutReason.PROBE
    assert queue.next_due_ns(at(probing=True)) == 0
    flight = cut(queue, probing=True)
    assert lsns(flight.entries) == list(range(1, 9))
    queue.fail(flight.number, retry_at_ns=0)
    push(queue, b"x", first_lsn=21)
    flight = cut(queue, probing=True)
    assert (lsns(flight.entries), flight.reason, flight.tries) == (list(range(1, 9)), CutReason.PROBE, 1)


def test_a_probe_of_one_operation_is_one() -> None:
    queue = queue_of(count=None)
    push(queue, b"a", b"b")
    assert lsns(cut(queue, probing=True, target=1).entries) == [1]


# --- cutting ------------------------------------------------------------------------------------------------

CUTS = {
    "up to the count": (3, 1000, [1, 1, 1, 1], [1, 2, 3]),
    "up to the bytes": (9, 10, [4, 5, 1, 1], [1, 2, 3]),
    "one that is too large goes alone": (9, 10, [11, 1], [1]),
    "one that is too large waits for its turn": (9, 10, [1, 11, 1], [1]),
    "all there is": (9, 1000, [1, 1], [1, 2]),
    "empty ones cost no bytes": (9, 1, [0, 0, 1, 0], [1, 2, 3, 4]),
}


@pytest.mark.parametrize("mixed", [False, True], ids=["one priority", "two priorities"])
@pytest.mark.parametrize(("count", "size", "payloads", "expected"), CUTS.values(), ids=CUTS.keys())
def test_a_cut_takes(count: int, size: int, payloads: list[int], expected: list[int], *, mixed: bool) -> None:
    queue = queue_of(count=count, size=size)
    for lsn, payload in enumerate(payloads, 1):
        queue.push(entry(lsn, b"", payload=bytes(payload), priority=5 - mixed * (lsn == len(payloads))))
    assert lsns(cut(queue, draining=True).entries) == expected
    if len(expected) < len(payloads):
        queue.fail(1, retry_at_ns=0)
        assert lsns(cut(queue, draining=True).entries) == expected, "a parcel keeps the same bounds"


def test_a_parcel_keeps_to_a_policy_that_was_narrowed_meanwhile() -> None:
    queue = queue_of(count=9, linger_ns=0)
    push(queue, *(b"a" * 3 for _ in range(6)))
    queue.fail(cut(queue).number, retry_at_ns=0)
    queue.policy = replace(queue.policy, count=4, bytes=8)
    assert drained(queue) == [[1, 2], [3, 4], [5, 6]]


# --- failures -----------------------------------------------------------------------------------------------


def test_a_batch_that_failed_comes_back_as_it_was_and_its_keys_wait() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b", b"c", b"a", b"d")
    queue.fail(cut(queue).number, retry_at_ns=500)
    assert queue.failures == 1
    assert lsns(queue.finish(cut(queue, 10).number)) == [3, 5]
    assert due(queue, 499, draining=True) is None
    assert queue.next_due_ns() == 500
    flight = cut(queue, 500)
    assert (lsns(flight.entries), flight.reason, flight.tries) == ([1, 2], CutReason.RETRY, 1)
    queue.fail(flight.number, retry_at_ns=600)
    flight = cut(queue, 600)
    assert (lsns(flight.entries), flight.tries) == ([1, 2], 2)
    queue.finish(flight.number)
    assert drained(queue) == [[4]]
    assert_empty(queue)


@pytest.mark.parametrize("order", [Order.SHARD, Order.KEY, Order.NONE], ids=lambda order: order.value)
def test_a_failure_that_blocks_holds_up_the_shard(order: Order) -> None:
    queue = queue_of(order, count=2, on_failure=FailureOrder.BLOCK)
    push(queue, b"a", b"b", b"c", b"a")
    queue.fail(cut(queue).number, retry_at_ns=500)
    assert due(queue, 499, draining=True, probing=True) is None
    assert queue.next_due_ns() == 500
    assert drained(queue, 500) == [[1, 2], [3, 4]]
    assert_empty(queue)


def test_a_block_holds_though_what_failed_is_gone() -> None:
    """The backend asked for that wait, not the operation."""
    queue = queue_of(Order.SHARD, count=1)
    push(queue, b"a", b"b")
    queue.fail(cut(queue).number, retry_at_ns=500)
    queue.cancel(1)
    queue.drop([1])
    assert (due(queue, 499), queue.next_due_ns()) == (None, 500)
    assert drained(queue, 500) == [[2]]
    assert_empty(queue)


@pytest.mark.parametrize("on_failure", list(FailureOrder))
def test_a_retry_can_be_hurried_and_a_delay_cannot(on_failure: FailureOrder) -> None:
    queue = queue_of(on_failure=on_failure)
    queue.hurry(0)
    push(queue, b"a", b"b")
    queue.push(entry(3, b"c"), not_before_ns=500, deadline_ns=900)
    assert queue.next_expiry_ns == 900
    queue.fail(cut(queue, draining=True).number, retry_at_ns=10_000)
    assert due(queue, 100, draining=True) is None
    queue.hurry(100)
    assert sorted(lsns(cut(queue, 100, draining=True).entries)) == [1, 2]
    assert queue.delayed_lsns == {3}


def test_an_operation_that_failed_alone_can_be_hurried() -> None:
    queue = queue_of()
    push(queue, b"a", b"b")
    flight = cut(queue, draining=True)
    queue.partly(flight.number, settled=[1], retry_at_ns={0: 10_000})
    assert due(queue, 100, draining=True) is None
    queue.hurry(100)
    assert lsns(cut(queue, 100, draining=True).entries) == [1]


@pytest.mark.parametrize("order", [Order.KEY, Order.SHARD])
def test_what_is_out_after_an_answer_counts_and_holds_up_its_key_until_it_is_dropped(order: Order) -> None:
    queue = queue_of(order)
    push(queue, b"a", b"b", b"a")
    flight = cut(queue, draining=True)
    queue.partly(flight.number, settled=[1, 2], retry_at_ns={}, out=[0])
    assert (len(queue), queue.ready, queue.failures) == (1, 0, 0)
    queue.push(entry(4, b"a"))
    queue.push(entry(5, b"b"))
    if order is Order.KEY:
        other = cut(queue, draining=True)
        assert lsns(other.entries) == [5]
        queue.finish(other.number)
    assert due(queue, draining=True) is None
    queue.drop([1])
    assert lsns(cut(queue, draining=True).entries) == ([4] if order is Order.KEY else [4, 5])


def test_nothing_of_a_batch_may_be_out_and_something_else() -> None:
    queue = queue_of()
    push(queue, b"a", b"b")
    number = cut(queue, draining=True).number
    with pytest.raises(AssertionError):
        queue.partly(number, settled=[0, 1], retry_at_ns={}, out=[0])
    with pytest.raises(AssertionError):
        queue.partly(number, settled=[0], retry_at_ns={1: 5}, out=[1])


def test_a_failure_without_order_holds_up_only_its_operations() -> None:
    queue = queue_of(Order.NONE, count=2)
    push(queue, b"a", b"b", b"a", b"b")
    queue.fail(cut(queue).number, retry_at_ns=500)
    assert lsns(queue.finish(cut(queue).number)) == [3, 4]
    assert drained(queue, 500) == [[1, 2]]


def test_a_key_that_waits_does_not_hold_up_the_others() -> None:
    queue = queue_of(count=3)
    push(queue, b"a", b"b", b"c")
    queue.partly(cut(queue).number, settled=[1, 2], retry_at_ns={0: 500})
    push(queue, b"a", b"b", b"a", b"c", first_lsn=4)
    assert queue.ready == 2
    assert due(queue, 10) is None
    assert lsns(queue.finish(cut(queue, 10, draining=True).number)) == [5, 7]
    assert due(queue, 499, draining=True) is None
    flight = cut(queue, 500)
    assert (lsns(flight.entries), flight.reason) == ([1, 4, 6], CutReason.COUNT)


def test_an_operation_without_order_waits_alone() -> None:
    queue = queue_of(Order.NONE, count=2)
    push(queue, b"a", b"a", b"a")
    queue.partly(cut(queue).number, settled=[1], retry_at_ns={0: 500})
    assert drained(queue, 10) == [[3]]
    assert drained(queue, 500) == [[1]]


def test_a_shard_in_order_waits_as_a_whole() -> None:
    queue = queue_of(Order.SHARD, count=3)
    push(queue, b"a", b"b", b"c", b"d")
    queue.partly(cut(queue).number, settled=[0], retry_at_ns={1: 500, 2: 0})
    assert due(queue, 499, draining=True) is None
    assert drained(queue, 500) == [[2, 3], [4]]


def test_operations_of_a_key_wait_each_for_its_own_time_and_for_their_elders() -> None:
    queue = queue_of(count=3)
    push(queue, b"a", b"a", b"a")
    queue.partly(cut(queue).number, settled=[], retry_at_ns={0: 200, 1: 500, 2: 100})
    assert queue.failures == 1
    assert due(queue, 199, draining=True) is None
    assert drained(queue, 200) == [[1]]
    assert drained(queue, 500) == [[2, 3]]


def test_what_waited_for_its_retry_does_not_linger_again() -> None:
    queue = queue_of(count=2, linger_ns=FAR_NS)
    push(queue, b"a", b"b")
    queue.partly(cut(queue).number, settled=[0], retry_at_ns={1: 500})
    assert queue.next_due_ns() == 500
    assert due(queue, 500) is CutReason.RETRY
    assert lsns(cut(queue, 500).entries) == [2]


def test_a_flush_does_not_wait_behind_a_later_operation_that_was_tried_again() -> None:
    queue = queue_of(count=2, linger_ns=FAR_NS)
    push(queue, b"a", first_lsn=10)
    push(queue, b"b", first_lsn=50)
    queue.partly(cut(queue).number, settled=[], retry_at_ns={0: 500, 1: 501})
    queue.policy = replace(queue.policy, count=9)
    assert due(queue, 501, flush_lsn=20) is not None
    assert set(lsns(cut(queue, 501).entries)) == {10, 50}


def test_an_answer_must_speak_for_the_whole_batch() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b")
    number = cut(queue).number
    with pytest.raises(AssertionError):
        queue.partly(number, settled=[0], retry_at_ns={})
    with pytest.raises(AssertionError):
        queue.partly(number, settled=[0, 1], retry_at_ns={1: 0})


def test_urgent_operations_overtake_what_is_tried_again_but_not_for_ever() -> None:
    queue = queue_of(count=1, linger_ns=0)
    push(queue, b"a")
    queue.fail(cut(queue).number, retry_at_ns=0)
    push(queue, *(b"%d" % i for i in range(20)), first_lsn=2, priority=9)
    order = [lsns(queue.finish(cut(queue).number)) for _ in range(10)]
    assert order == [[lsn] for lsn in range(2, 11)] + [[1]]


def test_an_outage_costs_no_operation_an_attempt() -> None:
    """A day of it, in virtual time: everything is applied in the end, in order, in its first attempt."""
    queue = queue_of(count=10, size=10**6)
    now_ns = 0
    for lsn in range(1, 101):
        queue.push(entry(lsn, b"%d" % (lsn % 7)))
    while now_ns < 86_400 * 10**9:
        now_ns += 30 * 10**9
        if due(queue, now_ns) is not None:
            queue.fail(cut(queue, now_ns).number, retry_at_ns=now_ns + 30 * 10**9)
    now_ns += 30 * 10**9
    assert [queue.attempts(lsn) for lsn in range(1, 101)] == [0] * 100
    applied = [lsn for batch in drained(queue, now_ns) for lsn in batch]
    assert sorted(applied) == list(range(1, 101))
    for key in range(7):
        assert [lsn for lsn in applied if lsn % 7 == key] == [lsn for lsn in range(1, 101) if lsn % 7 == key]
    assert_empty(queue)


# --- searching ----------------------------------------------------------------------------------------------


def deliver(
    queue: ShardQueue, poison: Iterable[int], *, now_ns: int = 0, deadly: bool = True
) -> tuple[list[int], list[int], int]:
    """Deliver everything to a backend that fails whenever a poisonous operation is in a batch.

    Returns what was applied, in order, what was buried, and how many calls that took.
    """
    bad, applied, buried, calls = set(poison), [], [], 0
    while (reason := due(queue, now_ns, draining=True)) is not None:
        flight = queue.cut(at(now_ns, draining=True), reason)
        calls += 1
        if bad.isdisjoint(lsns(flight.entries)):
            applied += lsns(queue.finish(flight.number))
        elif not queue.split(flight.number):
            queue.blame(flight.number, [0])
            assert queue.is_search(flight.number)
            queue.partly(
                flight.number, settled=[0] if deadly else [], retry_at_ns={} if deadly else {0: FAR_NS}
            )
            buried += lsns(flight.entries)
        assert calls < 1_000
    return applied, buried, calls


@pytest.mark.parametrize(
    "on_failure", [FailureOrder.BLOCK, FailureOrder.HOLD_KEY], ids=lambda choice: choice.value
)
def test_a_search_applies_what_is_sound_in_order_and_isolates_the_rest(on_failure: FailureOrder) -> None:
    queue = queue_of(count=16, on_failure=on_failure)
    push(queue, *(b"abc"[i % 3 : i % 3 + 1] for i in range(16)))
    applied, buried, calls = deliver(queue, [4, 11])
    assert buried == [4, 11]
    assert applied == [lsn for lsn in range(1, 17) if lsn not in buried]
    assert calls <= 1 + 2 * (3 + 4)
    assert_empty(queue)


def test_the_parts_of_a_search_say_so() -> None:
    queue = queue_of(count=4)
    push(queue, b"a", b"b", b"c", b"d")
    flight = cut(queue)
    assert not queue.is_search(flight.number)
    assert queue.split(flight.number)
    flight = cut(queue)
    assert (lsns(flight.entries), flight.reason) == ([1, 2], CutReason.SPLIT)
    assert queue.is_search(flight.number)
    queue.finish(flight.number)
    assert lsns(cut(queue).entries) == [3], "the right half fails, so it is not tried as a whole"


def test_the_last_part_of_a_search_can_fail_too() -> None:
    queue = queue_of(count=8)
    push(queue, *(b"%d" % i for i in range(8)))
    applied, buried, _ = deliver(queue, [1, 7])
    assert (applied, buried) == ([2, 3, 4, 5, 6, 8], [1, 7])


def test_what_is_left_of_a_failed_batch_can_be_taken_out_as_a_whole() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b", b"a")
    queue.fail(cut(queue).number, retry_at_ns=0)
    queue.release(0)
    assert (queue.ready, repr(queue._places.parcels.front[0])) == (2, "<Parcel of 2, 1 tries>")
    assert repr(queue._places) == (
        "<Places <Line of 0, 0 urgent>, <Holds of 1 operations under 2 names>, "
        "<Parcels: 1 in front, 0 waiting>>"
    )
    queue.cancel(1)
    queue.cancel(2)
    queue.drop([1, 2])
    assert drained(queue) == [[3]]
    assert_empty(queue)


def test_what_follows_an_operation_that_is_isolated_but_not_dead_waits_for_it() -> None:
    queue = queue_of(count=6)
    push(queue, b"a", b"b", b"a", b"b", b"a", b"c")
    push(queue, b"a", b"d", first_lsn=7)
    applied, isolated, _ = deliver(queue, [3], deadly=False)
    assert isolated == [3]
    assert applied == [1, 2, 4, 6, 8]
    assert queue.attempts(3) == 1
    flight = cut(queue, FAR_NS)
    assert (lsns(flight.entries), queue.is_search(flight.number)) == ([3], True)
    queue.finish(flight.number)
    assert drained(queue, FAR_NS) == [[5, 7]]
    assert_empty(queue)


def test_an_operation_that_was_isolated_goes_alone_until_it_is_settled() -> None:
    """Else it would make others fail again."""
    queue = queue_of(Order.NONE, count=4, attempts=3)
    push(queue, b"a", b"b", b"c", b"d")
    deliver(queue, [2], deadly=False)
    push(queue, b"e", b"f", first_lsn=5)
    for attempts in (2, 3):
        flight = cut(queue, FAR_NS)
        assert lsns(flight.entries) == [2]
        assert queue.blame(flight.number, [0]) == ([0] if attempts == 3 else [])
        queue.partly(flight.number, settled=[], retry_at_ns={0: FAR_NS})
    assert queue.attempts(2) == 3


@pytest.mark.parametrize(
    "on_failure", [FailureOrder.BLOCK, FailureOrder.HOLD_KEY], ids=lambda choice: choice.value
)
def test_an_outage_during_a_search_puts_everything_back_as_one(on_failure: FailureOrder) -> None:
    queue = queue_of(count=4, on_failure=on_failure)
    push(queue, b"a", b"b", b"c", b"d", b"a")
    queue.fail(cut(queue).number, retry_at_ns=0)
    queue.split(cut(queue).number)
    queue.unsplit(cut(queue).number, 500)
    assert due(queue, 499, draining=True) is None
    flight = cut(queue, 500)
    assert (lsns(flight.entries), flight.reason, flight.tries) == ([1, 2, 3, 4], CutReason.RETRY, 1)
    assert not queue.is_search(flight.number)
    assert [queue.attempts(lsn) for lsn in range(1, 5)] == [0] * 4


def test_a_failure_of_a_part_is_an_outage_of_the_search() -> None:
    queue = queue_of(count=4)
    push(queue, b"a", b"b", b"c", b"d")
    queue.split(cut(queue).number)
    queue.fail(cut(queue).number, retry_at_ns=0)
    assert drained(queue) == [[1, 2, 3, 4]]


def test_an_outage_of_what_was_never_searched_puts_it_back_too() -> None:
    queue = queue_of(count=2)
    push(queue, b"a", b"b", b"a")
    queue.unsplit(cut(queue).number, 0)
    flight = cut(queue)
    assert (lsns(flight.entries), flight.tries) == ([1, 2], 0)


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_a_batch_that_is_too_large_comes_back_in_smaller_ones(order: Order) -> None:
    queue = queue_of(order, count=5)
    push(queue, b"a", b"b", b"a", b"b", b"a", b"a")
    queue.shrink(cut(queue).number, 2, retry_at_ns=100)
    assert due(queue, 99) is None
    assert drained(queue, 100) == [[1, 2], [3, 4], [5], [6]]
    assert_empty(queue)


def test_a_part_of_a_search_can_be_too_large_too() -> None:
    queue = queue_of(count=9)
    push(queue, *(b"%d" % i for i in range(9)))
    queue.split(cut(queue, draining=True).number)
    queue.shrink(cut(queue).number, 1, retry_at_ns=0)
    applied, buried, _ = deliver(queue, [2])
    assert (applied, buried) == ([1, 3, 4, 5, 6, 7, 8, 9], [2])


def test_what_is_left_of_a_smaller_batch_waits_behind_what_failed_of_it() -> None:
    queue = queue_of(count=4)
    push(queue, b"a", b"b", b"a", b"c")
    queue.shrink(cut(queue).number, 2, retry_at_ns=0)
    queue.fail(cut(queue).number, retry_at_ns=500)
    assert drained(queue) == [[4]]
    assert drained(queue, 500) == [[1, 2], [3]]
    assert_empty(queue)


def test_a_smaller_batch_can_be_searched() -> None:
    queue = queue_of(count=4)
    push(queue, b"a", b"b", b"a", b"c")
    queue.shrink(cut(queue).number, 2, retry_at_ns=0)
    applied, buried, _ = deliver(queue, [1])
    assert (applied, buried) == ([2, 4, 3], [1])
    assert_empty(queue)


def test_searches_without_order_go_on_side_by_side() -> None:
    queue = queue_of(Order.NONE, count=2, flights=2)
    push(queue, b"a", b"b", b"c", b"d")
    first, second = cut(queue), cut(queue)
    queue.split(first.number)
    queue.split(second.number)
    parts = [cut(queue), cut(queue)]
    assert sorted(lsns(part.entries)[0] for part in parts) == [1, 3]
    assert due(queue, draining=True) is None
    for part in parts:
        queue.finish(part.number)
    assert sorted(lsn for batch in drained(queue) for lsn in batch) == [2, 4]
    assert_empty(queue)


# --- attempts -----------------------------------------------------------------------------------------------


def test_only_blame_costs_an_attempt() -> None:
    queue = queue_of(count=2, attempts=2)
    push(queue, b"a", b"b")
    number = cut(queue).number
    assert queue.blame(number, [1]) == []
    queue.partly(number, settled=[], retry_at_ns={0: 0, 1: 0})
    number = cut(queue).number
    assert (queue.attempts(1), queue.attempts(2)) == (0, 1)
    assert queue.blame(number, [0, 1]) == [1]
    queue.partly(number, settled=[1], retry_at_ns={0: 0})
    assert queue.attempts(2) == 0, "it is settled"
    assert drained(queue) == [[1]]
    assert_empty(queue)


def test_without_a_limit_nobody_uses_attempts_up() -> None:
    queue = queue_of(count=1, attempts=None)
    push(queue, b"a")
    for _ in range(1_000):
        number = cut(queue).number
        assert queue.blame(number, [0]) == []
        queue.partly(number, settled=[], retry_at_ns={0: 0})
    assert queue.attempts(1) == 1_000


# --- times --------------------------------------------------------------------------------------------------


DELAYS = {
    Order.KEY: ([[1, 2]], [[3, 4, 5]]),
    Order.SHARD: ([[1, 2]], [[3, 4, 5]]),
    Order.NONE: ([[1, 2, 4, 5]], [[3]]),
}


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_a_delayed_operation_holds_up_what_must_not_overtake_it(order: Order) -> None:
    queue = queue_of(order, count=9)
    push(queue, b"a", b"a")
    queue.push(entry(3, b"a"), not_before_ns=500)
    push(queue, b"a", b"a", first_lsn=4)
    early, late = DELAYS[order]
    assert queue.ready == len(early[0])
    assert drained(queue, 499) == early
    assert queue.next_due_ns() == 500
    assert drained(queue, 500) == late
    assert_empty(queue)


def test_a_delayed_operation_of_another_key_holds_nobody_up() -> None:
    queue = queue_of(count=9)
    queue.push(entry(1, b"a"), not_before_ns=500)
    push(queue, b"b", first_lsn=2)
    queue.push(entry(3, b"c"), not_before_ns=400)
    assert queue.delayed_lsns == {1, 3}
    assert drained(queue) == [[2]]
    assert drained(queue, 500) == [[1, 3]], "in LSN order"


def test_a_delayed_operation_of_another_priority_joins_the_others() -> None:
    queue = queue_of(Order.NONE, count=9)
    queue.push(entry(1, b"a", priority=7), not_before_ns=500)
    push(queue, b"b", b"c", first_lsn=2)
    assert drained(queue, 500) == [[1, 2, 3]]
    assert_empty(queue)


def test_an_operation_is_taken_out_when_its_deadline_has_passed() -> None:
    queue = queue_of(count=9)
    push(queue, b"a")
    queue.push(entry(2, b"b"), deadline_ns=500)
    queue.push(entry(3, b"c"), deadline_ns=400, not_before_ns=900)
    assert queue.next_due_ns(at(200)) == LINGER_NS
    assert queue.expire(399) == []
    assert lsns(queue.expire(500)) == [2, 3]
    assert (len(queue), queue.ready) == (3, 1)
    assert queue.memory_bytes == sum(map(entry_bytes, [entry(1, b"a"), entry(2, b"b"), entry(3, b"c")]))
    queue.drop([2, 3])
    assert drained(queue) == [[1]]
    assert_empty(queue)


EXPIRED = {Order.KEY: [[1, 3, 6]], Order.SHARD: [], Order.NONE: [[1, 3, 5, 6]]}


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_until_a_burial_is_durable_nothing_overtakes_what_is_buried(order: Order) -> None:
    """Else, after a crash and with a wall clock that went back, the elder would be delivered behind the younger."""
    queue = queue_of(order, count=9)
    push(queue, b"a")
    queue.push(entry(2, b"b"), deadline_ns=500)
    push(queue, b"a", first_lsn=3)
    queue.push(entry(4, b"b"), deadline_ns=500)
    push(queue, b"b", b"c", first_lsn=5)
    assert lsns(queue.expire(500)) == [2, 4]
    applied = drained(queue, 500)
    assert applied == EXPIRED[order]
    queue.drop([2])
    assert drained(queue, 500) == [], "the other one is not buried yet"
    push(queue, b"b", first_lsn=7)
    assert queue.next_due_ns() == (LINGER_NS if order is Order.NONE else None)
    queue.drop([4])
    gone = {2, 4, *(lsn for batch in applied for lsn in batch)}
    assert drained(queue, 500) == [[lsn for lsn in range(1, 8) if lsn not in gone]]
    assert_empty(queue)


def test_what_failed_waits_behind_its_elder_that_is_being_buried() -> None:
    queue = queue_of(count=3)
    queue.push(entry(1, b"a"), deadline_ns=500)
    push(queue, b"a", b"b", b"c", first_lsn=2)
    queue.fail(cut(queue).number, retry_at_ns=600)
    assert lsns(queue.expire(600)) == [1]
    assert drained(queue, 600) == [[3], [4]], "what is left of the batch goes without the key that waits"
    queue.drop([1])
    assert drained(queue, 600) == [[2]]
    assert_empty(queue)


def test_an_operation_that_comes_back_waits_for_the_burial_of_one_of_its_key() -> None:
    queue = queue_of(count=1)
    push(queue, b"a")
    queue.push(entry(2, b"a"), deadline_ns=500)
    number = cut(queue).number
    assert lsns(queue.expire(500)) == [2]
    queue.partly(number, settled=[], retry_at_ns={0: 500})
    assert due(queue, 500, draining=True) is None
    queue.drop([2])
    assert drained(queue, 500) == [[1]]
    assert_empty(queue)


def test_a_deadline_that_passes_in_flight_counts_when_the_operation_comes_back() -> None:
    queue = queue_of(count=2)
    queue.push(entry(1, b"a"), deadline_ns=500)
    push(queue, b"b", first_lsn=2)
    number = cut(queue).number
    assert queue.next_due_ns() == 500
    assert queue.expire(500) == []
    assert queue.next_due_ns() is None
    queue.fail(number, retry_at_ns=900)
    assert lsns(queue.expire(600)) == [1]
    queue.drop([1])
    assert drained(queue, 900) == [[2]]
    assert_empty(queue)


def test_a_deadline_of_what_was_applied_in_time_is_forgotten() -> None:
    queue = queue_of(count=1)
    queue.push(entry(1, b"a"), deadline_ns=500)
    assert drained(queue) == [[1]]
    assert queue.expire(500) == []
    assert_empty(queue)


def test_many_deadlines_at_once_are_found_wherever_their_operations_are() -> None:
    queue = queue_of(count=50, size=10**6)
    for lsn in range(1, 201):
        queue.push(entry(lsn, b"%d" % (lsn % 150), priority=5 + lsn % 2), deadline_ns=500)
    queue.fail(cut(queue).number, retry_at_ns=10**6)
    number = cut(queue).number
    queue.partly(
        number, settled=[], retry_at_ns=dict.fromkeys(range(len(queue.flights[number].entries)), 10**6)
    )
    taken = lsns(queue.expire(500))
    assert taken == list(range(1, 201))
    queue.drop(taken)
    assert_empty(queue)


# --- cancelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_a_cancelled_operation_is_delivered_to_nobody(order: Order) -> None:
    queue = queue_of(order, count=9)
    push(queue, b"a", b"b", b"a")
    found = queue.cancel(2)
    assert found == entry(2, b"b")
    assert (len(queue), queue.cancel(2), queue.cancel(99)) == (3, None, None)
    queue.drop([2])
    assert drained(queue) == [[1, 3]]
    assert_empty(queue)


def test_what_is_in_flight_cannot_be_cancelled() -> None:
    queue = queue_of(count=1)
    push(queue, b"a")
    cut(queue)
    assert queue.cancel(1) is None


BEHIND = {Order.KEY: [[1, 3]], Order.SHARD: [], Order.NONE: [[1, 3, 4]]}


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_until_a_cancellation_is_durable_nothing_overtakes_it(order: Order) -> None:
    queue = queue_of(order, count=9)
    push(queue, b"a", b"b", b"a", b"b")
    found = queue.cancel(2)
    assert found is not None
    applied = drained(queue)
    assert applied == BEHIND[order]
    push(queue, b"b", first_lsn=5)
    queue.restore(found)
    left = [lsn for lsn in range(1, 6) if lsn not in {lsn for batch in applied for lsn in batch}]
    assert drained(queue) == [left]
    assert_empty(queue)


@pytest.mark.parametrize("mixed", [False, True], ids=["one priority", "two priorities"])
@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_a_cancellation_that_fails_changes_nothing(order: Order, *, mixed: bool) -> None:
    queue = queue_of(order, count=9)
    push(queue, b"a", b"b", b"c")
    if mixed:
        push(queue, b"d", first_lsn=4, priority=4)
    for lsn in (1, 3, 2):
        found = queue.cancel(lsn)
        assert found is not None
        queue.restore(found)
    expected = [1, 2, 3, 4] if order is Order.SHARD else [1, 2, 4, 3]  # half the share for the lower priority
    assert drained(queue) == [expected if mixed else [1, 2, 3]]
    assert_empty(queue)


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_a_delayed_operation_can_be_cancelled_and_restored(order: Order) -> None:
    queue = queue_of(order, count=9)
    queue.push(entry(1, b"a"), not_before_ns=500)
    push(queue, b"a", b"a", first_lsn=2)
    found = queue.cancel(1)
    assert found is not None
    before = drained(queue, 100)
    assert before == ([[2, 3]] if order is Order.NONE else [])
    queue.restore(found)
    assert drained(queue, 499) == []
    assert drained(queue, 500) == ([[1]] if before else [[1, 2, 3]])
    assert_empty(queue)


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_an_operation_that_waits_for_its_retry_can_be_cancelled_and_restored(order: Order) -> None:
    for lsn in (1, 2, 4):
        queue = queue_of(order, count=3)
        push(queue, b"a", b"a", b"b", b"a")
        queue.fail(cut(queue).number, retry_at_ns=500)
        found = queue.cancel(lsn)
        assert found is not None
        queue.restore(found)
        early = [n for batch in drained(queue, 499) for n in batch]
        assert lsn == 4 or lsn not in early
        applied = [*early, *(n for batch in drained(queue, 500) for n in batch)]
        assert sorted(applied) == [1, 2, 3, 4]
        if order is not Order.NONE:
            assert [n for n in applied if n != 3] == [1, 2, 4]
        assert_empty(queue)


def test_a_restored_operation_still_has_its_deadline() -> None:
    queue = queue_of()
    queue.push(entry(1, b"a"), deadline_ns=500)
    found = queue.cancel(1)
    assert found is not None
    assert queue.expire(500) == []
    queue.restore(found)
    assert lsns(queue.expire(500)) == [1]


def test_a_batch_knows_how_often_any_of_its_operations_failed() -> None:
    queue = queue_of(count=3)
    push(queue, b"a", b"b", b"c")
    assert queue.most_attempts([1, 2, 3]) == 0
    flight = cut(queue)
    queue.blame(flight.number, [1])
    assert queue.most_attempts([1, 2, 3]) == 1
    assert queue.most_attempts([1, 3]) == 0


# --- many at once -------------------------------------------------------------------------------------------


def run_of(first_lsn: int, count: int, *, priority: int = 5, size: int = 3) -> Run:
    """Operations that came at once, each with a key of its own."""
    keys = [b"%d" % lsn for lsn in range(first_lsn, first_lsn + count)]
    return Run(range(first_lsn, first_lsn + count), keys, [bytes(size)] * count, priority, 0)


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_what_comes_at_once_is_cut_as_if_it_had_come_one_by_one(order: Order) -> None:
    at_once, one_by_one = queue_of(order, count=3, size=10**6), queue_of(order, count=3, size=10**6)
    for run in (run_of(1, 100), run_of(101, 2), run_of(103, 1), run_of(104, 70)):
        at_once.push_run(run)
        for e in run:
            one_by_one.push(e)
    assert (len(at_once), at_once.ready, at_once.memory_bytes) == (173, 173, one_by_one.memory_bytes)
    while due(at_once) is not None:
        flights = [cut(queue) for queue in (at_once, one_by_one)]
        assert [list(column) for column in flights[0].columns()] == [
            list(column) for column in flights[1].columns()
        ]
        assert flights[0].entries == flights[1].entries
        assert flights[0].bytes == flights[1].bytes
        for queue in (at_once, one_by_one):
            queue.finish(flights[0].number)
    assert drained(at_once) == drained(one_by_one) == [[172, 173]]
    assert_empty(at_once)


def test_a_batch_ends_where_its_bytes_do_also_in_the_middle_of_what_came_at_once() -> None:
    queue = queue_of(count=1_000, size=50)
    queue.push_run(run_of(10, 200, size=10))  # of 12 and of 13 bytes
    assert lsns(cut(queue)) == [10, 11, 12, 13]
    queue.finish(1)
    queue.push(entry(210, b"210", payload=bytes(200)))
    queue.push(entry(211, b"211"))
    batches = drained(queue)
    assert batches[-2:] == [[210], [211]], "one that is larger goes alone"
    assert [lsn for batch in batches for lsn in batch] == list(range(14, 212))
    assert max(map(len, batches)) == 4
    assert_empty(queue)


@pytest.mark.parametrize("priority", [5, 4, 9])
@pytest.mark.parametrize("before", [0, 1, 9, 10, 12])
def test_what_comes_at_once_waits_beyond_the_limit_as_if_it_had_come_one_by_one(
    before: int, priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 10)
    at_once, one_by_one = queue_of(), queue_of()
    for queue in (at_once, one_by_one):
        for lsn in range(1, before + 1):
            queue.push(entry(lsn, b"%d" % lsn))
    at_once.push_run(run_of(50, 8, priority=priority))
    for e in run_of(50, 8, priority=priority):
        one_by_one.push(e)
    assert (len(at_once), at_once.ready) == (len(one_by_one), one_by_one.ready)
    assert lsns(at_once._beyond) == lsns(one_by_one._beyond)
    assert drained(at_once) == drained(one_by_one)
    assert_empty(at_once)


def test_what_is_beyond_comes_inside_at_once_but_for_what_has_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 100)
    queue = queue_of(count=100, size=10**6)
    queue.push_run(run_of(1, 250))
    assert (queue.ready, len(queue), queue._calm) == (100, 250, True)
    queue.finish(cut(queue).number)
    assert queue.ready == 100
    queue.push(entry(300, b"late"), not_before_ns=500)
    assert drained(queue) == [list(range(101, 201)), list(range(201, 251))]
    assert drained(queue, 500) == [[300]]
    assert_empty(queue)


# --- bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Order.KEY, Order.NONE], ids=lambda order: order.value)
def test_stragglers_stop_the_shard_before_its_mark_grows_over_its_limit(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LSNs between them belong to other shards, so that each straggler costs a range."""
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 10)
    queue, ledger = queue_of(order, count=6), ShardLedger(Mark())
    for lsn in range(1, 200, 2):
        queue.push(entry(lsn, b"%d" % lsn))
        ledger.admit(lsn)
    rounds = 0
    while due(queue, draining=True) is not None:
        flight = cut(queue, draining=True)
        *failed, last = flight.entries
        if failed:
            queue.partly(
                flight.number, settled=[len(failed)], retry_at_ns=dict.fromkeys(range(len(failed)), 500)
            )
            ledger.settle([last[0]])
        else:
            queue.partly(flight.number, settled=[], retry_at_ns={0: 500})
        assert len(ledger.mark(epoch=1).ranges) <= 10
        rounds += 1
        assert rounds < 100
    assert len(queue) > 10
    assert queue.ready == 0
    assert queue.next_due_ns() == 500
    assert len(drained(queue, 500)) >= len(queue) // 6


def test_urgent_operations_are_no_way_around_that_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 10)
    queue, ledger = queue_of(count=1, size=10**6), ShardLedger(Mark())
    for lsn in range(1, 200, 2):
        queue.push(entry(lsn, b"%d" % lsn, priority=9 if lsn % 9 == 0 else 5))
        ledger.admit(lsn)
    applied: list[int] = []
    while due(queue, draining=True) is not None:
        found = lsns(queue.finish(cut(queue, draining=True).number))
        ledger.settle(found)
        applied += found
        assert len(ledger.mark(epoch=1).ranges) <= 10
    assert sorted(applied) == list(range(1, 200, 2))
    assert applied.index(9) == 0
    assert_empty(queue)


def test_what_is_beyond_the_limit_keeps_its_times_and_cannot_be_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 2)
    queue = queue_of(count=1)
    push(queue, b"a", b"b")
    queue.push(entry(3, b"c"), not_before_ns=500, deadline_ns=900)
    queue.push(entry(4, b"d"), deadline_ns=100)
    assert (len(queue), queue.ready, queue.cancel(3)) == (4, 2, None)
    assert queue.expire(100) == []
    queue.finish(cut(queue).number)
    assert (queue.expire(100), queue.ready) == ([], 1), "the third one is inside now, and delayed"
    queue.finish(cut(queue).number)
    assert lsns(queue.expire(100)) == [4]
    queue.drop([4])
    assert drained(queue, 499) == []
    assert drained(queue, 500) == [[3]]
    assert_empty(queue)


def test_urgent_operations_fetched_ahead_go_first_with_their_elders() -> None:
    queue = queue_of(count=4)
    push(queue, b"a", b"b", b"c")
    push_ahead(
        queue, [entry(500, b"b", priority=2), entry(900, b"x", priority=2), entry(1000, b"x", priority=9)]
    )
    push(queue, b"d", first_lsn=4)
    flight = cut(queue)
    assert lsns(flight.entries)[:2] == [900, 1000]
    queue.finish(flight.number)
    applied = [lsn for batch in drained(queue) for lsn in batch]
    order = [*lsns(flight.entries), *applied]
    assert sorted(order) == [1, 2, 3, 4, 500, 900, 1000]
    assert order.index(2) < order.index(500)
    assert_empty(queue)


def test_an_operation_fetched_ahead_waits_behind_its_key() -> None:
    queue = queue_of(count=9)
    queue.push(entry(1, b"a"), not_before_ns=500)
    push_ahead(queue, [entry(1000, b"a", priority=9)])
    assert due(queue, 499, draining=True) is None
    assert drained(queue, 500) == [[1, 1000]]
    assert_empty(queue)


def test_an_operation_fetched_ahead_waits_behind_its_key_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 2)
    queue = queue_of(count=9)
    push(queue, b"a", b"b", b"c")
    push_ahead(queue, [entry(1000, b"c", priority=9), entry(1001, b"d", priority=9)])
    assert [lsn for batch in drained(queue) for lsn in batch] == [1001, 1, 2, 3, 1000]
    assert_empty(queue)


def test_what_was_fetched_ahead_beyond_the_limit_is_found_when_it_has_come_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands before what is elder then: nobody may look for it where its LSN belongs."""
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 2)
    queue = queue_of(count=9)
    push(queue, b"a", b"b", b"c", priority=5)
    queue.push_ahead([(entry(1000, b"c"), 0, 500)])
    push(queue, b"d", b"e", first_lsn=10)
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 100)
    queue.finish(cut(queue, draining=True).number)
    queue.push_run(run_of(12, 70))
    found = queue.cancel(12)
    assert found is not None
    assert lsns(queue.expire(500)) == [1000]
    queue.drop([12, 1000])
    assert [lsn for batch in drained(queue) for lsn in batch] == [3, 10, 11, *range(13, 82)]
    assert_empty(queue)


def test_an_operation_fetched_ahead_keeps_its_times() -> None:
    queue = queue_of(count=9)
    push(queue, b"a")
    queue.push_ahead([
        (entry(900, b"x", priority=9), 0, 500), (entry(1000, b"y", priority=9), 300, 0), (entry(1001, b"y"), 0, 0),
    ])  # fmt: skip
    assert queue.delayed_lsns == {1000, 1001}
    assert queue.next_due_ns() == 0
    assert lsns(cut(queue, 299).entries) == [900, 1]
    queue.fail(1, retry_at_ns=600)
    assert lsns(queue.expire(500)) == [900]
    queue.drop([900])
    assert drained(queue, 500) == [[1000, 1001]]
    assert drained(queue, 600) == [[1]]
    assert_empty(queue)


def test_what_is_fetched_ahead_and_waits_beyond_the_limit_keeps_its_times_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "WINDOW_COUNT_MAX", 2)
    queue = queue_of(count=9)
    push(queue, b"a", b"b", b"c")
    queue.push_ahead([(entry(1000, b"c", priority=9), 300, 0), (entry(1001, b"c", priority=9), 0, 200)])
    assert drained(queue) == [[1, 2], [3]]
    assert queue.expire(199) == []
    assert lsns(queue.expire(200)) == [1001]
    queue.drop([1001])
    assert drained(queue, 299) == []
    assert drained(queue, 300) == [[1000]]
    assert_empty(queue)


def test_a_shard_in_order_fetches_nothing_ahead() -> None:
    with pytest.raises(AssertionError):
        push_ahead(queue_of(Order.SHARD), [])


def test_it_knows_since_when_its_oldest_operation_waits() -> None:
    queue = queue_of(count=1)
    assert queue.oldest_arrival_ns is None
    for lsn in (1, 2):
        queue.push(entry(lsn, b"%d" % lsn, now_ns=10 * lsn))
    assert queue.oldest_arrival_ns == 10
    number = cut(queue, draining=True).number
    assert queue.oldest_arrival_ns == 10
    queue.finish(number)
    assert queue.oldest_arrival_ns == 20


def test_the_linger_follows_what_batches_take() -> None:
    queue = queue_of(Order.NONE, count=None, linger_ns=None, flights=2)
    for _ in range(100):
        queue.observe_duration(0.05)
    push(queue, b"a")
    assert queue.next_due_ns() == 500_000
    cut(queue, 500_000)
    push(queue, b"b", first_lsn=2)
    assert queue.next_due_ns() in range(4_900_000, 5_000_001)


@given(order=st.sampled_from(Order), rounds=st.integers(1, 5), size=st.integers(0, 10))
def test_memory_returns_to_zero(order: Order, rounds: int, size: int) -> None:
    queue = queue_of(order, count=2)
    for lsn in range(1, 6):
        queue.push(entry(lsn, b"%d" % (lsn % 2), payload=bytes(size)))
    assert queue.memory_bytes == 5 * (1 + size + limits.OPERATION_OVERHEAD_BYTES)
    for _ in range(rounds):
        queue.fail(cut(queue, FAR_NS, draining=True).number, retry_at_ns=0)
    drained(queue, FAR_NS)
    assert_empty(queue)
