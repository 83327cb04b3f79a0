"""Quantiles from buckets, against those of the sorted values themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.histogram import BUCKETS_MAX, VALUE_MAX, Histogram, RecentHistogram

ERROR_MAX = 0.05
VALUES = st.one_of(
    st.integers(0, 100),
    st.integers(0, 10**6),
    st.integers(0, 10**11),
    st.integers(0, VALUE_MAX),
)


def of(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(st.lists(VALUES, min_size=1, max_size=300), st.floats(0, 1))
def test_a_quantile_is_within_five_percent_of_the_exact_one(values: list[int], q: float) -> None:
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    assert abs(of(values).quantile(q) - exact) <= ERROR_MAX * exact


@pytest.mark.parametrize("bits", range(1, VALUE_MAX.bit_length()))
def test_the_ends_of_every_bucket_are_near_its_middle(bits: int) -> None:
    low = 1 << bits
    width = max(1, low >> 4)
    for first in range(low, 2 * low, width):
        for value in (first, first + width - 1):
            histogram = of([value, VALUE_MAX])
            assert abs(histogram.quantile(0.5) - value) <= value / 32


@given(st.lists(VALUES, min_size=1, max_size=50))
def test_the_mean_and_the_maximum_are_exact(values: list[int]) -> None:
    histogram = of(values)
    assert histogram.average == sum(values) / len(values)
    assert histogram.maximum == histogram.quantile(1.0) == max(values)
    assert (histogram.count, histogram.total) == (len(values), sum(values))


@given(st.lists(st.lists(VALUES, max_size=50), max_size=5), st.lists(st.floats(0, 1), max_size=5))
def test_merged_histograms_say_what_one_of_all_values_says(
    parts: list[list[int]], shares: list[float]
) -> None:
    merged = Histogram.merged(map(of, parts))
    whole = of([value for part in parts for value in part])
    shares.sort()
    assert merged.quantiles(shares) == whole.quantiles(shares)
    assert (merged.count, merged.total, merged.maximum) == (whole.count, whole.total, whole.maximum)


@given(VALUES, st.integers(1, 1000), st.lists(VALUES, max_size=20))
def test_a_value_added_many_times_is_that_value_many_times(value: int, times: int, others: list[int]) -> None:
    at_once, one_by_one = of(others), of(others)
    at_once.add(value, times)
    for _ in range(times):
        one_by_one.add(value)
    shares = [0.1, 0.5, 0.9, 1.0]
    assert at_once.quantiles(shares) == one_by_one.quantiles(shares)
    assert at_once.total == one_by_one.total


@given(st.lists(VALUES, min_size=1, max_size=50), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_quantiles_at_once_are_those_one_by_one(values: list[int], shares: list[float]) -> None:
    histogram = of(values)
    shares.sort()
    assert histogram.quantiles(shares) == [histogram.quantile(share) for share in shares]
    assert histogram.quantiles(shares) == sorted(histogram.quantiles(shares))


def test_there_are_no_more_buckets_than_it_says() -> None:
    histogram = Histogram()
    histogram.add(0)
    for bits in range(80):
        for step in range(64):
            histogram.add((1 << bits) + (step << bits >> 6))
    assert len(histogram._buckets) == BUCKETS_MAX
    assert max(histogram._buckets) == BUCKETS_MAX - 1


def test_values_beyond_the_largest_are_counted_as_it() -> None:
    histogram = of([VALUE_MAX * 4, VALUE_MAX * 8])
    assert histogram.maximum == VALUE_MAX * 8
    assert histogram.quantile(0.5) == pytest.approx(VALUE_MAX, rel=ERROR_MAX)


def test_where_nothing_was_counted_all_is_zero() -> None:
    histogram = Histogram()
    assert (histogram.average, histogram.quantiles((0.0, 0.5, 1.0))) == (0.0, [0, 0, 0])
    assert repr(histogram) == "<Histogram of 0, up to 0>"


def test_small_values_are_exact() -> None:
    assert [of([value, 1000]).quantile(0.5) for value in range(32)] == list(range(32))


def test_a_negative_value_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        Histogram().add(-1)


# --- of late ------------------------------------------------------------------------------------------------------

WINDOW_NS = 60


@given(st.lists(st.tuples(st.integers(0, 100), VALUES), max_size=40), st.integers(0, 200))
def test_what_is_younger_than_a_window_counts_and_what_is_older_than_two_does_not(
    steps: list[tuple[int, int]], wait_ns: int
) -> None:
    recent = RecentHistogram(window_ns=WINDOW_NS, now_ns=1_000)
    now_ns = 1_000
    seen: list[tuple[int, int]] = []
    for step_ns, value in steps:
        now_ns += step_ns
        recent.add(value, now_ns=now_ns)
        seen.append((now_ns, value))
    now_ns += wait_ns
    young = sum(now_ns - at_ns < WINDOW_NS for at_ns, _ in seen)
    not_old = sum(now_ns - at_ns < 2 * WINDOW_NS for at_ns, _ in seen)
    whole = recent.whole(now_ns=now_ns)
    assert young <= whole.count <= not_old
    values = [value for _, value in seen]
    assert whole.total == sum(values[len(values) - whole.count :])


def test_a_window_ends_when_it_is_over() -> None:
    recent = RecentHistogram(window_ns=WINDOW_NS, now_ns=0)
    recent.add(1, now_ns=WINDOW_NS - 1)
    recent.add(2, now_ns=WINDOW_NS)
    assert recent.whole(now_ns=2 * WINDOW_NS - 1).total == 3
    assert recent.whole(now_ns=2 * WINDOW_NS).total == 2
    assert recent.whole(now_ns=3 * WINDOW_NS).total == 0
    recent.add(4, now_ns=3 * WINDOW_NS)
    assert recent.whole(now_ns=5 * WINDOW_NS).total == 0


def test_the_state_of_a_recent_histogram_is_shown() -> None:
    recent = RecentHistogram(window_ns=WINDOW_NS, now_ns=0)
    recent.add(7, now_ns=1)
    recent.add(8, now_ns=70)
    assert repr(recent) == "<RecentHistogram of 1 and 1>"


def test_who_reads_while_another_adds_gets_an_answer() -> None:
    histogram = of([1, 2, 3])
    histogram.count += 100  # as between the two steps of an `add`
    assert histogram.quantiles((0.5, 0.99)) == [2, 3]
