"""Each step is taken at its mark and given back below it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.pressure import Pressure

NONE, SHRINK, PAUSE = Pressure

TABLE = [
    # before, percent in use, after
    (NONE, 0, NONE), (NONE, 79, NONE), (NONE, 80, SHRINK), (NONE, 89, SHRINK), (NONE, 90, PAUSE), (NONE, 150, PAUSE),
    (SHRINK, 74, NONE), (SHRINK, 75, SHRINK), (SHRINK, 89, SHRINK), (SHRINK, 90, PAUSE),
    (PAUSE, 100, PAUSE), (PAUSE, 85, PAUSE), (PAUSE, 84, SHRINK), (PAUSE, 75, SHRINK), (PAUSE, 74, NONE),
]  # fmt: skip


@pytest.mark.parametrize(("before", "percent", "after"), TABLE)
def test_each_step_has_its_marks(before: Pressure, percent: int, after: Pressure) -> None:
    assert before.after(percent, 100) is after


@pytest.mark.parametrize("before", Pressure)
def test_without_a_limit_nothing_presses(before: Pressure) -> None:
    assert before.after(10**12, 0) is NONE


def test_the_smallest_limit_is_one() -> None:
    assert NONE.after(1, 1) is PAUSE


@given(st.sampled_from(Pressure), st.integers(0, 200), st.integers(0, 200))
def test_more_memory_in_use_never_means_less_pressure(before: Pressure, less: int, more: int) -> None:
    order = list(Pressure)
    less, more = sorted((less, more))
    assert order.index(before.after(less, 100)) <= order.index(before.after(more, 100))


@given(st.sampled_from(Pressure), st.integers(0, 120))
def test_what_follows_stays_while_memory_does(before: Pressure, used: int) -> None:
    after = before.after(used, 100)
    assert after.after(used, 100) is after
