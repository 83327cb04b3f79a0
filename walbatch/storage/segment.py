"""One segment file: made, appended to, sealed, and read.

What is not here: which segment comes next and what may be removed (`log`).

The idea needed to read it: a segment appears under its name only when its header and its first frames are
synced, so a name in wal/ always stood for a valid segment; a bad header is damage, never an interrupted
creation.
"""

from __future__ import annotations

import bisect
import errno
from array import array
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.compaction import Unsettled
from walbatch.core.frame import (
    EMPTY_BODY,
    SECTOR,
    TRAILER_BYTES,
    Body,
    FrameError,
    FrameIndex,
    FrameType,
    HeaderState,
    SegmentHeader,
    decode_footer,
    decode_segment_header,
    encode_footer,
    encode_frame_header,
    encode_segment_header,
    footer_offset,
    frame_seed,
)
from walbatch.core.scanner import read_frame_header
from walbatch.ports import File, FileSystem
from walbatch.storage.layout import TEMPORARY_SUFFIX, sync_directory, sync_file

AHEAD_BYTES: Final = 128 * limits.KIB
"""Room that is filled with zeros at once, ahead of the frames."""
AHEAD_FRAME_BYTES_MAX: Final = 48 * limits.KIB
"""Larger frames write more than they save: see docs/decisions/0013-prepared-segments.md for what was measured."""
_ZEROS: Final = bytes(AHEAD_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstFrame:
    """A frame that a new segment starts with."""

    body: Body
    type: FrameType
    first_lsn: int
    span: int
    synced_lsn: int
    flags: int
    kind_counts: dict[str, int]
    priority: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClosedSegment:
    """A segment that nobody appends to: up to `end_offset` its frames count, up to `last_lsn`.

    A compaction puts another one in its place, with another header. So its header is what tells one from the other.
    """

    header: SegmentHeader
    end_offset: int
    last_lsn: int
    file_bytes: int
    kinds: frozenset[str] | None
    """Kinds that it holds operations of, where that is known."""
    unsettled: Unsettled | None
    """Operations that were not settled when it was written, or looked at last; None: nobody knows."""
    damaged: bool = False
    """A compaction could not read it, and leaves it alone. Who needs what is in it will say so."""


class SegmentWriter:
    """The active segment. One thread at a time.

    It keeps an index of its frames in arrays (25 bytes a frame and kind), which becomes the seal footer.
    """

    def __init__(self, file: File, path: str, header: SegmentHeader) -> None:
        self._file = file
        self.path = path
        self.header = header
        # (offset of the next frame, last LSN, operations, frames): replaced as a whole, last, so that an
        # append which a signal handler's exception interrupts has either happened or not, and can be
        # repeated.
        self._tail = (SECTOR, header.prev_last_lsn, 0, 0)
        self._offsets = array("I")
        self._first_lsns = array("Q")
        self._priorities = array("B")
        self._kinds: dict[str, int] = {}
        self._counts: list[tuple[int, int, int]] = []
        self._sealed_bytes = 0
        # Up to _filled_end frames or zeros were written; up to _room_end the file is preallocated.
        self._filled_end = SECTOR
        self._room_end = 0

    def __repr__(self) -> str:
        return f"<SegmentWriter {self.header.number} at {self.offset}, last lsn {self.last_lsn}>"

    @property
    def offset(self) -> int:
        """Where the next frame goes."""
        return self._tail[0]

    @property
    def file_bytes(self) -> int:
        """Bytes of the file as far as it is written, its footer included once it is sealed."""
        return self._sealed_bytes or self.offset

    @property
    def last_lsn(self) -> int:
        """The last LSN in the segment; prev_last_lsn while it has none."""
        return self._tail[1]

    @property
    def operations(self) -> int:
        """Operations in the segment."""
        return self._tail[2]

    @classmethod
    def create(
        cls,
        fs: FileSystem,
        path: str,
        header: SegmentHeader,
        *,
        segment_bytes: int,
        wall_ns: int,
        first: list[FirstFrame],
    ) -> SegmentWriter:
        """Make the segment with its first frames and make both it and its name durable.

        Crash story: everything is written and synced under a temporary name, then renamed, then the directory
        is synced. Before the rename is durable the segment does not exist (a left-over temporary file is
        removed by the next open); after it the segment is whole. Only then may anything be acknowledged in
        it.
        """
        temporary = path + TEMPORARY_SUFFIX
        if fs.exists(temporary):
            fs.unlink(temporary)
        file = fs.create(temporary)
        try:
            writer = cls(file, path, header)
            writer._room_end = _preallocate(file, segment_bytes)
            writer.write_header()
            for frame in first:
                writer.append(
                    frame.body, type=frame.type, first_lsn=frame.first_lsn, span=frame.span, synced_lsn=frame.synced_lsn,
                    wall_ns=wall_ns, flags=frame.flags, kind_counts=frame.kind_counts, priority=frame.priority,
                )  # fmt: skip
            sync_file(file, temporary)
            fs.rename(temporary, path)
            sync_directory(fs, path.rpartition("/")[0])
        except BaseException:
            file.close()
            raise
        return writer

    def write_header(self) -> None:
        """Write the first sector. Not durable until `sync`."""
        self._file.write([encode_segment_header(self.header)], 0)

    def append(
        self, body: Body, *, type: FrameType, first_lsn: int, span: int, synced_lsn: int, wall_ns: int, flags: int = 0,
        kind_counts: dict[str, int] | None = None, priority: int = 0,
    ) -> int:  # fmt: skip
        """Write a frame at the end; returns its offset. Not durable until `sync`.

        Crash story: the frame starts on a sector of its own, so whatever part of it lands, no earlier frame
        changes. If the write fails, nothing here has moved: the same call may be repeated and writes the same
        place. Zeros may follow the frame, over room that nothing was ever written to: whatever part of them lands, there
        is what preallocated room may hold anyway.
        """
        offset, _, operations, frames = self._tail
        seed = frame_seed(self.header.salt, self.header.number, offset)
        head = encode_frame_header(
            body,
            type=type,
            first_lsn=first_lsn,
            span=span,
            synced_lsn=synced_lsn,
            wall_ns=wall_ns,
            seed=seed,
            flags=flags,
        )
        end = offset + body.total_bytes
        filled_end = self._filled_end
        zeros = b""
        if end > filled_end:
            filled_end = self._filled_to(offset, end)
            zeros = _ZEROS[: filled_end - end]
        try:
            self._file.write([head, *body.parts, zeros], offset)
        except OSError:
            self._room_end = 0  # on a full disk the frame alone may fit
            raise
        self._filled_end = filled_end
        if len(self._offsets) > frames:
            self._trim_index(frames)
        self._offsets.append(offset // SECTOR)
        self._first_lsns.append(first_lsn)
        self._priorities.append(priority)
        for kind, count in (kind_counts or {}).items():
            self._counts.append((frames, self._kinds.setdefault(kind, len(self._kinds)), count))
        self._tail = (end, first_lsn + span - 1, operations + body.count, frames + 1)
        return offset

    def _filled_to(self, offset: int, end: int) -> int:
        """Up to where zeros are written with a small frame that goes to `offset` and ends at `end`; `end` for none.

        The first write to preallocated room makes its sync a transaction of the file system. Zeros ahead make it one for many
        frames. The start of a segment goes without, so that a store that writes little pays nothing.
        """
        if offset < AHEAD_BYTES or end - offset > AHEAD_FRAME_BYTES_MAX:
            return end
        return max(end, min(self._room_end, (end // AHEAD_BYTES + 1) * AHEAD_BYTES))

    def _trim_index(self, frames: int) -> None:
        """Remove what an interrupted append left. The offsets are the first to grow, so they are the last to be cut."""
        while self._counts and self._counts[-1][0] >= frames:
            self._counts.pop()
        for column in (self._priorities, self._first_lsns, self._offsets):
            del column[frames:]

    def stamp(self, *, next_lsn: int, flags: int, wall_ns: int) -> None:
        """Append an idle stamp: everything before it must have been synced. Not durable until `sync`."""
        self.append(
            EMPTY_BODY,
            type=FrameType.STAMP,
            first_lsn=next_lsn,
            span=0,
            synced_lsn=next_lsn - 1,
            wall_ns=wall_ns,
            flags=flags,
        )

    def sync(self) -> None:
        """fdatasync the file. StorageError if that fails."""
        sync_file(self._file, self.path)

    def index(self) -> FrameIndex:
        """The index of the frames so far."""
        frames = self._tail[3]
        counts = array("I", bytes(4 * frames * len(self._kinds)))
        for frame, kind, count in self._counts:
            if frame < frames:
                counts[frame * len(self._kinds) + kind] = count
        return FrameIndex(
            last_lsn=self.last_lsn, operation_count=self.operations, kinds=tuple(self._kinds),
            offsets=[sector * SECTOR for sector in self._offsets[:frames]], first_lsns=self._first_lsns[:frames],
            priorities=self._priorities[:frames], counts=counts,
        )  # fmt: skip

    def seal(self, *, wall_ns: int) -> None:
        """Write the footer, cut the file behind it, sync. Everything in the segment must have been synced before.

        Crash story: without the footer (or with a part of it) the segment is a last segment with a torn tail
        that holds no operation; with it, it is complete. Repeating after an error writes the same bytes to
        the same place.
        """
        if self._sealed_bytes:
            return
        body = encode_footer(self.index(), offset=self.offset)
        seed = frame_seed(self.header.salt, self.header.number, self.offset)
        head = encode_frame_header(
            body,
            type=FrameType.SEAL,
            first_lsn=self.last_lsn + 1,
            span=0,
            synced_lsn=self.last_lsn,
            wall_ns=wall_ns,
            seed=seed,
        )
        self._file.write([head, *body.parts], self.offset)
        self._file.truncate(self.offset + body.total_bytes)
        sync_file(self._file, self.path)
        self._sealed_bytes = self.offset + body.total_bytes

    def cut(self) -> None:
        """Give back the preallocated room behind the last frame. Not durable until `sync`, and needs not be."""
        self._file.truncate(self.offset)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def _preallocate(file: File, size: int) -> int:
    """Reserve room for a segment; on a full disk go on without, since a small write may still fit. Returns where it ends.

    Opening a store must work on a full disk: delivering its backlog is what makes room.
    """
    try:
        file.preallocate(size)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        file.truncate(0)
        return 0
    return size


def read_header(file: File) -> tuple[HeaderState, SegmentHeader | None]:
    """The first sector, checked."""
    return decode_segment_header(file.read(SECTOR, 0))


def read_footer(file: File, header: SegmentHeader, file_bytes: int) -> tuple[int, FrameIndex] | None:
    """Offset and content of the seal footer; None where the segment has none that is valid."""
    at = footer_offset(file.read(TRAILER_BYTES, max(0, file_bytes - TRAILER_BYTES)))
    if at is None or at + limits.FRAME_HEADER_BYTES > file_bytes:
        return None
    try:
        frame = read_frame_header(file.read, header=header, offset=at)
        if frame.type is not FrameType.SEAL or at + frame.total_bytes != file_bytes:
            return None
        body = file.read(frame.total_bytes - limits.FRAME_HEADER_BYTES, at + limits.FRAME_HEADER_BYTES)
        return at, decode_footer(frame, body)
    except FrameError:
        return None


def next_wanted_offset(
    index: FrameIndex, offset: int, wanted: frozenset[str], *, priority_min: int = 0
) -> int | None:
    """The first frame at or after `offset` that holds an operation of a kind in `wanted`; None if there is none.

    With `priority_min`, one whose highest priority is at least that.
    """
    columns = [column for column, kind in enumerate(index.kinds) if kind in wanted]
    width = len(index.kinds)
    for frame in range(bisect.bisect_left(index.offsets, offset), len(index.offsets)):
        if index.priorities[frame] >= priority_min and any(
            index.counts[frame * width + column] for column in columns
        ):
            return index.offsets[frame]
    return None
