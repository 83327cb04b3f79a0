"""Who waits for which operation."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import walbatch as wb
from walbatch.runtime.clock import RealThreads
from walbatch.runtime.promises import LOGGED, STALE_MAX, Promises
from walbatch.runtime.ticket import Fate

THREADS = RealThreads()


def fate_of(first: int, last: int | None = None) -> Fate:
    return Fate(THREADS, first, first if last is None else last, None)


def result(fate: Fate, number: int) -> object:
    """What whoever asks for it now is told; ... if nothing."""
    promise = fate.settled(number)
    return promise.take() if promise.done else ...


def test_everybody_who_waits_for_an_operation_has_one_fate_which_is_told() -> None:
    promises = Promises()
    go = threading.Barrier(8)
    kept: list[Fate] = []

    def wait_for_it() -> None:
        mine = fate_of(7)
        go.wait(30)
        kept.append(promises.find_or_add(LOGGED, mine))

    callers = [threading.Thread(target=wait_for_it) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    promises.resolve(LOGGED, 7, "done")
    assert [result(fate, 7) for fate in kept] == ["done"] * 8
    assert len(set(kept)) == 1


def test_a_fate_that_nobody_keeps_is_forgotten_and_costs_nothing() -> None:
    promises = Promises()
    first = fate_of(7)
    promises.add(LOGGED, first)
    assert promises.find_or_add(LOGGED, fate_of(7)) is first
    assert repr(promises) == "<Promises of 1 fates>"
    del first
    gc.collect()
    assert repr(promises) == "<Promises of 0 fates>"
    promises.resolve_applied(LOGGED, Untouchable(), Untouchable())
    again = fate_of(7)
    assert promises.find_or_add(LOGGED, again) is again


class Untouchable(Sequence[int]):
    """Nobody may look at it."""

    def __len__(self) -> int:
        raise AssertionError

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError


def test_what_was_forgotten_takes_a_bounded_number_of_places() -> None:
    promises = Promises()
    kept = [fate_of(first * 10, first * 10 + 9) for first in range(10)]
    for fate in kept:
        promises.add(LOGGED, fate)
    for number in range(100, 10_000):
        promises.add(LOGGED, fate_of(number))
        assert len(promises._scopes[LOGGED].firsts) <= 2 * len(kept) + STALE_MAX + 2
    for fate in kept:
        promises.resolve(LOGGED, fate.last, fate.first)
        assert result(fate, fate.last) == fate.first


def test_a_fate_all_of_which_is_settled_is_not_looked_for_any_more_and_still_tells() -> None:
    promises = Promises()
    fate = fate_of(1, 3)
    promises.add(LOGGED, fate)
    promises.resolve_applied(LOGGED, [1, 3], ["one", "three"])
    assert repr(promises) == "<Promises of 1 fates>"
    promises.resolve(LOGGED, 2, error=wb.OperationCancelled(2))
    assert repr(promises) == "<Promises of 0 fates>"
    promises.resolve_all(wb.EngineClosed("closed"))
    assert (result(fate, 1), result(fate, 3)) == ("one", "three")
    with pytest.raises(wb.OperationCancelled):
        result(fate, 2)
    assert repr(fate) == "<Fate of 1..3, 3 settled>"


def test_numbers_of_lanes_that_log_nothing_are_not_mistaken_for_one_another() -> None:
    promises = Promises()
    logged, first, second = fate_of(1), fate_of(1), fate_of(1)
    promises.add(LOGGED, logged)
    promises.add(0, first)
    promises.add(1, second)
    promises.resolve(0, 1, "first")
    promises.resolve(2, 1, "nobody's")
    assert (result(logged, 1), result(first, 1), result(second, 1)) == (..., "first", ...)


def test_at_the_end_everybody_who_still_waits_is_told_and_nothing_that_was_told_changes() -> None:
    promises = Promises()
    fate = fate_of(1, 4)
    promises.add(LOGGED, fate)
    waited = fate.settled(2)
    promises.resolve_applied(LOGGED, [1], None)
    promises.resolve_all(wb.EngineClosed("closed"))
    assert waited.done
    assert result(fate, 1) is None
    promises.resolve_applied(LOGGED, [2, 3], ["late", "late"])
    for number in (2, 3, 4):
        with pytest.raises(wb.EngineClosed):
            result(fate, number)


@given(
    sizes=st.lists(st.integers(1, 6), max_size=12),
    kept=st.sets(st.integers(0, 11)),
    order=st.randoms(use_true_random=False),
)
def test_each_operation_of_a_kept_fate_gets_its_own_result_whatever_the_order(
    sizes: list[int], kept: set[int], order: object
) -> None:
    promises = Promises()
    fates: dict[int, Fate] = {}
    number = 1
    for index, size in enumerate(sizes):
        fate = fate_of(number, number + size - 1)
        promises.add(LOGGED, fate)
        if index in kept:
            fates[index] = fate
        del fate
        number += size
    numbers = list(range(1, number))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    half = len(numbers) // 2
    promises.resolve_applied(LOGGED, numbers[:half], [str(one) for one in numbers[:half]])
    early = {one.first: promises.find_or_add(LOGGED, fate_of(one.first)) for one in fates.values()}
    assert all(early[one.first] is one for one in fates.values() if not one.is_whole)
    promises.resolve_applied(LOGGED, numbers[half:], [str(one) for one in numbers[half:]])
    for fate in fates.values():
        assert [result(fate, one) for one in range(fate.first, fate.last + 1)] == [
            str(one) for one in range(fate.first, fate.last + 1)
        ]
