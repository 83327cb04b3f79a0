"""What an operation costs the disk: writes, syncs, reads and bytes, counted. A change that adds one fails here on any machine.

Each figure below is exact, or says what it leaves room for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

import walbatch as wb
from tests.performance.counting import (
    NAMES,
    QUIET,
    SYNCS,
    WRITES,
    Call,
    SystemCalls,
    Tally,
    count_system_calls,
    counting_environment,
)
from tests.support import DEADLINE_S, wait_until

SECTOR_BYTES: Final = 512
PAYLOAD: Final = os.urandom(256)
GROUP: Final = tuple((b"key-%d" % number, os.urandom(256)) for number in range(1_000))
GROUP_BYTES: Final = sum(len(payload) for _, payload in GROUP)


@pytest.fixture
def tally() -> Tally:
    return Tally()


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SystemCalls:
    return count_system_calls(monkeypatch, tmp_path / "q")


@pytest.fixture
def opened(tmp_path: Path, calls: SystemCalls, tally: Tally) -> Iterator[Callable[..., wb.Engine]]:
    """Opens an engine whose one lane is paused, and which does nothing because of time; closes it without delivering."""
    engines: list[wb.Engine] = []

    def open_engine(settings: wb.Settings = QUIET, *, paused: bool = True, **lane: Any) -> wb.Engine:
        lane.setdefault("backend", lambda _: None)
        engine = wb.Engine.open(
            tmp_path / "q",
            {"put": wb.Lane(lane.pop("backend"), **lane)},
            settings=settings,
            environment=counting_environment(tally),
        )
        engines.append(engine)
        if paused:
            engine.pause("put")
        engine.submit("put", key=b"first")  # what an engine does once is done now
        calls.start()
        return engine

    yield open_engine
    for engine in engines:
        engine.close(drain=False)


def log_calls(calls: SystemCalls) -> Counter[str]:
    """The calls that change the log or wait for the disk, by name."""
    return Counter(call.name for call in calls.of((*WRITES, *SYNCS, *NAMES)) if call.name != "open")


# --- submitting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "delivered meanwhile"])
def test_an_operation_alone_costs_one_write_of_its_sectors_and_one_sync(
    opened: Callable[..., wb.Engine], calls: SystemCalls, paused: bool
) -> None:
    engine = opened(paused=paused)
    for number in range(50):
        engine.submit("put", key=b"key-%d" % number, payload=PAYLOAD)
    assert (calls.writes, calls.syncs) == (50, 50)
    assert {call.size for call in calls.of(WRITES)} == {SECTOR_BYTES}, (
        "256 bytes and what describes them fit in one sector"
    )
    assert log_calls(calls).total() == 100, "nothing else is done to the log"


@pytest.mark.parametrize("payload_bytes", [0, 1, 256, 380, 511, 512, 4_096, 65_536])
def test_a_frame_takes_the_sectors_that_it_fills(
    opened: Callable[..., wb.Engine], calls: SystemCalls, payload_bytes: int
) -> None:
    engine = opened()
    engine.submit("put", key=b"key", payload=os.urandom(payload_bytes))
    described = 128  # the frame's header, and four columns that need no array
    assert calls.written_bytes <= -(-(payload_bytes + described) // SECTOR_BYTES) * SECTOR_BYTES


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "delivered meanwhile"])
def test_a_group_costs_one_write_and_one_sync_whatever_its_size(
    opened: Callable[..., wb.Engine], calls: SystemCalls, paused: bool
) -> None:
    engine = opened(paused=paused)
    for _ in range(10):
        engine.submit_many("put", GROUP)
    assert (calls.writes, calls.syncs) == (10, 10)
    assert log_calls(calls).total() == 20, "nothing else is done to the log"


def test_groups_on_disk_take_six_percent_more_than_their_payloads_with_all_segments_and_footers(
    opened: Callable[..., wb.Engine], calls: SystemCalls, tmp_path: Path
) -> None:
    engine = opened(replace(QUIET, segment_bytes=2**20))
    for _ in range(40):
        engine.submit_many("put", GROUP)
    payload_bytes = 40 * GROUP_BYTES
    assert calls.written_bytes <= 1.06 * payload_bytes
    engine.close(drain=False)
    sizes = [path.stat().st_size for path in (tmp_path / "q" / "wal").iterdir()]
    assert len(sizes) >= 10, "else no footer was written"
    assert payload_bytes < sum(sizes) <= 1.06 * payload_bytes


def test_a_segment_costs_a_fixed_number_of_syncs(
    opened: Callable[..., wb.Engine], calls: SystemCalls
) -> None:
    engine = opened(replace(QUIET, segment_bytes=2**20))
    for _ in range(40):
        engine.submit_many("put", GROUP)
    segments = sum(call.name == "open" for call in calls.of(("open",)))
    assert segments >= 10
    # The footer of the old one, and the header and the name of the new one.
    assert calls.syncs <= 40 + 3 * segments
    assert calls.writes <= 40 + 2 * segments


# --- sharing ---------------------------------------------------------------------------------------------------------


def hold_the_next_sync(calls: SystemCalls) -> tuple[threading.Event, threading.Event]:
    """The next sync of the log says that it has begun (the first event), and ends when it may (the second)."""
    began, may_end = threading.Event(), threading.Event()

    def before(call: Call) -> None:
        if call.name in SYNCS and call.place == "wal" and not began.is_set():
            began.set()
            assert may_end.wait(DEADLINE_S)

    calls.before = before
    return began, may_end


def test_all_that_queue_up_while_a_leader_syncs_share_one_write_and_one_sync(
    opened: Callable[..., wb.Engine], calls: SystemCalls
) -> None:
    engine = opened()
    began, may_end = hold_the_next_sync(calls)
    first = engine.stats().submitted_lsn

    def submit(number: int) -> None:
        assert engine.submit("put", key=b"key-%d" % number, payload=PAYLOAD).durable

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(33)]
    threads[0].start()
    assert began.wait(DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: engine.stats().submitted_lsn == first + 33, what="all of them have queued up")
    assert (calls.writes, calls.syncs) == (1, 1)
    may_end.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert (calls.writes, calls.syncs) == (2, 2)


def test_all_tasks_that_submit_while_a_group_is_synced_share_the_next(
    opened: Callable[..., wb.Engine], calls: SystemCalls
) -> None:
    async def run() -> None:
        engine = wb.AsyncEngine(opened())
        began, may_end = hold_the_next_sync(calls)
        first = engine.stats().submitted_lsn
        tasks = [asyncio.create_task(engine.submit("put", key=b"key-0", payload=PAYLOAD))]
        assert await asyncio.to_thread(began.wait, DEADLINE_S)
        tasks += [
            asyncio.create_task(engine.submit("put", key=b"key-%d" % number, payload=PAYLOAD))
            for number in range(1, 100)
        ]
        async with asyncio.timeout(DEADLINE_S):
            while engine.stats().submitted_lsn < first + 100:  # noqa: ASYNC110 - no event says so
                await asyncio.sleep(0)  # other threads bring it about
        assert (calls.writes, calls.syncs) == (1, 1)
        may_end.set()
        await asyncio.gather(*tasks)
        assert (calls.writes, calls.syncs) == (2, 2)

    asyncio.run(run())


# --- delivering ------------------------------------------------------------------------------------------------------

NARROW: Final = replace(QUIET, memory_bytes_max=2**20)
"""Room for a part of the backlog: the rest is read back."""


def test_a_backlog_is_read_back_once_and_nothing_is_written_for_it(
    opened: Callable[..., wb.Engine], calls: SystemCalls
) -> None:
    engine = opened(NARROW)
    for _ in range(16):
        engine.submit_many("put", GROUP)
    backlog_bytes = calls.written_bytes
    assert backlog_bytes > 3 * NARROW.memory_bytes_max
    calls.start()
    engine.resume("put")
    engine.flush("put", timeout=DEADLINE_S)
    assert calls.writes == calls.syncs == 0
    # A frame whose operations do not all fit is read again for the rest, which costs the frames at the border.
    assert backlog_bytes * 0.5 < calls.read_bytes <= backlog_bytes * 1.25


def test_what_fits_in_memory_is_delivered_without_a_look_at_the_log(
    opened: Callable[..., wb.Engine], calls: SystemCalls
) -> None:
    engine = opened(paused=False)
    engine.flush("put", timeout=DEADLINE_S)
    calls.start()
    for _ in range(10):
        engine.submit_many("put", GROUP)
    engine.flush("put", timeout=DEADLINE_S)
    assert calls.reads == 0
    assert (calls.writes, calls.syncs) == (10, 10)


@pytest.mark.parametrize("groups", [2, 20])
def test_settling_saves_nothing_beyond_the_checkpoints_that_time_asks_for(
    opened: Callable[..., wb.Engine], tally: Tally, groups: int
) -> None:
    engine = opened(paused=False)
    tally.saves.clear()
    for _ in range(groups):
        engine.submit_many("put", GROUP)
    engine.flush("put", timeout=DEADLINE_S)
    assert tally.saves == {}
    engine.close()
    assert tally.saves.pop("save_checkpoint") <= 2
    assert sum(tally.saves.values()) <= 1, "what the controllers have learnt"


# --- the counting itself ---------------------------------------------------------------------------------------------


def test_a_second_sync_would_be_seen(
    opened: Callable[..., wb.Engine], calls: SystemCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from walbatch.storage.filesystem import RealFile  # noqa: PLC0415 - changed here only

    once = RealFile.datasync

    def twice(file: RealFile) -> None:
        once(file)
        once(file)

    engine = opened()
    monkeypatch.setattr(RealFile, "datasync", twice)
    engine.submit("put", key=b"k", payload=PAYLOAD)
    assert (calls.writes, calls.syncs) == (1, 2)


def test_only_what_is_done_to_the_store_is_counted(calls: SystemCalls, tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "elsewhere", os.O_RDWR | os.O_CREAT)
    os.pwrite(descriptor, b"x", 0)
    os.fsync(descriptor)
    os.close(descriptor)
    assert calls.calls == []


def test_filling_room_with_zeros_is_told_apart_from_writing_frames(
    calls: SystemCalls, tmp_path: Path
) -> None:
    folder = tmp_path / "q" / "wal"
    folder.mkdir(parents=True)
    descriptor = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
    os.pwritev(descriptor, [bytes(4_096), bytes(4_096)], 0)
    os.pwritev(descriptor, [bytes(4_096), b"frame"], 0)
    os.close(descriptor)
    assert [call.is_fill for call in calls.calls if call.name == "pwritev"] == [True, False]
    assert calls.written_bytes == 4_096 + len(b"frame")
