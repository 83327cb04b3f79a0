"""Zeros that are written ahead of small frames, cut off at every point, in every way that the simulated disk allows.

The segments of the workloads are smaller than the room that is filled at once, so that is made smaller here.
"""

from __future__ import annotations

from typing import Final

import pytest

from tests.crash.test_simulation import check, with_knobs
from tools.modes.workloads import WORKLOADS
from walbatch.storage import segment
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Explorer, FailedSync, Plan, Room

SECONDS: Final = 30.0
NAMES: Final = ("single", "roll", "interval", "reopen", "threads")


@pytest.fixture(autouse=True)
def filled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many zeros were written ahead, each time."""
    monkeypatch.setattr(segment, "AHEAD_BYTES", 1024)
    sizes: list[int] = []
    filled_to = segment.SegmentWriter._filled_to

    def watched(writer: segment.SegmentWriter, offset: int, end: int) -> int:
        filled_end = filled_to(writer, offset, end)
        sizes.append(filled_end - end)
        return filled_end

    monkeypatch.setattr(segment.SegmentWriter, "_filled_to", watched)
    return sizes


@pytest.mark.parametrize("strict", [False, True], ids=["prefix", "strict"])
@pytest.mark.parametrize("name", NAMES)
def test_no_crash_breaks_a_guarantee(name: str, strict: bool, filled: list[int]) -> None:
    check(Explorer(open_engine, WORKLOADS[name], Plan(strict=strict, seconds=SECONDS)).run())
    assert any(filled)


@pytest.mark.parametrize("failed_sync", [FailedSync.DROP, FailedSync.REVERT], ids=str)
@pytest.mark.parametrize("room", [Room.GARBAGE, Room.STALE], ids=str)
def test_the_room_may_have_held_anything(room: Room, failed_sync: FailedSync, filled: list[int]) -> None:
    workload = with_knobs(WORKLOADS["roll"], failed_sync=failed_sync, room=room)
    check(Explorer(open_engine, workload, Plan(bound=16, samples=8, seconds=SECONDS)).run())
    assert any(filled)


def test_no_second_crash_inside_recovery_breaks_a_guarantee(filled: list[int]) -> None:
    plan = Plan(depth=2, bound=24, samples=8, inner_bound=8, inner_samples=2, seconds=5)
    check(Explorer(open_engine, WORKLOADS["roll"], plan).run())
    assert any(filled)
