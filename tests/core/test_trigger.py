"""When a batch is cut, and why: every mode, every other reason, and the linger that adapts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch import limits
from walbatch.core.trigger import (
    COMPANY_NS,
    LINGER_NS_MAX,
    LINGER_NS_MIN,
    CutPolicy,
    Cutter,
    Linger,
    Situation,
)
from walbatch.types import CutReason, TriggerMode

LINGER_NS = 100
OLDEST_NS = 1_000


@dataclass
class Ready:
    """What is ready: so many operations of a byte each, the first of which arrived at OLDEST_NS."""

    count: int = 1
    bytes: int = 1
    urgent: int = 0

    def __len__(self) -> int:
        return self.count

    def oldest_ns(self) -> int:
        return OLDEST_NS

    def lowest_lsn(self) -> int:
        return 7


POLICY = CutPolicy(count=4, bytes=10, linger_ns=LINGER_NS)


def reason(
    mode: TriggerMode, ready: Ready, waited_ns: int, *, policy: CutPolicy = POLICY, eager: bool = False,
    in_flight: bool = False, **facts: object,
) -> CutReason | None:  # fmt: skip
    situation = Situation(now_ns=OLDEST_NS + waited_ns, target=10_000)
    return Cutter(replace(policy, mode=mode)).reason(
        situation._replace(**facts),  # type: ignore[arg-type]  # as the test says
        ready, eager=eager, in_flight=in_flight,
    )  # fmt: skip


FEW, MANY, LARGE = Ready(count=3), Ready(count=4), Ready(bytes=10)
MODES = {
    # mode: (few operations before and after their linger, at their age bound; many; large; and both after their linger)
    TriggerMode.ANY: (None, "linger", "linger", "count", "bytes", "count", "bytes"),
    TriggerMode.SIZE: (None, None, "age", "count", "bytes", "count", "bytes"),
    TriggerMode.TIMEOUT: (None, "linger", "linger", None, None, "linger", "linger"),
    TriggerMode.ALL: (None, None, "age", None, None, "count", "bytes"),
}


@pytest.mark.parametrize("mode", TriggerMode, ids=lambda mode: mode.value)
def test_a_mode_says_which_of_size_and_time_cuts(mode: TriggerMode) -> None:
    before, after, aged = LINGER_NS - 1, LINGER_NS, 2 * LINGER_NS
    found = (
        reason(mode, FEW, before), reason(mode, FEW, after), reason(mode, FEW, aged), reason(mode, MANY, before),
        reason(mode, LARGE, before), reason(mode, MANY, after), reason(mode, LARGE, after),
    )  # fmt: skip
    assert found == MODES[mode]


@pytest.mark.parametrize("mode", TriggerMode, ids=lambda mode: mode.value)
def test_nothing_waits_longer_than_twice_its_linger(mode: TriggerMode) -> None:
    assert reason(mode, Ready(), 2 * LINGER_NS) is not None
    adaptive = replace(POLICY, linger_ns=None)
    assert reason(mode, Ready(), 2 * LINGER_NS_MIN, policy=adaptive, in_flight=True) is not None


AT_ONCE = {
    "urgent": (Ready(urgent=1), {}, CutReason.URGENT),
    "cut before": (Ready(), {"eager": True}, CutReason.RETRY),
    "memory": (Ready(), {"memory_pressed": True}, CutReason.MEMORY),
    "drain": (Ready(), {"draining": True}, CutReason.DRAIN),
    "flush": (Ready(), {"flush_lsn": 7}, CutReason.FLUSH),
    "window": (Ready(), {"window_full": True}, CutReason.BACKLOG),
    "probe": (Ready(), {"probing": True}, CutReason.PROBE),
}


@pytest.mark.parametrize("mode", TriggerMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("ready", "facts", "expected"), AT_ONCE.values(), ids=AT_ONCE.keys())
def test_what_cuts_at_once_in_every_mode(
    mode: TriggerMode, ready: Ready, facts: dict[str, bool], expected: CutReason
) -> None:
    assert reason(mode, ready, 0, **facts) is expected  # type: ignore[arg-type]  # eager, or of the situation


def test_a_flush_cuts_nothing_that_came_after_it() -> None:
    assert reason(TriggerMode.ANY, Ready(), 0, flush_lsn=6) is None


def test_a_full_batch_says_so_whatever_else_would_have_cut_it() -> None:
    """The controller learns from those that were full."""
    assert reason(TriggerMode.ANY, Ready(count=4, urgent=1), 0, draining=True, flush_lsn=9) is CutReason.COUNT


def test_the_target_of_the_controller_cuts_where_it_is_smaller() -> None:
    assert reason(TriggerMode.ANY, Ready(count=3), 0, target=3) is CutReason.COUNT
    assert reason(TriggerMode.ANY, Ready(count=1), 0, target=0) is CutReason.COUNT


def test_without_a_count_the_target_alone_cuts() -> None:
    policy = replace(POLICY, count=None, bytes=10**9)
    assert reason(TriggerMode.ANY, Ready(count=9_999), 0, policy=policy) is None
    assert reason(TriggerMode.ANY, Ready(count=10_000), 0, policy=policy) is CutReason.COUNT


def test_an_idle_backend_is_not_kept_waiting_where_the_linger_adapts() -> None:
    adaptive = replace(POLICY, linger_ns=None)
    assert reason(TriggerMode.ANY, Ready(), COMPANY_NS - 1, policy=adaptive) is None
    assert reason(TriggerMode.ANY, Ready(), COMPANY_NS, policy=adaptive) is CutReason.IDLE
    assert reason(TriggerMode.ANY, Ready(), COMPANY_NS, policy=adaptive, in_flight=True) is None
    assert (
        reason(TriggerMode.ANY, Ready(), LINGER_NS_MIN, policy=adaptive, in_flight=True) is CutReason.LINGER
    )


@pytest.mark.parametrize(("count", "count_max", "target", "limit"), [
    (None, 100, 50, 50), (None, 100, 500, 100), (10, 100, 50, 10), (10, 5, 50, 5), (10, 100, 3, 3), (10, 100, 0, 1),
])  # fmt: skip
def test_every_bound_of_the_count_holds(count: int | None, count_max: int, target: int, limit: int) -> None:
    policy = CutPolicy(count=count, bytes=1, linger_ns=0, count_max=count_max)
    assert policy.limit(target) == limit
    assert CutPolicy(count=None, bytes=1, linger_ns=0).limit(10**9) == limits.BATCH_COUNT_MAX


@given(
    mode=st.sampled_from(TriggerMode),
    linger_ns=st.sampled_from([None, 0, LINGER_NS]),
    count=st.integers(1, 6),
    size=st.integers(1, 12),
    urgent=st.integers(0, 1),
    eager=st.booleans(),
    in_flight=st.booleans(),
)
def test_what_time_alone_makes_due_is_due_then_and_not_before(
    mode: TriggerMode,
    linger_ns: int | None,
    count: int,
    size: int,
    urgent: int,
    *,
    eager: bool,
    in_flight: bool,
) -> None:
    cutter = Cutter(CutPolicy(mode=mode, count=4, bytes=10, linger_ns=linger_ns))
    ready = Ready(count=count, bytes=size, urgent=urgent)
    at_ns = cutter.due_at_ns(10_000, ready, eager=eager, in_flight=in_flight)

    def due(now_ns: int) -> bool:
        situation = Situation(now_ns=now_ns, target=10_000)
        return cutter.reason(situation, ready, eager=eager, in_flight=in_flight) is not None

    assert due(at_ns) or at_ns == 0
    assert due(max(at_ns, OLDEST_NS))
    assert at_ns <= OLDEST_NS or not due(at_ns - 1)


@pytest.mark.parametrize(("mode", "lingers"), [
    (TriggerMode.ANY, 1), (TriggerMode.TIMEOUT, 1), (TriggerMode.SIZE, 2), (TriggerMode.ALL, 2),
], ids=str)  # fmt: skip
def test_where_time_alone_does_not_cut_the_age_bound_does(mode: TriggerMode, lingers: int) -> None:
    cutter = Cutter(replace(POLICY, mode=mode))
    assert cutter.due_at_ns(10_000, Ready(), eager=False, in_flight=False) == OLDEST_NS + lingers * LINGER_NS


def test_the_linger_is_a_tenth_of_what_batches_take() -> None:
    linger = Linger()
    assert linger.ns == LINGER_NS_MIN
    for _ in range(200):
        linger.observe(0.05)
    assert abs(linger.ns - 5_000_000) < 10_000
    assert repr(linger) == f"<Linger {linger.ns:,} ns>"
    assert repr(Cutter(POLICY)) == "<Cutter any <Linger 1,000,000 ns>>"


@given(st.lists(st.floats(0, 10_000), max_size=50))
def test_the_linger_stays_within_its_bounds(durations: list[float]) -> None:
    linger = Linger()
    for seconds in durations:
        linger.observe(seconds)
        assert LINGER_NS_MIN <= linger.ns <= LINGER_NS_MAX
