"""Reading back while the log is rolled and its segments are merged: what is read stands at other places afterwards."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.support import wait_until
from walbatch.storage.log import Log
from walbatch.types import Position

SETTINGS = wb.Settings(segment_bytes=4 * 2**20, checkpoint_ms=20, compress_bytes_min=None)
LIVES = 8


class SlowDisk:
    """Holds the first read of a kind up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits, self.go = threading.Event(), threading.Event()
        self.is_slow: Callable[[int, dict[str, Any]], bool] = lambda next_lsn, found: False
        read_frame = Log.read_frame

        def read(log: Log, position: Position, *, next_lsn: int, **found: Any) -> Any:
            if not self.waits.is_set() and self.is_slow(next_lsn, found):
                self.waits.set()
                assert self.go.wait(30)
            return read_frame(log, position, next_lsn=next_lsn, **found)

        monkeypatch.setattr(Log, "read_frame", read)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    slow = SlowDisk(monkeypatch)
    yield slow
    slow.go.set()


def many_lives(store: Path, *, keys: dict[int, bytes], urgent: int = 0) -> list[int]:
    """A store of as many short segments, in each two operations that nobody has taken; returns their LSNs."""
    lsns: list[int] = []
    for _ in range(LIVES):
        with wb.Engine.open(store, lanes={"put": wb.Lane(None)}, settings=SETTINGS) as engine:
            for _ in range(2):
                number = len(lsns) + 1
                key = keys.get(number, b"k%d" % number)
                priority = 9 if number == urgent else 5
                ticket = engine.submit("put", key=key, payload=os.urandom(100_000), priority=priority)
                assert ticket.lsn == number
                lsns.append(number)
    return lsns


def merge_meanwhile(engine: wb.Engine, store: Path) -> int:
    """Make the log roll (the first options do) and wait until its segments are merged; returns the last LSN."""
    last = engine.submit("put", key=b"new", deadline=time.time() + 3600).lsn
    wait_until(lambda: len(list((store / "wal").glob("*.seg"))) <= 2, what="the segments are merged")
    assert last is not None
    return last


def test_a_read_that_is_overtaken_by_a_merge_skips_nothing(tmp_path: Path, disk: SlowDisk) -> None:
    store = tmp_path / "q"
    lsns = many_lives(store, keys={})
    disk.is_slow = lambda next_lsn, found: next_lsn >= 5 and "priority_min" not in found
    delivered: list[int] = []
    release = threading.Event()

    def put(batch: wb.Batch) -> None:
        assert release.wait(30)
        delivered.extend(batch.lsns)

    with wb.Engine.open(store, lanes={"put": wb.Lane(put)}, settings=SETTINGS) as engine:
        assert disk.waits.wait(30)
        last = merge_meanwhile(engine, store)
        disk.go.set()
        release.set()
        engine.flush(timeout=30)
        assert delivered == [*lsns, last]


def test_a_search_that_is_overtaken_by_a_merge_leaves_no_elder_behind(tmp_path: Path, disk: SlowDisk) -> None:
    store = tmp_path / "q"
    lsns = many_lives(store, keys={9: b"same", 16: b"same"}, urgent=16)
    disk.is_slow = lambda next_lsn, found: found.get("priority_min") == 0  # the pass that looks for elders
    delivered: list[int] = []
    release = threading.Event()

    def put(batch: wb.Batch) -> None:
        assert release.wait(30)
        delivered.extend(batch.lsns)

    with wb.Engine.open(store, lanes={"put": wb.Lane(put)}, settings=SETTINGS) as engine:
        assert disk.waits.wait(30)
        last = merge_meanwhile(engine, store)
        disk.go.set()
        release.set()
        engine.flush(timeout=30)
        assert sorted(delivered) == [*lsns, last]
        assert delivered.index(9) < delivered.index(16)
