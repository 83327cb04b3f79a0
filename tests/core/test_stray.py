"""The spread around the lead follows from noise, curve and evidence, as docs/batching.md derives it."""

from __future__ import annotations

import pytest

from walbatch.core.evidence import STEP
from walbatch.core.parabola import Parabola
from walbatch.core.stray import (
    CHANCE_BOUND,
    CHANCE_MAX,
    CHANCE_MIN,
    CHANCE_UNSURE,
    REACH_BOUND,
    REACH_MAX,
    REACH_MIN,
    STEPS_MAX,
    Stray,
)


def parabola(*, curve: float = 0.5, weight: float = 1000.0, slope: float = 0.0) -> Parabola:
    return Parabola(
        at=5.0, level=0.0, slope=slope, curve=curve, weight=weight, slope_sd=0.1, curve_sd=0.0, reach=1.0
    )


def followed(*, variance: float, doubt: float = 0.0, bound: bool = False, **shape: float) -> Stray:
    stray = Stray()
    stray.follow(parabola(**shape), variance, doubt, bound=bound)
    return stray


@pytest.mark.parametrize(("curve", "variance"), [(0.5, 0.04), (0.1, 0.04), (2.0, 4.0)])
def test_what_straying_costs_is_what_it_saves(curve: float, variance: float) -> None:
    stray = followed(curve=curve, variance=variance, weight=100.0)
    costs = 2 * curve * stray.by**2 * stray.chance / 2
    saves = variance / (2 * (2 * curve) * 100 * stray.by**2 * stray.chance)
    # Steps are whole ones, so it strays a little less where the next one would be too far.
    assert 0.5 < costs / saves < 1.01


def test_without_noise_it_hardly_strays_and_with_doubt_it_strays_far() -> None:
    calm, wild = followed(variance=1e-6), followed(variance=0.04, doubt=5.0)
    assert (calm.by, calm.chance) == (STEP, CHANCE_MIN)
    assert (wild.by, wild.chance) == (STEPS_MAX * STEP, CHANCE_MAX)
    assert repr(calm).startswith("<Stray by 0.09, ")


@pytest.mark.parametrize(("slope", "steps", "chance"), [(-0.5, 1, CHANCE_BOUND), (0.2, 2, CHANCE_UNSURE)])
def test_at_a_ceiling_it_strays_little(slope: float, steps: int, chance: float) -> None:
    stray = followed(variance=0.5, doubt=1.0, bound=True, slope=slope)
    assert (stray.by, stray.chance) == (steps * STEP, chance)


def test_the_reach_follows_slowly_and_within_bounds() -> None:
    stray = followed(variance=0.04, doubt=5.0)
    reaches = [stray.follow_reach(bound=False) for _ in range(40)]
    assert REACH_MIN < reaches[0] < 1.0
    assert reaches == sorted(reaches)
    assert reaches[-1] == pytest.approx(REACH_MAX, abs=1e-3)
    stray.follow(parabola(), 1e-6, 0.0, bound=False)
    assert [stray.follow_reach(bound=True) for _ in range(40)][-1] == pytest.approx(REACH_BOUND, abs=1e-3)
