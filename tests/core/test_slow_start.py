"""The slow start doubles while that helps, and ends when it does not."""

from __future__ import annotations

import pytest

from walbatch.core.slow_start import BARREN_MAX, Next, SlowStart


def go(costs: list[float]) -> list[Next]:
    start = SlowStart()
    return [start.delivered(cost, late=False, highest=False) for cost in costs]


def test_a_size_that_costs_less_is_doubled_after_two_batches() -> None:
    assert go([8, 8, 4, 4, 2]) == [
        Next.THE_SAME, Next.TWICE_AS_MUCH, Next.THE_SAME, Next.TWICE_AS_MUCH, Next.THE_SAME,
    ]  # fmt: skip


def test_it_ends_when_doublings_in_a_row_gain_nothing() -> None:
    steps = go([10.0] * 2 * (2 + BARREN_MAX))
    assert steps.index(Next.THE_BEST) == 2 * (1 + BARREN_MAX) - 1
    assert Next.THE_BEST not in go([10, 10, 10, 10, 10, 10, 10, 10, 5, 5, 5, 5, 5, 5, 5, 5])


def test_a_size_that_costs_more_must_do_so_twice_as_often() -> None:
    assert go([10, 10, 15, 15, 15, 15])[2:] == [Next.THE_SAME] * 3 + [Next.THE_BEST]
    assert go([10, 10, 15, 15, 9, 9])[2:] == [Next.THE_SAME] * 3 + [Next.TWICE_AS_MUCH]
    assert go([10, 10, 40, 40])[2:] == [Next.THE_SAME, Next.THE_BEST]


@pytest.mark.parametrize(("late", "highest", "after"), [(True, False, 2), (False, True, 2), (True, True, 2)])
def test_two_late_batches_and_the_largest_size_end_it(late: bool, highest: bool, after: int) -> None:
    start = SlowStart()
    steps = [start.delivered(1.0, late=late, highest=highest) for _ in range(after)]
    assert steps == [Next.THE_SAME] * (after - 1) + [Next.THE_BEST]
    assert repr(start) == "<SlowStart best 1 s, 0 doublings for nothing>"


def test_one_late_batch_may_be_chance() -> None:
    start = SlowStart()
    steps = [
        start.delivered(10.0 if late else 1.0, late=late, highest=False)
        for late in (True, False, False, False)
    ]
    assert steps == [Next.THE_SAME] * 3 + [Next.TWICE_AS_MUCH]
    again = [start.delivered(10.0 if late else 1.0, late=late, highest=False) for late in (False, True, True)]
    assert again == [Next.THE_SAME] * 2 + [Next.THE_BEST]
