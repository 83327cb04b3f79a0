"""Sums over sums: what a size cost, the older the less, with rare long batches shared out fairly."""

from __future__ import annotations

import math

import pytest

from walbatch.core.evidence import Evidence

SIZES = [1, 2, 4, 8, 16]


def test_a_count_belongs_to_the_nearest_size() -> None:
    evidence = Evidence(SIZES)
    found = [evidence.index(count) for count in (0.1, 1, 2, 3.1, 6, 100)]
    assert found == [0, 0, 1, 2, 3, 4]


def test_the_cost_is_seconds_over_operations_not_a_mean_of_ratios() -> None:
    evidence = Evidence(SIZES)
    evidence.add(2, 4, 4.0, 0.0)
    evidence.add(2, 3, 10.0, 0.0)
    assert evidence.cost(2) == pytest.approx(math.log(14 / 7))
    assert evidence.weight(2) == 2


def test_what_failed_costs_time_where_the_size_is_known() -> None:
    evidence = Evidence(SIZES)
    evidence.lose(2, 4.0)
    assert evidence.tried(0.0) == []
    evidence.add(2, 4, 4.0, 0.0)
    evidence.lose(2, 4.0)
    assert evidence.cost(2) == pytest.approx(math.log(2))
    assert evidence.weight(2) == 1


def test_older_samples_weigh_less_and_rescaling_changes_nothing() -> None:
    evidence, rescaled = Evidence(SIZES), Evidence(SIZES)
    for found, factors in ((evidence, [1e7]), (rescaled, [1e14, 1e-7])):
        found.add(0, 1, 1.0, 0.5)
        for factor in factors:
            found.fade(factor)
        found.add(0, 1, 3.0, 0.0)
    assert evidence.weight(0) == pytest.approx(1, abs=1e-6)
    assert evidence.weight(0) == pytest.approx(rescaled.weight(0))
    assert evidence.cost(0) == pytest.approx(math.log(3), abs=1e-5)
    assert evidence.cost(0) == pytest.approx(rescaled.cost(0))
    assert evidence.events == pytest.approx(rescaled.events)
    assert repr(evidence) == "<Evidence 1 of 5 sizes>"


def test_a_rare_excess_is_shared_by_all_sizes_at_first() -> None:
    evidence = Evidence(SIZES)
    for index in (2, 3):
        for _ in range(50):
            evidence.add(index, SIZES[index], float(SIZES[index]), 0.0)
    evidence.add(2, 4, 4.0, 100.0)
    own, other = evidence.cost(2), evidence.cost(3)
    assert 0 < other < own < 2 * other
    near = evidence.near(math.log(2), math.log(8))
    assert (near.costs, near.weights, near.weight) == ([0.0, own, other], [0.0, 51.0, 50.0], 101.0)
    assert near.logs == [math.log(size) for size in SIZES[1:4]]
    assert near.beyond == pytest.approx((51 * own + 50 * other) / 101)
    assert evidence.clipped_cost(2) == 0.0


def test_a_frequent_excess_is_found_to_be_a_size_s_own() -> None:
    evidence = Evidence(SIZES)
    for _ in range(2000):
        evidence.add(2, 4, 4.0, 4.0)
        evidence.add(3, 8, 8.0, 0.0)
    assert evidence.cost(2) == pytest.approx(math.log(2), abs=0.05)
    assert evidence.cost(3) == pytest.approx(0, abs=0.05)


def test_without_an_excess_the_costs_near_are_the_plain_ones() -> None:
    evidence = Evidence(SIZES)
    evidence.add(1, 2, 4.0, 0.0)
    two = math.log(2)
    assert evidence.near(-3.0, two) == ([0.0, two], [0.0, two], [0.0, 1.0], 1.0, 0.0)
    assert evidence.near(two + 0.1, 3.0).weight == 0.0


@pytest.mark.parametrize(("weight", "reach", "sizes"), [(1.0, 0.5, 1), (2.0, 2.0, 3), (99.0, 4.0, 5)])
def test_where_little_is_known_it_is_looked_for_further_away(weight: float, reach: float, sizes: int) -> None:
    evidence = Evidence(SIZES)
    for index in (0, 2):
        evidence.add(index, SIZES[index], 1.0, 0.0)
    near, reached = evidence.around(0.0, 0.5, weight)
    assert (reached, len(near.logs)) == (reach, sizes)


def test_the_largest_size_of_which_enough_is_known() -> None:
    evidence = Evidence(SIZES)
    assert evidence.largest(0.0) == 0
    evidence.add(4, 16, 16.0, 0.0)
    evidence.fade(10.0)
    evidence.add(1, 2, 2.0, 0.0)
    assert [evidence.largest(weight) for weight in (0.05, 0.5, 2.0)] == [4, 1, 0]


def test_cells_can_be_put_into_other_sizes() -> None:
    evidence, other = Evidence(SIZES), Evidence([1, 3, 9, 27])
    evidence.add(0, 1, 2.0, 0.0)
    evidence.add(4, 16, 32.0, 8.0)
    evidence.fade(2.0)
    evidence.add(4, 16, 32.0, 0.0)
    for size, weight, cost, excess in evidence.cells(0.1):
        other.put(size, weight, cost, excess)
    other.put_events(evidence.events)
    assert other.tried(0.0) == [0, 2]
    assert other.weight(2) == pytest.approx(1.5)
    assert other.events == pytest.approx(0.5)
    assert other.cost(2) == pytest.approx(evidence.cost(4), abs=1e-3)
