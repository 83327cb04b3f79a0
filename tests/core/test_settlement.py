"""The ledger of a shard, against a model that keeps every LSN in a set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from walbatch.core import settlement
from walbatch.core.settlement import ShardLedger
from walbatch.types import Mark, merge_ranges, ranges_of

BEYOND = 8
"""How far past the frontier the model asks."""


def mark_of(lsns: set[int], *, epoch: int = 0) -> Mark:
    """The mark that covers exactly `lsns`, as a backend would hold it."""
    watermark = 0
    while watermark + 1 in lsns:
        watermark += 1
    return Mark(epoch=epoch, watermark=watermark, ranges=merge_ranges(ranges_of(sorted(lsns)), watermark))


def check_shape(mark: Mark) -> None:
    """Ranges are disjoint, ascending, no neighbours, and above the watermark."""
    end = mark.watermark - 1
    for first, last in mark.ranges:
        assert end + 1 < first <= last
        end = last


class LedgerMachine(RuleBasedStateMachine):
    """LSNs are decided one after the other: of another shard, settled before this run, or pending."""

    def __init__(self) -> None:
        super().__init__()
        self.before: set[int] = set()
        self.mine: set[int] = set()
        self.pending: set[int] = set()
        self.settled: set[int] = set()
        self.ahead: set[int] = set()
        self.next_lsn = 1

    @initialize(before=st.sets(st.integers(1, 40)), epoch=st.integers(0, 3))
    def start(self, before: set[int], epoch: int) -> None:
        self.before = before
        self.ledger = ShardLedger(mark_of(before, epoch=epoch))

    @rule(count=st.integers(1, 6), mine=st.integers(0, 63))
    def durable(self, count: int, mine: int) -> None:
        """Operations became durable, some of this shard: what the initial mark covers is not admitted."""
        for bit in range(count):
            lsn = self.next_lsn
            self.next_lsn += 1
            if lsn in self.ahead:
                if self.ledger.is_ahead(lsn):
                    self.ledger.reach(lsn)
                continue
            if not mine >> bit & 1:
                continue
            if self.ledger.initial.covers(lsn):
                continue
            self.mine.add(lsn)
            self.pending.add(lsn)
            self.ledger.admit(lsn)

    @rule(gaps=st.lists(st.integers(1, 3), min_size=1, max_size=8), are_consecutive=st.booleans())
    def many_durable(self, gaps: list[int], *, are_consecutive: bool) -> None:
        """A whole group of this shard became durable, as a range or with other shards' between them."""
        first = self.next_lsn
        if self.ledger.knows_from(first):
            return
        lsns: Sequence[int] = tuple(first + sum(gaps[:i]) for i in range(len(gaps)))
        if are_consecutive:
            lsns = range(first, first + len(gaps))
        self.next_lsn = lsns[-1] + 1
        self.mine.update(lsns)
        self.pending.update(lsns)
        self.ledger.admit_many(lsns)
        assert not any(self.ledger.is_pending(lsn) for lsn in range(first, self.next_lsn) if lsn not in lsns)

    @rule(distance=st.integers(0, 6))
    def out_of_turn(self, distance: int) -> None:
        """An operation that the frontier has not come to is brought forward."""
        lsn = self.next_lsn + distance
        if lsn > self.ledger.frontier and lsn not in self.ahead and not self.ledger.initial.covers(lsn):
            self.ledger.admit_ahead(lsn)
            self.ahead.add(lsn)
            self.mine.add(lsn)
            self.pending.add(lsn)
            assert self.ledger.is_pending(lsn)

    @rule()
    def caught_up(self) -> None:
        self.ledger.advance(self.next_lsn - 1)

    @rule(data=st.data())
    @precondition(lambda self: self.pending)
    def settle(self, data: st.DataObject) -> None:
        lsns = data.draw(st.sets(st.sampled_from(sorted(self.pending)), min_size=1))
        self.ledger.settle(lsns)
        self.pending -= lsns
        self.settled |= lsns

    @rule(count=st.integers(1, 12), kind=st.sampled_from([tuple, list, frozenset]))
    @precondition(lambda self: self.pending)
    def settle_the_eldest(self, count: int, kind: Callable[[Iterable[int]], Collection[int]]) -> None:
        """As batches do that were cut in order. A mark says before what it comes to."""
        eldest = sorted(self.pending)[:count]
        lsns: Collection[int] = kind(eldest)
        if eldest[-1] - eldest[0] + 1 == len(eldest) and kind is not frozenset:
            lsns = range(eldest[0], eldest[-1] + 1)
        promised = self.ledger.mark(epoch=4, settling=lsns)
        self.ledger.settle(lsns)
        self.pending.difference_update(eldest)
        self.settled.update(eldest)
        assert promised == self.ledger.mark(epoch=4)

    @rule()
    @precondition(lambda self: self.pending)
    def settle_all_but_the_oldest(self) -> None:
        lsns = set(sorted(self.pending)[1:])
        self.ledger.settle(lsns)
        self.pending -= lsns
        self.settled |= lsns

    def check_mark(self, mark: Mark, pending: set[int]) -> None:
        check_shape(mark)
        frontier = self.ledger.frontier
        for lsn in range(1, max(self.next_lsn, 41) + BEYOND):
            if lsn in pending:
                assert not mark.covers(lsn), "a pending operation is called settled"
            elif lsn in self.settled or lsn in self.before:
                assert mark.covers(lsn), "a settled operation is forgotten"
            elif lsn > frontier:
                assert not mark.covers(lsn), "what is not even there yet is called settled"
        first = min(pending, default=None)
        assert first is None or mark.watermark < first

    @rule(data=st.data())
    def mark_with_a_batch_in_flight(self, data: st.DataObject) -> None:
        settling: frozenset[int] = frozenset()
        if self.pending:
            settling = data.draw(st.frozensets(st.sampled_from(sorted(self.pending))))
        mark = self.ledger.mark(epoch=9, settling=settling)
        assert mark.epoch == 9
        settled, self.settled = self.settled, self.settled | settling
        self.check_mark(mark, self.pending - settling)
        self.settled = settled

    @invariant()
    def marks_are_exact(self) -> None:
        if hasattr(self, "ledger"):
            self.check_mark(self.ledger.mark(epoch=1), self.pending)

    @invariant()
    def the_watermark_stops_below_the_oldest_pending_operation(self) -> None:
        if not hasattr(self, "ledger"):
            return
        watermark = self.ledger.watermark()
        assert len(self.ledger) == len(self.pending)
        assert all(map(self.ledger.is_pending, self.pending))
        assert not any(map(self.ledger.is_pending, self.settled))
        assert all(watermark < lsn for lsn in self.pending)
        assert watermark <= self.ledger.mark(epoch=1).watermark
        if not self.pending:
            assert watermark >= self.ledger.frontier


LedgerMachine.TestCase.settings = settings(stateful_step_count=20)
TestLedgerAgainstSets = LedgerMachine.TestCase


@given(settling=st.sets(st.integers(1, 60)), settled=st.sets(st.integers(1, 60)))
def test_a_mark_with_a_batch_in_flight_is_the_mark_after_it_is_settled(
    settling: set[int], settled: set[int]
) -> None:
    def ledger() -> ShardLedger:
        made = ShardLedger(Mark())
        for lsn in range(1, 61):
            made.admit(lsn)
        made.settle(settled)
        return made

    settling -= settled
    promised, later = ledger(), ledger()
    later.settle(settling)
    assert promised.mark(epoch=3, settling=frozenset(settling)) == later.mark(epoch=3)
    assert promised.mark(epoch=3) == ledger().mark(epoch=3)


def test_a_batch_in_flight_may_reach_over_several_blocks() -> None:
    ledger = ShardLedger(Mark())
    for block in ((1, 2), (3, 4), (5, 7)):
        ledger.admit_many(block)
    for settling in ((1,), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5)):
        assert ledger.mark(epoch=1, settling=settling).watermark == settling[-1] + (settling[-1] == 5)
    assert ledger.mark(epoch=1, settling=(1, 2, 3, 4, 5, 7)).watermark == 7


def test_a_new_ledger_calls_nothing_settled() -> None:
    ledger = ShardLedger(Mark())
    assert ledger.mark(epoch=1) == Mark(epoch=1)
    assert (ledger.watermark(), len(ledger)) == (0, 0)


def test_lsns_of_other_shards_below_the_frontier_are_covered() -> None:
    ledger = ShardLedger(Mark())
    ledger.admit(5)
    ledger.admit(9)
    ledger.settle([9])
    assert ledger.mark(epoch=0) == Mark(watermark=4, ranges=((6, 9),))
    ledger.settle([5])
    ledger.advance(20)
    assert ledger.mark(epoch=0) == Mark(watermark=20)
    assert repr(ledger) == "<ShardLedger 0 pending, watermark 20, frontier 20>"


def test_a_frontier_never_goes_back() -> None:
    ledger = ShardLedger(Mark())
    ledger.admit(7)
    ledger.advance(3)
    assert ledger.frontier == 7


def test_an_initial_mark_above_the_frontier_is_kept_but_not_yet_a_reason_to_trim() -> None:
    ledger = ShardLedger(Mark(epoch=4, watermark=10, ranges=((12, 15),)))
    ledger.advance(5)
    assert ledger.watermark() == 5
    assert ledger.mark(epoch=5) == Mark(epoch=5, watermark=10, ranges=((12, 15),))


def test_an_initial_hole_closes() -> None:
    ledger = ShardLedger(Mark(watermark=10, ranges=((12, 15),)))
    ledger.admit(11)
    ledger.advance(30)
    assert ledger.mark(epoch=0) == Mark(watermark=10, ranges=((12, 15),))
    assert ledger.mark(epoch=0, settling=frozenset({11})) == Mark(watermark=30)
    ledger.settle([11])
    ledger.advance(30)
    assert ledger.mark(epoch=0) == Mark(watermark=30)
    assert ledger.initial.ranges == ()


@pytest.mark.parametrize("lsn", [4, 5])
def test_admitting_twice_or_backwards_is_a_bug_of_ours(lsn: int) -> None:
    ledger = ShardLedger(Mark())
    ledger.admit(5)
    with pytest.raises(AssertionError):
        ledger.admit(lsn)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_admitting_many_is_admitting_each(gaps: list[int], more: list[int]) -> None:
    lsns = [sum([*gaps, *more][: i + 1]) for i in range(len(gaps) + len(more))]
    one_by_one, at_once = ShardLedger(Mark()), ShardLedger(Mark())
    for lsn in lsns:
        one_by_one.admit(lsn)
    at_once.admit_many(lsns[: len(gaps)])
    at_once.admit_many(lsns[len(gaps) :])
    for ledger in (one_by_one, at_once):
        ledger.settle(lsns[::2])
    assert at_once.mark(epoch=1) == one_by_one.mark(epoch=1)
    assert (len(at_once), at_once.frontier) == (len(one_by_one), lsns[-1])


def test_many_that_were_admitted_before_are_a_bug_of_ours() -> None:
    ledger = ShardLedger(Mark())
    ledger.admit_many([3, 5])
    with pytest.raises(AssertionError):
        ledger.admit_many([5, 6])


def test_what_was_settled_out_of_turn_is_covered_and_need_not_be_met_again() -> None:
    ledger = ShardLedger(Mark())
    ledger.admit(1)
    room = ledger.room_ahead
    ledger.admit_ahead(7)
    assert ledger.room_ahead == room - 1
    assert ledger.mark(epoch=0, settling=frozenset({7})) == Mark(ranges=((7, 7),))
    ledger.settle([7])
    assert (ledger.is_ahead(7), ledger.is_pending(7), len(ledger)) == (True, False, 1)
    assert ledger.mark(epoch=0) == Mark(ranges=((7, 7),))
    ledger.advance(9)  # the log does not hold it any more
    assert not ledger.is_ahead(7)
    assert ledger.mark(epoch=0) == Mark(ranges=((2, 7),))
    ledger.settle([1])
    assert ledger.watermark() == 9


def test_what_is_settled_in_order_costs_one_comparison_of_a_block() -> None:
    """Nothing is taken apart into single LSNs."""
    ledger = ShardLedger(Mark())
    ledger.admit_many(range(1, 1_001))
    ledger.admit_many(tuple(range(1_001, 3_001, 2)))
    for lsns in (
        range(1, 400),
        range(400, 1_001),
        tuple(range(1_001, 2_001, 2)),
        list(range(2_001, 2_011, 2)),
    ):
        ledger.settle(lsns)
        assert not ledger._pending
        assert ledger.watermark() >= lsns[-1]
    assert (len(ledger), ledger.watermark()) == (495, 2_010)
    assert not ledger.is_pending(2_009)
    assert ledger.is_pending(2_011)
    assert not ledger.is_pending(2_012)
    assert not ledger.is_pending(5_000)


def test_what_was_admitted_one_by_one_does_not_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "_BLOCK_COUNT", 10)
    ledger = ShardLedger(Mark())
    for lsn in range(1, 1_001):
        ledger.admit(lsn)
        if lsn > 5:
            ledger.settle([lsn - 5])
    assert sum(map(len, ledger._blocks)) <= 2 * 10
    assert len(ledger) == 5


@pytest.mark.parametrize(
    ("known", "knows"),
    [
        (Mark(), False),
        (Mark(watermark=5), True),
        (Mark(ranges=((3, 5),)), True),
        (Mark(ranges=((3, 4),)), False),
    ],
)
def test_it_says_whether_anything_may_be_known_of_what_comes(known: Mark, *, knows: bool) -> None:
    ledger = ShardLedger(known)
    assert ledger.knows_from(5) is knows
    ledger.admit_ahead(9)
    assert ledger.knows_from(5)
    ledger.settle([9])
    assert ledger.knows_from(5)


def test_settling_what_is_not_pending_is_a_bug_of_ours() -> None:
    with pytest.raises(KeyError):
        ShardLedger(Mark()).settle([1])


def test_one_straggler_does_not_keep_what_was_settled_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "_COMPACT_SLACK", 10)
    ledger = ShardLedger(Mark())
    for lsn in range(1, 1001):
        ledger.admit(lsn)
        if lsn > 1:
            ledger.settle([lsn])
    assert len(ledger._order) <= 2 + 10
    assert ledger.mark(epoch=0) == Mark(ranges=((2, 1000),))


def test_a_checkpoint_does_not_claim_what_only_the_backend_knows_before_it_was_passed_over() -> None:
    """Else a second crash would find it covered and never count it."""
    ledger = ShardLedger(Mark(watermark=20, ranges=((25, 30),)), counted=Mark(watermark=3))
    ledger.advance(3)
    assert ledger.checkpoint_mark(epoch=1) == Mark(epoch=1, watermark=3)
    assert ledger.mark(epoch=1) == Mark(epoch=1, watermark=20, ranges=((25, 30),))
    assert [ledger.pass_over(lsn) for lsn in (2, 3, 4, 5)] == [False, False, True, True]
    ledger.advance(5)
    assert ledger.checkpoint_mark(epoch=1) == Mark(epoch=1, watermark=5)


def test_a_checkpoint_claims_what_was_passed_over_above_something_pending() -> None:
    ledger = ShardLedger(Mark(ranges=((12, 13),)), counted=Mark())
    ledger.admit(10)
    assert ledger.pass_over(12)
    assert ledger.pass_over(13)
    ledger.advance(13)
    ledger.admit(14)
    claimed = ledger.checkpoint_mark(epoch=1)
    assert [lsn for lsn in range(9, 16) if claimed.covers(lsn)] == [9, 11, 12, 13]
    ledger.settle([10])
    assert ledger.checkpoint_mark(epoch=1).watermark == 13
