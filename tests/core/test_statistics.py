"""What is said of batches, against a plain list of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.statistics import NS_PER_S, WINDOW_S, ShardTally, batch_stats
from walbatch.metrics import BatchStats, CutStats, Spread
from walbatch.types import CutReason

OPENED_NS = 5_000 * NS_PER_S
MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A batch that is to be counted."""

    reason: CutReason = CutReason.COUNT
    count: int = 10
    bytes: int = 100
    target_count: int = 10
    oldest_ns: int = 4 * MS
    mean_ns: int = 2 * MS
    seconds: float = 0.01
    retried: int = 0
    dead: int = 0
    failed: bool = False

    @property
    def applied(self) -> int:
        return 0 if self.failed else self.count - self.retried - self.dead


def cut(tally: ShardTally, batch: Given, now_ns: int = OPENED_NS) -> None:
    tally.cut(
        batch.reason, batch.count, batch.bytes, target_count=batch.target_count, oldest_ns=batch.oldest_ns,
        mean_ns=batch.mean_ns, now_ns=now_ns,
    )  # fmt: skip


def end(tally: ShardTally, batch: Given, now_ns: int = OPENED_NS) -> None:
    tally.done(
        batch.reason, batch.count, batch.seconds, applied=batch.applied, retried=batch.retried, dead=batch.dead,
        failed=batch.failed, result="failed" if batch.failed else "delivered", now_ns=now_ns,
    )  # fmt: skip


def tally_of(*batches: Given) -> ShardTally:
    tally = ShardTally(now_ns=OPENED_NS)
    for batch in batches:
        cut(tally, batch)
        end(tally, batch)
    return tally


def stats_of(*batches: Given) -> BatchStats:
    return tally_of(*batches).snapshot(now_ns=OPENED_NS + NS_PER_S)


@st.composite
def batches(draw: st.DrawFn) -> Given:
    count = draw(st.integers(1, 2_000))
    mean_ns = draw(st.integers(0, 10**10))
    failed = draw(st.booleans())
    retried = count if failed else draw(st.integers(0, count))
    return Given(
        reason=draw(st.sampled_from(CutReason)), count=count, bytes=draw(st.integers(0, 10**6)),
        target_count=draw(st.integers(1, 2_000)), oldest_ns=draw(st.integers(mean_ns, min(10**12, mean_ns * count))),
        mean_ns=mean_ns, seconds=draw(st.floats(0, 100)), retried=retried,
        dead=0 if failed else draw(st.integers(0, count - retried)), failed=failed,
    )  # fmt: skip


@given(st.lists(batches(), max_size=40), st.integers(1, 4))
def test_the_sums_are_those_of_the_batches(given_batches: list[Given], shards: int) -> None:
    tallies = [tally_of(*given_batches[shard::shards]) for shard in range(shards)]
    stats = batch_stats(tallies, now_ns=OPENED_NS + NS_PER_S)
    operations = sum(batch.count for batch in given_batches)
    assert stats.operations == operations == stats.batched + stats.individual
    assert stats.individual == sum(batch.count == 1 for batch in given_batches)
    assert stats.batches == len(given_batches)
    assert stats.bytes == sum(batch.bytes for batch in given_batches)
    assert stats.failed_batches == sum(batch.failed for batch in given_batches)
    assert (stats.applied, stats.retried, stats.dead) == (
        sum(batch.applied for batch in given_batches),
        sum(batch.retried for batch in given_batches),
        sum(batch.dead for batch in given_batches),
    )
    assert stats.in_flight == 0
    assert stats.seconds.count == len(given_batches)
    assert stats.queue_seconds.count == operations
    assert 0 <= stats.efficiency <= 1
    assert 0 <= stats.error_rate <= 1
    assert sum(stats.results.values()) == len(given_batches)
    if given_batches:
        assert stats.count_average == operations / len(given_batches)
        assert stats.bytes_average == stats.bytes / len(given_batches)
        total_s = math.fsum(batch.seconds for batch in given_batches)
        assert stats.seconds.average * len(given_batches) == pytest.approx(total_s, abs=1e-7)
        waited_s = sum(batch.mean_ns * batch.count for batch in given_batches) / NS_PER_S
        rounding_s = operations / NS_PER_S
        assert stats.queue_seconds.average * operations == pytest.approx(waited_s, abs=rounding_s)
        assert stats.queue_seconds.maximum == max(batch.oldest_ns for batch in given_batches) / NS_PER_S


@given(st.lists(batches(), max_size=40))
def test_every_sum_is_split_by_cut_reason(given_batches: list[Given]) -> None:
    stats = stats_of(*given_batches)
    assert set(stats.cuts) == {batch.reason.value for batch in given_batches}
    for name in ("batches", "failed_batches", "operations", "bytes", "applied", "retried", "dead"):
        assert sum(getattr(split, name) for split in stats.cuts.values()) == getattr(stats, name), name
    for reason, split in stats.cuts.items():
        mine = [batch for batch in given_batches if batch.reason.value == reason]
        assert split.count_average == split.operations / split.batches
        assert split.seconds_average == pytest.approx(sum(batch.seconds for batch in mine) / len(mine))
        waited_s = sum(batch.mean_ns * batch.count for batch in mine) / NS_PER_S
        assert split.queue_s_average == pytest.approx(waited_s / split.operations)


def test_quantiles_are_of_batches_and_of_waiting_operations() -> None:
    quick, slow = Given(seconds=0.010), Given(seconds=0.200, oldest_ns=900 * MS, mean_ns=90 * MS)
    stats = stats_of(*[quick] * 97, *[slow] * 3)
    assert (stats.seconds.p50, stats.seconds.p95) == pytest.approx((0.010, 0.010), rel=0.05)
    assert (stats.seconds.p99, stats.seconds.maximum) == pytest.approx((0.200, 0.200), rel=0.05)
    # Of 1,000 operations three waited 900 ms: the oldest of the slow batches. The other 27 did not wait at all.
    assert stats.queue_seconds.p50 == pytest.approx(16 / 9 / 1000, rel=0.05)
    assert stats.queue_seconds.p99 == pytest.approx(4 / 1000, rel=0.05)
    assert stats.queue_seconds.maximum == 0.9


def test_where_nothing_was_cut_all_is_zero() -> None:
    assert stats_of() == BatchStats() == batch_stats((), now_ns=0)
    assert BatchStats().seconds == Spread()


def test_a_batch_in_flight_is_counted_and_has_no_duration_yet() -> None:
    tally = ShardTally(now_ns=OPENED_NS)
    cut(tally, Given())
    stats = tally.snapshot(now_ns=OPENED_NS + NS_PER_S)
    assert (stats.in_flight, stats.batches, stats.operations) == (1, 1, 10)
    assert (stats.seconds, stats.error_rate) == (Spread(), 0.0)
    assert stats.cuts == {
        "count": CutStats(batches=1, operations=10, bytes=100, count_average=10, queue_s_average=0.002)
    }
    assert repr(tally) == "<ShardTally 1 batches, 1 in flight>"


def test_a_batch_cannot_end_twice() -> None:
    tally = tally_of(Given())
    with pytest.raises(AssertionError):
        end(tally, Given())


# --- rates --------------------------------------------------------------------------------------------------------


def steady(seconds: float, *, per_second: int = 10) -> tuple[ShardTally, int]:
    """A batch of ten operations every so often that takes 20 ms of them, and the time when the last has ended."""
    tally = ShardTally(now_ns=OPENED_NS)
    step_ns = NS_PER_S // per_second
    now_ns = OPENED_NS
    for _ in range(round(seconds * per_second)):
        cut(tally, Given(), now_ns)
        end(tally, Given(), now_ns + 20 * MS)
        now_ns += step_ns
    return tally, now_ns


@pytest.mark.parametrize("seconds", [0.5, 3, 9.9, 10, 11.3, 60])
def test_the_rate_is_that_of_a_steady_flow_at_any_age(seconds: float) -> None:
    tally, now_ns = steady(seconds)
    stats = tally.snapshot(now_ns=now_ns)
    assert stats.throughput == pytest.approx(100, rel=0.02)
    assert stats.throughput_overall == pytest.approx(100, rel=0.02)
    assert stats.load == pytest.approx(0.2, rel=0.02)


def test_a_flow_that_ended_leaves_the_window_and_stays_in_the_whole() -> None:
    tally, now_ns = steady(60)
    later = tally.snapshot(now_ns=now_ns + 5 * NS_PER_S)
    assert later.throughput == pytest.approx(50, rel=0.1)
    much_later = tally.snapshot(now_ns=now_ns + (WINDOW_S + 1) * NS_PER_S)
    assert (much_later.throughput, much_later.load) == (0, 0)
    assert much_later.throughput_overall == pytest.approx(100 * 60 / 71, rel=0.02)
    ages_later = tally.snapshot(now_ns=now_ns + 10**6 * NS_PER_S)
    assert (ages_later.throughput, ages_later.load) == (0, 0)


def test_a_gap_does_not_bring_back_what_was_before_it() -> None:
    tally, now_ns = steady(10)
    now_ns += 1_000 * NS_PER_S
    cut(tally, Given(), now_ns)
    end(tally, Given(), now_ns)
    assert tally.snapshot(now_ns=now_ns).throughput == pytest.approx(1, rel=0.11)


@pytest.mark.parametrize("ended", [True, False])
def test_a_long_batch_is_a_load_while_it_lasts_and_over_its_whole_time(ended: bool) -> None:
    tally = ShardTally(now_ns=OPENED_NS)
    cut(tally, Given())
    now_ns = OPENED_NS + 3_600 * NS_PER_S
    if ended:
        end(tally, Given(), now_ns)
    assert tally.snapshot(now_ns=now_ns).load == 1.0
    if ended:
        assert tally.snapshot(now_ns=now_ns + 5 * NS_PER_S).load == pytest.approx(0.5)


def test_batches_in_flight_at_once_are_a_load_once() -> None:
    tally = ShardTally(now_ns=OPENED_NS)
    for start_ms in (0, 100, 200):
        cut(tally, Given(), OPENED_NS + start_ms * MS)
    for end_ms in (300, 400, 500):
        end(tally, Given(), OPENED_NS + end_ms * MS)
    assert tally.snapshot(now_ns=OPENED_NS + NS_PER_S).load == pytest.approx(0.5)


def test_load_is_the_mean_of_the_shards_that_have_worked() -> None:
    busy, half, unused = (ShardTally(now_ns=OPENED_NS) for _ in range(3))
    for tally in (busy, half):
        cut(tally, Given())
    end(half, Given(), OPENED_NS + NS_PER_S)
    stats = batch_stats([busy, half, unused], now_ns=OPENED_NS + 2 * NS_PER_S)
    assert stats.load == pytest.approx(0.75)
    assert stats.in_flight == 1


def test_error_rate_counts_answers_and_efficiency_what_was_aimed_at() -> None:
    stats = stats_of(
        Given(count=10, target_count=40, retried=3, dead=1), Given(count=10, target_count=10), Given(count=20, target_count=10)
    )  # fmt: skip
    assert stats.error_rate == pytest.approx(4 / 40)
    assert stats.efficiency == pytest.approx(40 / (40 + 10 + 20))
    assert stats.target_count == 10


# --- estimates ----------------------------------------------------------------------------------------------------


def lasting(count: int, *, fixed_s: float, each_s: float, failed: bool = False) -> Given:
    return Given(count=count, seconds=fixed_s + each_s * count, failed=failed, retried=count if failed else 0)


@given(st.floats(0, 1), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 5_000), min_size=8, max_size=60))
def test_the_fixed_cost_of_a_call_is_found_where_sizes_differ(
    fixed_s: float, each_s: float, counts: list[int]
) -> None:
    stats = stats_of(*(lasting(count, fixed_s=fixed_s, each_s=each_s) for count in counts))
    assert stats.saved_calls == sum(counts) - len(counts)
    if max(counts) == min(counts):
        assert (stats.call_s, stats.saved_s) == (None, None)
    if max(counts) >= 2 * min(counts) and len(counts) <= 20:
        assert stats.call_s == pytest.approx(fixed_s, abs=1e-6 + each_s * 1e-3)
        assert stats.saved_s == pytest.approx(
            stats.saved_calls * fixed_s, abs=(1e-6 + each_s * 1e-3) * sum(counts)
        )


def test_failed_batches_save_nothing_and_teach_nothing() -> None:
    good = [lasting(count, fixed_s=0.01, each_s=0.001) for count in range(10, 30)]
    bad = [lasting(count, fixed_s=5.0, each_s=0.0, failed=True) for count in range(10, 30)]
    assert stats_of(*good, *bad).call_s == pytest.approx(0.01)
    assert stats_of(*good, *bad).saved_calls == stats_of(*good).saved_calls
    assert stats_of(*bad).saved_calls == 0


def test_a_cost_that_falls_with_the_size_is_no_negative_fixed_cost() -> None:
    growing = [Given(count=count, seconds=(count / 100) ** 2) for count in range(10, 100, 5)]
    assert stats_of(*growing).call_s == 0.0


def test_the_fixed_cost_follows_a_backend_that_changes() -> None:
    counts = [10, 20, 40, 80]
    before = [lasting(count, fixed_s=1.0, each_s=0.001) for _ in range(500) for count in counts]
    after = [lasting(count, fixed_s=0.1, each_s=0.001) for _ in range(1_000) for count in counts]
    assert stats_of(*before, *after).call_s == pytest.approx(0.1, rel=0.01)


def test_savings_add_up_over_shards_that_differ() -> None:
    counts = [10, 20, 40, 80, 10, 20, 40, 80]
    near = tally_of(*(lasting(count, fixed_s=0.001, each_s=0.001) for count in counts))
    far = tally_of(*(lasting(count, fixed_s=0.1, each_s=0.001) for count in counts))
    unknown = tally_of(Given(count=10))
    stats = batch_stats([near, far, unknown], now_ns=OPENED_NS + NS_PER_S)
    saved = sum(counts) - len(counts)
    assert stats.saved_calls == 2 * saved + 9
    assert stats.saved_s == pytest.approx(saved * 0.101)
    assert stats.call_s == pytest.approx(0.0505)


def test_what_one_operation_costs_does_not_pass_for_a_saving() -> None:
    """Alone or together, an operation that went alone saves no call."""
    assert stats_of(*[Given(count=1)] * 20).saved_calls == 0
