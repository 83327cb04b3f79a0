"""The read-only look: exact where the lock is held, right beside an engine that is writing, and always without a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import walbatch as wb
from tests.fates import make_fates, requeue_half
from tests.storage.states import flip as flip_value
from tests.storage.states import tamper
from tests.stores import PAYLOAD_BYTES, TINY, Made, deliver, flip, make_store, picture
from tests.support import FAST, Recorder
from walbatch import inspection, limits
from walbatch.core.checksum import crc32c
from walbatch.errors import ConfigError, CorruptionError, StorageError, StoreLocked, UnsupportedFormat
from walbatch.inspection import dead_letters, find_store, look, operations, remembered_lanes
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.lsnkeys import key_of

SECTOR = limits.SECTOR_BYTES


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_a_full_look_counts_what_is_pending_lane_by_lane(tmp_path: Path, clean: bool) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", clean=clean)
    found = look(made.path, full=True, lock=True)
    assert found.problems == ()
    assert found.store.refusal is None
    assert {kind: (lane.pending, lane.shards) for kind, lane in found.store.lanes.items()} == {
        "put": (30, 2), "log": (0, 2),
    }  # fmt: skip
    pending = [made.submitted[lsn] for lsn in made.pending]
    assert found.store.lanes["put"].pending_bytes == sum(
        len(key) + len(payload) for _, key, payload in pending
    )
    assert found.store.pending == 30
    assert look(made.path).store.pending == 30, "a quick look counts the same"


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_it_says_what_the_next_opening_does(tmp_path: Path, clean: bool) -> None:
    made = make_store(tmp_path / "q", clean=clean)
    found = look(made.path, full=True, lock=True).store
    with wb.Engine.open(made.path, lanes={"put": wb.Lane(None, shards=2)}, settings=TINY) as engine:
        assert engine.recovery == found.cases
        assert engine.stats().pending == found.pending
        assert engine.submit("put", key=b"k").lsn == found.next_lsn
    assert (found.copied_operations > 0) != clean


def test_segments_are_shown_with_their_row(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[2], SECTOR + 100)
    segments = look(made.path, full=True).store.segments
    assert [segment.number for segment in segments] == list(range(1, len(made.segments) + 1))
    assert [(segment.label, segment.decision) for segment in segments[:4]] == [
        ("W5", "use"), ("W5", "use"), ("W6", "corrupt"), ("W5", "use"),
    ]  # fmt: skip
    assert segments[2].damage == "frame body does not match its CRC"


def test_lanes_are_remembered_with_their_urls(tmp_path: Path) -> None:
    path = tmp_path / "q"
    assert remembered_lanes(path) == {}
    lanes = {"put": wb.Lane(wb.LmdbBackend(tmp_path / "b"), shards=3), "log": wb.Lane(Recorder())}
    with wb.Engine.open(path, lanes=lanes):
        pass
    found = remembered_lanes(path)
    assert {kind: (memory.shards, memory.url) for kind, memory in found.items()} == {
        "put": (3, f"lmdb://{tmp_path}/b"), "log": (1, None),
    }  # fmt: skip


def test_the_audit_checks_every_crc_with_the_second_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_store(tmp_path / "q", count=4)
    assert look(made.path, full=True, audit=True).problems == ()
    monkeypatch.setattr(inspection.tally, "crc32c_audit", lambda data, seed: 7)
    problems = look(made.path, full=True, audit=True).problems
    frames = look(made.path, full=True).frames
    assert len(problems) == 2 * frames + len(made.segments), (
        "headers and bodies of frames, headers of segments"
    )
    assert problems[0] == "segment 1 at offset 0: the two CRC-32C implementations disagree"


# --- operations ------------------------------------------------------------------------------------------------------


def test_operations_come_as_they_were_submitted(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log")
    found = list(operations(made.path))
    assert [operation.lsn for operation in found] == sorted(operation.lsn for operation in found)
    assert {o.lsn: (o.kind, o.key, o.payload) for o in found if not o.settled} == {
        lsn: made.submitted[lsn] for lsn in made.pending
    }
    assert {o.lsn for o in found if o.settled} <= made.settled


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"kind": "log"}, lambda lsn, kind, key: kind == "log"),
        ({"key": b"k3"}, lambda lsn, kind, key: key == b"k3"),
        ({"first_lsn": 11}, lambda lsn, kind, key: lsn >= 11),
        ({"last_lsn": 11}, lambda lsn, kind, key: lsn <= 11),
        (
            {"first_lsn": 12, "last_lsn": 20, "kind": "put"},
            lambda lsn, kind, key: 12 <= lsn <= 20 and kind == "put",
        ),
        ({"first_lsn": 12, "last_lsn": 11}, lambda lsn, kind, key: False),
        ({"kind": "nothing"}, lambda lsn, kind, key: False),
        ({"pending_only": True}, lambda lsn, kind, key: True),
    ],
    ids=["kind", "key", "from", "to", "together", "empty", "unknown kind", "pending"],
)
def test_operations_can_be_filtered(
    tmp_path: Path, filters: dict[str, object], wanted: Callable[[int, str, bytes], bool]
) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), count=15)
    expected = [lsn for lsn, (kind, key, _) in made.submitted.items() if wanted(lsn, kind, key)]
    assert [operation.lsn for operation in operations(made.path, **filters)] == expected  # type: ignore[arg-type]


def test_operations_before_damage_are_shown_before_it_is_reported(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + 100)
    found: list[int] = []
    with pytest.raises(CorruptionError, match=r"4\.seg") as caught:
        found.extend(operation.lsn for operation in operations(made.path))
    assert found == list(range(1, 10))
    assert caught.value.offset == SECTOR


# --- what was given up -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [True, False], ids=["locked", "unlocked"])
def test_what_was_given_up_is_not_pending_although_no_checkpoint_knows(tmp_path: Path, lock: bool) -> None:
    made = make_fates(tmp_path / "q")
    found = look(made.path, full=True, lock=lock).store
    assert found.pending == len(made.pending)
    assert {kind: lane.pending for kind, lane in found.lanes.items()} == {"put": 10, "log": 9}
    assert found.passed_over == len(made.dead) + len(made.cancelled)
    before = found.settled_lsn
    assert before == 0, "or else this proves nothing"


def test_what_was_given_up_is_shown_as_settled(tmp_path: Path) -> None:
    made = make_fates(tmp_path / "q")
    assert {found.lsn for found in operations(made.path, pending_only=True)} == made.pending
    assert {found.lsn for found in operations(made.path) if found.settled} == made.dead | made.cancelled


def test_the_next_opening_delivers_what_a_look_calls_pending(tmp_path: Path) -> None:
    made = make_fates(tmp_path / "q")
    pending = {found.lsn for found in operations(made.path, pending_only=True)}
    assert {lsn for lsn, _, _ in deliver(made.path, kinds={"put": 2, "log": 2})} == pending


def test_what_was_given_up_and_checkpointed_is_not_counted_twice(tmp_path: Path) -> None:
    made = make_fates(tmp_path / "q")
    deliver(made.path, kinds={"put": 2})
    found = look(made.path, full=True).store
    assert (found.pending, found.lanes["put"].pending, found.lanes["log"].pending) == (9, 0, 9)


def test_an_operation_whose_letter_is_damaged_is_pending_as_long_as_the_log_has_it(tmp_path: Path) -> None:
    made = make_fates(tmp_path / "q")
    tamper(made.path / "state", "letters", key_of(2), flip_value)
    assert {found.lsn for found in operations(made.path, pending_only=True)} == made.pending | {2}
    found = look(made.path, full=True).store
    assert found.pending == len(made.pending) + 1
    assert {lsn for lsn, _, _ in deliver(made.path, kinds={"put": 2, "log": 2})} == made.pending | {2}


def test_a_letter_that_was_submitted_again_is_no_letter_any_more(tmp_path: Path) -> None:
    made = make_fates(tmp_path / "q")
    requeue_half(tmp_path / "cut", 2, work=made.path)
    before = picture(tmp_path / "cut")
    assert [letter.lsn for letter in dead_letters(tmp_path / "cut")[0]] == [5]
    assert picture(tmp_path / "cut") == before
    with wb.Engine.open(tmp_path / "cut", lanes={"put": wb.Lane(None, shards=2)}, settings=TINY) as engine:
        assert [letter.lsn for letter in engine.dead_letters()] == [5]


# --- it leaves no trace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [True, False], ids=["locked", "unlocked"])
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("damaged", [True, False], ids=["damaged", "sound"])
def test_a_look_writes_nothing(tmp_path: Path, lock: bool, clean: bool, damaged: bool) -> None:
    made = make_store(tmp_path / "q", clean=clean)
    if damaged:
        flip(made.segments[3], SECTOR + 100)
    before = picture(made.path)
    assert "state/lock.mdb" in before
    look(made.path, full=True, lock=lock)
    remembered_lanes(made.path)
    if not damaged:
        assert len(list(operations(made.path))) == 30
    assert picture(made.path) == before


GAZE = """
import sys, threading
from walbatch.inspection import look, operations, remembered_lanes
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
count = 0
while not stop.is_set():
    found = look(sys.argv[1]).store
    assert found.refusal is None, found.refusal
    remembered_lanes(sys.argv[1])
    list(operations(sys.argv[1]))
    count += 1
print(count)
"""


def test_an_engine_can_start_at_any_moment_of_a_look(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", count=3)
    environment = {**os.environ, "PYTHONPATH": str(Path(wb.__file__).parent.parent)}
    gazers = [
        subprocess.Popen(
            [sys.executable, "-c", GAZE, str(made.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for _ in range(2)
    ]
    try:
        for _ in range(30):
            lane = wb.Lane(Recorder(), shards=2, trigger=FAST)
            with wb.Engine.open(made.path, lanes={"put": lane}, settings=TINY) as engine:
                engine.submit("put", key=b"k")
    finally:
        counts = [int(gazer.communicate(timeout=60)[0] or 0) for gazer in gazers]
    assert [gazer.returncode for gazer in gazers] == [0, 0]
    assert all(count > 3 for count in counts), "they were at it"


def test_a_look_with_the_lock_is_refused_while_an_engine_has_it(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}):
        assert look(tmp_path / "q").store.live
        with pytest.raises(StoreLocked, match=str(os.getpid())):
            look(tmp_path / "q", lock=True)
    assert not look(tmp_path / "q", lock=True).store.live


# --- beside a live engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["growing", "trimming"])
@pytest.mark.parametrize("segment_bytes", [4096, 256 * 1024], ids=["small segments", "large segments"])
def test_a_look_at_a_store_that_is_written_to_finds_it_sound(
    tmp_path: Path, segment_bytes: int, held: bool
) -> None:
    settings = replace(TINY, segment_bytes=segment_bytes, timer_ms=1, checkpoint_ms=1)
    lane = wb.Lane(None if held else Recorder(), shards=2, trigger=FAST)
    stop = threading.Event()
    allowed = [30]
    with wb.Engine.open(tmp_path / "q", lanes={"put": lane}, settings=settings) as engine:
        engine.submit("put", key=b"first")

        def write(thread: int) -> None:
            number = 0
            while not stop.is_set():
                if number >= allowed[0]:  # each look reads all of the log: it must not outgrow a slow machine
                    stop.wait(0.001)
                    continue
                number += 1
                engine.submit_many(
                    "put", [(b"%d-%d" % (thread, number), bytes(PAYLOAD_BYTES * (number % 20)))] * 3
                )

        writers = [threading.Thread(target=write, args=(n,)) for n in range(3)]
        for writer in writers:
            writer.start()
        try:
            reached = 0
            for number in range(40):
                allowed[0] += 30
                durable = engine.stats().durable_lsn
                found = look(tmp_path / "q", full=number % 2 == 0)
                assert found.store.refusal is None, found.store.refusal
                assert found.problems == ()
                assert found.store.live
                assert not [
                    case for case in found.store.cases if case.label not in {"W1", "W10", "W11", "S7"}
                ]
                assert found.store.durable_lsn >= durable
                assert found.store.durable_lsn >= reached
                reached = found.store.durable_lsn
                lsns = [
                    operation.lsn for operation in operations(tmp_path / "q", first_lsn=max(1, reached - 200))
                ]
                assert lsns == sorted(set(lsns))
                if held:  # else they may be trimmed before they are read
                    assert lsns[-1] >= reached
        finally:
            stop.set()
            for writer in writers:
                writer.join()


def test_damage_is_found_beside_a_live_engine(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}, settings=TINY) as engine:
        for number in range(20):
            engine.submit("put", key=b"%d" % number, payload=bytes(PAYLOAD_BYTES))
        segments = sorted((tmp_path / "q" / "wal").glob("*.seg"))
        flip(segments[2], SECTOR + 100)
        found = look(tmp_path / "q", full=True).store
        assert isinstance(found.refusal, CorruptionError)
        assert [case.label for case in found.cases if case.segment == 3] == ["W6"]
        engine.close(drain=False)


def test_a_write_in_motion_is_no_torn_tail(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}, settings=TINY) as engine:
        engine.submit("put", key=b"k")
        segment = max((tmp_path / "q" / "wal").glob("*.seg"))
        with segment.open("r+b") as file:
            file.seek(3 * SECTOR)
            file.write(b"half of a frame")
        assert not [case for case in look(tmp_path / "q", full=True).store.cases if case.is_noteworthy]
        engine.close(drain=False)
    # Nobody is writing any more, so it is what it looks like.
    found = look(tmp_path / "q", full=True).store
    assert [case.label for case in found.cases if case.is_noteworthy] in ([], ["W9"])


# --- what is no store ------------------------------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("not a directory")


def a_directory_of_something_else(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (a_file, "is a file"),
        (Path.mkdir, "holds no store"),
        (a_directory_of_something_else, "holds no store"),
    ],
    ids=["nothing", "a file", "an empty directory", "another directory"],
)
def test_a_path_that_is_no_store_is_said_to_be_none(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "q"
    make(path)
    for call in (find_store, look, lambda path: list(operations(path))):
        with pytest.raises(ConfigError, match=says):
            call(path)


def test_a_store_without_its_identity_is_corrupt_and_not_absent(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", count=3)
    (made.path / "identity").unlink()
    found = look(made.path).store
    assert isinstance(found.refusal, CorruptionError)
    assert [case.label for case in found.cases] == ["S1"]


def test_a_newer_identity_is_a_newer_format(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", count=3)
    newer_identity(made)
    assert isinstance(look(made.path).store.refusal, UnsupportedFormat)
    with pytest.raises(UnsupportedFormat):
        list(operations(made.path))


def newer_identity(made: Made) -> None:
    """Let the identity say that its store has the format after this one."""
    data = bytearray((made.path / "identity").read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    data[-4:] = crc32c(bytes(data[:-4]), 0).to_bytes(4, "little")
    (made.path / "identity").write_bytes(data)


def test_a_disk_that_cannot_be_read_is_an_io_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "q", count=3)

    def fail(path: str) -> None:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(RealFileSystem, "open_read", lambda self, path: fail(path))
    with pytest.raises(StorageError, match="Input/output error"):
        look(made.path)


def test_a_store_that_is_looked_at_delivers_as_if_it_had_not_been(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", clean=False)
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    look(made.path, full=True, lock=True)
    assert sorted(deliver(made.path, kinds={"put": 2})) == sorted(deliver(copy, kinds={"put": 2}))
