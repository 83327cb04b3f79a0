"""One segment: how it appears, how it grows, how it ends."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable

import pytest

import walbatch as wb
from tests.core.segments import STORE, columns_of, segment_header
from tests.memory import MemoryFileSystem, fail_at
from walbatch.core.columns import decode_body, encode_body
from walbatch.core.frame import EMPTY_BODY, FLAG_CLEAN, SECTOR, FrameType, HeaderState
from walbatch.core.scanner import SegmentScan, Visit, scan_segment
from walbatch.storage import segment
from walbatch.storage.segment import FirstFrame, SegmentWriter, next_wanted_offset, read_footer, read_header

PATH = "/q/wal/0000000000000000001.seg"
SIZE = 8192


def empty() -> MemoryFileSystem:
    return MemoryFileSystem.of("/q", {})


def first_frame(*payloads: bytes) -> FirstFrame:
    return FirstFrame(
        body=encode_body(columns_of(payloads)), type=FrameType.OPERATIONS, first_lsn=1, span=len(payloads), synced_lsn=0,
        flags=0, kind_counts={"put": len(payloads)}, priority=5,
    )  # fmt: skip


def create(fs: MemoryFileSystem, *first: FirstFrame) -> SegmentWriter:
    return SegmentWriter.create(fs, PATH, segment_header(), segment_bytes=SIZE, wall_ns=1, first=list(first))


def append(writer: SegmentWriter, *payloads: bytes, kind: str = "put") -> int:
    body = encode_body(columns_of(payloads))
    return writer.append(
        body, type=FrameType.OPERATIONS, first_lsn=writer.last_lsn + 1, span=len(payloads), synced_lsn=writer.last_lsn,
        wall_ns=1, kind_counts={kind: len(payloads)}, priority=5,
    )  # fmt: skip


def scan(fs: MemoryFileSystem, visit: Visit | None = None) -> SegmentScan:
    data = bytes(fs.files[PATH].data)
    return scan_segment(
        lambda size, offset: data[offset : offset + size],
        header=segment_header(),
        file_bytes=len(data),
        visit=visit,
    )


def payloads_of(fs: MemoryFileSystem) -> list[bytes]:
    found: list[bytes] = []

    def visit(_offset: int, frame: object, padded: bytes) -> None:
        if frame.type is FrameType.OPERATIONS:  # type: ignore[attr-defined]
            found.extend(decode_body(frame, padded).payloads)  # type: ignore[arg-type]

    scan(fs, visit)
    return found


# --- appearing -------------------------------------------------------------------------------------------------------


def test_a_new_segment_has_its_header_and_its_first_frames_and_is_durable() -> None:
    fs = empty()
    writer = create(fs, first_frame(b"a", b"b"))
    assert (writer.last_lsn, writer.operations, writer.offset) == (2, 2, 2 * SECTOR)
    after = fs.after_power_cut()
    assert len(after.files[PATH].data) == SIZE
    assert read_header(after.open_read(PATH)) == (HeaderState.VALID, segment_header())
    assert payloads_of(after) == [b"a", b"b"]
    assert f"{PATH}.tmp" not in after.files
    assert "last lsn 2" in repr(writer)
    writer.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_segment_is_there_as_a_whole_or_not_at_all_whatever_call_fails(code: int) -> None:
    for number in itertools.count(1):
        fs = empty()
        fs.fail = fail_at(number, code, for_ever=False)
        with contextlib.suppress(OSError, wb.StorageError):
            create(fs, first_frame(b"a", b"b")).close()
        calls, fs.fail = len(fs.calls), None
        assert fs.open_files == 0
        for disk in (fs, fs.after_power_cut()):
            if PATH in disk.files:
                assert payloads_of(disk) == [b"a", b"b"]
        create(fs, first_frame(b"a", b"b")).close()
        assert payloads_of(fs.after_power_cut()) == [b"a", b"b"], "it can be tried again"
        if calls < number:
            break
    assert number > 7


def test_a_full_disk_may_still_have_room_for_a_small_segment() -> None:
    fs = empty()

    def full(call: str, path: str) -> None:
        if call == "preallocate":
            raise OSError(errno.ENOSPC, "no space", path)

    fs.fail = full
    writer = create(fs, first_frame(b"a"))
    append(writer, b"b")
    writer.sync()
    assert payloads_of(fs.after_power_cut()) == [b"a", b"b"]
    writer.close()


# --- growing ---------------------------------------------------------------------------------------------------------


def test_an_append_is_durable_after_the_sync_and_not_before() -> None:
    fs = empty()
    writer = create(fs)
    assert append(writer, b"a") == SECTOR
    assert payloads_of(fs.after_power_cut()) == []
    writer.sync()
    assert payloads_of(fs.after_power_cut()) == [b"a"]
    writer.close()


# --- zeros ahead ---


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> int:
    """Zeros are written 2 KiB ahead of frames of up to 1 KiB."""
    monkeypatch.setattr(segment, "AHEAD_BYTES", 2048)
    monkeypatch.setattr(segment, "AHEAD_FRAME_BYTES_MAX", 1024)
    return 2048


def written(fs: MemoryFileSystem) -> list[tuple[int, int]]:
    """Offset and length of each write that was not synced."""
    return [(offset, len(data)) for offset, data in fs.files[PATH].pending]


def test_zeros_go_ahead_of_small_frames_once_for_many_of_them(ahead: int) -> None:
    fs = empty()
    writer = create(fs)
    for _ in range(9):
        append(writer, b"a")
    early = [(at, 512) for at in (512, 1024, 1536)]
    assert written(fs) == [
        *early, (2048, 2048), *[(at, 512) for at in (2560, 3072, 3584)], (4096, 2048), (4608, 512),
    ]  # fmt: skip
    writer.sync()
    assert payloads_of(fs.after_power_cut()) == [b"a"] * 9
    assert writer.file_bytes == writer.offset == 10 * SECTOR
    writer.close()


def test_zeros_end_with_the_preallocated_room(ahead: int) -> None:
    fs = empty()
    writer = create(fs)
    for _ in range(17):
        append(writer, b"a")
    assert max(offset + size for offset, size in written(fs)) == writer.offset == SIZE + 2 * SECTOR
    assert len(fs.files[PATH].data) == writer.offset
    writer.close()


def test_large_frames_have_no_zeros_ahead(ahead: int) -> None:
    fs = empty()
    writer = create(fs)
    for _ in range(3):
        append(writer, bytes(1024))
    assert written(fs) == [(512, 1536), (2048, 1536), (3584, 1536)]
    writer.close()


def test_where_no_room_was_preallocated_there_are_no_zeros_ahead(ahead: int) -> None:
    fs = empty()

    def full(call: str, path: str) -> None:
        if call == "preallocate":
            raise OSError(errno.EDQUOT, "no space", path)

    fs.fail = full
    writer = create(fs)
    for _ in range(5):
        append(writer, b"a")
    assert len(fs.files[PATH].data) == writer.offset
    writer.close()


def test_a_write_that_failed_is_repeated_without_zeros_ahead(ahead: int) -> None:
    fs = empty()
    writer = create(fs)
    for number in range(3):
        append(writer, b"%d" % number)
    fs.fail = fail_at(1, errno.ENOSPC, for_ever=False)
    with pytest.raises(OSError, match="No space"):
        append(writer, b"3")
    writer.sync()
    assert append(writer, b"3") == 2048
    assert written(fs) == [(2048, 512)]
    writer.sync()
    assert payloads_of(fs.after_power_cut()) == [b"0", b"1", b"2", b"3"]
    writer.seal(wall_ns=1)
    assert scan(fs).sealed
    writer.close()


@pytest.mark.parametrize("sizes", [(10, 10), (5000, 10), (10, 5000)], ids=str)
def test_a_failed_append_has_moved_nothing_and_can_be_repeated(sizes: tuple[int, int]) -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"before")
    fs.fail = fail_at(1, errno.ENOSPC, for_ever=False)
    before = (writer.offset, writer.last_lsn, writer.operations)
    with pytest.raises(OSError, match="space"):
        append(writer, bytes(sizes[0]))
    assert (writer.offset, writer.last_lsn, writer.operations) == before
    append(writer, b"x" * sizes[1])
    append(writer, b"after")
    writer.seal(wall_ns=1)
    assert payloads_of(fs) == [b"before", b"x" * sizes[1], b"after"]
    assert len(writer.index().offsets) == 3
    writer.close()


def test_what_a_failed_append_left_behind_is_not_taken_for_a_frame() -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"before")
    fs.fail = fail_at(1, errno.ENOSPC, for_ever=False)
    with pytest.raises(OSError, match="space"):
        append(writer, b"y" * 3000)
    writer.sync()
    found = scan(fs.after_power_cut())
    assert found.last_lsn == 1
    assert found.damage is not None
    assert found.damage.evidence_lsn <= 1
    writer.close()


def test_a_stamp_proves_what_is_before_it() -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    assert [frame.header.first_lsn for frame in scan(fs).unproven] == [1]
    writer.sync()
    writer.stamp(next_lsn=2, flags=FLAG_CLEAN, wall_ns=1)
    found = scan(fs)
    assert found.unproven == ()
    assert found.clean
    assert found.proven_lsn == 1
    writer.close()


# --- ending ----------------------------------------------------------------------------------------------------------


def test_a_sealed_segment_says_what_it_holds_and_where() -> None:
    fs = empty()
    writer = create(fs)
    offsets = [append(writer, b"a"), append(writer, b"b" * 2000, kind="get"), append(writer, b"c", b"d")]
    writer.sync()
    writer.seal(wall_ns=1)
    writer.seal(wall_ns=2)
    size = len(fs.files[PATH].data)
    assert size % SECTOR == 0
    file = fs.open_read(PATH)
    found = read_footer(file, segment_header(), size)
    assert found is not None
    at, index = found
    assert at == writer.offset
    assert index.offsets == offsets
    assert index.last_lsn == 4
    assert index.operation_count == 4
    assert index.kind_totals() == {"put": 3, "get": 1}
    assert next_wanted_offset(index, 0, frozenset({"get"})) == offsets[1]
    assert next_wanted_offset(index, offsets[1] + 1, frozenset({"get"})) is None
    assert next_wanted_offset(index, offsets[1], frozenset({"put"})) == offsets[2]
    assert next_wanted_offset(index, 0, frozenset({"other"})) is None
    assert scan(fs).sealed
    assert read_footer(file, segment_header(salt=8), size) is None
    assert read_footer(file, segment_header(store=STORE[::-1]), size) is not None, (
        "the store is the header's business"
    )
    file.close()
    writer.close()


@pytest.mark.parametrize("cut", [1, 16, 17, SECTOR])
def test_a_footer_that_was_cut_is_none(cut: int) -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    writer.seal(wall_ns=1)
    data = fs.files[PATH].data
    del data[len(data) - cut :]
    file = fs.open_read(PATH)
    assert read_footer(file, segment_header(), len(data)) is None
    file.close()
    writer.close()


def test_a_payload_that_looks_like_a_footer_is_none() -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    writer.seal(wall_ns=1)
    footer = bytes(fs.files[PATH].data[-SECTOR:])
    again = empty()
    other = create(again)
    for shift in range(3):
        append(other, bytes(SECTOR * 2 - 64 - 33 - shift) + footer)
    other.cut()
    file = again.open_read(PATH)
    assert read_footer(file, segment_header(), file.size()) is None
    assert payloads_of(again)[0].endswith(footer)
    for closing in (file, writer, other):
        closing.close()


def failing(call: str, code: int) -> Callable[[str, str], None]:
    def fail(name: str, path: str) -> None:
        if name == call:
            raise OSError(code, "injected", path)

    return fail


@pytest.mark.parametrize("call", ["write", "truncate"])
def test_sealing_can_be_repeated_after_a_full_disk(call: str) -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    writer.sync()
    fs.fail = failing(call, errno.ENOSPC)
    with pytest.raises(OSError, match="injected"):
        writer.seal(wall_ns=1)
    assert scan(fs.after_power_cut()).last_lsn == 1
    fs.fail = None
    writer.seal(wall_ns=2)
    after = fs.after_power_cut()
    assert scan(after).sealed
    assert payloads_of(after) == [b"a"]
    writer.close()


def test_a_footer_whose_sync_failed_is_an_error_that_nobody_tries_again() -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    fs.fail = failing("datasync", errno.ENOSPC)
    with pytest.raises(wb.StorageError, match="sync"):
        writer.seal(wall_ns=1)
    writer.close()


def test_cutting_gives_back_what_was_preallocated() -> None:
    fs = empty()
    writer = create(fs)
    append(writer, b"a")
    writer.cut()
    assert len(fs.files[PATH].data) == 2 * SECTOR
    assert (
        writer.append(EMPTY_BODY, type=FrameType.VOID, first_lsn=2, span=9, synced_lsn=1, wall_ns=1)
        == 2 * SECTOR
    )
    assert scan(fs).last_lsn == 10
    writer.close()
