"""Reading ahead: fewer system calls, and never bytes that are not the log's."""

from __future__ import annotations

import errno

import pytest

from tests.memory import MemoryFile, MemoryFileSystem
from tests.storage.test_log import SETTINGS, append, filled, new_store, open_log, payloads_of
from walbatch.core.frame import SECTOR
from walbatch.errors import CorruptionError, StorageError
from walbatch.storage.layout import Layout
from walbatch.storage.log import LogSettings
from walbatch.storage.reading import AHEAD_BYTES_MAX, AHEAD_BYTES_MIN
from walbatch.types import Position

LARGE = LogSettings(segment_bytes=64 * 2**20, compress_bytes_min=None, compress_level=1)


def watch(fs: MemoryFileSystem) -> list[str]:
    """The calls from now on."""
    calls: list[str] = []
    fs.fail = lambda call, path: calls.append(call)
    return calls


def test_small_frames_are_read_many_at_a_time() -> None:
    fs = new_store()
    log = open_log(fs, settings=LARGE)
    for number in range(1, 1001):
        append(log, b"%d" % number)
    calls = watch(fs)
    assert payloads_of(log) == {n: b"%d" % n for n in range(1, 1001)}
    assert calls.count("read") == -(-1000 * SECTOR // AHEAD_BYTES_MIN)


@pytest.mark.parametrize("size", [AHEAD_BYTES_MIN, 4 * AHEAD_BYTES_MIN, AHEAD_BYTES_MAX // 8 * 7])
def test_large_frames_are_read_in_one_piece_like_the_one_before(size: int) -> None:
    fs = new_store()
    log = open_log(fs, settings=LARGE)
    for number in range(1, 11):
        append(log, bytes([number]) * size)
    calls = watch(fs)
    assert payloads_of(log) == {n: bytes([n]) * size for n in range(1, 11)}
    assert calls.count("read") <= 10 + 1


def test_frames_of_all_sizes_come_back_whatever_came_before() -> None:
    log = open_log(new_store(), settings=LARGE)
    sizes = [0, 1, 3 * AHEAD_BYTES_MAX, 5, AHEAD_BYTES_MIN, 7, 2 * AHEAD_BYTES_MAX, AHEAD_BYTES_MAX, 1, 0]
    for number, size in enumerate(sizes):
        append(log, bytes([number]) * size)
    assert payloads_of(log) == {n + 1: bytes([n]) * size for n, size in enumerate(sizes)}


def test_what_is_appended_behind_what_was_read_ahead_is_seen() -> None:
    log = open_log(new_store(), settings=LARGE)
    position, lsn = Position(1, SECTOR), 0
    for number in range(1, 50):
        append(log, b"%d" % number)
        frame = log.read_frame(position, next_lsn=lsn)
        assert frame is not None
        assert list(frame.payloads) == [b"%d" % number]
        position, lsn = frame.next_position, frame.last_lsn + 1
        assert log.read_frame(position, next_lsn=lsn) is None


def test_a_place_that_cannot_be_read_harms_only_the_frame_that_stands_there() -> None:
    fs = new_store()
    log = open_log(fs, settings=LARGE)
    ends = [append(log, b"%d" % number).offset + SECTOR for number in range(1, 4)]
    read = MemoryFile.read

    def failing(file: MemoryFile, size: int, offset: int) -> bytes:
        if offset <= ends[1] < offset + size:
            raise OSError(errno.EIO, "bad sector")
        return read(file, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFile, "read", failing)
        position, lsn = Position(1, SECTOR), 0
        for _ in range(2):
            frame = log.read_frame(position, next_lsn=lsn)
            assert frame is not None
            position, lsn = frame.next_position, frame.last_lsn + 1
        with pytest.raises(StorageError, match="cannot read"):
            log.read_frame(position, next_lsn=lsn)
    assert len(payloads_of(log)) == 3


def test_a_closed_segment_is_not_read_beyond_its_end() -> None:
    fs = new_store()
    log = filled(fs)
    calls = watch(fs)
    found = payloads_of(log)
    assert len(found) == 30
    assert calls.count("read") == log.segment_count, "each of them fits into one read"
    assert calls.count("open_read") == log.segment_count


def test_damage_is_found_in_bytes_that_were_read_ahead() -> None:
    fs = new_store()
    log = open_log(fs, settings=SETTINGS)
    append(log, b"a")
    second = append(log, b"b")
    data = fs.files[Layout("/q").segment(1)].data
    data[second.offset + 100] ^= 1
    first = log.read_frame(Position(1, SECTOR), next_lsn=0)
    assert first is not None
    with pytest.raises(CorruptionError) as caught:
        log.read_frame(first.next_position, next_lsn=2)
    assert caught.value.offset == second.offset
