"""The table of checks: for each row facts at which it says nothing, facts at which it speaks, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core import health
from walbatch.core.health import ClockWatch, Growth, HealthFacts, LaneFacts, ShardFacts, Trend, assess
from walbatch.metrics import Health, HealthCheck, HealthReason, HealthVerdict

DEGRADED, FAILING = HealthVerdict.DEGRADED, HealthVerdict.FAILING
NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: `well` is said nothing of, `ill` is, with a text that holds `says`."""

    name: HealthCheck
    verdict: HealthVerdict
    well: HealthFacts
    ill: HealthFacts
    says: str
    value: float = 0.0
    limit: float = 0.0
    lane: str | None = None
    shard: int | None = None


def shard(
    *, in_flight_s: float = 0.0, timeout_s: float | None = None, breaker: str = "closed", breaker_open_s: float = 0.0,
    broken: str = "", nonsense: int = 0, last_error: str = "", latency_target_s: float | None = None,
    latency_s: float | None = None, target_unreachable: bool = False, clogged_bytes: int = 0, memory_bytes_max: int = 0,
    failures: int = 0,
) -> HealthFacts:  # fmt: skip
    return HealthFacts(
        shards=(
            ShardFacts(lane="put", shard=0),
            ShardFacts(
                lane="put", shard=3, in_flight_s=in_flight_s, timeout_s=timeout_s, breaker=breaker,
                breaker_open_s=breaker_open_s, broken=broken, nonsense=nonsense, last_error=last_error,
                latency_target_s=latency_target_s, latency_s=latency_s, target_unreachable=target_unreachable,
                clogged_bytes=clogged_bytes, memory_bytes_max=memory_bytes_max, failures=failures,
            ),
        )
    )  # fmt: skip


def lane(
    *, growth: int = 0, settled: int = 0, paused: bool = False, held: bool = False, retries_waiting: int = 0, waiting: int = 0
) -> HealthFacts:  # fmt: skip
    return HealthFacts(
        lanes=(
            LaneFacts(name="get"),
            LaneFacts(
                name="put", pending=7_000, growth=growth, settled=settled, trend_s=60.0, paused=paused, held=held,
                retries_waiting=retries_waiting, waiting=waiting,
            ),
        )
    )  # fmt: skip


LETTERS = HealthFacts(dead_letters_max=1_000, dead_letter_bytes_max=4_000)

TABLE = {
    "the engine has stopped": Row(
        name=HealthCheck.STOPPED, verdict=FAILING, well=HealthFacts(), ill=HealthFacts(failure="a sync failed"),
        says="stopped: a sync failed. Close it",
    ),
    "memory is short": Row(
        name=HealthCheck.MEMORY, verdict=DEGRADED, well=HealthFacts(memory_bytes=799, memory_bytes_max=1_000),
        ill=HealthFacts(memory_bytes=800, memory_bytes_max=1_000), says="80% of the memory there is (800 of 1,000 bytes)",
        value=800, limit=800,
    ),
    "memory is out": Row(
        name=HealthCheck.MEMORY, verdict=FAILING, well=HealthFacts(memory_bytes=900, memory_bytes_max=0),
        ill=HealthFacts(memory_bytes=900, memory_bytes_max=1_000), says="nothing new is taken in", value=900, limit=900,
    ),
    "the log nears its bound": Row(
        name=HealthCheck.DISK, verdict=DEGRADED, well=HealthFacts(disk_bytes=749, disk_bytes_max=1_000),
        ill=HealthFacts(disk_bytes=750, disk_bytes_max=1_000), says="75% of disk_bytes_max (750 of 1,000 bytes)",
        value=750, limit=750,
    ),
    "the log is almost full": Row(
        name=HealthCheck.DISK, verdict=FAILING, well=HealthFacts(disk_bytes=900, disk_bytes_max=0),
        ill=HealthFacts(disk_bytes=900, disk_bytes_max=1_000), says="submitting waits", value=900, limit=900,
    ),
    "there are many dead letters": Row(
        name=HealthCheck.DEAD_LETTERS, verdict=DEGRADED, well=replace(LETTERS, dead_letters=749),
        ill=replace(LETTERS, dead_letters=750), says="750 of dead_letters_max with 1,000: at the limit shards will wait",
        value=750, limit=750,
    ),
    "dead letters are at their bound": Row(
        name=HealthCheck.DEAD_LETTERS, verdict=FAILING, well=replace(LETTERS, dead_letters=1), says="shards that would",
        ill=replace(LETTERS, dead_letters=1_000), value=1_000, limit=1_000,
    ),
    "dead letters are large": Row(
        name=HealthCheck.DEAD_LETTERS, verdict=DEGRADED, well=replace(LETTERS, dead_letter_bytes=2_999),
        ill=replace(LETTERS, dead_letters=10, dead_letter_bytes=3_000), says="3,000 of dead_letter_bytes_max with 4,000",
        value=3_000, limit=3_000,
    ),
    "calls were given up": Row(
        name=HealthCheck.ABANDONED, verdict=DEGRADED, well=HealthFacts(abandoned=7, abandoned_max=16),
        ill=HealthFacts(abandoned=8, abandoned_max=16), says="8 calls of backends were given up", value=8, limit=8,
    ),
    "no more calls are given up": Row(
        name=HealthCheck.ABANDONED, verdict=FAILING, well=HealthFacts(abandoned_max=16),
        ill=HealthFacts(abandoned=16, abandoned_max=16), says="shards wait", value=16, limit=16,
    ),
    "syncs are slow": Row(
        name=HealthCheck.SYNC, verdict=DEGRADED, well=HealthFacts(syncs=100, sync_s_p99=0.25),
        ill=HealthFacts(syncs=20, sync_s_p99=0.3), says="takes 0.3 s or more", value=0.3, limit=0.25,
    ),
    "too few syncs to judge, and then enough": Row(
        name=HealthCheck.SYNC, verdict=DEGRADED, well=HealthFacts(syncs=19, sync_s_p99=9.0, sync_s_max=1.0),
        ill=HealthFacts(syncs=20, sync_s_p99=9.0, sync_s_max=1.0), says="takes 9 s or more", value=9, limit=1,
    ),
    "the clock went forward": Row(
        name=HealthCheck.CLOCK, verdict=DEGRADED, well=HealthFacts(clock_jump_s=5), ill=HealthFacts(clock_jump_s=3_600),
        says="jumped 3.6e+03 s forward", value=3_600, limit=5,
    ),
    "the clock went back": Row(
        name=HealthCheck.CLOCK, verdict=DEGRADED, well=HealthFacts(clock_jump_s=-5), ill=HealthFacts(clock_jump_s=-5.5),
        says="jumped 5.5 s back", value=-5.5, limit=5,
    ),
    "a backend wants repair": Row(
        name=HealthCheck.BACKEND_BROKEN, verdict=FAILING, well=shard(), ill=shard(broken="wrong password"), lane="put", shard=3,
        says="shard 3 of lane put stands still, its work kept: the backend says 'wrong password'",
    ),
    "a backend gave no answer": Row(
        name=HealthCheck.NONSENSE, verdict=FAILING, well=shard(last_error="3 outcomes for 2 operations"),
        ill=shard(nonsense=1, last_error="3 outcomes for 2 operations"), says="last answer was no answer (3 outcomes",
        value=1, limit=1, lane="put", shard=3,
    ),
    "a backend gives no answers": Row(
        name=HealthCheck.NONSENSE, verdict=FAILING, well=shard(), ill=shard(nonsense=4), says="last 4 answers were no answer",
        value=4, limit=1, lane="put", shard=3,
    ),
    "a batch is stuck": Row(
        name=HealthCheck.STUCK, verdict=FAILING, well=shard(in_flight_s=30, timeout_s=30),
        ill=shard(in_flight_s=31, timeout_s=30), says="in flight for 31 s, its limit is 30 s", value=31, limit=30, lane="put",
        shard=3,
    ),
    "a batch without a limit is never stuck": Row(
        name=HealthCheck.STUCK, verdict=FAILING, well=shard(in_flight_s=1e6), ill=shard(in_flight_s=1e6, timeout_s=1),
        says="nothing may overtake it", value=1e6, limit=1, lane="put", shard=3,
    ),
    "a breaker is open": Row(
        name=HealthCheck.BREAKER, verdict=DEGRADED, well=shard(last_error="refused"),
        ill=shard(breaker="open", breaker_open_s=2.5, last_error="refused"),
        says="the breaker opened 2.5 s ago and is open, because the backend fails (refused)", value=2.5, lane="put", shard=3,
    ),
    "a breaker is half open": Row(
        name=HealthCheck.BREAKER, verdict=DEGRADED, well=shard(), ill=shard(breaker="half open"),
        says="opened 0 s ago and is half open, because the backend fails. Work", lane="put", shard=3,
    ),
    "all batches fail": Row(
        name=HealthCheck.FAILURES, verdict=DEGRADED, well=shard(failures=4, last_error="TypeError: x"),
        ill=shard(failures=5, last_error="TypeError: x"), says="the last 5 batches all failed (TypeError: x)", value=5, limit=5,
        lane="put", shard=3,
    ),
    "all batches fail, and nobody said how": Row(
        name=HealthCheck.FAILURES, verdict=DEGRADED, well=shard(), ill=shard(failures=1_000),
        says="the last 1,000 batches all failed. If", value=1_000, limit=5, lane="put", shard=3,
    ),
    "an open breaker says why all batches fail": Row(
        name=HealthCheck.FAILURES, verdict=DEGRADED, well=shard(failures=9, breaker="open"), ill=shard(failures=9),
        says="all failed", value=9, limit=5, lane="put", shard=3,
    ),
    "a broken backend says why all batches fail": Row(
        name=HealthCheck.FAILURES, verdict=DEGRADED, well=shard(failures=9, broken="no"), ill=shard(failures=9),
        says="all failed", value=9, limit=5, lane="put", shard=3,
    ),
    "nonsense says why all batches fail": Row(
        name=HealthCheck.FAILURES, verdict=DEGRADED, well=shard(failures=9, nonsense=9), ill=shard(failures=9),
        says="all failed", value=9, limit=5, lane="put", shard=3,
    ),
    "a lane is paused": Row(
        name=HealthCheck.PAUSED, verdict=DEGRADED, well=lane(paused=True), ill=lane(paused=True, waiting=1),
        says="lane put: it is paused, and at least 1 operation waits. Resume it with engine.resume('put')", value=1, lane="put",
    ),
    "a lane that is not paused works": Row(
        name=HealthCheck.PAUSED, verdict=DEGRADED, well=lane(waiting=3), ill=lane(paused=True, waiting=3),
        says="at least 3 operations wait.", value=3, lane="put",
    ),
    "a lane has no backend": Row(
        name=HealthCheck.HELD, verdict=DEGRADED, well=lane(held=True), ill=lane(held=True, waiting=2_000),
        says="lane put: it has no backend here, and at least 2,000 operations wait in the log", value=2_000, lane="put",
    ),
    "a lane without a backend may be paused": Row(
        name=HealthCheck.HELD, verdict=DEGRADED, well=lane(paused=True, waiting=1), ill=lane(paused=True, held=True, waiting=1),
        says="no backend here", value=1, lane="put",
    ),
    "the engine was closed": Row(
        name=HealthCheck.CLOSED, verdict=FAILING, well=HealthFacts(closed=True, failure="a sync failed"),
        ill=HealthFacts(closed=True), says="the engine is closed: it accepts and delivers nothing more",
    ),
    "no size keeps the latency target": Row(
        name=HealthCheck.LATENCY_TARGET, verdict=DEGRADED, well=shard(latency_target_s=0.1, latency_s=0.3),
        ill=shard(latency_target_s=0.1, latency_s=0.3, target_unreachable=True),
        says="keeps the latency target of 0.1 s; a batch takes 0.3 s", value=0.3, limit=0.1, lane="put", shard=3,
    ),
    "no size keeps an unknown latency target": Row(
        name=HealthCheck.LATENCY_TARGET, verdict=DEGRADED, well=shard(), ill=shard(target_unreachable=True),
        says="no size of batch keeps the latency target. Raise", lane="put", shard=3,
    ),
    "delayed operations fill the memory": Row(
        name=HealthCheck.DELAYED, verdict=DEGRADED, well=shard(memory_bytes_max=1_024),
        ill=shard(clogged_bytes=1_000, memory_bytes_max=1_024),
        says="shard 3 of lane put: delayed operations fill its memory (1,000 bytes; half of 1,024", value=1_000, limit=1_024,
        lane="put", shard=3,
    ),
    "a queue grows": Row(
        name=HealthCheck.GROWING, verdict=DEGRADED, well=lane(growth=999, settled=10), ill=lane(growth=1_000, settled=10),
        says="in 60 s 1,000 operations more came in than the 10 that were settled; 7,000 are pending", value=1_000, limit=1_000,
        lane="put",
    ),
    "a busy queue grows by more than a ripple": Row(
        name=HealthCheck.GROWING, verdict=DEGRADED, well=lane(growth=4_999, settled=50_000),
        ill=lane(growth=5_000, settled=50_000), says="5,000 operations more", value=5_000, limit=5_000, lane="put",
    ),
    "a queue that is paused may grow": Row(
        name=HealthCheck.GROWING, verdict=DEGRADED, well=lane(growth=9_000, settled=10, paused=True),
        ill=lane(growth=9_000, settled=10), says="9,000", value=9_000, limit=1_000, lane="put",
    ),
    "a queue without a backend may grow": Row(
        name=HealthCheck.GROWING, verdict=DEGRADED, well=lane(growth=9_000, settled=10, held=True),
        ill=lane(growth=9_000, settled=10), says="9,000", value=9_000, limit=1_000, lane="put",
    ),
    "a queue whose backend does not work is not this row's": Row(
        name=HealthCheck.GROWING, verdict=DEGRADED, well=lane(growth=9_000, settled=0),
        ill=lane(growth=9_000, settled=1), says="9,000", value=9_000, limit=1_000, lane="put",
    ),
    "the retry budget is empty": Row(
        name=HealthCheck.RETRY_BUDGET, verdict=DEGRADED, well=lane(), ill=lane(retries_waiting=1),
        says="1 retry waits for the longest delay", value=1, lane="put",
    ),
    "the retry budget is empty and many wait": Row(
        name=HealthCheck.RETRY_BUDGET, verdict=DEGRADED, well=lane(), ill=lane(retries_waiting=1_200),
        says="1,200 retries wait for", value=1_200, lane="put",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_each_row_speaks_from_its_limit_on(row: Row) -> None:
    assert row.name not in {reason.name for reason in assess(row.well).reasons}
    found = assess(row.ill)
    assert found.verdict is row.verdict
    (reason,) = found.reasons
    assert row.says in reason.text
    assert reason == HealthReason(
        name=row.name, verdict=row.verdict, text=reason.text, lane=row.lane, shard=row.shard, value=row.value,
        limit=row.limit,
    )  # fmt: skip


def test_every_check_has_a_row() -> None:
    assert {row.name for row in TABLE.values()} == set(HealthCheck)


def test_every_text_says_what_to_do_next() -> None:
    """Two sentences, or what happens by itself."""
    for row in TABLE.values():
        (reason,) = assess(row.ill).reasons
        assert any(
            sign in reason.text for sign in (". ", ", and make ", ": measure ", "goes on by itself")
        ), row


def test_an_engine_of_which_nothing_is_known_is_well() -> None:
    assert assess(HealthFacts()) == Health(verdict=HealthVerdict.OK, reasons=())


@given(
    st.lists(st.sampled_from(sorted(TABLE)), min_size=1, max_size=6, unique_by=lambda name: TABLE[name].name)
)
def test_the_verdict_is_the_worst_reason_which_stands_first(names: list[str]) -> None:
    facts = HealthFacts()
    for name in names:
        ill = TABLE[name].ill
        changed = {
            field: value
            for field in HealthFacts.__dataclass_fields__
            if field not in {"lanes", "shards"}
            and (value := getattr(ill, field)) != getattr(HealthFacts(), field)
        }
        facts = replace(facts, **changed, lanes=facts.lanes + ill.lanes, shards=facts.shards + ill.shards)
    found = assess(facts)
    verdicts = [reason.verdict for reason in found.reasons]
    assert found.verdict is verdicts[0]
    assert verdicts == sorted(verdicts, key=lambda verdict: verdict is not FAILING)
    assert {TABLE[name].name for name in names} >= {reason.name for reason in found.reasons}


# --- facts over time ----------------------------------------------------------------------------------------------


def test_a_trend_says_nothing_before_a_whole_window() -> None:
    trend = Trend()
    assert trend.growth() == Growth()
    for second in range(54):
        trend.observe(second * NS_PER_S, pending=second * 100, settled=second * 10)
        assert trend.growth() == Growth()
    for second in range(54, 56):
        trend.observe(second * NS_PER_S, pending=second * 100, settled=second * 10)
    assert trend.growth() == Growth(pending=5_500, settled=550, seconds=55)


def test_a_trend_that_is_told_every_second_is_there_from_then_on() -> None:
    trend = Trend()
    for second in range(300):
        trend.observe(second * NS_PER_S, pending=second, settled=0)
        assert (55 <= trend.growth().seconds <= 60) == (second >= 55)


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=200))
def test_a_trend_is_the_change_over_about_a_minute(steps_ms: list[int]) -> None:
    trend, now_ms = Trend(), 0
    for step in steps_ms:
        now_ms += step
        trend.observe(now_ms * 1_000_000, pending=now_ms * 3, settled=now_ms * 7)
        found = trend.growth()
        assert len(trend._points) <= health.TREND_POINTS + 1
        assert found.pending == pytest.approx(found.seconds * 3_000)
        assert found.settled == pytest.approx(found.seconds * 7_000)
        assert found == Growth() or 55 <= found.seconds <= 60


def test_a_trend_after_a_long_silence_starts_again() -> None:
    trend = Trend()
    for second in range(0, 61, 5):
        trend.observe(second * NS_PER_S, pending=0, settled=second)
    assert trend.growth().seconds == 60
    trend.observe(10**6 * NS_PER_S, pending=10**6, settled=60)
    assert trend.growth() == Growth()


def test_a_clock_that_drifts_did_not_jump_and_one_that_was_set_did() -> None:
    hour = 3_600 * NS_PER_S
    watch = ClockWatch(monotonic_ns=0, wall_ns=hour)
    for step in range(1, 100):
        watch.observe(monotonic_ns=step * NS_PER_S, wall_ns=hour + step * (NS_PER_S + NS_PER_S // 2))
    assert watch.jump_s(monotonic_ns=99 * NS_PER_S) == 0.0
    drifted = 99 * NS_PER_S // 2
    watch.observe(monotonic_ns=100 * NS_PER_S, wall_ns=100 * NS_PER_S + drifted)
    assert watch.jump_s(monotonic_ns=100 * NS_PER_S) == -3_600
    watch.observe(monotonic_ns=101 * NS_PER_S, wall_ns=101 * NS_PER_S + drifted)
    assert watch.jump_s(monotonic_ns=700 * NS_PER_S) == -3_600
    assert watch.jump_s(monotonic_ns=701 * NS_PER_S) == 0.0
