"""Opening a store: what it makes, what it refuses, and what an error at any moment leaves behind."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import walbatch as wb
from tests.memory import MemoryFileSystem, environment, fail_at
from tests.support import FAST, QUICK_RETRY, Recorder
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

    def copy(self) -> Life:
        """For another future of the same past."""
        return Life(set(self.submitted), set(self.acknowledged), set(self.applied))

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
def test_an_error_at_any_call_loses_nothing_acknowledged(code: int, for_ever: bool) -> None:
    for number in itertools.count(1):
        fs, life = MemoryFileSystem(), Life()
        fs.fail = fail_at(number, code, for_ever=for_ever)
        life.run(fs)
        calls, fs.fail = len(fs.calls), None
        assert fs.open_files == 0, f"call {number}: a file stays open"
        assert not fs.locks, f"call {number}: the store stays locked"
        life.copy().check(fs.after_power_cut())
        life.run(fs)
        life.copy().check(fs.after_power_cut())
        life.check(fs)
        if calls < number:
            break
    assert number > 50


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_an_error_at_any_call_of_recovery_loses_nothing_acknowledged(code: int) -> None:
    before, life = MemoryFileSystem(), Life()
    before.fail = fail_at(45, errno.EIO, for_ever=True)
    life.run(before)
    assert life.acknowledged
    calls = 0
    for number in itertools.count(1):
        fs = before.after_power_cut()
        again = life.copy()
        for _ in range(2):
            fs.fail = fail_at(number, code, for_ever=True)
            again.run(fs)
            calls = len(fs.calls)
            fs.fail = None
            assert fs.open_files == 0, f"call {number}: a file stays open"
            assert not fs.locks, f"call {number}: the store stays locked"
            fs = fs.after_power_cut()
        again.check(fs)
        if calls < number:
            break
    assert number > 20


# --- making a store --------------------------------------------------------------------------------------------------


def test_a_new_store_and_the_way_to_it_are_durable_when_it_is_open() -> None:
    fs = MemoryFileSystem()
    engine = open_engine(fs, Recorder())
    after = fs.after_power_cut()
    engine.close()
    assert {f"{ROOT}/wal", f"{ROOT}/state", f"{ROOT}/quarantine"} <= set(after.directories)
    assert {path for path in after.files if "lock" not in path} == {
        f"{ROOT}/identity",
        f"{ROOT}/wal/{1:019d}.seg",
    }


def test_directories_that_an_earlier_opener_left_unsynced_are_synced_by_the_next() -> None:
    before = MemoryFileSystem()
    before.fail = fail_when("sync_directory", 1)
    with pytest.raises(wb.StorageError):
        open_engine(before, Recorder())
    before.fail = None
    engine = open_engine(before, Recorder())
    ticket = engine.submit("kept", key=b"k", payload=b"v")
    after = before.after_power_cut()
    engine.close()
    assert ticket.durable
    life = Life({b"v"}, {b"v"})
    life.check(after)


def test_a_parent_that_may_not_be_opened_does_not_forbid_a_store_below_it() -> None:
    def closed(call: str, path: str) -> None:
        if call == "sync_directory" and path == "/":
            raise PermissionError(errno.EACCES, "closed", path)

    fs = MemoryFileSystem()
    fs.fail = closed
    open_engine(fs, Recorder()).close()


def fail_when(wanted: str, number: int) -> Callable[[str, str], None]:
    """Fail a call the `number`th time, once."""
    seen = 0

    def fail(call: str, path: str) -> None:
        nonlocal seen
        seen += call == wanted
        if call == wanted and seen == number:
            raise OSError(errno.EIO, "injected", path)

    return fail


def test_an_interrupted_creation_is_taken_over(tmp_path: Path) -> None:
    for name in ("wal", "state", "quarantine"):
        (tmp_path / name).mkdir()
    (tmp_path / "identity.tmp").write_bytes(b"half")
    with wb.Engine.open(tmp_path, lanes={"put": wb.Lane(Recorder())}) as engine:
        assert [case.label for case in engine.recovery] == ["S5"]


def test_a_store_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        wb.Engine.open(tmp_path / "a" / "q", lanes={"put": wb.Lane(Recorder())}).close()
    finally:
        os.umask(before)
    for root, directories, files in os.walk(tmp_path / "a"):
        assert os.stat(root).st_mode & 0o777 == 0o700
        assert all(os.stat(f"{root}/{name}").st_mode & 0o077 == 0 for name in [*directories, *files])


@pytest.mark.parametrize("what", ["wal", "state"])
def test_a_directory_without_identity_that_holds_data_is_not_made_a_store(tmp_path: Path, what: str) -> None:
    (tmp_path / what).mkdir()
    (tmp_path / what / "something").write_bytes(b"x")
    with pytest.raises(wb.CorruptionError, match="identity") as caught:
        wb.Engine.open(tmp_path, lanes={"put": wb.Lane(Recorder())})
    assert caught.value.path.endswith("identity")
    assert not (tmp_path / "identity").exists()


# --- the lock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 4000,
        b'{"pid": "7", "host": 3}',
        b'{"pid": 1' + b"0" * 3000 + b"}",
    ],
    ids=["empty", "half", "list", "null", "not_text", "deep", "wrong_types", "huge_number"],
)
def test_the_note_in_a_held_lock_is_never_trusted(tmp_path: Path, note: bytes) -> None:
    fs = RealFileSystem()
    layout = Layout(str(tmp_path))
    held = fs.lock(layout.lock, b"mine")
    assert not isinstance(held, bytes)
    (tmp_path / "lock").write_bytes(note)
    with pytest.raises(wb.StoreLocked) as caught:
        take_lock(fs, layout, b"other")
    assert caught.value.path == str(tmp_path)
    assert caught.value.host is None
    held.release()


def test_the_holder_of_a_lock_is_named(tmp_path: Path) -> None:
    fs = RealFileSystem()
    layout = Layout(str(tmp_path))
    held = take_lock(fs, layout, json.dumps({"pid": 4711, "host": "elsewhere"}).encode())
    with pytest.raises(wb.StoreLocked, match="process 4711 on elsewhere"):
        take_lock(fs, layout, b"other")
    held.release()
    assert not held.held
    take_lock(fs, layout, b"other").release()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (tmp_path / "q" / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(wb.StorageError):
        wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(Recorder())})
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
