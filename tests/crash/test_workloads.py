"""The hand-written workloads: each runs clean, reaches what it is about, and survives a sample of its crashes."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from tools.modes.prediction import predict
from tools.modes.workloads import STORM, WORKLOADS
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Explorer, Machine, Plan, Process, Session, Workload
from walbatch.testing.simulation.history import AppliedTo, Checkpointed, Event, Opened, Predicted, Refused

SECONDS: Final = 20.0
CALLS_MAX: Final = 400


def lived(workload: Workload) -> tuple[list[Event], Process]:
    """The history of the workload when nothing crashes."""
    history: list[Event] = []
    machine = Machine()
    if workload.prepare is not None:
        workload.prepare(machine)
    process = Process(machine, history, seed=1, faults=None, manners=workload.manners)
    process.faults.faults = tuple(workload.faults)
    process.run(lambda: Session(process, open_engine, workload, "0").run(workload.run))
    return history, process


def test_there_are_thirty() -> None:
    assert len(WORKLOADS) >= 30
    assert all(" " not in name for name in WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_runs_clean_and_is_short(name: str) -> None:
    workload = WORKLOADS[name]
    history, process = lived(replace(workload, predict=predict))
    assert workload.oracle().judge(history) == []
    assert sum(process.faults.calls.values()) < CALLS_MAX
    assert any(isinstance(event, AppliedTo) for event in history)


@pytest.mark.parametrize("name", [*WORKLOADS, "storm"])
def test_no_crash_of_a_sample_breaks_a_guarantee_or_a_prediction(name: str) -> None:
    workload = replace(WORKLOADS.get(name, STORM), predict=predict)
    report = Explorer(open_engine, workload, Plan(bound=4, samples=1, strict=True, seconds=SECONDS)).run()
    assert not report.failures, report.failures[0]
    assert report.states > 60 or not report.complete


# --- that they reach what they are about ---


def segments_at_the_end(history: list[Event]) -> int:
    return max(event.checkpoint.segment for event in history if isinstance(event, Checkpointed))


@pytest.mark.parametrize(
    ("name", "segments"),
    [("roll", 3), ("exactly_full", 4), ("trim_many", 4), ("straggler", 4), ("largest", 2)],
)
def test_segments_roll(name: str, segments: int) -> None:
    history, _ = lived(WORKLOADS[name])
    assert segments_at_the_end(history) >= segments


def test_a_failed_sync_makes_lsns_jump() -> None:
    history, process = lived(WORKLOADS["after_failed_sync"])
    assert process.faults.hits == 2
    assert sum(isinstance(event, Opened) for event in history) == 3
    lsns = [event.lsn for event in history if isinstance(event, AppliedTo) and event.lsn is not None]
    assert max(lsns) > 2**24


def test_a_full_disk_and_a_full_roll_strike() -> None:
    history, process = lived(WORKLOADS["disk_full"])
    assert any(isinstance(event, AppliedTo) for event in history)
    assert process.machine.fs.capacity_bytes is not None
    _, process = lived(WORKLOADS["full_at_roll"])
    assert process.faults.hits == 2


def test_the_backlog_exceeds_the_memory() -> None:
    reading = []

    def run(session: Session) -> None:
        original = session._open_engine

        def opened(*arguments: object) -> object:
            engine = original(*arguments)  # type: ignore[arg-type]
            flush = engine.flush

            def watched(*, timeout: float) -> None:
                reading.append(engine.stats().lanes["put"].reading_back)
                flush(timeout=timeout)

            engine.flush = watched
            return engine

        session._open_engine = opened
        WORKLOADS["backlog"].run(session)

    lived(replace(WORKLOADS["backlog"], run=run))
    assert reading == [1]


def test_a_lost_identity_is_refused_and_a_lost_state_delivers_again() -> None:
    history, _ = lived(WORKLOADS["lost_identity"])
    assert [event.error for event in history if isinstance(event, Refused)] == ["CorruptionError"]
    history, _ = lived(replace(WORKLOADS["lost_state"], predict=predict))
    cases = [case for event in history if isinstance(event, Predicted) for case in event.cases]
    assert any(case.startswith("S7") for case in cases)
