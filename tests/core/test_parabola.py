"""The fit finds the parabola that the samples came from, and keeps its head where there are few."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.parabola import (
    CURVE_MAX,
    CURVE_MIN,
    EXTENT,
    RISE_MAX,
    SLOPE_MAX,
    SLOPE_MEAN,
    SLOPE_MIN,
    Parabola,
    fit,
)

PLACES = [5 + step / 10 for step in range(-8, 9)]


def parabola(slope: float, curve: float) -> Parabola:
    return Parabola(
        at=5.0, level=0.0, slope=slope, curve=curve, weight=1.0, slope_sd=0.1, curve_sd=0.1, reach=2.0
    )


@pytest.mark.parametrize(("slope", "curve"), [(-0.5, 0.3), (0.0, 2.0), (1.5, 0.1)])
def test_many_samples_without_noise_give_the_curve_back(slope: float, curve: float) -> None:
    costs = [-7 + slope * (place - 5) + curve * (place - 5) ** 2 for place in PLACES]
    found = fit(5.0, PLACES, costs, [100.0] * len(PLACES), variance=1e-6, reach=2.0)
    assert found.at == 5.0
    assert found.level == pytest.approx(-7, abs=1e-3)
    assert found.slope == pytest.approx(slope, abs=1e-3)
    assert found.curve == pytest.approx(curve, abs=1e-3)
    assert found.slope_sd < 1e-3


def test_one_sample_says_little_about_the_slope() -> None:
    found = fit(5.0, [5.0], [-7.0], [1.0], variance=0.04, reach=1.0)
    assert found.slope == pytest.approx(SLOPE_MEAN, abs=0.01)
    assert found.slope_sd == pytest.approx(0.5, abs=0.01)


def test_the_logarithm_of_a_mean_of_few_is_too_low_and_corrected() -> None:
    few = fit(5.0, [5.0], [-7.0], [1.0], variance=0.25, reach=1.0)
    many = fit(5.0, [5.0], [-7.0], [1000.0], variance=0.25, reach=1.0)
    assert many.level == pytest.approx(-7.0, abs=1e-3)
    assert few.level == pytest.approx(-7.0 + 0.125 / 1.5)


def test_what_is_beyond_reach_does_not_count_unless_nothing_else_is_there() -> None:
    near = fit(5.0, [5.0, 9.0], [-7.0, 3.0], [1.0, 50.0], variance=0.04, reach=1.0)
    assert near.weight == 1.0
    far = fit(5.0, [4.0, 9.0], [-7.0, 3.0], [0.0, 50.0], variance=0.04, reach=1.0)
    assert 0 < far.weight < 50


def test_a_hill_is_taken_for_a_shallow_valley() -> None:
    costs = [-7 - 0.5 * (place - 5) ** 2 for place in PLACES]
    found = fit(5.0, PLACES, costs, [100.0] * len(PLACES), variance=1e-4, reach=2.0)
    assert found.curve == CURVE_MIN


@pytest.mark.parametrize(("slope", "bound"), [(-3.0, SLOPE_MIN), (40.0, SLOPE_MAX)])
def test_a_slope_has_bounds(slope: float, bound: float) -> None:
    costs = [-7 + slope * (place - 5) for place in PLACES]
    found = fit(5.0, PLACES, costs, [100.0] * len(PLACES), variance=1e-4, reach=2.0)
    assert found.slope == bound


def test_a_curve_has_a_bound() -> None:
    costs = [-7 + 300 * (place - 5) ** 2 for place in PLACES]
    found = fit(5.0, PLACES, costs, [100.0] * len(PLACES), variance=1e-4, reach=2.0)
    assert found.curve == CURVE_MAX


def test_the_lowest_point_is_where_the_slope_is_what_growing_must_gain() -> None:
    found = parabola(-0.5, 0.25)
    move, doubt = found.lowest(0.01)
    assert found.slope_at(5.0 + move) == pytest.approx(-0.01)
    assert doubt == pytest.approx(0.04)


@given(st.floats(SLOPE_MIN, SLOPE_MAX), st.floats(CURVE_MIN, CURVE_MAX), st.floats(-8, 16))
def test_the_rise_is_smooth_finite_and_has_the_slope_that_it_says(
    slope: float, curve: float, at: float
) -> None:
    found = parabola(slope, curve)
    assert found.rise(5.0) == 0
    assert found.rise(at) <= max(RISE_MAX, (abs(slope) + curve * EXTENT) * EXTENT)
    assert math.isfinite(math.exp(found.rise(at)))
    step = 1e-5
    if found.rise(at + step) < RISE_MAX and found.rise(at - step) < RISE_MAX:
        measured = (found.rise(at + step) - found.rise(at - step)) / (2 * step)
        assert measured == pytest.approx(found.slope_at(at), abs=1e-2)
