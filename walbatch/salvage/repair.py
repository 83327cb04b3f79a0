"""One segment to write anew, and the whole frames of the damaged one.

What is not here: which segments need it (`planning`), and the writing (`rebuilding`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from walbatch import limits
from walbatch.core.frame import SECTOR, FrameError, FrameHeader, HeaderState, SegmentHeader, check_body
from walbatch.core.recovery import SegmentFacts
from walbatch.core.scanner import SegmentScan, read_frame_header
from walbatch.errors import StorageError
from walbatch.ports import File, FileSystem
from walbatch.storage.layout import Layout
from walbatch.types import Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole frame of a damaged segment."""

    offset: int
    header: FrameHeader

    def body(self, file: File) -> bytes:
        """Its body and padding, checked again, since it is read again."""
        at = self.offset + limits.FRAME_HEADER_BYTES
        padded = file.read(self.header.total_bytes - limits.FRAME_HEADER_BYTES, at)
        try:
            check_body(self.header, padded)
        except FrameError as error:
            raise StorageError(
                f"a frame reads differently the second time ({error}): check the disk, then try again"
            ) from error
        return padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """One segment to write: the frames it keeps, and the LSNs that become void."""

    header: SegmentHeader
    exists: bool
    """There is a damaged file, to be kept in quarantine/."""
    reason: str
    kept: tuple[Whole, ...] = ()
    known_lsn: int
    """The last LSN that is known to have stood in it."""
    last_lsn: int
    """Its last LSN: above `known_lsn` where the end of the log is gone and LSNs are skipped."""
    lost: tuple[Range, ...] = ()

    @property
    def gaps(self) -> list[Range]:
        """The known LSNs that no frame names."""
        gaps: list[Range] = []
        reached = self.header.prev_last_lsn
        for whole in self.kept:
            if whole.header.first_lsn > reached + 1:
                gaps.append((reached + 1, whole.header.first_lsn - 1))
            reached = whole.header.last_lsn
        if reached < self.known_lsn:
            gaps.append((reached + 1, self.known_lsn))
        return gaps

    @property
    def facts(self) -> SegmentFacts:
        """What recovery will see once it is written."""
        size = SECTOR + sum(whole.header.total_bytes for whole in self.kept)
        scan = SegmentScan(
            end_offset=size, last_lsn=self.last_lsn, proven_lsn=self.last_lsn, frames=len(self.kept),
            operations=sum(whole.header.count for whole in self.kept), sealed=False, clean=False, lost=0, unproven=(),
            damage=None,
        )  # fmt: skip
        return SegmentFacts(
            number=self.header.number, file_bytes=size, state=HeaderState.VALID, header=self.header, scan=scan
        )


def valid_frames(file: File, header: SegmentHeader) -> Iterator[Whole]:
    """Every frame that is whole in its place."""
    size = file.size()
    offset = SECTOR
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
        yield Whole(offset=offset, header=frame)
        offset += frame.total_bytes


def in_order(frames: Iterable[Whole], reached: int) -> tuple[Whole, ...]:
    """The frames that name LSNs above `reached`, ascending and without overlap."""
    kept = []
    for frame in frames:
        if frame.header.span and frame.header.first_lsn > reached:
            kept.append(frame)
            reached = frame.header.last_lsn
    return tuple(kept)


def is_zero(file: File, offset: int) -> bool:
    """Whether only zeros stand from `offset` on."""
    while data := file.read(limits.SCAN_CHUNK_BYTES, offset):
        if data.strip(b"\0"):
            return False
        offset += len(data)
    return True


@contextlib.contextmanager
def opened(fs: FileSystem, layout: Layout, number: int) -> Iterator[File]:
    """A segment, open for reading."""
    file = fs.open_read(layout.segment(number))
    try:
        yield file
    finally:
        file.close()
