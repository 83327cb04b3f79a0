"""The state of a store: what survives which damage, and that nothing wrong is ever believed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.storage.states import OTHER, STORE, tamper
from walbatch import limits
from walbatch.core.checksum import crc32c
from walbatch.errors import ConfigError, CorruptionError, EngineClosed, StorageError, UnsupportedFormat
from walbatch.ports import StateStore
from walbatch.storage import envelope, statefile, statefolder
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.envelope import (
    ForeignValueError,
    decode_checkpoint,
    decode_lane,
    encode_checkpoint,
    encode_lane,
    seal,
    unseal,
)
from walbatch.types import Checkpoint, LaneMark, LaneMemory, Mark

ROOT = Path(__file__).resolve().parents[2]
LANES = {
    "put": LaneMemory(name="put", shards=4, url="lmdb:///data/blocks"),
    "notify": LaneMemory(name="notify", shards=1),
}


def checkpoint(generation: int, **fields: Any) -> Checkpoint:
    values: dict[str, Any] = {
        "generation": generation,
        "epoch": 3,
        "watermark": 100 * generation,
        "durable_lsn": 100 * generation + 9,
        "segment": 5,
        "settled_count": 90 * generation,
        "lanes": {"put": LaneMark(shards=(Mark(epoch=3, watermark=7, ranges=((9, 9), (12, 20))), Mark()))},
    }
    return Checkpoint(**values | fields)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "state"


@pytest.fixture(autouse=True)
def _store(path: Path) -> None:
    path.parent.mkdir()


def opened(path: Path, **options: Any) -> LmdbState:
    return LmdbState.open_for_engine(str(path), STORE, str(path.parent / "quarantine"), **options)


def saved(path: Path, *generations: int, lanes: bool = True) -> None:
    state = opened(path)
    for generation in generations:
        state.save_checkpoint(checkpoint(generation))
    if lanes:
        state.save_lanes(LANES)
    state.close()


def loaded(path: Path, **options: Any) -> tuple[int | None, list[str]]:
    """The generation that is loaded, and all findings."""
    state = LmdbState.open(str(path), STORE, **options)
    try:
        found, findings = state.load_checkpoint()
        _, lane_findings = state.load_lanes()
    finally:
        state.close()
    return found.generation if found else None, [*findings, *lane_findings]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: times of change and contents."""
    return {
        str(file.relative_to(folder)): (
            file.lstat().st_mtime_ns,
            file.read_bytes() if file.is_file() else b"",
        )
        for file in sorted(folder.rglob("*"))
    }


def run(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script with the package in its path."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


# --- saving and loading -------------------------------------------------------------------------------------------


def test_it_is_a_state_store(path: Path) -> None:
    state: StateStore = opened(path)
    state.close()


def test_a_new_store_has_no_checkpoint_and_nothing_is_wrong_with_it(path: Path) -> None:
    state = opened(path)
    assert state.load_checkpoint() == (None, [])
    assert state.load_lanes() == ({}, [])
    state.close()
    assert loaded(path, readonly=True) == (None, [])


def test_what_was_saved_is_loaded_by_the_next_opener(path: Path) -> None:
    saved(path, 1, 2)
    state = opened(path)
    assert state.load_checkpoint() == (checkpoint(2), [])
    assert state.load_lanes() == (LANES, [])
    state.close()


def test_a_save_replaces_the_older_of_two_generations(path: Path) -> None:
    saved(path, 1, 2, 3)
    tamper(path, "checkpoint", b"1", lambda _: None)
    assert loaded(path, readonly=True) == (2, [])


def test_lanes_that_are_not_saved_again_stay(path: Path) -> None:
    state = opened(path)
    state.save_lanes({"put": LANES["put"]})
    state.save_lanes({"notify": LANES["notify"]})
    state.save_lanes({})
    assert state.load_lanes() == (LANES, [])
    state.close()


def test_directories_and_files_are_for_their_owner_only(path: Path) -> None:
    saved(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_the_map_grows_until_a_checkpoint_fits(path: Path) -> None:
    ranges = tuple((2 * lsn, 2 * lsn) for lsn in range(1, 20_000))
    large = checkpoint(1, lanes={"put": LaneMark(shards=(Mark(ranges=ranges),) * 3)})
    state = LmdbState.open(str(path), STORE, map_bytes=64 * limits.KIB)
    state.save_checkpoint(large)
    assert state.load_checkpoint() == (large, [])
    state.close()
    # Opened with a map that is exactly full.
    state = LmdbState.open(str(path), STORE, map_bytes=64 * limits.KIB)
    state.save_checkpoint(checkpoint(2))
    assert state.load_checkpoint()[0] == checkpoint(2)
    state.close()


def test_a_map_that_may_not_grow_ends_in_a_storage_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statefile, "MAP_BYTES_MAX", 256 * limits.KIB)
    state = LmdbState.open(str(path), STORE, map_bytes=64 * limits.KIB)
    ranges = tuple((2 * lsn, 2 * lsn) for lsn in range(1, 50_000))
    with pytest.raises(StorageError, match="MAP_FULL"):
        state.save_checkpoint(checkpoint(1, lanes={"put": LaneMark(shards=(Mark(ranges=ranges),))}))
    state.close()


def test_closing_twice_is_fine_and_a_closed_state_saves_nothing(path: Path) -> None:
    state = opened(path)
    state.close()
    state.close()
    with pytest.raises(EngineClosed, match="closed"):
        state.save_checkpoint(checkpoint(1))


def test_its_repr_shows_its_state_in_one_line(path: Path) -> None:
    state = opened(path)
    assert re.fullmatch(r"<LmdbState \S+ writable, <StateFile \S+ writable, transaction \d+>>", repr(state))
    state.close()
    assert repr(state) == f"<LmdbState {path} closed, no file>"


# --- damage -------------------------------------------------------------------------------------------------------


def flip(value: bytes) -> bytes:
    return value[:-9] + bytes([value[-9] ^ 4]) + value[-8:]


def cut_file(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / "data.mdb", size)


def overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with (path / "data.mdb").open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def swap_generations(path: Path) -> None:
    values: list[bytes] = []
    for key in (b"0", b"1"):
        tamper(path, "checkpoint", key, lambda value: values.append(value) or value)  # type: ignore[func-returns-value]
    tamper(path, "checkpoint", b"0", lambda _: values[1])
    tamper(path, "checkpoint", b"1", lambda _: values[0])


def replace_by_link(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        target = path.parent / "elsewhere"
        (path / name).rename(target)
        (path / name).symlink_to(target)

    return damage


def replace_data_by_directory(path: Path) -> None:
    (path / "data.mdb").unlink()
    (path / "data.mdb").mkdir()


def replace_state_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"not a directory")


def replace_state_by_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def value(key: bytes, generation: int, store: bytes = STORE) -> Callable[[bytes], bytes]:
    return lambda _: seal(key, encode_checkpoint(checkpoint(generation)), store)


def both(change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tamper(path, "checkpoint", b"0", change)
        tamper(path, "checkpoint", b"1", change)

    return damage


def foreign_state(path: Path) -> None:
    for key in (b"0", b"1"):
        tamper(path, "checkpoint", key, value(key, 8 + int(key), OTHER))


# Situation: how to damage generations 6 and 7; the generation that must survive; a finding (None: nothing is wrong).
DAMAGE: dict[str, tuple[Callable[[Path], object], int | None, str | None]] = {
    "no damage": (lambda path: None, 7, None),
    "the newest generation": (lambda p: tamper(p, "checkpoint", b"1", flip), 6, "b'1'.*checksum"),
    "the older generation": (lambda p: tamper(p, "checkpoint", b"0", flip), 7, "b'0'.*checksum"),
    "the newest generation is cut": (
        lambda p: tamper(p, "checkpoint", b"1", lambda v: v[:40]),
        6,
        "damaged",
    ),
    "the newest generation is empty": (lambda p: tamper(p, "checkpoint", b"1", lambda _: b""), 6, "0 bytes"),
    "both generations": (both(flip), None, "checksum"),
    "generations swapped": (swap_generations, None, "checksum"),
    "another store's value": (
        lambda p: tamper(p, "checkpoint", b"1", value(b"1", 9, OTHER)),
        6,
        f"belongs to the store {OTHER.hex()}",
    ),
    "another store's state": (foreign_state, None, "belongs to the store"),
    "a generation in the wrong slot": (
        lambda p: tamper(p, "checkpoint", b"1", value(b"1", 8)),
        6,
        "generation 8",
    ),
    "an unknown key": (lambda p: tamper(p, "checkpoint", b"2", value(b"2", 8)), 7, "b'2'"),
    "a sound envelope around nonsense": (
        lambda p: tamper(p, "checkpoint", b"1", lambda _: seal(b"1", b"nonsense", STORE)),
        6,
        "too early",
    ),
    "a lane's memory": (lambda p: tamper(p, "lanes", b"put", flip), 7, "lane b'put'.*damaged"),
    "a lane's name that is no text": (
        lambda p: tamper(p, "lanes", b"\xff", lambda _: seal(b"\xff", encode_lane(LANES["put"]), STORE)),
        7,
        "not usable",
    ),
    "a lane's memory that is too long": (
        lambda p: tamper(p, "lanes", b"put", lambda _: bytes(envelope.LANE_BYTES_MAX + 100)),
        7,
        "no value of ours is that long",
    ),
    "file cut in the middle": (cut_file(5 * 4096), None, "state is damaged"),
    "file cut inside a page": (cut_file(5 * 4096 + 77), None, "state is damaged"),
    "file cut after the first page": (cut_file(4096), None, "state is damaged"),
    "file cut in the first page": (cut_file(100), None, "state is damaged"),
    "file emptied": (cut_file(0), None, None),
    "file gone": (lambda p: (p / "data.mdb").unlink(), None, None),
    "directory gone": (shutil.rmtree, None, None),
    "zeroed first page": (overwrite(0, bytes(4096)), None, "state is damaged"),
    "zeroed second page": (overwrite(4096, bytes(4096)), None, "state is damaged"),
    "garbage all over": (overwrite(0, b"\xa5" * 40_000), None, "state is damaged"),
    "a directory instead of the file": (replace_data_by_directory, None, "not a regular file"),
    "a link instead of the file": (replace_by_link("data.mdb"), None, "not a regular file"),
    "a link instead of the lock file": (replace_by_link("lock.mdb"), None, "not a regular file"),
    "a file instead of the directory": (replace_state_by_file, None, "not a directory"),
    "a link instead of the directory": (replace_state_by_link, None, "not a directory"),
    "garbage in the lock file": (lambda p: (p / "lock.mdb").write_bytes(b"\xa5" * 8192), 7, None),
    "no lock file": (lambda p: (p / "lock.mdb").unlink(), 7, None),
}


@pytest.mark.parametrize(("damage", "generation", "finding"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage(
    path: Path, damage: Callable[[Path], object], generation: int | None, finding: str | None
) -> None:
    saved(path, 6, 7)
    damage(path)
    elsewhere = path.parent / "elsewhere"
    kept = (
        snapshot(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes() if elsewhere.exists() else None
    )

    predicted = loaded(path, readonly=True)
    assert predicted[0] == generation
    assert bool(predicted[1]) == (finding is not None)
    if finding is not None:
        assert re.search(finding, predicted[1][0])

    state = opened(path)
    found, findings = state.load_checkpoint()
    findings += state.load_lanes()[1]
    assert (found.generation if found else None, len(findings)) == (generation, len(predicted[1]))
    quarantine = path.parent / "quarantine"
    suspect = finding is not None and "too long" not in finding and "that long" not in finding
    assert bool(quarantine.is_dir() and [*quarantine.glob("*.note")]) == suspect
    state.save_checkpoint(checkpoint(8))
    state.save_lanes(LANES)
    assert state.load_checkpoint()[0] == checkpoint(8)
    assert state.load_lanes()[0] == LANES
    state.close()
    if kept is not None:
        after = snapshot(elsewhere) if elsewhere.is_dir() else elsewhere.read_bytes()
        assert after == kept, "nothing outside the store was touched"


def test_a_damaged_file_is_moved_aside_whole_with_a_note(path: Path) -> None:
    saved(path, 6, 7)
    overwrite(0, b"\xa5" * 8192)(path)
    suspect = (path / "data.mdb").read_bytes()
    state = opened(path)
    _, findings = state.load_checkpoint()
    state.close()
    quarantine = path.parent / "quarantine"
    assert (quarantine / "state-1.data.mdb").read_bytes() == suspect
    assert str(path) in (quarantine / "state-1.note").read_text()
    assert str(quarantine / "state-1.note") in findings[0]
    assert stat.S_IMODE(quarantine.stat().st_mode) == 0o700


def test_what_was_moved_aside_before_is_never_replaced(path: Path) -> None:
    for fill in (b"\xa5", b"\x5a"):
        saved(path, 6, 7)
        overwrite(0, fill * 8192)(path)
        opened(path).close()
    quarantine = path.parent / "quarantine"
    assert (quarantine / "state-1.data.mdb").read_bytes().startswith(b"\xa5")
    assert (quarantine / "state-2.data.mdb").read_bytes().startswith(b"\x5a")


def test_a_damaged_value_is_kept_once_however_often_the_store_is_opened(path: Path) -> None:
    saved(path, 6, 7)
    values: list[bytes] = []
    tamper(path, "checkpoint", b"1", lambda found: values.append(flip(found)) or values[0])  # type: ignore[func-returns-value]
    for _ in range(3):
        opened(path).close()
    copies = [*(path.parent / "quarantine").glob("state-value-*.bytes")]
    assert [copy.read_bytes() for copy in copies] == values


def test_without_a_quarantine_a_damaged_file_is_left_alone_and_refused(path: Path) -> None:
    saved(path, 6, 7)
    overwrite(0, b"\xa5" * 8192)(path)
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(CorruptionError, match="move it aside"):
        LmdbState.open(str(path), STORE)
    assert (path / "data.mdb").read_bytes() == before


def test_a_newer_version_is_refused_and_nothing_is_changed(path: Path) -> None:
    def newer(key: bytes) -> Callable[[bytes], bytes]:
        covered = struct.pack("<4sI16s", envelope.MAGIC, 2, STORE) + b"whatever comes"
        return lambda _: covered + struct.pack("<I", crc32c(covered, crc32c(key, 0)))

    saved(path, 6, 7)
    tamper(path, "checkpoint", b"1", newer(b"1"))
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(UnsupportedFormat, match=r"version 2.*upgrade"):
        opened(path)
    with pytest.raises(UnsupportedFormat, match="version 2"):
        loaded(path, readonly=True)
    assert (path / "data.mdb").read_bytes() == before
    assert not (path.parent / "quarantine").exists()


PROBES = {
    "cut": 60,
    "bit in the first pages": 150,
    "bit in the heads of pages": 80,
    "bit anywhere": 80,
    "page": 80,
}


@pytest.mark.parametrize(("kind", "count"), PROBES.items())
def test_no_damaged_file_kills_its_reader_or_is_believed(tmp_path: Path, kind: str, count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.storage.state_probe", str(tmp_path), kind, "1", str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert sum(outcomes.values()) >= count
    assert outcomes.get("reported", 0) > 0
    assert outcomes.keys() <= {"sound", "reported", "stale", "harmless"}


# --- reading beside others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda path: None, overwrite(0, b"\xa5" * 8192), shutil.rmtree, both(flip)],
    ids=["sound", "damaged", "gone", "damaged values"],
)
def test_a_reader_writes_nothing_at_all(path: Path, damage: Callable[[Path], None]) -> None:
    saved(path, 6, 7)
    damage(path)
    if path.exists():
        (path / "lock.mdb").unlink()
    before = snapshot(path.parent)
    for options in ({"readonly": True}, {"readonly": True, "shared": True}):
        loaded(path, **options)
    assert snapshot(path.parent) == before


def test_a_reader_saves_nothing(path: Path) -> None:
    saved(path, 1)
    for shared in (False, True):
        state = LmdbState.open(str(path), STORE, readonly=True, shared=shared)
        with pytest.raises(EngineClosed, match="readonly"):
            state.save_checkpoint(checkpoint(2))
        state.close()


def test_a_live_state_can_be_read_in_the_same_process(path: Path) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    reader = LmdbState.open(str(path), STORE, readonly=True, shared=True)
    assert reader.load_checkpoint()[0] == checkpoint(1)
    with pytest.raises(EngineClosed, match="borrowed"):
        reader.save_checkpoint(checkpoint(2))
    reader.close()
    state.save_checkpoint(checkpoint(2))
    assert state.load_checkpoint()[0] == checkpoint(2)
    reader = LmdbState.open(str(path), STORE, readonly=True, shared=True)
    state.close()
    with pytest.raises(EngineClosed, match="closed"):
        reader.load_checkpoint()


READ = """
import sys
from walbatch.storage.checkpoint import LmdbState
state = LmdbState.open(sys.argv[1], bytes.fromhex(sys.argv[2]), readonly=True, shared=True)
found, findings = state.load_checkpoint()
print(found.generation, findings, sorted(state.load_lanes()[0]))
"""


def test_a_live_state_can_be_read_by_another_process(path: Path) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(4))
    state.save_lanes(LANES)
    done = run(READ, str(path), STORE.hex())
    assert (done.stdout, done.stderr) == ("4 [] ['notify', 'put']\n", "")
    state.save_checkpoint(checkpoint(5))
    state.close()


def test_a_second_writer_in_the_process_is_refused(path: Path) -> None:
    state = opened(path)
    with pytest.raises(StorageError, match="already open"):
        opened(path)
    state.save_checkpoint(checkpoint(1))
    state.close()


FORK = """
import os, sys
from walbatch.errors import EngineClosed
from walbatch.storage.checkpoint import LmdbState
state = LmdbState.open(sys.argv[1], bytes(16))
child = os.fork()
if child == 0:
    refused = 0
    for call in (state.load_checkpoint, state.load_lanes, lambda: state.save_checkpoint(None)):
        try:
            call()
        except (EngineClosed, AttributeError):
            refused += 1
    state.close()
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), state.load_checkpoint())
"""


def test_a_forked_child_can_use_nothing_of_it_and_does_no_harm(path: Path) -> None:
    done = run(FORK, str(path))
    assert (done.stdout, done.stderr) == ("3 (None, [])\n", "")


# --- failing disks ------------------------------------------------------------------------------------------------


def failing_with(code: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def large(generation: int) -> Checkpoint:
    """One that needs more room than is reserved."""
    ranges = tuple((2 * lsn, 2 * lsn) for lsn in range(1, 90_000))
    return checkpoint(generation, lanes={"put": LaneMark(shards=(Mark(ranges=ranges),))})


def test_a_full_disk_is_told_as_such_and_the_save_can_be_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", failing_with(errno.ENOSPC))
        with pytest.raises(StorageError, match="make room") as caught:
            state.save_checkpoint(large(2))
        assert caught.value.errno == errno.ENOSPC
        assert state.load_checkpoint()[0] == checkpoint(1)
        # A small one fits into what is reserved.
        state.save_checkpoint(checkpoint(2))
    state.save_checkpoint(large(3))
    assert state.load_checkpoint()[0] == large(3)
    state.close()


def test_after_any_other_failure_nothing_is_saved_any_more(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = opened(path)
    with monkeypatch.context() as broken:
        broken.setattr(os, "posix_fallocate", failing_with(errno.EIO))
        with pytest.raises(StorageError, match="check the disk") as caught:
            state.save_checkpoint(large(1))
        assert (caught.value.errno, caught.value.path) == (errno.EIO, str(path))
    with pytest.raises(StorageError, match="check the disk"):
        state.save_checkpoint(checkpoint(2))
    state.close()
    assert loaded(path) == (None, [])


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_room_does_without(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing_with(code))
    saved(path, 1, 2)
    assert loaded(path) == (2, [])


def test_the_lock_file_has_no_holes_that_a_full_disk_could_not_fill(path: Path) -> None:
    saved(path, 1)
    lock = (path / "lock.mdb").stat()
    assert lock.st_size == statefolder.LOCK_BYTES, "LMDB did not extend it"
    assert lock.st_blocks * 512 >= lock.st_size


def test_on_a_full_disk_lmdb_is_not_let_near_a_lock_file_with_holes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(path, 1)
    (path / "lock.mdb").unlink()
    (path / "lock.mdb").touch()
    os.truncate(path / "lock.mdb", statefolder.LOCK_BYTES)
    with monkeypatch.context() as full:
        full.setattr(statefolder, "DISK_FULL_BYTES", 2**62)
        for shared in (False, True):
            with pytest.raises(StorageError, match="make room") as caught:
                LmdbState.open(str(path), STORE, shared=shared)
            assert caught.value.errno == errno.ENOSPC
        assert loaded(path, readonly=True) == (1, [])
    saved(path, 2)


def test_a_lock_file_that_cannot_be_made_leaves_nothing_behind(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *_: 100)
        with pytest.raises(StorageError, match="make room"):
            opened(path)
    assert [*path.iterdir()] == []
    opened(path).close()


LIMITED = """
import resource, signal, sys
from walbatch.errors import StorageError
from walbatch.storage.checkpoint import LmdbState
sys.path.insert(0, sys.argv[2])
from tests.storage.test_checkpoint import checkpoint, large
import os, errno
def cannot(*_):
    raise OSError(errno.EOPNOTSUPP, "no")
os.posix_fallocate = cannot
state = LmdbState.open(sys.argv[1], bytes(16))
state.save_checkpoint(checkpoint(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        state.save_checkpoint(large(2))
    except StorageError as error:
        print(error.errno, str(error).startswith(sys.argv[1]))
print(state.load_checkpoint()[0].generation)
"""


def test_a_write_that_fails_inside_lmdb_is_an_error_and_the_last_checkpoint_stands(path: Path) -> None:
    done = run(LIMITED, str(path), str(ROOT))
    assert (done.stdout, done.stderr) == ("5 True\n5 True\n1\n", "")


def test_a_path_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="could not be made") as caught:
        LmdbState.open(str(tmp_path / "missing" / "state"), STORE)
    assert caught.value.errno == errno.ENOENT


SAVE_FOR_EVER = """
import sys
sys.path.insert(0, sys.argv[2])
from walbatch.storage.checkpoint import LmdbState
from tests.storage.test_checkpoint import STORE, checkpoint
state = LmdbState.open(sys.argv[1], STORE)
found, findings = state.load_checkpoint()
generation = found.generation if found else 0
while True:
    generation += 1
    state.save_checkpoint(checkpoint(generation))
    print(generation, flush=True)
"""


def test_a_checkpoint_that_was_saved_survives_kill_9(path: Path) -> None:
    generation = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(path), str(ROOT)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(30):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
        process.stdout.close()
        process.wait()
        assert acknowledged > generation
        found, findings = loaded(path, readonly=True)
        assert findings == []
        assert found is not None
        assert acknowledged <= found <= acknowledged + 1
        generation = found


# --- what can be stored -------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, limits.LSN_MAX)
NAMES = st.text(min_size=1, max_size=16).filter(lambda name: name.isprintable())


@st.composite
def marks(draw: st.DrawFn) -> Mark:
    edges = sorted(draw(st.lists(NUMBERS, unique=True, min_size=1, max_size=9)))
    ranges = tuple((edges[index], edges[index + 1]) for index in range(1, len(edges) - 1, 2))
    return Mark(epoch=draw(NUMBERS), watermark=edges[0], ranges=ranges)


checkpoints = st.builds(
    Checkpoint,
    generation=NUMBERS,
    epoch=NUMBERS,
    watermark=NUMBERS,
    durable_lsn=NUMBERS,
    segment=NUMBERS,
    settled_count=NUMBERS,
    lanes=st.dictionaries(
        NAMES,
        st.builds(LaneMark, shards=st.lists(marks(), min_size=1, max_size=5).map(tuple)),
        max_size=4,
    ),
)


@given(checkpoints)
def test_a_checkpoint_comes_back_as_it_was(value: Checkpoint) -> None:
    assert decode_checkpoint(encode_checkpoint(value)) == value


@given(checkpoints, st.data())
def test_no_flipped_bit_of_a_value_is_accepted(value: Checkpoint, data: st.DataObject) -> None:
    damaged = bytearray(seal(b"0", encode_checkpoint(value), STORE))
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="checksum"):
        unseal(b"0", bytes(damaged), STORE)


@given(checkpoints, st.data())
def test_changed_bytes_with_a_good_checksum_give_a_checkpoint_or_a_value_error(
    value: Checkpoint, data: st.DataObject
) -> None:
    body = bytearray(encode_checkpoint(value))
    for _ in range(data.draw(st.integers(1, 5))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = decode_checkpoint(bytes(body[: data.draw(st.integers(0, len(body)))]))
    except ValueError:
        return
    assert decode_checkpoint(encode_checkpoint(changed)) == changed


@given(st.binary(max_size=300))
def test_any_bytes_for_a_lane_give_its_memory_or_a_value_error(body: bytes) -> None:
    try:
        memory = decode_lane(b"put", body)
    except ValueError:
        return
    assert decode_lane(b"put", encode_lane(memory)) == memory


def test_a_value_is_bound_to_its_key_and_its_store() -> None:
    sealed = seal(b"0", b"body", STORE)
    assert unseal(b"0", sealed, STORE) == b"body"
    with pytest.raises(ValueError, match="checksum"):
        unseal(b"1", sealed, STORE)
    with pytest.raises(ForeignValueError, match=STORE.hex()):
        unseal(b"0", sealed, OTHER)


TOO_MUCH: dict[str, Checkpoint] = {
    "a negative number": checkpoint(1, watermark=-1),
    "a number beyond 63 bits": checkpoint(2**63),
    "too many lanes": checkpoint(1, lanes={f"lane {n}": LaneMark(shards=(Mark(),)) for n in range(65)}),
    "too many shards": checkpoint(1, lanes={"put": LaneMark(shards=(Mark(),) * 257)}),
    "no shards": checkpoint(1, lanes={"put": LaneMark(shards=())}),
    "a name that is too long": checkpoint(1, lanes={"x" * 65: LaneMark(shards=(Mark(),))}),
    "no name": checkpoint(1, lanes={"": LaneMark(shards=(Mark(),))}),
    "ranges that overlap": checkpoint(1, lanes={"put": LaneMark(shards=(Mark(ranges=((1, 5), (5, 6))),))}),
}


@pytest.mark.parametrize("value", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_checkpoint_that_could_not_be_read_back_is_not_written(path: Path, value: Checkpoint) -> None:
    state = opened(path)
    state.save_checkpoint(checkpoint(1))
    with pytest.raises(StorageError, match="cannot be stored"):
        state.save_checkpoint(value)
    assert state.load_checkpoint() == (checkpoint(1), [])
    state.close()


HOSTILE_LANES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "Expecting"),
    "not UTF-8": (b'{"shards": 1, "url": "\xff"}', "utf-8"),
    "nested without end": (b"[" * 20_000, "nested"),
    "not an object": (b"[]", "object"),
    "a name too many": (b'{"shards": 1, "url": null, "run": "x"}', "object"),
    "a name missing": (b'{"shards": 1}', "object"),
    "shards that are no number": (b'{"shards": "1", "url": null}', "whole number"),
    "shards that are true": (b'{"shards": true, "url": null}', "whole number"),
    "no shards": (b'{"shards": 0, "url": null}', "0 shards"),
    "too many shards": (b'{"shards": 257, "url": null}', "257 shards"),
    "an absurd number of shards": (b'{"shards": 1%s, "url": null}' % (b"0" * 5000), "limit|shards"),
    "a url that is no text": (b'{"shards": 1, "url": 7}', "printable"),
    "a url with control characters": (b'{"shards": 1, "url": "lmdb:\\u001b[2J"}', "printable"),
    "an empty url": (b'{"shards": 1, "url": ""}', "url"),
    "a url that is too long": (b'{"shards": 1, "url": "%s"}' % (b"x" * 4097), "4,097 bytes of a url"),
    "too many bytes": (b" " * 40_000, "40,000 bytes"),
}


@pytest.mark.parametrize(("body", "reason"), HOSTILE_LANES.values(), ids=HOSTILE_LANES.keys())
def test_a_hostile_lane_is_refused_with_its_reason(body: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_lane(b"put", body)


def test_every_lane_that_cannot_be_remembered_is_named_and_none_is_saved(path: Path) -> None:
    state = opened(path)
    with pytest.raises(ConfigError) as caught:
        state.save_lanes(
            {
                "put": LANES["put"],
                "far": LaneMemory(name="far", shards=1, url="x" * 5000),
                "wide": LaneMemory(name="wide", shards=257),
            }
        )
    assert [problem.split("'")[1] for problem in caught.value.problems] == ["far", "wide"]
    assert state.load_lanes() == ({}, [])
    state.close()


def test_more_lanes_than_a_store_may_have_are_reported(path: Path) -> None:
    state = opened(path)
    state.save_lanes(
        {f"lane {n}": LaneMemory(name=f"lane {n}", shards=1) for n in range(limits.KINDS_MAX + 3)}
    )
    lanes, findings = state.load_lanes()
    state.close()
    assert len(lanes) == limits.KINDS_MAX
    assert findings == ["more than 64 lanes are remembered: the rest is ignored"]


def test_more_entries_than_any_store_has_cost_bounded_memory(path: Path) -> None:
    saved(path, 1)
    with lmdb.open(str(path), max_dbs=8) as env, env.begin(db=env.open_db(b"lanes"), write=True) as txn:
        for number in range(5000):
            txn.put(b"z%05d" % number, b"?")
    generation, findings = loaded(path, readonly=True)
    assert generation == 1
    assert findings[0] == "state holds more than 256 entries in its table lanes: the rest is ignored"
    assert len(findings) < 300
