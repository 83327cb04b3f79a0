"""Opening a store: what it makes, what it refuses, and what an error at any moment leaves behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment, fail_at
from tests.support import FAST, QUICK_RETRY, Recorder
from walbatch.core.checksum import crc32c
from walbatch.errors import WalbatchError
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.store import take_lock

SMALL = wb.Settings(
    segment_bytes=4096,
    disk_bytes_max=2**30,
    timer_ms=1,
    checkpoint_ms=1,
    disk_full_wait_s=0.01,
    idle_stamp_ms=1,
)
ROOT = "/a/q"


def open_engine(fs: MemoryFileSystem, recorder: Recorder) -> wb.Engine:
    lanes = {
        "put": wb.Lane(recorder, trigger=FAST, retry=QUICK_RETRY, shards=2),
        "kept": wb.Lane(None),
        "soon": wb.Lane(recorder, trigger=FAST, durability="interval", interval_ms=1),
    }
    return wb.Engine.open(ROOT, lanes=lanes, settings=SMALL, environment=environment(fs))


@dataclass
class Life:
    """What became of the operations of a store, as its user knows it."""

    submitted: set[bytes] = field(default_factory=set)
    acknowledged: set[bytes] = field(default_factory=set)
    applied: set[bytes] = field(default_factory=set)

    def run(self, fs: MemoryFileSystem) -> None:
        """Open, submit enough to roll, flush, close. Typed errors end it."""
        recorder = Recorder()
        with contextlib.suppress(WalbatchError):
            engine = open_engine(fs, recorder)
            try:
                for step in range(9):
                    self._submit(engine, step)
                with contextlib.suppress(WalbatchError):
                    engine.flush("put", timeout=30)
            finally:
                assert engine.close(timeout=30).reason
        self.applied |= {payload for _, _, payload in recorder.applied}

    def _submit(self, engine: wb.Engine, step: int) -> None:
        lane = ("put", "kept", "soon")[step % 3]
        payloads = [os.urandom(400) for _ in range(3)]
        self.submitted.update(payloads)
        with contextlib.suppress(wb.StorageError):
            engine.submit_many(lane, [(payload[:4], payload) for payload in payloads])
            if lane != "soon":
                self.acknowledged.update(payloads)

    def check(self, fs: MemoryFileSystem) -> None:
        """On a healthy disk everything acknowledged is applied, or is delivered now; nothing else ever was."""
        recorder = Recorder()
        lanes = {
            "put": wb.Lane(recorder, trigger=FAST, shards=2),
            "kept": wb.Lane(recorder, trigger=FAST),
            "soon": wb.Lane(recorder, trigger=FAST),
        }
        with wb.Engine.open(
            ROOT, lanes=lanes, settings=SMALL, environment=environment(fs), verify=True
        ) as engine:
            engine.flush(timeout=30)
        delivered = self.applied | {payload for _, _, payload in recorder.applied}
        assert delivered <= self.submitted
        assert self.acknowledged <= delivered


ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for_ever"])
@pytest.mark.parametrize("then", ["restart", "power_cut", "restart_and_power_cut"])
def test_an_error_at_any_call_loses_nothing_acknowledged(code: int, for_ever: bool, then: str) -> None:
    for number in itertools.count(1):
        fs, life = MemoryFileSystem(), Life()
        fs.fail = fail_at(number, code, for_ever=for_ever)
        life.run(fs)
        calls, fs.fail = len(fs.calls), None
        assert fs.open_files == 0, f"call {number}: a file stays open"
        assert not fs.locks, f"call {number}: the store stays locked"
        if then == "restart_and_power_cut":
            life.run(fs)
        life.check(fs if then == "restart" else fs.after_power_cut())
        if calls < number:
            break
    assert number > 50


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_an_error_at_any_call_of_recovery_loses_nothing_acknowledged(code: int) -> None:
    before, life = MemoryFileSystem(), Life()
    before.fail = fail_at(45, errno.EIO, for_ever=True)
    life.run(before)
    assert life.acknowledged
    for number in itertools.count(1):
        fs = before.after_power_cut()
        again = Life(set(life.submitted), set(life.acknowledged), set(life.applied))
        for _ in range(2):
            fs.fail = fail_at(number, code, for_ever=True)
            again.run(fs)
            calls = len(fs.calls)
            fs.fail = None
            fs = fs.after_power_cut()
        again.check(fs)
        if calls < number:
            break
    assert number > 20
