"""The level follows what all sizes have in common, and says when the curve must be another one."""

from __future__ import annotations

from random import Random

import pytest

from walbatch.core.level import RATE_MAX, RATE_MIN, RATE_START, Level

DEVIATION = 0.2


def follow(level: Level, error: float, *, side: int = 0, age: int = 1000) -> bool:
    return level.follow(error, error / DEVIATION, side=side, age=age)


def test_errors_that_last_make_it_follow_faster_and_noise_makes_it_slower() -> None:
    lagging, noisy = Level(), Level()
    for number in range(200):
        follow(lagging, 0.15)
        follow(noisy, 0.15 if number % 2 else -0.15)
    assert RATE_START < lagging.rate <= RATE_MAX
    assert RATE_MIN <= noisy.rate < RATE_START


def test_it_finds_the_level_of_what_it_is_told() -> None:
    level, random = Level(), Random(1)
    for age in range(1000):
        error = 5.0 * random.gauss(1, 0.1) / level.now - 1
        level.follow(min(error, 2.0), min(error, 2.0) / 0.5, side=0, age=age)
    assert level.now == pytest.approx(5.0, rel=0.1)
    assert repr(level).startswith("<Level 5")


@pytest.mark.parametrize("error", [-0.3, 0.3])
def test_errors_of_one_sign_are_a_change(error: float) -> None:
    level = Level()
    changes = [follow(level, error) for _ in range(40)]
    assert changes.index(True) == 16
    assert sum(changes) == 2


def test_noise_is_no_change() -> None:
    level, random = Level(), Random(2)
    assert not any(
        follow(level, random.gauss(0, DEVIATION), side=random.choice([-1, 0, 1])) for _ in range(5000)
    )


@pytest.mark.parametrize("turn", [-1, 1])
def test_errors_of_opposite_sign_on_either_side_are_a_slope_that_turned(turn: int) -> None:
    level = Level()
    changes = [follow(level, 0.3 * turn * side, side=side) for side in [-1, 1] * 10]
    assert changes.index(True) == 10
    flat = Level()
    assert not any(follow(flat, 0.3 * turn * side, side=0) for side in [-1, 1] * 10)


def test_tests_that_were_forgotten_begin_anew() -> None:
    level = Level()
    for _ in range(15):
        follow(level, 0.3)
    level.forget()
    assert not any(follow(level, 0.3) for _ in range(15))
    level.restore(0.3)
    assert level.rate == 0.3
    assert not any(follow(level, 0.3) for _ in range(15))
