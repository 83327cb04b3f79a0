"""A survey beside a writer: what is a write in motion, what is damage, and who holds the lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import walbatch as wb
from tests.stores import flip, make_store
from walbatch import limits
from walbatch.core.recovery import StoreFacts, make_plan
from walbatch.errors import StorageError
from walbatch.storage import holder, observation
from walbatch.storage.filesystem import RealFile, RealFileSystem
from walbatch.storage.holder import Holder, holder_of
from walbatch.storage.layout import Layout
from walbatch.storage.observation import observe

SECTOR = limits.SECTOR_BYTES


def layout_of(path: Path) -> Layout:
    return Layout(str(path))


# --- motion ----------------------------------------------------------------------------------------------------------


def test_damage_that_is_whole_when_it_is_read_again_was_a_write_in_motion(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    segment = made.segments[-1]
    whole = segment.read_bytes()
    flip(segment, SECTOR + 100)
    damaged = survey_of(made.path)
    assert damaged.segments[-1].scan is not None
    assert damaged.segments[-1].scan.damage is not None
    segment.write_bytes(whole)
    calm = observation._without_motion(RealFileSystem(), layout_of(made.path), damaged)
    assert calm.segments[-1].scan is not None
    assert calm.segments[-1].scan.damage is None


def test_damage_that_stays_is_damage(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[-1], SECTOR + 100)
    damaged = survey_of(made.path)
    assert observation._without_motion(RealFileSystem(), layout_of(made.path), damaged) == damaged
    refusal = make_plan(observe(RealFileSystem(), layout_of(made.path), full=True).facts).refusal
    assert refusal is not None
    assert refusal.label == "W7"


def survey_of(path: Path) -> StoreFacts:
    """The facts, without a second reading."""
    return observe(RealFileSystem(), layout_of(path), full=True, locked=True).facts


class VanishingFileSystem(RealFileSystem):
    """Loses the oldest segment as soon as the segments have been listed, as trimming does."""

    def __init__(self, times: int) -> None:
        self.times = times

    def list_directory(self, path: str) -> list[str]:
        names = super().list_directory(path)
        if path.endswith("/wal") and self.times:
            self.times -= 1
            return ["0000000000000000000.seg", *names]
        return names


def test_a_segment_that_is_trimmed_during_the_look_is_looked_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "q")
    vanishing = VanishingFileSystem(times=observation.LOOKS_MAX - 1)
    monkeypatch.setattr(
        observation._Pinned, "list_directory", lambda self, path: vanishing.list_directory(path)
    )
    found = observe(RealFileSystem(), layout_of(made.path))
    assert make_plan(found.facts).refusal is None
    vanishing.times = observation.LOOKS_MAX
    with pytest.raises(StorageError, match="changes faster than it can be read"):
        observe(RealFileSystem(), layout_of(made.path))


def test_a_trimmed_segment_can_be_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with observation._Pinned(1) as fs:
        fs.open_read(str(path)).close()
        path.unlink()
        again: RealFile = fs.open_read(str(path))
        assert again.read(10, 0) == b"content"
        again.close()


# --- who holds the lock ----------------------------------------------------------------------------------------------


def test_nobody_holds_a_lock_that_is_not_there_or_was_given_back(tmp_path: Path) -> None:
    assert holder_of(str(tmp_path / "lock")) is Holder.NOBODY
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}):
        assert holder_of(str(tmp_path / "q" / "lock")) is Holder.SOMEBODY
    assert holder_of(str(tmp_path / "q" / "lock")) is Holder.NOBODY


def test_the_holder_may_be_another_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert holder_of(str(lock)) is Holder.SOMEBODY
        process.communicate()
    assert holder_of(str(lock)) is Holder.NOBODY


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        (b"", Holder.NOBODY),
        (b'{"pid": 7, "host": "elsewhere"}', Holder.UNKNOWN),
        (b"\xff not json", Holder.UNKNOWN),
        (b"[]", Holder.UNKNOWN),
    ],
    ids=["empty", "another machine", "garbage", "no object"],
)
def test_a_holder_on_another_machine_or_in_a_container_cannot_be_seen(
    tmp_path: Path, note: bytes, expected: Holder
) -> None:
    (tmp_path / "lock").write_bytes(note)
    assert holder_of(str(tmp_path / "lock")) is expected


def test_without_the_kernels_list_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").write_bytes(b"")
    monkeypatch.setattr(holder, "_LOCKS", str(tmp_path / "nothing"))
    assert holder_of(str(tmp_path / "lock")) is Holder.UNKNOWN


def test_a_line_of_the_kernels_list_that_is_no_line_is_ignored() -> None:
    wanted = (8, 1), 5
    assert holder._names("1: FLOCK  ADVISORY  WRITE 708 08:01:5 0 EOF", *wanted)
    for line in (
        "",
        "1: POSIX  ADVISORY  WRITE 708 08:01:5 0 EOF",
        "1: FLOCK  ADVISORY  WRITE 708 <none>:5 0 EOF",
    ):
        assert not holder._names(line, *wanted)
    assert not holder._names("1: -> FLOCK  ADVISORY  WRITE 708 08:01:5 0 EOF", *wanted), (
        "it waits, and holds nothing"
    )


def test_where_the_mount_cannot_be_found_the_files_own_device_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "_MOUNTS", str(tmp_path / "nothing"))
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}):
        assert holder_of(str(tmp_path / "q" / "lock")) is Holder.SOMEBODY
