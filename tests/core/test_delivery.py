"""What a backend's answer means: nothing is settled without being told so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.segments import STORE
from walbatch import limits
from walbatch.core.delivery import Verdict, backoff_ns, judge
from walbatch.types import Applied, Batch, CutReason, Failures, Order, Outcome, Retry

KEYS = [b"a", b"b", b"c"]


def batch_of(*keys: bytes) -> Batch:
    return Batch(
        lane="put",
        shard=0,
        store=STORE,
        lsns=range(1, len(keys) + 1),
        keys=keys,
        payloads=[b""] * len(keys),
        priorities=[5] * len(keys),
        attempt=1,
        reason=CutReason.COUNT,
        mark=None,
    )


@pytest.mark.parametrize("order", Order, ids=lambda order: order.value)
def test_none_says_that_all_were_applied(order: Order) -> None:
    assert judge(batch_of(b"a", b"b"), None, order) == Verdict(
        applied={0: None, 1: None}, retry={}, error=None
    )


def test_results_are_handed_through() -> None:
    verdict = judge(batch_of(b"a", b"b"), [Applied("x"), Applied()], Order.KEY)
    assert verdict == Verdict(applied={0: "x", 1: None}, retry={}, error=None)


def test_a_tuple_is_as_good_as_a_list() -> None:
    assert judge(batch_of(b"a"), (Applied(1),), Order.NONE).applied == {0: 1}


def test_failures_name_the_exceptions_and_say_that_the_rest_was_applied() -> None:
    verdict = judge(batch_of(b"a", b"b", b"c"), Failures({1: Retry(after=2.0, error="busy")}), Order.KEY)
    assert verdict == Verdict(applied={0: None, 2: None}, retry={1: 2.0}, error="busy")


ORDERS = {
    "by key": (Order.KEY, {0: None, 2: None}, {1: 1.0, 3: 0.0}),
    "by shard": (Order.SHARD, {0: None}, {1: 1.0, 2: 0.0, 3: 0.0}),
    "free": (Order.NONE, {0: None, 2: None, 3: None}, {1: 1.0}),
}


@pytest.mark.parametrize(("order", "applied", "retry"), ORDERS.values(), ids=ORDERS.keys())
def test_what_comes_after_a_failed_operation(
    order: Order, applied: dict[int, Any], retry: dict[int, float]
) -> None:
    verdict = judge(batch_of(b"a", b"b", b"a", b"b"), Failures({1: Retry(after=1.0)}), order)
    assert verdict == Verdict(applied=applied, retry=retry, error="the backend asked for a retry")


def test_the_first_error_that_says_something_is_reported() -> None:
    verdict = judge(batch_of(b"a", b"b"), [Retry(), Retry(error="full")], Order.NONE)
    assert verdict.error == "full"


outcomes = st.one_of(
    st.builds(Applied, st.integers()),
    st.builds(Retry, after=st.floats(), error=st.sampled_from(["", "e"])),
)


@given(
    rows=st.lists(st.tuples(st.sampled_from(KEYS), outcomes), max_size=12),
    order=st.sampled_from(Order),
    sparse=st.booleans(),
)
def test_every_operation_is_either_applied_or_tried_again(
    rows: list[tuple[bytes, Outcome]], order: Order, *, sparse: bool
) -> None:
    answers = [outcome for _, outcome in rows]
    retries = {index: answer for index, answer in enumerate(answers) if isinstance(answer, Retry)}
    results = {index: answer.result for index, answer in enumerate(answers) if isinstance(answer, Applied)}
    if sparse:
        results = dict.fromkeys(results)
    verdict = judge(batch_of(*(key for key, _ in rows)), Failures(retries) if sparse else answers, order)
    keys = [key for key, _ in rows]

    def blocked(index: int) -> bool:
        if order is Order.NONE:
            return False
        return any(
            failed < index and (order is Order.SHARD or keys[failed] == keys[index]) for failed in retries
        )

    assert verdict.applied == {i: result for i, result in results.items() if not blocked(i)}
    assert sorted([*verdict.applied, *verdict.retry]) == list(range(len(rows)))
    assert (verdict.error is None) == (not verdict.retry)
    for wait in verdict.retry.values():
        assert 0 <= wait <= limits.RETRY_DELAY_NS_MAX / 1e9
        assert int(wait * 1e9) >= 0


WAITS = {
    "negative": (-1.0, 0.0),
    "not a number": (math.nan, 0.0),
    "for ever": (math.inf, limits.RETRY_DELAY_NS_MAX / 1e9),
    "longer than anything waits": (1e300, limits.RETRY_DELAY_NS_MAX / 1e9),
    "an integer": (3, 3.0),
}


@pytest.mark.parametrize(("after", "wait"), WAITS.values(), ids=WAITS.keys())
def test_a_wait_is_cut_to_what_makes_sense(after: float, wait: float) -> None:
    assert judge(batch_of(b"a"), [Retry(after=after)], Order.KEY).retry == {0: wait}


NONSENSE: Mapping[str, Any] = {
    "a number": 3,
    "true": True,
    "text": "ok",
    "bytes": b"ok",
    "a generator": (outcome for outcome in [Applied()]),
    "a dictionary": {0: Retry()},
    "too few outcomes": [Applied()],
    "too many outcomes": [Applied()] * 3,
    "no outcomes": [],
    "an outcome that is none": [Applied(), None],
    "the class instead of an outcome": [Applied(), Applied],
    "an exception as an outcome": [Applied(), ValueError("x")],
    "failures with an index too high": Failures({2: Retry()}),
    "failures with a negative index": Failures({-1: Retry()}),
    "failures with an index that is none": Failures({"0": Retry()}),  # type: ignore[dict-item]
    "failures with an outcome that is none": Failures({0: "busy"}),  # type: ignore[dict-item]
    "a wait that is none": [Applied(), Retry(after="soon")],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_settles_nothing(answer: Any) -> None:
    with pytest.raises(ValueError):
        judge(batch_of(b"a", b"b"), answer, Order.KEY)


@given(
    failures=st.integers(0, 10_000),
    base_s=st.floats(0, 10),
    ceiling_s=st.floats(0, limits.RETRY_DELAY_NS_MAX / 1e9),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_a_backoff_stays_below_its_ceiling_and_its_doubling(
    failures: int, base_s: float, ceiling_s: float, chance: float
) -> None:
    delay = backoff_ns(failures, base_s=base_s, ceiling_s=ceiling_s, chance=chance)
    assert 0 <= delay <= ceiling_s * 1e9
    assert failures > 60 or delay <= base_s * 2**failures * 1e9


def test_a_backoff_doubles_with_each_failure_up_to_its_ceiling() -> None:
    delays = [backoff_ns(failures, base_s=1, ceiling_s=5, chance=0.5) for failures in range(5)]
    assert delays == [500_000_000, 1_000_000_000, 2_000_000_000, 2_500_000_000, 2_500_000_000]
