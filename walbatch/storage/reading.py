"""Reads frames of operations back, from any segment, while others append, trim and compact.

What is not here: who wants which operations (`runtime.readback`).

The idea needed to read it: a position names a segment and an offset in it, and both may have changed when it is used.
A segment that is gone was trimmed, or merged into a later one. In a segment that was compacted, an offset from before
means nothing any more, so there the next LSN says where to go on. Whether a file is the one that was looked for is
known once it is open and the log still has the same segment under its number. What lies below a segment's end never
changes in the file that it was read from, so it is read ahead.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.columns import Columns, decode_body
from walbatch.core.frame import (
    SECTOR,
    FrameError,
    FrameHeader,
    FrameIndex,
    FrameType,
    NewerFrameError,
    SegmentHeader,
)
from walbatch.core.scanner import decode_frame_of
from walbatch.errors import CorruptionError, StorageError, UnsupportedFormat
from walbatch.ports import File, FileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.segment import ClosedSegment, next_wanted_offset, read_footer
from walbatch.types import Options, Position

_INDEXES_MAX = 2
"""Footers that are kept: shards read back at a few places in turn."""

AHEAD_BYTES_MIN: Final = 64 * limits.KIB
AHEAD_BYTES_MAX: Final = limits.MIB
"""What is read at once beyond the frame that is wanted: enough to make the system calls of small frames rare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame of operations that was read back."""

    position: Position
    next_position: Position
    header: FrameHeader
    columns: Columns

    @property
    def lsns(self) -> Sequence[int]:
        """The LSNs of its operations."""
        return self.columns.lsns(self.header.first_lsn)

    @property
    def last_lsn(self) -> int:
        """Its last LSN."""
        return self.header.last_lsn

    @property
    def wall_ns(self) -> int:
        """When it was written; of one that was compacted, when the last of its operations was."""
        return self.header.wall_ns

    @property
    def kinds(self) -> Sequence[str]:
        """Names of kinds."""
        return self.columns.kinds

    @property
    def kind_indexes(self) -> Sequence[int]:
        """For each operation, the index of its kind in `kinds`."""
        return self.columns.kind_indexes

    @property
    def priorities(self) -> Sequence[int]:
        """Priorities, 0 to 10."""
        return self.columns.priorities

    @property
    def keys(self) -> Sequence[bytes]:
        """Keys."""
        return self.columns.keys

    @property
    def payloads(self) -> Sequence[bytes]:
        """Payloads."""
        return self.columns.payloads

    @property
    def options(self) -> Sequence[Options]:
        """Options; empty where no operation has any."""
        return self.columns.options


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A segment as it is at this moment. `active`: it may grow behind `segment.end_offset`."""

    segment: ClosedSegment
    active: bool

    @property
    def number(self) -> int:
        """Its number."""
        return self.segment.header.number


class _Segment:
    """The open file of one segment, and the part of it that was read last.

    Small frames are served from there, and of large ones a whole frame is read at once, like the one before it.
    """

    def __init__(self, header: SegmentHeader, file: File) -> None:
        self.header = header
        self.file = file
        self._start = 0
        self._chunk = b""
        self._ahead_bytes = AHEAD_BYTES_MIN

    def find(self, size: int, offset: int, end_offset: int) -> tuple[bytes, int]:
        """Bytes that hold `size` bytes of the file from `offset` on, and where in them; fewer only at `end_offset`."""
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._chunk):
            self._chunk = self._read(size, offset, end_offset)
            self._start, at = offset, 0
        return self._chunk, at

    def _read(self, size: int, offset: int, end_offset: int) -> bytes:
        """As much as is worth reading at once; only what is asked for, if the rest cannot be read."""
        room = max(0, end_offset - offset)
        ahead = min(max(size, self._ahead_bytes), room)
        if ahead > size:
            try:
                return self.file.read(ahead, offset)
            except OSError:
                pass
        return self.file.read(min(size, room), offset)

    def expect(self, frame_bytes: int) -> None:
        """The next frame will be about as large as this one."""
        self._ahead_bytes = min(max(frame_bytes + frame_bytes // 8, AHEAD_BYTES_MIN), AHEAD_BYTES_MAX)


class Reader:
    """One thread reads; nothing here is locked. `extent_at(number)`: the segment `number`, or the first one behind it."""

    def __init__(self, fs: FileSystem, layout: Layout, extent_at: Callable[[int], Extent | None]) -> None:
        self._fs = fs
        self._layout = layout
        self._extent_at = extent_at
        # One file stays open, so a removed segment's room is given back when the reader goes on to the next.
        self._open: _Segment | None = None
        self._indexes: list[tuple[SegmentHeader, FrameIndex | None]] = []

    def __repr__(self) -> str:
        return f"<Reader {self._layout.root} in segment {self._open.header.number if self._open else None}>"

    def read_frame(
        self,
        position: Position,
        *,
        next_lsn: int,
        wanted: frozenset[str] | None = None,
        priority_min: int = 0,
    ) -> Frame | None:
        """See `ports.Log.read_frame`."""
        placed: SegmentHeader | None = None
        """The segment in whose present file the position's offset was found, by this call."""
        while (extent := self._extent_at(position.segment)) is not None:
            segment, number = extent.segment, extent.number
            offset = position.offset if number == position.segment else SECTOR
            if segment.header.compacted and placed is not segment.header:
                found = self._offset_of(segment, next_lsn)
                if found is None:
                    continue
                offset = found
            placed = segment.header
            position = Position(number, offset)
            if not extent.active and offset < segment.end_offset:
                skipped = self._skip(segment, offset, wanted, priority_min)
                if skipped is None:
                    position = Position(number + 1, SECTOR)
                    continue
                offset = skipped
                position = Position(number, offset)
            if offset >= segment.end_offset:
                if extent.active:
                    return None
                position = Position(number + 1, SECTOR)
                continue
            frame = self._read_at(segment, position, next_lsn)
            if isinstance(frame, Frame):
                return frame
            if frame is not None:
                position = Position(number, offset + frame.total_bytes)
        return None

    def close(self) -> None:
        """Release the file."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.file.close()

    def _offset_of(self, segment: ClosedSegment, next_lsn: int) -> int | None:
        """Where in a compacted segment to look for an LSN; None where it has changed again."""
        index = self._index(segment)
        if index is None:
            # Without a footer the frames are passed one by one.
            return SECTOR if self._segment(segment.header) is not None else None
        frame = bisect.bisect_right(index.first_lsns, next_lsn) - 1
        return index.offsets[frame] if frame >= 0 else SECTOR

    def _skip(
        self, segment: ClosedSegment, offset: int, wanted: frozenset[str] | None, priority_min: int
    ) -> int | None:
        """The next offset worth reading in a closed segment; None if it holds nothing more that is wanted."""
        kinds = segment.kinds
        if kinds is None or (wanted is None and not priority_min):
            return offset
        if wanted is None:
            wanted = kinds
        if kinds.isdisjoint(wanted):
            return None
        if kinds <= wanted and not priority_min:
            return offset
        index = self._index(segment)
        return (
            offset if index is None else next_wanted_offset(index, offset, wanted, priority_min=priority_min)
        )

    def _index(self, segment: ClosedSegment) -> FrameIndex | None:
        """The footer of a closed segment; None where it has none, or has changed."""
        header = segment.header
        for known, index in self._indexes:
            if known is header:
                return index
        try:
            opened = self._segment(header)
            if opened is None:
                return None
            found = read_footer(opened.file, header, segment.file_bytes)
        except OSError as error:
            raise self._unreadable(header.number, error) from error
        index = found[1] if found else None
        self._indexes = [*self._indexes[-(_INDEXES_MAX - 1) :], (header, index)]
        return index

    def _read_at(
        self, segment: ClosedSegment, position: Position, next_lsn: int
    ) -> Frame | FrameHeader | None:
        """The frame at `position`, decoded if it holds operations from `next_lsn` on; None if its segment has changed."""
        offset, end_offset = position.offset, segment.end_offset
        try:
            opened = self._segment(segment.header)
            if opened is None:
                return None
            data, at = opened.find(limits.FRAME_HEADER_BYTES, offset, end_offset)
            header = decode_frame_of(segment.header, data[at : at + limits.FRAME_HEADER_BYTES], offset=offset)
            if header.type is not FrameType.OPERATIONS or header.last_lsn < next_lsn:
                return header
            opened.expect(header.total_bytes)
            data, at = opened.find(header.total_bytes, offset, end_offset)
            columns = decode_body(header, data, start=at + limits.FRAME_HEADER_BYTES)
        except OSError as error:
            raise self._unreadable(position.segment, error) from error
        except NewerFrameError as error:
            raise newer_frame(self._layout.segment(position.segment), offset, error) from error
        except FrameError as error:
            path = self._layout.segment(position.segment)
            raise CorruptionError(
                f"{path} at offset {position.offset}: {error}. These operations were acknowledged. Nothing was changed; "
                f"keep a copy of the store, then run 'walbatch verify {self._layout.root}'",
                path=path, offset=position.offset, expected="a valid frame",
            ) from error  # fmt: skip
        return Frame(
            position=position, next_position=Position(position.segment, offset + header.total_bytes),
            header=header, columns=columns,
        )  # fmt: skip

    def _unreadable(self, number: int, error: OSError) -> StorageError:
        """The error for a segment that cannot be read back: an error of the file system is no damage."""
        path = self._layout.segment(number)
        return StorageError(
            f"cannot read {path}: {error.strerror or error}. Nothing is lost; repair the disk and reopen", path=path,
            errno=error.errno,
        )  # fmt: skip

    def _segment(self, header: SegmentHeader) -> _Segment | None:
        """The open file of a segment; None if it was removed, or replaced by a compaction."""
        if self._open is not None and self._open.header is header:
            return self._open
        self.close()
        try:
            file = self._fs.open_read(self._layout.segment(header.number))
        except FileNotFoundError:
            if self._is_present(header):
                raise
            return None
        # A compaction renames and tells the log at once. So this was the file under that name when it was opened.
        if not self._is_present(header):
            file.close()
            return None
        self._open = _Segment(header, file)
        return self._open

    def _is_present(self, header: SegmentHeader) -> bool:
        """Whether the log has this very segment."""
        extent = self._extent_at(header.number)
        return extent is not None and extent.segment.header is header


def newer_frame(path: str, offset: int, error: NewerFrameError) -> UnsupportedFormat:
    """The error for a frame that a later version wrote."""
    return UnsupportedFormat(
        f"{path} at offset {offset}: {error}: a newer walbatch wrote it. Upgrade walbatch; nothing was changed"
    )
