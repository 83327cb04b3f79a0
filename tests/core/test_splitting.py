"""The search for what makes a batch fail: in few calls, in order, and nobody is blamed who did not fail alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.splitting import Search


@dataclass
class Outcome:
    """What became of a batch of `size` operations that failed as a whole, since its `poison` fails whatever it is in."""

    calls: int = 0
    """After the first one."""
    isolating: int = 0
    """Of them, those up to the last poison."""
    failed: int = 0
    applied: list[int] = field(default_factory=list)
    blamed: list[int] = field(default_factory=list)


def searched(size: int, poison: Collection[int]) -> Outcome:
    search = Search(size)
    left = list(range(size))
    outcome = Outcome()
    while left:
        count = search.part(len(left))
        assert 1 <= count <= len(left)
        part = left[:count]
        outcome.calls += 1
        if not any(index in poison for index in part):
            outcome.applied += part
            left = left[count:]
            search.passed(count)
        elif count > 1:
            outcome.failed += 1
            search.failed(count)
        else:
            outcome.failed += 1
            outcome.isolating = outcome.calls
            outcome.blamed += part
            left = left[1:]
            search.isolated()
    return outcome


def worst(size: int, count: int) -> tuple[float, float, float]:
    """The most calls, calls up to the last poison, and failed calls, over all places of `count` poisons."""
    found = [searched(size, set(places)) for places in itertools.combinations(range(size), count)]
    return max(o.calls for o in found), max(o.isolating for o in found), max(o.failed for o in found)


def bound(size: int, count: int) -> float:
    """Extra calls, those that fail after the first one, that `count` poisons among `size` operations may cost."""
    return count * (math.log2(size / count) + 2)


def check(size: int, poison: Collection[int]) -> None:
    outcome = searched(size, poison)
    assert outcome.blamed == sorted(poison)
    assert outcome.applied == [index for index in range(size) if index not in poison]
    if poison:
        assert outcome.failed <= bound(size, len(poison))
        assert outcome.calls <= bound(size, len(poison)) + 3 * len(poison)


@pytest.mark.parametrize("size", range(2, 13))
def test_every_poison_is_found_within_the_bound_wherever_it_is(size: int) -> None:
    for count in range(size + 1):
        for poison in itertools.combinations(range(size), count):
            check(size, frozenset(poison))


@given(size=st.integers(2, 4096), data=st.data())
def test_every_poison_is_found_within_the_bound_in_a_large_batch(size: int, data: st.DataObject) -> None:
    check(size, data.draw(st.frozensets(st.integers(0, size - 1), max_size=40)))


@given(
    size=st.integers(2, 4096), start=st.integers(0, 4095), step=st.integers(1, 300), count=st.integers(1, 200)
)
def test_a_row_of_poison_is_found_within_the_bound(size: int, start: int, step: int, count: int) -> None:
    check(size, frozenset(range(start, size, step)[:count]))


@pytest.mark.parametrize(
    ("size", "front", "step"), [(4_096, 4, 129), (65_536, 6, 1_025), (16_385, 8, 195), (633, 0, 50)]
)
def test_rows_that_are_worst_for_a_search_stay_within_the_bound(size: int, front: int, step: int) -> None:
    """A few at the front, and then each where the part has just doubled."""
    check(size, frozenset([*range(front), *range(front, size, step)]))


def test_one_poison_is_isolated_in_the_logarithm_and_one_call() -> None:
    """A thousand operations: ten halvings, and the call in which it fails alone."""
    assert max(searched(1024, {index}).isolating for index in range(1024)) == 11
    assert max(searched(1024, {index}).failed for index in range(1024)) == 10


def test_what_fails_no_more_is_applied_and_nobody_is_blamed() -> None:
    """A failure that was none of the operations': each part passes."""
    outcome = searched(100, ())
    assert (outcome.blamed, outcome.failed, outcome.applied) == ([], 0, list(range(100)))


@given(size=st.integers(2, 64), data=st.data())
def test_nothing_goes_wrong_when_operations_are_taken_out_or_parts_cut_short(
    size: int, data: st.DataObject
) -> None:
    poison = data.draw(st.frozensets(st.integers(0, size - 1), max_size=8))
    search, left, blamed = Search(size), list(range(size)), []
    while left:
        if data.draw(st.booleans()):
            index = data.draw(st.integers(0, len(left) - 1))
            del left[index]
            search.removed(index)
            continue
        count = min(search.part(len(left)), data.draw(st.integers(1, size)))
        if poison.isdisjoint(left[:count]):
            left = left[count:]
            search.passed(count)
        elif count > 1:
            search.failed(count)
        else:
            blamed.append(left.pop(0))
            search.isolated()
    assert set(blamed) <= poison
    assert search.found == len(blamed)


def test_a_single_operation_needs_no_search() -> None:
    with pytest.raises(AssertionError):
        Search(1)


def test_its_state_shows() -> None:
    search = Search(8)
    assert repr(search) == "<Search in 8, 0 found, one among the next 8>"
