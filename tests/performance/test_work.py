"""What an operation costs the interpreter: bytecodes that are run, blocks of memory that are held, and waits of threads.

The figures are those that were found when the test was written, with a little room, and each says what it holds: a loop over the
operations of a group where there was none shows here at once, on any machine. Who makes it cheaper lowers the figure.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

import walbatch as wb
from tests.performance.counting import QUIET, Tally, counted_blocks, counted_bytecodes, counting_environment
from tests.support import DEADLINE_S, wait_until

GROUP: Final = tuple((b"key-%d" % number, os.urandom(256)) for number in range(1_000))
ROOMY: Final = replace(QUIET, memory_bytes_max=2**28)
IN_THOUSANDS: Final = {"trigger": wb.Trigger(count=1_000), "controller": wb.Fixed(1_000)}
"""Batches that are cut as they come, so that it is always the same number of them."""

# What was found, and a tenth more. Bytecodes are those of the caller's thread, unless told.
BYTECODES_ALONE: Final = 3_200
"""An operation that is submitted alone: checks, a group of its own, its frame, and who is told of it."""
BYTECODES_IN_GROUP: Final = 11
"""One in a group of 1,000: seven to unpack its pair, and its share of what is done once for all of them."""
BYTECODES_TO_THE_END: Final = 19.5
"""The same with its delivery, in all threads together."""
BYTECODES_OF_TASK: Final = 860
"""One of 100 tasks that await one operation each: with asyncio's own."""
BLOCKS_ALONE: Final = 7.8
"""Blocks of memory for an operation that waits in memory, its frame's place in the index of the segment included."""
BLOCKS_IN_GROUP: Final = 0.1
FRAME_BLOCKS: Final = 3
"""What the active segment holds for each of its frames."""
WAITS_ALONE: Final = 0.1
"""Waits of the engine's threads for an operation that is submitted alone: each thread that is woken for nothing adds one."""
WAITS_OF_GROUP: Final = 8
"""Waits for a group of 1,000 that is submitted, delivered and flushed: the caller's, the timer's, the worker's."""
WAITS_OF_TASKS: Final = 3
"""Waits for 100 tasks that submit at once."""


def open_engine(path: Path, tally: Tally | None = None, *, paused: bool = True) -> wb.Engine:
    engine = wb.Engine.open(
        path / "q",
        {"put": wb.Lane(lambda _: None, **IN_THOUSANDS)},  # type: ignore[arg-type]
        settings=ROOMY,
        environment=counting_environment(tally or Tally()),
    )
    if paused:
        engine.pause("put")
    return engine


def submit_alone(engine: wb.Engine, count: int) -> None:
    for number in range(count):
        engine.submit("put", key=b"key-%d" % number, payload=b"x" * 256)


def submit_groups(engine: wb.Engine, count: int) -> None:
    for _ in range(count):
        engine.submit_many("put", GROUP)


ON_THIS_PYTHON: Final = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11),
    reason="other versions have other bytecodes: the figures are those of 3.11",
)

Submit = Callable[[wb.Engine, int], None]
WAYS: Final[dict[str, tuple[Submit, int, float, float]]] = {
    # way: (calls, operations of a call, bytecodes of an operation at most, blocks held for one at most)
    "one by one": (submit_alone, 1, BYTECODES_ALONE, BLOCKS_ALONE),
    "in groups of a thousand": (submit_groups, 1_000, BYTECODES_IN_GROUP, BLOCKS_IN_GROUP),
}


@ON_THIS_PYTHON
@pytest.mark.parametrize(("submit", "size", "bytecodes_max", "blocks_max"), WAYS.values(), ids=WAYS.keys())
def test_submitting_runs_so_many_bytecodes(
    tmp_path: Path, submit: Submit, size: int, bytecodes_max: float, blocks_max: float
) -> None:
    with open_engine(tmp_path) as engine:
        submit(engine, 3)
        calls = 20 if size == 1 else 3
        with counted_bytecodes() as counted:
            submit(engine, calls)
        engine.resume("put")
    assert 0 < counted[0] / (calls * size) <= bytecodes_max


@pytest.mark.parametrize(("submit", "size", "bytecodes_max", "blocks_max"), WAYS.values(), ids=WAYS.keys())
def test_an_operation_that_waits_holds_so_many_blocks_of_memory(
    tmp_path: Path, submit: Submit, size: int, bytecodes_max: float, blocks_max: float
) -> None:
    with open_engine(tmp_path) as engine:
        calls = 500 if size == 1 else 20

        def fill(times: int) -> None:
            submit(engine, calls)
            wait_until(
                lambda: engine.stats().lanes["put"].in_memory == times * calls * size,
                what="all wait in the queue",
            )

        fill(1)
        with counted_blocks() as counted:
            fill(2)
        engine.resume("put")
    assert counted[0] / (calls * size) <= blocks_max


@pytest.mark.parametrize(("submit", "size"), [(submit_alone, 1), (submit_groups, 1_000)], ids=WAYS.keys())
def test_an_operation_that_is_settled_holds_nothing(tmp_path: Path, submit: Submit, size: int) -> None:
    with open_engine(tmp_path, paused=False) as engine:
        calls = 500 if size == 1 else 20

        def settle() -> None:
            submit(engine, calls)
            engine.flush("put", timeout=DEADLINE_S)

        settle()
        with counted_blocks() as counted:
            settle()
    # What the active segment knows of its frames stays until it is sealed: FRAME_BLOCKS for each.
    assert counted[0] <= calls * FRAME_BLOCKS + 200


@ON_THIS_PYTHON
def test_delivering_in_batches_of_a_thousand_runs_so_many_bytecodes(tmp_path: Path) -> None:
    counts = []
    for groups in (3, 13):
        with counted_bytecodes() as counted, open_engine(tmp_path / str(groups), paused=False) as engine:
            for _ in range(groups):
                engine.submit_many("put", GROUP)
                engine.flush("put", timeout=DEADLINE_S)
        counts += counted
    assert (counts[1] - counts[0]) / 10_000 <= BYTECODES_TO_THE_END


@ON_THIS_PYTHON
def test_a_hundred_tasks_that_submit_at_once_run_so_many_bytecodes_each(tmp_path: Path) -> None:
    async def run() -> float:
        engine = wb.AsyncEngine(open_engine(tmp_path))

        async def submit() -> None:
            await asyncio.gather(
                *(engine.submit("put", key=b"key-%d" % number, payload=b"x" * 256) for number in range(100))
            )

        await submit()
        with counted_bytecodes() as counted:
            await submit()
        await engine.close(drain=False)
        return counted[0] / 100

    assert asyncio.run(run()) <= BYTECODES_OF_TASK


# --- threads ---------------------------------------------------------------------------------------------------------


def test_operations_one_by_one_wake_no_thread_that_has_nothing_to_do(tmp_path: Path) -> None:
    tally = Tally()
    with open_engine(tmp_path, tally) as engine:
        submit_alone(engine, 10)
        tally.waits = 0
        submit_alone(engine, 100)
        assert tally.waits <= 100 * WAITS_ALONE
        engine.resume("put")


def test_a_group_wakes_so_many_threads_whatever_its_size(tmp_path: Path) -> None:
    tally = Tally()
    with open_engine(tmp_path, tally, paused=False) as engine:
        submit_groups(engine, 5)
        engine.flush("put", timeout=DEADLINE_S)
        tally.waits = 0
        for _ in range(20):
            submit_groups(engine, 1)
            engine.flush("put", timeout=DEADLINE_S)
        assert tally.waits <= 20 * WAITS_OF_GROUP


def test_a_hundred_tasks_wait_for_no_thread_each(tmp_path: Path) -> None:
    tally = Tally()

    async def run() -> None:
        engine = wb.AsyncEngine(open_engine(tmp_path, tally))
        await engine.submit("put", key=b"first")
        tally.waits = 0
        for _ in range(10):
            await asyncio.gather(*(engine.submit("put", key=b"key-%d" % number) for number in range(100)))
        assert tally.waits <= 10 * WAITS_OF_TASKS
        await engine.close(drain=False)

    asyncio.run(run())


@pytest.mark.parametrize("shards", [1, 4])
def test_an_idle_lane_waits_for_no_tick(tmp_path: Path, shards: int) -> None:
    # Whoever comes after a batch has landed has to wake the timer, which looks by itself once a minute here.
    engine = wb.Engine.open(tmp_path / "q", {"put": wb.Lane(lambda _: None, shards=shards)}, settings=ROOMY)
    with engine:
        for number in range(30):
            engine.submit("put", key=b"key-%d" % number).result(DEADLINE_S)
