"""What an opening does to the files of the log, and what it takes over of them: the parts of carrying out recovery's plan.

What is not here: the plan (`core.recovery`), and the order of the steps (`log.Log.open`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from walbatch import limits
from walbatch.core.columns import decode_body
from walbatch.core.compaction import by_kind
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_COPIED,
    Body,
    FrameError,
    FrameHeader,
    FrameType,
    NewerFrameError,
    SegmentHeader,
    check_body,
)
from walbatch.core.recovery import Plan, StoreFacts, TornTail
from walbatch.errors import StorageError
from walbatch.ports import FileSystem
from walbatch.storage.layout import TEMPORARY_SUFFIX, Layout, keep_copy, write_durably
from walbatch.storage.reading import newer_frame
from walbatch.storage.segment import ClosedSegment, FirstFrame


def kind_counts(kinds: Sequence[str], kind_indexes: Sequence[int]) -> dict[str, int]:
    """Operations by kind."""
    if len(kinds) == 1:
        return {kinds[0]: len(kind_indexes)}
    indexes = list(kind_indexes)
    return {kind: indexes.count(index) for index, kind in enumerate(kinds)}


def highest(priorities: Sequence[int]) -> int:
    """The highest priority. Mostly all are the same, which is found out sooner."""
    first = priorities[0]
    return first if priorities.count(first) == len(priorities) else max(priorities)


def trimmed_lsn(facts: StoreFacts) -> int:
    """Without a checkpoint: what was trimmed, hence settled. The log itself has to go on telling it.

    The next checkpoint will begin below what is missing, and would make it look lost.
    """
    first = facts.segments[0].header if facts.segments else None
    return first.prev_last_lsn if first is not None else 0


def remove_temporary_files(fs: FileSystem, layout: Layout) -> None:
    """Remove what an interrupted creation left. No temporary file ever holds the only copy of anything."""
    for name in fs.list_directory(layout.wal):
        if name.endswith(TEMPORARY_SUFFIX):
            fs.unlink(f"{layout.wal}/{name}")


def quarantine(fs: FileSystem, layout: Layout, torn: TornTail) -> None:
    """Copy a torn tail out of its segment, with a note of where it came from. The segment itself stays as it is."""
    fs.make_directory(layout.quarantine)
    size = torn.end - torn.offset
    name = keep_copy(
        fs,
        layout.segment(torn.segment),
        f"{layout.quarantine}/{torn.segment:019d}-{torn.offset}",
        torn.offset,
        size,
    )
    note = f"segment {torn.segment}, offset {torn.offset}, {size} bytes: torn tail, never acknowledged ({torn.reason})\n"
    write_durably(fs, f"{name}.note", note.encode())


def cut_predecessor(fs: FileSystem, layout: Layout, closed: dict[int, ClosedSegment], number: int) -> None:
    """Give back the preallocated room of the segment that a crash left behind.

    Crash story: the new segment's header, which cuts the old one off at this very place, is durable. What stood behind it was
    copied to the new segment or to quarantine/. Whether the cut itself survives does not matter.
    """
    old = closed.get(number)
    if old is not None and old.file_bytes > old.end_offset:
        fs.truncate(layout.segment(number), old.end_offset)
        closed[number] = replace(old, file_bytes=old.end_offset)


def first_frames(fs: FileSystem, layout: Layout, plan: Plan) -> Iterator[FirstFrame]:
    """What the new segment starts with: unproven frames, the skipped LSNs, and the proof that they are durable.

    The stamp is honest although it is written with the rest: nobody sees the segment before all of it is synced.
    """
    next_lsn = plan.prev_last_lsn + 1
    if plan.copied:
        assert plan.prev is not None
        file = fs.open_read(layout.segment(plan.prev.number))
        try:
            for frame in plan.copied:
                size = frame.header.total_bytes - limits.FRAME_HEADER_BYTES
                padded = file.read(size, frame.offset + limits.FRAME_HEADER_BYTES)
                yield _copied_frame(frame.header, padded, plan, offset=frame.offset)
                next_lsn = frame.header.last_lsn + 1
        finally:
            file.close()
    if plan.next_lsn > next_lsn:
        yield FirstFrame(
            body=EMPTY_BODY, type=FrameType.VOID, first_lsn=next_lsn, span=plan.next_lsn - next_lsn, synced_lsn=plan.prev_last_lsn,
            flags=0, kind_counts={}, priority=0,
        )  # fmt: skip
    if plan.next_lsn > plan.prev_last_lsn + 1:
        yield FirstFrame(
            body=EMPTY_BODY, type=FrameType.STAMP, first_lsn=plan.next_lsn, span=0,
            synced_lsn=plan.next_lsn - 1, flags=0, kind_counts={}, priority=0,
        )  # fmt: skip


def _copied_frame(header: FrameHeader, padded: bytes, plan: Plan, *, offset: int) -> FirstFrame:
    """An unproven frame for its new place: the same body under a new header.

    Checked again, since it was read again.
    """
    try:
        check_body(header, padded)
        columns = decode_body(header, padded) if header.type is FrameType.OPERATIONS else None
    except NewerFrameError as error:
        assert plan.prev is not None
        raise newer_frame(f"segment {plan.prev.number}", offset, error) from error
    except FrameError as error:
        raise StorageError(
            f"the unproven tail reads differently the second time ({error}): check the disk"
        ) from error
    body = Body(
        codec=header.codec, count=header.count, stored_bytes=header.stored_bytes, raw_bytes=header.raw_bytes,
        parts=(padded,), crc=header.body_crc,
    )  # fmt: skip
    return FirstFrame(
        body=body, type=header.type, first_lsn=header.first_lsn, span=header.span, synced_lsn=plan.prev_last_lsn,
        flags=header.flags | FLAG_COPIED, kind_counts=kind_counts(columns.kinds, columns.kind_indexes) if columns else {},
        priority=max(columns.priorities) if columns else 0,
    )  # fmt: skip


def closed_segments(facts: StoreFacts, plan: Plan) -> dict[int, ClosedSegment]:
    """The segments of earlier incarnations, each up to where the next one cuts it off.

    A segment whose header cannot be read is there only if it is settled; it is taken for its place in the
    order, to be trimmed.
    """
    closed: dict[int, ClosedSegment] = {}
    for index, segment in enumerate(facts.segments):
        following = facts.segments[index + 1].header if index + 1 < len(facts.segments) else None
        last = index + 1 == len(facts.segments)
        last_lsn = plan.prev_last_lsn if last else following.prev_last_lsn if following else segment.last_lsn
        end = plan.copied[0].offset if last and plan.copied else segment.end_offset
        header = segment.header or SegmentHeader(
            store=facts.store or b"", salt=0, epoch=0, number=segment.number, first_lsn=1, prev_number=0, prev_salt=0,
            prev_last_lsn=0, operations_before=0, checkpointed_lsn=0, created_wall_ns=0,
        )  # fmt: skip
        closed[segment.number] = ClosedSegment(
            header=header, end_offset=end, last_lsn=last_lsn, file_bytes=segment.file_bytes,
            kinds=frozenset(segment.footer.kinds) if segment.footer else None,
            unsettled=by_kind(segment.footer.kind_totals()) if segment.footer else None,
        )  # fmt: skip
    return closed
