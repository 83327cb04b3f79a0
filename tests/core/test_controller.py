"""What all size controllers have in common, and the two plain ones."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.controller import (
    AIMD_TARGET_S,
    BatchResult,
    Chance,
    FixedSize,
    LatencyAimd,
    Observation,
    SizeBounds,
    SizeController,
)
from walbatch.limits import BATCH_COUNT_MAX


def batch(
    seconds: float = 0.01,
    *,
    count: int = 100,
    result: BatchResult = BatchResult.DELIVERED,
    learnable: bool = True,
) -> Observation:
    return Observation(count=count, bytes=0, seconds=seconds, result=result, learnable=learnable)


# --- bounds ------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 70_000), st.integers(1, 300), st.floats(0, 1e6))
def test_a_clamped_size_is_allowed(count_min: int, count_max: int, multiple_of: int, wish: float) -> None:
    try:
        bounds = SizeBounds(count_min=count_min, count_max=count_max, multiple_of=multiple_of)
    except ValueError:
        allowed = range(count_min, count_max + 1)
        assert count_max > BATCH_COUNT_MAX or not any(size % multiple_of == 0 for size in allowed)
        return
    size = bounds.clamp(wish)
    assert count_min <= size <= count_max
    assert size % multiple_of == 0
    assert bounds.smallest <= size <= bounds.largest
    assert size <= wish or size == bounds.smallest


def test_a_size_beside_the_lead_is_another_one_if_there_is_one() -> None:
    bounds = SizeBounds(count_min=4, count_max=20, multiple_of=4)
    assert bounds.beside(16, 8, up=True) == 16
    assert [bounds.beside(8, 8, up=up) for up in (True, False)] == [12, 4]
    assert bounds.beside(20, 20, up=True) == 20
    assert bounds.beside(4, 4, up=False) == 4


@pytest.mark.parametrize(
    ("count_min", "count_max", "multiple_of", "message"),
    [
        (0, 10, 1, "from 0 to 10"),
        (5, 4, 1, "from 5 to 4"),
        (1, BATCH_COUNT_MAX + 1, 1, "must be"),
        (1, 10, 0, "multiples of 0"),
        (5, 7, 4, "no multiple of 4 lies between 5 and 7"),
    ],
)
def test_bounds_without_a_size_are_refused(
    count_min: int, count_max: int, multiple_of: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SizeBounds(count_min=count_min, count_max=count_max, multiple_of=multiple_of)


def test_a_ceiling_below_the_smallest_size_is_raised_to_it() -> None:
    bounds = SizeBounds(count_min=5, multiple_of=4)
    assert bounds.limited(3).largest == 8
    assert bounds.limited(21).largest == 20
    assert bounds.limited(10**9).largest == BATCH_COUNT_MAX


# --- chance ------------------------------------------------------------------------------------------------


def test_chance_is_the_published_generator() -> None:
    chance = Chance(1234567)
    # The reference sequence of splitmix64 for this seed.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [chance() for _ in expected] == [(value >> 11) * 2.0**-53 for value in expected]


@given(st.integers())
def test_chance_is_uniform_enough_and_repeatable(seed: int) -> None:
    chance, again = Chance(seed), Chance(seed)
    drawn = [chance() for _ in range(200)]
    assert drawn == [again() for _ in range(200)]
    assert all(0 <= value < 1 for value in drawn)
    assert 0.25 < sum(drawn) / len(drawn) < 0.75


# --- the fixed size ----------------------------------------------------------------------------------------


def test_a_fixed_size_stays_what_it_is_within_the_bounds() -> None:
    controller = FixedSize(count=100, multiple_of=8)
    assert (controller.target().count, controller.target().reason) == (96, "fixed")
    controller.observe(batch(99.0, result=BatchResult.TOO_LARGE))
    assert controller.target().count == 96
    controller.limit(50)
    assert controller.target().count == 48
    controller.limit(500)
    assert controller.target().count == 96
    assert controller.predict_s(96) is None
    assert controller.describe().samples == 1
    assert repr(controller) == "<FixedSize 96>"


def test_a_fixed_size_has_nothing_to_take_up() -> None:
    controller = FixedSize(count=10)
    assert controller.restore(controller.snapshot())
    assert not controller.restore(b"x")


# --- the latency AIMD --------------------------------------------------------------------------------------


def test_aimd_grows_by_a_step_and_shrinks_by_a_tenth() -> None:
    controller = LatencyAimd(start=80)
    controller.observe(batch(AIMD_TARGET_S))
    assert controller.target().count == 90
    controller.observe(batch(AIMD_TARGET_S * 1.01))
    assert (controller.target().count, controller.target().reason) == (81, "aimd")


@pytest.mark.parametrize("result", [BatchResult.TOO_LARGE, BatchResult.TIMED_OUT])
def test_aimd_halves_what_failed_for_its_size(result: BatchResult) -> None:
    controller = LatencyAimd(start=80)
    controller.observe(batch(result=result))
    assert controller.target().count == 40


@pytest.mark.parametrize(
    "ignored",
    [
        batch(9.0, learnable=False),
        batch(9.0, result=BatchResult.THROTTLED),
        batch(9.0, result=BatchResult.UNAVAILABLE),
        batch(9.0, result=BatchResult.FAILED),
    ],
    ids=repr,
)
def test_aimd_learns_nothing_from_what_is_not_the_size_s_doing(ignored: Observation) -> None:
    controller = LatencyAimd(start=80)
    controller.observe(ignored)
    assert controller.target().count == 80
    assert controller.describe().samples == 0


def test_aimd_stays_within_its_bounds_also_when_they_move() -> None:
    controller = LatencyAimd(start=80, count_min=10, count_max=100)
    for _ in range(10):
        controller.observe(batch(0.0))
    assert controller.target().count == 100
    controller.limit(50)
    assert controller.target().count == 50
    for _ in range(100):
        controller.observe(batch(9.0))
    assert controller.target().count == 10
    assert controller.predict_s(10) is None
    assert repr(controller) == "<LatencyAimd 10>"


def test_aimd_goes_on_where_it_was() -> None:
    controller, other = LatencyAimd(start=80), LatencyAimd(count_max=100)
    for _ in range(3):
        controller.observe(batch(0.0))
    assert LatencyAimd().restore(controller.snapshot())
    assert other.restore(controller.snapshot())
    assert (other.target().count, other.describe().samples) == (100, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"x" + data[1:],
        lambda data: data[:4] + b"\2" + data[5:],
        lambda data: data[:-8] + struct.pack("<d", math.nan),
    ],
    ids=["empty", "cut", "longer", "magic", "version", "no number"],
)
def test_aimd_refuses_a_damaged_snapshot_and_stays_as_it_was(damage: object) -> None:
    controller = LatencyAimd(start=80)
    assert callable(damage)
    assert not controller.restore(damage(LatencyAimd(start=20).snapshot()))
    assert controller.target().count == 80


def test_all_of_them_are_size_controllers() -> None:
    controllers: list[SizeController] = [FixedSize(count=1), LatencyAimd()]
    assert [controller.describe().name for controller in controllers] == ["fixed", "aimd"]
