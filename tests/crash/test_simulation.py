"""The shipped engine, cut off at every port call, in every way that the simulated disk allows, and judged by the oracle.

Each failure prints a line; `Explorer(open_engine, workload, plan).replay(line)` does it again.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

import pytest

from tools.modes.workloads import STORM, WORKLOADS
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import (
    Explorer,
    FailedSync,
    Fault,
    Machine,
    Plan,
    Report,
    Room,
    Workload,
    sweep_faults,
)

SECONDS: Final = 30.0
"""Real time for one exploration: beyond it a slow machine judges fewer states, and says so in the printed report."""

THOROUGH: Final = ("single", "roll", "threads", "transactional")
"""Explored with all images here; every workload is, with samples, in test_workloads and by tools/torture.py."""


def check(report: Report) -> None:
    print(report)
    assert not report.failures, "\n".join(map(str, report.failures))


def with_knobs(workload: Workload, *, failed_sync: FailedSync, room: Room) -> Workload:
    def turn(machine: Machine) -> None:
        machine.fs.failed_sync, machine.fs.room = failed_sync, room

    return replace(workload, prepare=turn)


@pytest.mark.parametrize("strict", [False, True], ids=["prefix", "strict"])
@pytest.mark.parametrize("name", THOROUGH)
def test_no_crash_breaks_a_guarantee(name: str, strict: bool) -> None:
    report = Explorer(open_engine, WORKLOADS[name], Plan(strict=strict, seconds=SECONDS)).run()
    check(report)
    assert report.states > 50 or not report.complete


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
