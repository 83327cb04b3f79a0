"""The retry budget: a few retries at once, and then as many as successes pay for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.budget import BUDGET_MAX, RetryBudget


def taken(budget: RetryBudget) -> int:
    count = 0
    while budget.take():
        count += 1
    return count


def test_it_starts_full_and_then_is_empty() -> None:
    budget = RetryBudget(0.2)
    assert repr(budget) == "<RetryBudget 10 of 10>"
    assert taken(budget) == BUDGET_MAX
    assert (budget.take(), budget.left) == (False, 0)


@pytest.mark.parametrize(("ratio", "successes"), [(0.2, 5), (0.1, 10), (1.0, 1), (0.3, 4)])
def test_successes_earn_a_retry(ratio: float, successes: int) -> None:
    budget = RetryBudget(ratio)
    taken(budget)
    for _ in range(successes - 1):
        budget.succeeded()
    assert not budget.take()
    budget.succeeded()
    assert budget.take()


def test_no_more_is_saved_up_than_its_ceiling() -> None:
    budget = RetryBudget(1_000)
    budget.succeeded()
    assert taken(budget) == BUDGET_MAX
    budget.succeeded()
    assert taken(budget) == BUDGET_MAX


def test_a_ratio_of_nothing_earns_nothing() -> None:
    budget = RetryBudget(0.0)
    taken(budget)
    for _ in range(1_000):
        budget.succeeded()
    assert not budget.take()


@given(ratio=st.floats(0, 3), events=st.lists(st.booleans(), max_size=200))
def test_retries_never_outnumber_what_was_earned(ratio: float, events: list[bool]) -> None:
    budget = RetryBudget(ratio)
    retries = sum(budget.take() for succeeded in events if succeeded or not budget.succeeded())  # type: ignore[func-returns-value]
    assert retries <= BUDGET_MAX + ratio * len(events) + 1e-3
    assert 0 <= budget.left <= BUDGET_MAX
