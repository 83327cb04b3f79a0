"""Gives up what is damaged, and says exactly what: the one place that changes a store which recovery refuses.

What is not here: guessing. A frame is kept only if its header and body are whole in their place; LSNs that
nothing names are listed as lost and stand as void frames from then on, so that later openings see a
contiguous log.

The idea needed to read it: a damaged segment is copied to quarantine/ as it is, rebuilt from its whole frames
under a temporary name, and replaced by a rename.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from walbatch import limits
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_LOST,
    SECTOR,
    Body,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
    check_body,
)
from walbatch.core.recovery import Decision, SegmentFacts, StoreFacts, decide_segment, make_plan, view_segment
from walbatch.core.scanner import read_frame_header
from walbatch.errors import ConfigError, StorageError
from walbatch.ports import File, FileSystem, StateStore
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import (
    TEMPORARY_SUFFIX,
    Layout,
    read_identity,
    sync_directory,
    sync_file,
    write_durably,
)
from walbatch.storage.segment import SegmentWriter
from walbatch.storage.store import collect_facts, storage_errors, take_lock
from walbatch.types import Range, merge_ranges

ROUNDS_MAX = 1_000_000
"""Segments that one salvage may rebuild: each round repairs one."""


def salvage_store(path: str | os.PathLike[str]) -> tuple[Range, ...]:
    """Rebuild every segment that recovery refuses; returns the LSN ranges that are lost.

    Some of the LSNs may have named no operation.

    The damaged files are in quarantine/ before anything is replaced; everything is durable at return. Running
    it again after a crash goes on where it stopped. Raises StorageError for damage it cannot work around
    (identity, state), StoreLocked.
    """
    root = os.path.realpath(os.fspath(path))
    fs = RealFileSystem()
    layout = Layout(root)
    with storage_errors(root):
        lock = take_lock(fs, layout, b"")
        try:
            return _salvage(fs, layout)
        finally:
            lock.release()


def _salvage(fs: FileSystem, layout: Layout) -> tuple[Range, ...]:
    _, uuid = read_identity(fs, layout)
    if uuid is None:
        raise StorageError(
            f"{layout.root} has no readable identity, and without it no byte of the log can be believed: restore the file "
            "'identity' from a copy",
            path=layout.identity,
        )  # fmt: skip
    fs.make_directory(layout.quarantine)
    state: StateStore = LmdbState.open(layout.state, uuid, readonly=True)
    lost: list[Range] = []
    try:
        for _ in range(ROUNDS_MAX):
            facts = collect_facts(fs, layout, state, full=True)
            refusal = make_plan(facts).refusal
            if refusal is None:
                return merge_ranges(lost, 0)
            if refusal.segment is None:
                raise StorageError(
                    f"{layout.root}: {refusal.message} ({refusal.label}); salvage has nothing to work with"
                )
            lost += _rebuild(fs, layout, facts, refusal.segment)
    finally:
        state.close()
    raise ConfigError(f"{layout.root} needs more than {ROUNDS_MAX:,} segments rebuilt")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whole:
    """A whole frame of a damaged segment."""

    offset: int
    header: FrameHeader


def _rebuild(fs: FileSystem, layout: Layout, facts: StoreFacts, number: int) -> list[Range]:
    """Replace segment `number` by one that holds its whole frames, and voids for what is lost.

    Crash story: the quarantine copy is durable before the rename; the rename is atomic, and durable after the
    directory sync. A crash before it leaves the damaged segment as it was.
    """
    index = next(i for i, segment in enumerate(facts.segments) if segment.number == number)
    segment = facts.segments[index]
    row = decide_segment(view_segment(facts, index))
    if row.decision is Decision.NEWER:
        raise StorageError(
            f"segment {number} has a newer format: upgrade walbatch", path=layout.segment(number)
        )
    before = facts.segments[index - 1] if index else None
    following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
    if row.label == "W4":
        # The segments between `before` and this one are gone: an empty one that names what it lost takes their place.
        assert segment.header is not None
        return _stand_in(fs, layout, before, segment.header)
    header = segment.header if segment.header is not None and segment.header.store == facts.store else None
    header = header or _header_from_neighbours(facts, index)
    _keep_copy(fs, layout, number)
    watermark = facts.checkpoint.watermark if facts.checkpoint else 0
    durable_lsn = facts.checkpoint.durable_lsn if facts.checkpoint else 0
    file = fs.open_read(layout.segment(number))
    try:
        whole = list(_whole_frames(file, header))
        named = max((frame.header.last_lsn for frame in whole), default=header.prev_last_lsn)
        end = following.prev_last_lsn if following else max(durable_lsn, named, header.prev_last_lsn)
        lost = _write_rebuilt(fs, layout.segment(number), header, file, whole, end, last=following is None)
    finally:
        file.close()
    return [(max(first, watermark + 1), last) for first, last in lost if last > watermark]


def _header_from_neighbours(facts: StoreFacts, index: int) -> SegmentHeader:
    """The header that a segment must have had, as its neighbours tell.

    Its frames validate only if the salt is right.
    """
    assert facts.store is not None
    before = facts.segments[index - 1] if index else None
    following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
    if following is None and before is None:
        raise StorageError(
            "the only segment's header is damaged, and nothing tells what it was: restore it from a copy"
        )
    model = following or (before.header if before else None)
    assert model is not None
    previous = before.header if before else None
    prev_last_lsn = before.last_lsn if before else 0
    return replace(
        model, store=facts.store, number=facts.segments[index].number, salt=following.prev_salt if following else model.salt,
        prev_number=before.number if before else 0, prev_salt=previous.salt if previous else 0, prev_last_lsn=prev_last_lsn,
        first_lsn=prev_last_lsn + 1,
    )  # fmt: skip


def _whole_frames(file: File, header: SegmentHeader) -> Iterator[_Whole]:
    """Every frame that is whole in its place, in LSN order and without overlap.

    Reads the file once, sector by sector.
    """
    size = file.size()
    offset = SECTOR
    reached = header.prev_last_lsn
    while offset < size:
        try:
            frame = read_frame_header(file.read, header=header, offset=offset)
            check_body(
                frame,
                file.read(frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES),
            )
        except FrameError:
            offset += SECTOR
            continue
        if frame.span and frame.first_lsn > reached:
            yield _Whole(offset=offset, header=frame)
            reached = frame.last_lsn
        offset += frame.total_bytes


def _write_rebuilt(
    fs: FileSystem, path: str, header: SegmentHeader, file: File, whole: list[_Whole], end: int, *, last: bool
) -> list[Range]:
    """Write the new segment over the old one's name; returns the lost ranges."""
    temporary = path + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    lost: list[Range] = []
    target = fs.create(temporary)
    try:
        writer = SegmentWriter(target, temporary, header)
        writer.write_header()
        for frame in whole:
            if frame.header.first_lsn > end:
                break
            if frame.header.first_lsn > writer.last_lsn + 1:
                lost.append((writer.last_lsn + 1, frame.header.first_lsn - 1))
                _void(writer, *lost[-1])
            padded = file.read(
                frame.header.total_bytes - limits.FRAME_HEADER_BYTES, frame.offset + limits.FRAME_HEADER_BYTES
            )
            writer.append(
                _body(frame.header, padded), type=frame.header.type, first_lsn=frame.header.first_lsn, span=frame.header.span,
                synced_lsn=header.prev_last_lsn, wall_ns=frame.header.wall_ns, flags=frame.header.flags,
            )  # fmt: skip
        if writer.last_lsn < end:
            lost.append((writer.last_lsn + 1, end))
            _void(writer, *lost[-1])
        if last:
            writer.stamp(next_lsn=writer.last_lsn + 1, flags=0, wall_ns=header.created_wall_ns)
        sync_file(target, temporary)
    finally:
        target.close()
    fs.rename(temporary, path)
    sync_directory(fs, path.rpartition("/")[0])
    return lost


def _stand_in(
    fs: FileSystem, layout: Layout, before: SegmentFacts | None, following: SegmentHeader
) -> list[Range]:
    """A segment in the place of missing ones."""
    if following.prev_number == 0:
        raise StorageError(
            f"segment {following.number} claims to be the first, but is not: restore the segments before it"
        )
    previous = before.header if before else None
    prev_last_lsn = before.last_lsn if before else 0
    header = replace(
        following, number=following.prev_number, salt=following.prev_salt, prev_number=before.number if before else 0,
        prev_salt=previous.salt if previous else 0, prev_last_lsn=prev_last_lsn, first_lsn=prev_last_lsn + 1,
    )  # fmt: skip
    path = layout.segment(header.number)
    if fs.exists(path):
        raise StorageError(
            f"{path} is another segment than the one after it expects: restore it from a copy", path=path
        )
    temporary = path + TEMPORARY_SUFFIX
    target = fs.create(temporary)
    try:
        writer = SegmentWriter(target, temporary, header)
        writer.write_header()
        _void(writer, header.first_lsn, following.prev_last_lsn)
        sync_file(target, temporary)
    finally:
        target.close()
    fs.rename(temporary, path)
    sync_directory(fs, layout.wal)
    return [(header.first_lsn, following.prev_last_lsn)]


def _void(writer: SegmentWriter, first: int, last: int) -> None:
    """Name LSNs that are given up."""
    writer.append(
        EMPTY_BODY, type=FrameType.VOID, first_lsn=first, span=last - first + 1, synced_lsn=writer.header.prev_last_lsn,
        wall_ns=writer.header.created_wall_ns, flags=FLAG_LOST,
    )  # fmt: skip


def _body(header: FrameHeader, padded: bytes) -> Body:
    return Body(
        codec=header.codec, count=header.count, stored_bytes=header.stored_bytes, raw_bytes=header.raw_bytes, padded=padded,
        crc=header.body_crc,
    )  # fmt: skip


def _keep_copy(fs: FileSystem, layout: Layout, number: int) -> None:
    """Copy a damaged segment to quarantine/ and make the copy durable. An earlier copy is never overwritten."""
    source = fs.open_read(layout.segment(number))
    copy = 0
    while fs.exists(name := f"{layout.quarantine}/{number:019d}.seg.{copy}"):
        copy += 1
    temporary = name + TEMPORARY_SUFFIX
    with contextlib.suppress(FileNotFoundError):
        fs.unlink(temporary)
    target = fs.create(temporary)
    try:
        offset = 0
        while data := source.read(limits.SCAN_CHUNK_BYTES, offset):
            target.write([data], offset)
            offset += len(data)
        sync_file(target, temporary)
    finally:
        source.close()
        target.close()
    fs.rename(temporary, name)
    sync_directory(fs, layout.quarantine)
    write_durably(fs, f"{name}.note", f"segment {number} as it was before a salvage rebuilt it\n".encode())
