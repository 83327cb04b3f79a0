"""Batches in flight: as many as the backend gains from, fewer when it says so, and no matter what size they have."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.concurrency import HOLD_DOUBLINGS_MAX, WINDOW_BATCHES, Concurrency
from walbatch.core.controller import BatchResult, Observation

BASE_S = 0.01


def batch(
    seconds: float = BASE_S,
    *,
    concurrency: int = 1,
    result: BatchResult = BatchResult.DELIVERED,
    learnable: bool = True,
    count: int = 100,
) -> Observation:
    return Observation(
        count=count, bytes=0, seconds=seconds, result=result, learnable=learnable, concurrency=concurrency
    )


class Backend:
    """Serves `width` batches at once; more than that share it. Its prediction follows, as a controller's does."""

    def __init__(self, *, width: int, noise: float = 0.2, seed: int = 1) -> None:
        self.width = width
        self.slow = 1.0
        self._noise = noise
        self._random = Random(seed)
        self._predicted = BASE_S

    def run(self, concurrency: Concurrency, batches: int) -> list[int]:
        limits = []
        for _ in range(batches):
            busy = concurrency.limit
            seconds = BASE_S * self.slow * max(1.0, busy / self.width)
            seconds *= math.exp(self._random.gauss(0, self._noise) - self._noise**2 / 2)
            concurrency.observe(batch(seconds, concurrency=busy), predicted_s=self._predicted)
            self._predicted += (seconds - self._predicted) / 256
            limits.append(concurrency.limit)
        return limits


@pytest.mark.parametrize("width", [1, 4, 12])
def test_it_grows_to_what_the_backend_gains_from_and_hardly_beyond(width: int) -> None:
    limits = Backend(width=width).run(Concurrency(limit_max=64), 8000)
    late = sorted(limits[4000:])
    assert 0.6 * width <= late[len(late) // 2] <= 1.5 * width + 1


def test_the_limit_is_never_exceeded() -> None:
    assert max(Backend(width=100).run(Concurrency(limit_max=3), 2000)) == 3


def test_nothing_grows_while_the_limit_is_not_reached() -> None:
    concurrency = Concurrency(limit_max=8, start=4)
    for _ in range(1000):
        concurrency.observe(batch(concurrency=3), predicted_s=BASE_S)
    assert concurrency.limit == 4


def test_a_change_of_size_is_no_congestion() -> None:
    concurrency = Concurrency(limit_max=8, start=4)
    for number in range(1000):
        count = 100 if number < 500 else 800
        concurrency.observe(batch(count * 1e-4, count=count), predicted_s=count * 1e-4)
    assert concurrency.limit == 4


def test_a_backend_that_throttles_gets_a_tenth_less_once_for_what_was_in_flight() -> None:
    concurrency = Concurrency(limit_max=64, start=40)
    throttled = batch(result=BatchResult.THROTTLED, learnable=False)
    concurrency.observe(throttled, predicted_s=None)
    assert concurrency.limit == 36
    for _ in range(39):
        concurrency.observe(throttled, predicted_s=None)
    assert concurrency.limit == 36
    for _ in range(40):
        concurrency.observe(batch(), predicted_s=BASE_S)
    concurrency.observe(throttled, predicted_s=None)
    assert concurrency.limit == 32


def test_it_never_falls_below_one() -> None:
    concurrency = Concurrency(limit_max=4)
    for _ in range(10):
        concurrency.observe(batch(result=BatchResult.THROTTLED), predicted_s=None)
        concurrency.observe(batch(), predicted_s=BASE_S)
    assert concurrency.limit == 1


def test_sudden_congestion_makes_it_smaller_and_a_slow_backend_does_not_keep_it_there() -> None:
    backend, concurrency = Backend(width=16, noise=0.05), Concurrency(limit_max=32)
    before = backend.run(concurrency, 5000)[-1]
    backend.slow = 2.0
    dip = min(backend.run(concurrency, 300))
    after = sorted(backend.run(concurrency, 8000)[4000:])
    assert dip < before
    assert after[len(after) // 2] > 8


@pytest.mark.parametrize(
    "ignored",
    [
        batch(9.0, result=BatchResult.UNAVAILABLE),
        batch(9.0, result=BatchResult.FAILED),
        batch(9.0, learnable=False),
        batch(0.0),
        batch(-1.0),
        batch(math.nan),
    ],
    ids=repr,
)
def test_what_says_nothing_changes_nothing(ignored: Observation) -> None:
    concurrency, other = Concurrency(limit_max=8, start=2), Concurrency(limit_max=8, start=2)
    for _ in range(WINDOW_BATCHES + 10):
        concurrency.observe(batch(concurrency=2), predicted_s=BASE_S)
        concurrency.observe(ignored, predicted_s=BASE_S)
        concurrency.observe(batch(concurrency=2), predicted_s=None)
        other.observe(batch(concurrency=2), predicted_s=BASE_S)
    # The trial begins in the same window; the batches that are skipped after it are not the same.
    assert (concurrency.limit, other.limit) == (3, 3)


def test_a_trial_that_does_not_pay_waits_ever_longer() -> None:
    limits = Backend(width=1, noise=0.0).run(Concurrency(limit_max=8), 40_000)
    trials = [index for index in range(1, len(limits)) if limits[index] == 2 and limits[index - 1] == 1]
    assert 3 <= len(trials) <= 2 * HOLD_DOUBLINGS_MAX + 40_000 // (WINDOW_BATCHES << HOLD_DOUBLINGS_MAX)


@pytest.mark.parametrize(("start", "limit_max"), [(0, 4), (5, 4), (1, 0)])
def test_a_start_outside_the_limits_is_refused(start: int, limit_max: int) -> None:
    with pytest.raises(ValueError, match="start"):
        Concurrency(limit_max=limit_max, start=start)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True),
            st.one_of(st.none(), st.floats(0, 1e9)),
            st.sampled_from(BatchResult),
            st.integers(1, 300),
            st.booleans(),
        ),
        max_size=200,
    )
)
def test_whatever_happens_the_limit_stays_within_its_bounds(
    events: list[tuple[float, float | None, BatchResult, int, bool]],
) -> None:
    concurrency = Concurrency(limit_max=5)
    for seconds, predicted, result, others, learnable in events:
        observation = batch(seconds, concurrency=others, result=result, learnable=learnable)
        concurrency.observe(observation, predicted_s=predicted)
        assert 1 <= concurrency.limit <= 5
    assert repr(concurrency).startswith("<Concurrency ")
