"""Writes one segment in the place of a damaged or missing one, and keeps what was there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from walbatch import limits
from walbatch.core.frame import EMPTY_BODY, FLAG_LOST, Body, FrameHeader, FrameType
from walbatch.ports import File, FileSystem
from walbatch.salvage.repair import Repair, opened
from walbatch.storage.layout import TEMPORARY_SUFFIX, Layout, sync_directory, sync_file, write_durably
from walbatch.storage.segment import SegmentWriter


def carry_out(fs: FileSystem, layout: Layout, repair: Repair) -> None:
    """Write one segment over the damaged one, or in the place of a missing one.

    Crash story: the note and the copy in quarantine/ are durable before the rename; the rename is atomic, and durable
    after the directory sync. A crash before it leaves the damage as it was, after it one segment less to repair.
    """
    path = layout.segment(repair.header.number)
    if not fs.is_directory(layout.quarantine):
        fs.make_directory(layout.quarantine)
        sync_directory(fs, layout.root)
    _quarantine(fs, layout, repair)
    temporary = path + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    target = fs.create(temporary)
    try:
        _write(fs, layout, repair, SegmentWriter(target, temporary, repair.header))
        sync_file(target, temporary)
        fs.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(temporary)
        raise
    finally:
        target.close()
    sync_directory(fs, layout.wal)


def _write(fs: FileSystem, layout: Layout, repair: Repair, writer: SegmentWriter) -> None:
    """The frames that are kept, voids between them, and a stamp: the proof that all of it was synced at once."""
    writer.write_header()
    gaps = iter([*repair.gaps, None])
    gap = next(gaps)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(opened(fs, layout, repair.header.number)) if repair.kept else None
        for whole in repair.kept:
            assert file is not None
            if gap is not None and gap[0] == writer.last_lsn + 1:
                _void(writer, *gap, flags=FLAG_LOST)
                gap = next(gaps)
            writer.append(
                _body(whole.header, whole.body(file)), type=whole.header.type, first_lsn=whole.header.first_lsn,
                span=whole.header.span, synced_lsn=repair.header.prev_last_lsn, wall_ns=whole.header.wall_ns,
                flags=whole.header.flags,
            )  # fmt: skip
    if gap is not None:
        _void(writer, *gap, flags=FLAG_LOST)
    if repair.last_lsn > writer.last_lsn:
        _void(writer, writer.last_lsn + 1, repair.last_lsn, flags=0)
    writer.stamp(next_lsn=writer.last_lsn + 1, flags=0, wall_ns=repair.header.created_wall_ns)


def _void(writer: SegmentWriter, first: int, last: int, *, flags: int) -> None:
    """LSNs that name no operation."""
    writer.append(
        EMPTY_BODY, type=FrameType.VOID, first_lsn=first, span=last - first + 1, synced_lsn=writer.header.prev_last_lsn,
        wall_ns=writer.header.created_wall_ns, flags=flags,
    )  # fmt: skip


def _body(header: FrameHeader, padded: bytes) -> Body:
    return Body(
        codec=header.codec, count=header.count, stored_bytes=header.stored_bytes, raw_bytes=header.raw_bytes, parts=(padded,),
        crc=header.body_crc,
    )  # fmt: skip


def _quarantine(fs: FileSystem, layout: Layout, repair: Repair) -> None:
    """Keep the damaged file, with a note of what is lost. A copy is made once, and never overwritten."""
    number = repair.header.number
    copy = 0
    while fs.exists(name := f"{layout.quarantine}/{number:019d}.seg.{copy}") and not (
        repair.exists and _is_same(fs, layout.segment(number), name)
    ):
        copy += 1
    lost = ", ".join(f"{first} to {last}" for first, last in repair.lost) or "none that was not settled"
    note = f"segment {number} was rebuilt by a salvage: {repair.reason}. LSNs that are lost: {lost}\n"
    write_durably(fs, f"{name}.note", note.encode())
    if not repair.exists or fs.exists(name):
        return
    temporary = name + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    with opened(fs, layout, number) as source:
        target = fs.create(temporary)
        try:
            for offset, data in _chunks(source):
                target.write([data], offset)
            sync_file(target, temporary)
        finally:
            target.close()
    fs.rename(temporary, name)
    sync_directory(fs, layout.quarantine)


def _is_same(fs: FileSystem, path: str, other: str) -> bool:
    """Whether two files hold the same bytes."""
    first, second = fs.open_read(path), fs.open_read(other)
    try:
        return first.size() == second.size() and all(
            data == second.read(len(data), offset) for offset, data in _chunks(first)
        )
    finally:
        first.close()
        second.close()


def _chunks(file: File) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file, a bounded piece at a time, each with its offset."""
    offset = 0
    while data := file.read(limits.SCAN_CHUNK_BYTES, offset):
        yield offset, data
        offset += len(data)
