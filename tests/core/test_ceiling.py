"""The largest size that does not fail, and the largest one that is quick enough."""

from __future__ import annotations

import math
from random import Random

import pytest

from walbatch.core.ceiling import (
    HOLD_BATCHES,
    HOLD_DOUBLINGS_MAX,
    HOLD_REFITS,
    RELAXED,
    VAIN_REFITS,
    FailureCeiling,
    LatencyCeiling,
)
from walbatch.core.parabola import Parabola

STEP = math.log(2) / 8


def try_at(ceiling: FailureCeiling, limit: int) -> bool:
    """A batch at the ceiling, against a backend that takes up to `limit`; whether it was taken."""
    count = int(math.exp(ceiling.at) + 1e-6)
    if count > limit:
        ceiling.failed(count, definite=True)
        return False
    ceiling.delivered(count)
    return True


# --- failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [300, 511, 37, 2])
def test_the_largest_size_that_is_taken_is_found_by_halves(limit: int) -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(limit // 2 + 1)
    ceiling.failed(512, definite=True)
    failures = sum(not try_at(ceiling, limit) for _ in range(HOLD_BATCHES // 2))
    assert failures <= 9
    assert 0.98 * limit - 1 <= math.exp(ceiling.at) <= limit + 1e-6


def test_the_size_that_failed_is_tried_again_ever_more_rarely() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(256)
    ceiling.failed(512, definite=True)
    failures = [number for number in range(100_000) if not try_at(ceiling, 400)]
    assert 8 < len(failures) < 24


def test_the_hold_does_not_grow_without_bound() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(1)
    ceiling.failed(2, definite=True)
    for _ in range(HOLD_DOUBLINGS_MAX + 5):
        while try_at(ceiling, 1):
            pass
    assert ceiling.restore(ceiling.snapshot())


def test_a_limit_that_is_lifted_is_noticed() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(256)
    ceiling.failed(512, definite=True)
    for number in range(10_000):
        try_at(ceiling, 400 if number < 1000 else 5000)
    assert math.exp(ceiling.at) > 2000


def test_where_nothing_was_delivered_it_goes_down_by_octaves() -> None:
    ceiling = FailureCeiling(STEP)
    tries = 0
    ceiling.failed(64, definite=True)
    while not try_at(ceiling, 5):
        tries += 1
    assert tries == 3


def test_the_smallest_batch_is_the_end() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.failed(1, definite=True)
    assert ceiling.at == 0
    ceiling.failed(1, definite=False)
    assert ceiling.at == 0


def test_a_timeout_costs_one_step() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(100)
    ceiling.failed(100, definite=False)
    assert ceiling.at == pytest.approx(math.log(100) - STEP)


def test_a_size_that_was_taken_before_costs_one_step_whatever_the_backend_says() -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.delivered(100)
    ceiling.failed(90, definite=True)
    assert ceiling.at == pytest.approx(math.log(90) - STEP)


@pytest.mark.parametrize("tries", [0, 1, 3, 200])
@pytest.mark.parametrize("delivered", [0, 256])
def test_a_ceiling_goes_on_from_its_snapshot(tries: int, delivered: int) -> None:
    ceiling, other = FailureCeiling(STEP), FailureCeiling(STEP)
    if delivered:
        ceiling.delivered(delivered)
    ceiling.failed(512, definite=True)
    for _ in range(tries):
        try_at(ceiling, 400)
    assert other.restore(ceiling.snapshot())
    assert repr(other) == repr(ceiling)
    assert other.at == pytest.approx(ceiling.at, abs=0.02)


def test_a_ceiling_that_was_about_to_try_again_does_so() -> None:
    ceiling = FailureCeiling(STEP)
    assert ceiling.restore(FailureCeiling.STATE.pack(512.0, 256.0, 0, 3, 1))
    assert ceiling.at == pytest.approx(math.log(512))
    assert not try_at(ceiling, 400)
    assert ceiling.at < math.log(512)


def test_a_ceiling_that_never_was_goes_on_as_such() -> None:
    ceiling = FailureCeiling(STEP)
    assert ceiling.restore(FailureCeiling(STEP).snapshot())
    assert ceiling.at == math.inf


@pytest.mark.parametrize(
    "state",
    [
        (0.5, 0.0, 0, 0, 0),
        (math.nan, 0.0, 0, 0, 0),
        (1e9, 0.0, 0, 0, 0),
        (5.0, -1.0, 0, 0, 0),
        (5.0, 5.0, 0, 0, 0),
        (0.0, 1e9, 0, 0, 0),
        (5.0, 1.0, 2**31, 0, 0),
        (5.0, 1.0, 0, HOLD_DOUBLINGS_MAX + 1, 0),
        (0.0, 1.0, 0, 0, 1),
        (5.0, 1.0, 0, 0, 2),
    ],
)
def test_a_state_that_cannot_be_is_refused(state: tuple[float, float, int, int, int]) -> None:
    ceiling = FailureCeiling(STEP)
    ceiling.failed(512, definite=True)
    before = repr(ceiling), ceiling.at
    assert not ceiling.restore(FailureCeiling.STATE.pack(*state))
    assert (repr(ceiling), ceiling.at) == before


# --- latency -----------------------------------------------------------------------------------------------

FIXED_S, EACH_S = 0.01, 0.001


def curve_at(at: float) -> Parabola:
    """The tangent of ln(fixed / n + each)."""
    count = math.exp(at)
    slope = -FIXED_S / (FIXED_S + EACH_S * count)
    return Parabola(
        at=at, level=0.0, slope=slope, curve=0.02, weight=500.0, slope_sd=0.01, curve_sd=0.1, reach=2.0
    )


def settle(ceiling: LatencyCeiling, refits: int) -> None:
    ceiling.at = min(ceiling.at, math.log(1000))
    for _ in range(refits):
        at = min(max(ceiling.at, 0.0), math.log(1000))
        ceiling.move(curve_at(at), math.log(FIXED_S / math.exp(at) + EACH_S), 0.0, math.log(1000))


def test_the_ceiling_is_where_the_predicted_tail_meets_the_target() -> None:
    ceiling = LatencyCeiling(0.110, 0.95)
    ceiling.tail = 0.1
    settle(ceiling, 500)
    seconds = FIXED_S + EACH_S * math.exp(ceiling.at)
    assert seconds * math.exp(ceiling.tail) == pytest.approx(0.110, rel=0.01)
    assert not ceiling.unreachable


def test_the_tail_settles_where_few_enough_lie_beyond() -> None:
    ceiling, random = LatencyCeiling(1.0, 0.95), Random(3)
    beyond = []
    for number in range(20_000):
        error = random.gauss(0, 0.3)
        if number > 2000:
            beyond.append(error > ceiling.tail)
        ceiling.observed(error, 0.3)
    assert 0.035 < sum(beyond) / len(beyond) < 0.055
    assert repr(ceiling).startswith("<LatencyCeiling at e^inf, tail 0.")


def test_a_batch_is_late_beyond_the_target() -> None:
    ceiling = LatencyCeiling(0.1, 0.95)
    assert ceiling.is_late(0.11)
    assert not ceiling.is_late(0.09)


def test_a_target_that_no_size_meets_is_given_up_said_so_and_relaxed() -> None:
    ceiling = LatencyCeiling(FIXED_S / 2, 0.95)
    ceiling.tail = 0.0
    settle(ceiling, 60)
    assert ceiling.unreachable
    settle(ceiling, 100)
    seconds = FIXED_S + EACH_S * math.exp(ceiling.at)
    assert FIXED_S * 1.2 < seconds < FIXED_S * 1.2 * math.exp(RELAXED)


def test_a_target_that_was_given_up_is_tried_again() -> None:
    ceiling = LatencyCeiling(FIXED_S / 2, 0.95)
    settle(ceiling, 60)
    assert ceiling.unreachable
    seen = []
    for _ in range(HOLD_REFITS):
        settle(ceiling, 1)
        seen.append(ceiling.unreachable)
    assert not all(seen)
    settle(ceiling, VAIN_REFITS + 60)
    assert ceiling.unreachable


def test_a_backend_that_gets_quick_enough_meets_the_target_again() -> None:
    ceiling = LatencyCeiling(FIXED_S / 2, 0.95)
    settle(ceiling, 60)
    assert ceiling.unreachable
    ceiling.move(curve_at(1.0), math.log(FIXED_S / 100), 0.0, 5.0)
    assert not ceiling.unreachable
