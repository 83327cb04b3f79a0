"""The controller that learns: it finds the best size, keeps its ceilings, and survives whatever it is told or given."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.ceiling import FailureCeiling
from walbatch.core.controller import SNAPSHOT_BYTES_MAX, BatchResult, Observation, SizeController
from walbatch.core.learnt import encoded_bytes
from walbatch.core.surface import COLLAPSE_BATCHES, ResponseSurface
from walbatch.limits import BATCH_COUNT_MAX

Duration = Callable[[int], float]

FAILURE_AT = encoded_bytes(0) - FailureCeiling.STATE.size


def batch(
    seconds: float,
    count: int,
    *,
    result: BatchResult = BatchResult.DELIVERED,
    learnable: bool = True,
) -> Observation:
    return Observation(count=count, bytes=count, seconds=seconds, result=result, learnable=learnable)


def knee(
    count: float, *, fixed: float = 0.01, each: float = 1e-5, at: float = 1000, bend: float = 4
) -> float:
    """The best size is a little above 1,000."""
    return fixed + each * count + (each * bend * at * (count / at - 1) ** 2 if count > at else 0.0)


def best_of(duration: Duration) -> int:
    return min(range(1, 20_000), key=lambda count: duration(count) / count)


def run(
    controller: SizeController,
    duration: Duration,
    batches: int,
    *,
    noise: float = 0.1,
    seed: int = 1,
    fails: Callable[[int], BatchResult | None] = lambda _: None,
) -> list[int]:
    random, counts = Random(seed), []
    for _ in range(batches):
        count = controller.target().count
        counts.append(count)
        seconds = duration(count) * math.exp(random.gauss(0, noise) - noise**2 / 2)
        controller.observe(batch(seconds, count, result=fails(count) or BatchResult.DELIVERED))
    return counts


def middle(counts: list[int]) -> int:
    return sorted(counts)[len(counts) // 2]


# --- finding the best size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 64, 8000])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_it_finds_the_knee_from_either_side(start: int, noise: float) -> None:
    controller = ResponseSurface(start=start)
    lead = middle(run(controller, knee, 2000, noise=noise)[1000:])
    best = best_of(knee)
    assert knee(lead) / lead <= 1.03 * knee(best) / best
    state = controller.describe()
    assert state.cost_s == pytest.approx(knee(best) / best, rel=0.15)
    assert (state.name, state.samples, state.latency_s) == ("surface", 2000, None)
    assert repr(controller).startswith("<ResponseSurface lead ")


def test_every_batch_has_a_reason_and_most_are_at_the_lead() -> None:
    controller = ResponseSurface()
    reasons = []
    for _ in range(3000):
        target = controller.target()
        reasons.append(target.reason)
        controller.observe(batch(knee(target.count) * (1 + len(reasons) % 3 / 10), target.count))
    assert set(reasons) == {"slow start", "lead", "explore", "scout"}
    assert reasons.count("lead") > 2000


def test_the_same_seed_and_the_same_batches_give_the_same_sizes() -> None:
    first, second, other = (run(ResponseSurface(seed=seed), knee, 500) for seed in (7, 7, 8))
    assert first == second
    assert first != other


def test_growing_for_nothing_is_not_worth_it() -> None:
    controller = ResponseSurface()
    lead = middle(run(controller, lambda count: 1e-3 + 1e-3 * count, 2000)[1000:])
    assert lead < 2000


def test_a_collapse_is_answered_from_well_below() -> None:
    controller = ResponseSurface()
    run(controller, knee, 1000)
    slower: Duration = lambda count: knee(count, at=50)  # noqa: E731
    counts = run(controller, slower, 40)
    assert min(counts[: COLLAPSE_BATCHES + 2]) < 100
    assert controller.describe().drifts >= 1
    best = best_of(slower)
    lead = middle(run(controller, slower, 1500)[500:])
    assert slower(lead) / lead <= 1.05 * slower(best) / best


@pytest.mark.parametrize("at", [300, 4000])
def test_a_drift_is_followed(at: int) -> None:
    controller = ResponseSurface()
    run(controller, knee, 1000)
    moved: Duration = lambda count: knee(count, at=at, fixed=0.02)  # noqa: E731
    lead = middle(run(controller, moved, 2500)[2000:])
    best = best_of(moved)
    assert moved(lead) / lead <= 1.05 * moved(best) / best


def test_a_cost_that_changes_at_all_sizes_alike_is_a_drift_too() -> None:
    controller = ResponseSurface()
    run(controller, knee, 1000)
    run(controller, lambda count: knee(count) / 2.5, 300)
    assert controller.describe().drifts == 1


def test_a_slope_that_turned_is_noticed_beside_the_lead() -> None:
    controller = ResponseSurface(seed=3)
    run(controller, knee, 1500)
    lead = controller.describe().lead_count
    scale = knee(lead) / lead
    # The same cost at the lead, and growing pays from now on.
    run(controller, lambda count: scale * count * (lead / count) ** 0.8, 600)
    assert controller.describe().lead_count > 2 * lead


def test_a_better_valley_far_away_is_found_by_a_scout() -> None:
    def valleys(count: float) -> float:
        near = 0.5 * math.log(count / 64) ** 2
        far = math.log(count / 512) ** 2 - 0.7
        return count * 1e-4 * math.exp(min(near, far))

    controller = ResponseSurface(start=64, seed=2)
    reasons: list[str] = []
    for _ in range(6000):
        target = controller.target()
        reasons.append(target.reason)
        controller.observe(batch(valleys(target.count), target.count))
    assert 350 < controller.describe().lead_count < 700
    assert "scout" in reasons


@pytest.mark.parametrize("octaves", [1, 3, 6])
def test_a_batch_far_from_the_lead_is_no_sign_that_the_cost_has_changed(octaves: int) -> None:
    controller, random = ResponseSurface(), Random(1)
    lead = middle(run(controller, knee, 300))
    for _ in range(2000):
        count = int(lead * 2 ** random.uniform(-octaves, octaves))
        controller.observe(batch(knee(count), count))
    state, best = controller.describe(), best_of(knee)
    assert state.drifts <= 4
    assert state.cost_s == pytest.approx(knee(best) / best, rel=0.05)
    assert knee(state.lead_count) / state.lead_count <= 1.02 * knee(best) / best


def test_batches_that_bytes_cut_far_below_the_lead_teach_what_they_can() -> None:
    controller = ResponseSurface(start=2000)
    run(controller, knee, 300)
    slower = 4.0
    for _ in range(100):
        controller.observe(batch(slower * knee(20), 20))
    assert controller.predict_s(20) == pytest.approx(slower * knee(20), rel=0.15)
    assert controller.describe().drifts <= 2


# --- what says nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ignored",
    [
        batch(9.0, 64, learnable=False),
        batch(9.0, 64, result=BatchResult.THROTTLED),
        batch(9.0, 64, result=BatchResult.UNAVAILABLE),
        batch(9.0, 0),
        batch(-1.0, 64),
        batch(math.nan, 64),
    ],
    ids=repr,
)
def test_what_says_nothing_about_the_size_changes_nothing(ignored: Observation) -> None:
    controller = ResponseSurface()
    run(controller, knee, 100)
    before = controller.snapshot()
    controller.observe(ignored)
    assert controller.snapshot() == before


def test_nothing_is_predicted_before_anything_is_known() -> None:
    controller = ResponseSurface()
    assert controller.predict_s(10) is None
    assert (controller.describe().cost_s, controller.describe().latency_s) == (None, None)
    run(controller, knee, 500)
    assert controller.predict_s(0) is None
    assert controller.predict_s(1000) == pytest.approx(knee(1000), rel=0.15)


# --- ceilings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cliff", [700, 100, 3])
def test_a_size_that_is_too_large_is_hardly_ever_tried(cliff: int) -> None:
    controller = ResponseSurface()
    counts = run(controller, knee, 3000, fails=lambda count: BatchResult.TOO_LARGE if count > cliff else None)
    assert sum(count > cliff for count in counts[1000:]) <= 4
    assert middle(counts[1000:]) >= 0.95 * cliff - 1
    assert controller.describe().cap_count >= 0.95 * cliff - 1


def test_a_timeout_during_the_slow_start_ends_it_below() -> None:
    controller = ResponseSurface()
    counts = run(controller, knee, 60, fails=lambda count: BatchResult.TIMED_OUT if count > 200 else None)
    assert counts.count(256) == 1
    assert max(counts[5:]) < 256


def test_a_first_batch_that_is_too_large_is_halved_until_one_is_not() -> None:
    controller = ResponseSurface(start=4096)
    counts = run(controller, knee, 8, fails=lambda count: BatchResult.TOO_LARGE if count > 300 else None)
    assert counts[:5] == [4096, 2048, 1024, 512, 256]


def test_a_failure_for_another_reason_costs_time_but_no_ceiling() -> None:
    controller = ResponseSurface()
    run(controller, knee, 500)
    cap, cost = controller.describe().cap_count, controller.describe().cost_s
    controller.observe(batch(5.0, controller.describe().lead_count, result=BatchResult.FAILED))
    assert controller.describe().cap_count == cap == BATCH_COUNT_MAX
    assert controller.describe().cost_s == cost


def test_no_target_exceeds_the_limit_or_breaks_the_multiple() -> None:
    controller = ResponseSurface(count_min=3, count_max=500, multiple_of=7, start=10_000)
    counts = run(controller, knee, 500)
    assert all(count % 7 == 0 and 7 <= count <= 497 for count in counts)
    assert middle(counts[100:]) >= 450
    controller.limit(50)
    counts = run(controller, knee, 500)
    assert all(count % 7 == 0 and 7 <= count <= 49 for count in counts)
    controller.limit(2)
    assert controller.target().count == 7
    controller.limit(5000)
    assert max(run(controller, knee, 2000)) > 600


def test_a_limit_far_below_all_that_is_known_is_learnt_from_anew() -> None:
    controller = ResponseSurface(start=4096)
    run(controller, knee, 500)
    controller.limit(10)
    assert middle(run(controller, knee, 300)) == 10
    assert controller.predict_s(10) == pytest.approx(knee(10), rel=0.1)


def test_a_latency_target_is_kept_by_the_share_of_batches_that_should() -> None:
    target_s = 0.014
    controller = ResponseSurface(latency_target_s=target_s, latency_quantile=0.9)
    random, late = Random(5), []
    for _ in range(4000):
        count = controller.target().count
        seconds = knee(count) * math.exp(random.gauss(0, 0.15))
        late.append(seconds > target_s)
        controller.observe(batch(seconds, count))
    share = sum(late[1000:]) / 3000
    assert 0.02 < share <= 0.1
    state = controller.describe()
    assert state.latency_s == pytest.approx(target_s, rel=0.2)
    assert not state.latency_unreachable


def test_a_target_that_no_size_meets_is_said_so_and_not_answered_with_batches_of_one() -> None:
    controller = ResponseSurface(latency_target_s=0.005)
    counts = run(controller, knee, 4000)
    assert controller.describe().latency_unreachable
    assert middle(counts[-1000:]) > 100


def test_one_slow_batch_at_the_start_does_not_trap_it_at_a_small_size() -> None:
    flat: Duration = lambda count: 0.084 + 2.5e-5 * count + (1e-5 * (count - 220) ** 2 if count > 220 else 0)  # noqa: E731
    controller = ResponseSurface(latency_target_s=0.15)
    controller.observe(batch(10 * flat(64), 64))
    assert middle(run(controller, flat, 600, noise=0.2)[300:]) > 100


def test_straying_from_a_few_operations_is_to_more_and_to_fewer() -> None:
    controller = ResponseSurface(count_max=64, start=3)
    counts = run(controller, lambda count: count * math.exp(abs(math.log(count / 3))), 600, noise=0.2)
    assert set(counts[100:]) >= {2, 3, 4}
    assert middle(counts[100:]) == 3


# --- the snapshot ----------------------------------------------------------------------------------------------


def trained(batches: int = 1500, **settings: float) -> ResponseSurface:
    controller = ResponseSurface(seed=4, **settings)  # type: ignore[arg-type]
    random = Random(9)
    for _ in range(batches):
        count = controller.target().count
        stalled = 30.0 if random.random() < 0.03 else 1.0
        controller.observe(batch(knee(count) * stalled * math.exp(random.gauss(0, 0.1)), count))
    return controller


def test_a_restart_does_not_start_over() -> None:
    controller, other = trained(), ResponseSurface()
    assert other.restore(controller.snapshot())
    before, after = controller.describe(), other.describe()
    assert other.target().reason != "slow start"
    assert after.lead_count == pytest.approx(before.lead_count, rel=0.1)
    assert (after.samples, after.drifts) == (before.samples, before.drifts)
    assert after.cost_s == pytest.approx(before.cost_s, rel=0.3)


def test_a_snapshot_is_small_whatever_happened() -> None:
    controller = ResponseSurface()
    random = Random(1)
    for _ in range(3000):
        count = int(math.exp(random.uniform(0, math.log(BATCH_COUNT_MAX))))
        controller.observe(batch(knee(count), count))
    assert encoded_bytes(100) < len(controller.snapshot()) <= SNAPSHOT_BYTES_MAX
    assert ResponseSurface().restore(controller.snapshot())


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_slow_start_goes_on(batches: int) -> None:
    controller, other = trained(batches), ResponseSurface(start=1)
    assert other.restore(controller.snapshot())
    assert other.target() == controller.target()
    lead = middle(run(other, knee, 1500)[1000:])
    assert 500 < lead < 2500


def test_a_snapshot_fits_into_other_bounds() -> None:
    controller = trained(latency_target_s=0.02)
    other = ResponseSurface(count_max=100, multiple_of=10, latency_target_s=0.03)
    assert other.restore(controller.snapshot())
    assert other.target().count <= 100
    run(other, knee, 100)
    assert ResponseSurface(count_min=5000).restore(controller.snapshot())


def test_a_ceiling_survives_a_restart() -> None:
    controller, other = ResponseSurface(), ResponseSurface()
    cliff: Callable[[int], BatchResult | None] = (  # noqa: E731
        lambda count: BatchResult.TOO_LARGE if count > 100 else None
    )
    run(controller, knee, 200, fails=cliff)
    assert other.restore(controller.snapshot())
    assert sum(count > 100 for count in run(other, knee, 50, fails=cliff)) <= 1


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "numbers": lambda data: data[: FAILURE_AT - 8] + struct.pack("<d", math.inf) + data[FAILURE_AT:],
    "ceiling": lambda data: data[:FAILURE_AT] + struct.pack("<d", 0.5) + data[FAILURE_AT + 8 :],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_snapshot_is_refused_and_changes_nothing(damage: Callable[[bytes], bytes]) -> None:
    controller = trained(100)
    before = controller.snapshot()
    data = trained(300).snapshot()
    assert damage(data) != data
    assert not controller.restore(damage(data))
    assert controller.snapshot() == before


@given(st.binary(max_size=300), st.integers(0, 10**6), st.integers(0, 255))
def test_hostile_bytes_never_raise(noise: bytes, place: int, byte: int) -> None:
    controller = ResponseSurface(latency_target_s=0.1)
    assert not controller.restore(noise)
    data = bytearray(trained(40).snapshot())
    data[place % len(data)] = byte
    controller.restore(bytes(data))
    controller.describe()
    run(controller, knee, 30)
    assert 1 <= controller.target().count <= BATCH_COUNT_MAX


# --- whatever happens ------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-1, 100_000)),
            st.one_of(st.floats(0, 10), st.floats(allow_nan=True, allow_infinity=True)),
            st.sampled_from([*BatchResult, *[BatchResult.DELIVERED] * 10]),
            st.booleans(),
        ),
        max_size=150,
    ),
    st.sampled_from([None, 1e-6, 0.1, 1e6]),
    st.integers(1, 200),
    st.integers(1, 64),
)
def test_whatever_happens_targets_are_allowed_and_the_state_can_be_told(
    events: list[tuple[int | None, float, BatchResult, bool]],
    latency_target_s: float | None,
    count_min: int,
    multiple_of: int,
) -> None:
    controller = ResponseSurface(
        count_min=count_min, multiple_of=multiple_of, latency_target_s=latency_target_s
    )
    for number, (count, seconds, result, learnable) in enumerate(events):
        asked = controller.target().count
        assert count_min <= asked <= BATCH_COUNT_MAX
        assert asked % multiple_of == 0
        controller.observe(
            batch(seconds, asked if count is None else count, result=result, learnable=learnable)
        )
        if number % 20 == 0:
            controller.limit(number * 50 + 1)
            assert controller.describe().cap_count >= count_min
            assert ResponseSurface(latency_target_s=0.5).restore(controller.snapshot())


def test_the_largest_snapshot_fits() -> None:
    assert encoded_bytes(len(ResponseSurface()._evidence.sizes)) <= SNAPSHOT_BYTES_MAX
