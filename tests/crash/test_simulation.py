"""The shipped engine, cut off at every port call, in every way that the simulated disk allows, and judged by the oracle.

Each failure prints a line; `Explorer(open_engine, workload, plan).replay(line)` does it again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from tests.testing.engines import open_engine
from walbatch.config import Trigger
from walbatch.testing.simulation import (
    Explorer,
    FailedSync,
    Fault,
    LanePlan,
    Machine,
    Manner,
    Plan,
    Report,
    Room,
    Session,
    Workload,
    sweep_faults,
)
from walbatch.testing.simulation.workload import QUICK
from walbatch.types import Batch

SECONDS: Final = 30.0
"""Real time for one exploration: beyond it a slow machine judges fewer states, and says so in the printed report."""

INCOMPRESSIBLE: Final = replace(QUICK, compress_bytes_min=None)
EXACT: Final = {"put": LanePlan(transactional=True, shards=2)}


def single(session: Session) -> None:
    session.open()
    for key in (b"a", b"b", b"a"):
        session.submit(key)
    session.close()


def many(session: Session) -> None:
    session.open()
    session.submit_many([b"a", b"b", b"a"])
    session.submit_many([b"b"] * 5, size=300)
    session.close()


def interval(session: Session) -> None:
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    session.pause(0.05)
    session.submit(b"a")
    session.close()


def roll(session: Session) -> None:
    """Eight operations fill two segments; the pause lets the first ones be checkpointed and trimmed."""
    session.open()
    for number in range(8):
        session.submit(b"k%d" % (number % 3), size=900)
    session.pause(0.1)
    session.submit(b"k1", size=900)
    session.close()


def reopen(session: Session) -> None:
    session.open()
    session.submit(b"a")
    session.submit(b"b")
    session.close(drain=False)
    session.open()
    session.submit(b"a")
    session.close()
    session.open()
    session.close()


def nowait(session: Session) -> None:
    session.open()
    waits = [session.submit_nowait(b"k%d" % (number % 2)) for number in range(4)]
    for wait in waits[:2]:
        wait()
    session.close()


def threads(session: Session) -> None:
    session.open()

    def two(key: bytes) -> Callable[[], None]:
        def run() -> None:
            session.submit(key)
            session.submit(key)

        return run

    session.together(two(b"a"), two(b"b"), two(b"a"))
    session.close()


def storm(session: Session) -> None:
    """Submits of every kind in three lanes, flushes, pauses, and a close in the middle of it."""
    session.open()
    engine = session.engine

    def some(number: int) -> Callable[[], None]:
        def run() -> None:
            for count in range(4):
                lane = ("put", "interval", "free")[(number + count) % 3]
                session.submit(b"k%d" % ((number + count) % 3), lane, size=number * count * 200 % 1500)

        return run

    def in_time() -> None:
        for wait in [session.submit_nowait(b"k%d" % (count % 3)) for count in range(4)]:
            wait()

    def hold() -> None:
        engine.pause("put")
        session.pause(0.01)
        engine.resume("put")

    session.together(
        some(0), some(1), some(2), in_time, hold,
        lambda: engine.flush(timeout=100), lambda: engine.close(timeout=60), lambda: session.submit_many([b"k0", b"k1"]),
    )  # fmt: skip
    session.close()


def unreliable(batch: Batch, call: int) -> Manner:
    """One of everything that a backend may do, but lie."""
    manners = (Manner.FAIL, Manner.PART, Manner.ANSWER_PART, Manner.TIMEOUT, Manner.APPLY, Manner.SLOW)
    return manners[(call - 1) % len(manners)]


LANES: Final = {
    "put": LanePlan(shards=3),
    "interval": LanePlan(durability="interval"),
    "free": LanePlan(order="none", trigger=Trigger(count=2, linger_ms=0)),
}
WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        Workload(name="single", run=single),
        Workload(name="many", run=many),
        Workload(name="interval", run=interval, lanes={"put": LanePlan(durability="interval")}),
        Workload(name="roll", run=roll, settings=INCOMPRESSIBLE),
        Workload(name="reopen", run=reopen),
        Workload(name="nowait", run=nowait),
        Workload(name="threads", run=threads),
        Workload(name="transactional", run=reopen, lanes=EXACT),
        Workload(name="unreliable backend", run=roll, settings=INCOMPRESSIBLE, manners=unreliable),
        Workload(
            name="unreliable transactional backend",
            run=threads,
            lanes=EXACT,
            manners=unreliable,
        ),
    )
}
STORM: Final = Workload(name="storm", run=storm, lanes=LANES, settings=INCOMPRESSIBLE, manners=unreliable)


def check(report: Report) -> None:
    print(report)
    assert not report.failures, "\n".join(map(str, report.failures))


def with_knobs(workload: Workload, *, failed_sync: FailedSync, room: Room) -> Workload:
    def turn(machine: Machine) -> None:
        machine.fs.failed_sync, machine.fs.room = failed_sync, room

    return replace(workload, prepare=turn)


@pytest.mark.parametrize("strict", [False, True], ids=["prefix", "strict"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_no_crash_breaks_a_guarantee(name: str, strict: bool) -> None:
    report = Explorer(open_engine, WORKLOADS[name], Plan(strict=strict, seconds=SECONDS)).run()
    check(report)
    assert report.states > 100 or not report.complete


@pytest.mark.parametrize("name", ["single", "reopen", "transactional"])
def test_no_second_crash_inside_recovery_breaks_a_guarantee(name: str) -> None:
    plan = Plan(depth=2, bound=24, samples=8, inner_bound=8, inner_samples=2, seconds=5)
    check(Explorer(open_engine, WORKLOADS[name], plan).run())


@pytest.mark.parametrize("room", [Room.GARBAGE, Room.STALE], ids=str)
def test_preallocated_room_may_hold_anything(room: Room) -> None:
    workload = with_knobs(WORKLOADS["roll"], failed_sync=FailedSync.DROP, room=room)
    check(Explorer(open_engine, workload, Plan(bound=16, samples=8, seconds=SECONDS)).run())


@pytest.mark.parametrize("failed_sync", [FailedSync.DROP, FailedSync.REVERT], ids=str)
@pytest.mark.parametrize("call", ["datasync", "sync_directory", "write"])
def test_no_failing_call_breaks_a_guarantee(call: str, failed_sync: FailedSync) -> None:
    workload = with_knobs(WORKLOADS["single"], failed_sync=failed_sync, room=Room.ZEROS)
    plan = Plan(bound=6, samples=2, seconds=SECONDS)
    visited = 0
    for fault, report in sweep_faults(
        open_engine, workload, [errno.EIO, errno.ENOSPC], plan, calls={call}, every=2
    ):
        visited += 1
        assert not report.failures, f"{fault}: {report.failures[0]}"
    assert visited >= 8


def test_a_failing_checkpoint_breaks_no_guarantee() -> None:
    for number in range(1, 4):
        for forever in (False, True):
            fault = Fault(call="save checkpoint", number=number, forever=forever)
            check(
                Explorer(
                    open_engine, replace(WORKLOADS["single"], faults=[fault]), Plan(seconds=SECONDS)
                ).run()
            )


@pytest.mark.parametrize("seeds", [range(20), range(20, 40)], ids=str)
def test_no_schedule_of_threads_breaks_a_guarantee_or_leaves_one_waiting(seeds: range) -> None:
    traces = set()
    for seed in seeds:
        report = Explorer(open_engine, STORM, Plan(seed=seed, cuts=())).run()
        assert not report.failures, report.failures[0]
        traces.add(report.trace)
    assert len(traces) == len(seeds)
