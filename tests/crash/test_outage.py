"""A backend that is away for a whole day of virtual time, while operations keep coming in; then it is back.

The idea needed to read it: a day passes in seconds, since time jumps to the next deadline. So whoever wakes too often during an
outage shows here: by the calls that the backend counts, and by the time that the test takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from walbatch.config import RetryPolicy, Settings, Trigger
from walbatch.limits import MIB
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import LanePlan, Machine, Manner, Process, Session, Workload
from walbatch.testing.simulation.backend import Reaction
from walbatch.testing.simulation.clock import START_NS
from walbatch.testing.simulation.explore import quiet
from walbatch.testing.simulation.history import Blamed, Buried, Drained, Event, Given
from walbatch.types import Batch

DAY_S: Final = 24 * 3_600
STEP_S: Final = 60.0
"""Virtual time between two groups of submissions."""
LAST_S: Final = 300.0
"""Virtual time after the outage within which everything must be applied."""
PATIENT: Final = RetryPolicy(attempts=1)
"""The first failure that is an operation's own kills it."""
ADAPTIVE: Final = Trigger(linger_ms=None)
LANES: Final = {
    "put": LanePlan(shards=2, retry=PATIENT, trigger=ADAPTIVE),
    "log": LanePlan(order="shard", retry=PATIENT, trigger=ADAPTIVE),
    "web": LanePlan(order="none", retry=PATIENT, trigger=ADAPTIVE),
    "exact": LanePlan(transactional=True, retry=PATIENT, trigger=ADAPTIVE),
}
SHARDS: Final = sum(lane.shards for lane in LANES.values())
SETTINGS: Final = Settings(
    segment_bytes=MIB, memory_bytes_max=MIB, disk_bytes_max=64 * MIB, timer_ms=60_000, checkpoint_ms=600_000,
    compress_bytes_min=None,
)  # fmt: skip


@dataclass
class Day:
    """What became of it."""

    history: list[Event] = field(default_factory=list)
    calls: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Calls of the backend during the outage, by shard."""
    submitted: int = 0
    recovered_s: float = 0.0
    breakers: set[str] = field(default_factory=set)
    """During the outage."""
    stats: Any = None
    letters: int = 0
    steps: int = 0
    slowest_submit_s: float = 0.0


def lived() -> Day:
    """A day without the backend, and what follows."""
    day = Day()
    process: Process

    def away(batch: Batch, _call: int) -> Reaction:
        if process.clock.now_ns >= START_NS + DAY_S * 10**9:
            return Manner.APPLY
        day.calls[batch.lane, batch.shard] += 1
        return ConnectionRefusedError("nobody listens")

    def use(session: Session) -> None:
        session.open()
        engine, clock = session.engine, process.clock
        while clock.now_ns < START_NS + DAY_S * 10**9:
            for name in LANES:
                keys = [b"k%d" % ((day.submitted + count) % 7) for count in range(2)]
                before = clock.now_ns
                session.submit_many(keys, name, size=400)
                day.slowest_submit_s = max(day.slowest_submit_s, (clock.now_ns - before) / 1e9)
                day.submitted += len(keys)
            session.pause(STEP_S)
        day.breakers = {lane.breaker for lane in engine.stats().lanes.values()}
        ended = clock.now_ns
        engine.flush(timeout=LAST_S)
        day.recovered_s = (clock.now_ns - ended) / 1e9
        for name in LANES:
            session.submit(b"after", name)
            engine.flush(name, timeout=LAST_S)
        day.stats, day.letters = engine.stats(), len(session.look_at_letters())
        session.close()

    workload = Workload(name="outage", run=use, lanes=LANES, settings=SETTINGS, manners=away)
    process = Process(Machine(), day.history, seed=1, manners=away)
    with quiet():
        process.run(lambda: Session(process, open_engine, workload, "0").run(use))
    day.steps = process.threads.steps
    assert workload.oracle().judge(day.history) == []
    return day


@pytest.fixture(scope="module")
def day() -> Day:
    return lived()


def test_after_an_outage_of_a_day_everything_is_applied_in_order(day: Day) -> None:
    """The oracle has judged the order, and that nothing is lost."""
    assert day.submitted > 10_000
    assert isinstance(day.history[-1], Drained)
    assert day.stats.applied == day.submitted + len(LANES)
    assert day.stats.unaccounted == 0
    assert day.recovered_s < LAST_S


def test_an_outage_of_a_day_costs_no_attempt_and_no_operation(day: Day) -> None:
    assert day.stats.dead == day.letters == 0
    assert not any(isinstance(event, (Buried, Blamed)) for event in day.history)


def test_during_an_outage_the_backend_is_asked_about_once_a_minute(day: Day) -> None:
    """The breaker opens for 60 seconds, less up to half as jitter."""
    assert len(day.calls) == SHARDS
    for shard, calls in day.calls.items():
        assert DAY_S / 60 <= calls <= DAY_S / 30 + 20, shard


def test_during_an_outage_breakers_are_open_and_after_it_they_close(day: Day) -> None:
    assert "closed" not in day.breakers
    assert {lane.breaker for lane in day.stats.lanes.values()} == {"closed"}


def test_during_an_outage_submitting_goes_on_in_bounded_memory(day: Day) -> None:
    """The backlog is several times what memory may hold, and nobody waits for the backend."""
    assert day.submitted * 400 > 4 * SETTINGS.memory_bytes_max
    assert day.stats.peak_memory_bytes <= SETTINGS.memory_bytes_max + 64 * 1024
    assert day.slowest_submit_s < 1.0


def test_nobody_wakes_without_a_reason(day: Day) -> None:
    """Each submission and each call of the backend takes some steps of the simulation, and idle time none."""
    given = sum(isinstance(event, Given) for event in day.history)
    assert day.steps < 30 * (day.submitted + given)
