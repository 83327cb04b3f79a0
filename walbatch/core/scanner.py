"""Reads a segment from its first frame to the last valid one, and looks behind the first damage for evidence.

It states facts; whether damage is a torn tail or corruption is decided in `recovery`. It reads through a function
that is given to it, in chunks of bounded size, so its memory does not grow with the segment.

The idea needed to read it: the LSNs of a log are contiguous (skipped ones stand in void frames), so a frame is valid
only if its header's seeded CRC, its body's CRC and its first LSN all fit the place. Each header says up to which LSN
the log was known durable when it was written; a later header above a damaged frame is the proof that the damaged
bytes had been acknowledged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.frame import (
    FLAG_CLEAN,
    FLAG_LOST,
    FRAME_MAGIC,
    SECTOR,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
    check_body,
    decode_frame_header,
    frame_seed,
)

Read = Callable[[int, int], bytes]
"""read(size, offset): up to `size` bytes at `offset`, fewer only at the end of the file."""

Visit = Callable[[int, FrameHeader, bytes], None]
"""visit(offset, header, padded body), called for every valid frame."""

_ZEROS: Final = bytes(limits.SCAN_CHUNK_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes after the last valid frame that are neither a valid frame nor zeros.

    `evidence_lsn` is the highest LSN that later headers prove to have been durable, or to have been written when what
    is damaged was durable (0: none); `seen_lsn` the highest LSN any later header names. The damaged bytes reach from
    `offset` to `end`, behind which there are only zeros.
    """

    offset: int
    end: int
    reason: str
    evidence_lsn: int
    seen_lsn: int
    resume_lsn: int
    """First LSN of the next intact header behind the damage; 0 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnprovenFrame:
    """A valid frame without proof that it was synced."""

    offset: int
    header: FrameHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentScan:
    """What a scan found. `last_lsn` is the last LSN of the valid frames (first_lsn - 1 where there are none)."""

    end_offset: int
    last_lsn: int
    proven_lsn: int
    frames: int
    operations: int
    sealed: bool
    clean: bool
    """The last frame is the stamp of a clean close."""
    lost: int
    """LSNs that an earlier salvage gave up."""
    unproven: tuple[UnprovenFrame, ...]
    damage: Damage | None


class _Reader:
    """Serves slices of a file from a bounded buffer."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._chunk = b""
        self._start = 0

    def get(self, size: int, offset: int) -> bytes:
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._chunk):
            self._chunk = self._read(max(size, limits.SCAN_CHUNK_BYTES), offset)
            self._start, at = offset, 0
        return self._chunk[at : at + size]


def scan_segment(
    read: Read,
    *,
    header: SegmentHeader,
    file_bytes: int,
    lsn_bound: int | None = None,
    visit: Visit | None = None,
) -> SegmentScan:
    """Scan a segment whose header is valid. O(bytes), memory bounded by one frame and one chunk.

    Frames that start above `lsn_bound` are superseded by the next segment: the scan ends before them. Errors of
    `read` and of `visit` pass through.
    """
    reader = _Reader(read)
    offset, expected = SECTOR, header.first_lsn
    proven = header.prev_last_lsn
    frames = operations = lost = 0
    sealed = clean = False
    unproven: deque[UnprovenFrame] = deque()
    failure = ""
    while offset < file_bytes and not sealed:
        if lsn_bound is not None and expected > lsn_bound:
            break
        try:
            frame, padded = _frame_at(reader, header, offset)
            if frame.first_lsn != expected or frame.synced_lsn >= expected:
                raise FrameError(f"frame of LSN {frame.first_lsn} where {expected} was expected")
        except FrameError as error:
            failure = str(error)
            break
        if visit is not None:
            visit(offset, frame, padded)
        frames += 1
        operations += frame.count
        if frame.flags & FLAG_LOST:
            lost += frame.span
        proven = max(proven, frame.synced_lsn)
        sealed = frame.type is FrameType.SEAL
        clean = frame.type is FrameType.STAMP and bool(frame.flags & FLAG_CLEAN)
        while unproven and unproven[0].header.last_lsn <= proven:
            unproven.popleft()
        if frame.span:
            unproven.append(UnprovenFrame(offset=offset, header=frame))
        expected += frame.span
        offset += frame.total_bytes
    superseded = lsn_bound is not None and expected > lsn_bound
    damage = (
        None
        if superseded or offset >= file_bytes
        else _look_behind(reader, header, offset, file_bytes, failure=failure, expected=expected)
    )
    return SegmentScan(
        end_offset=offset, last_lsn=expected - 1, proven_lsn=proven, frames=frames, operations=operations,
        sealed=sealed, clean=clean, lost=lost,
        unproven=tuple(unproven), damage=damage,
    )  # fmt: skip


def iterate_frames(
    read: Read, *, header: SegmentHeader, offset: int, end: int
) -> Iterator[tuple[int, FrameHeader]]:
    """Headers of consecutive frames from `offset` to `end`; raises FrameError at the first that is not valid."""
    while offset < end:
        frame = read_frame_header(read, header=header, offset=offset)
        yield offset, frame
        offset += frame.total_bytes


def read_frame_header(read: Read, *, header: SegmentHeader, offset: int) -> FrameHeader:
    """The frame header at `offset`. Raises FrameError."""
    return decode_frame_of(header, read(limits.FRAME_HEADER_BYTES, offset), offset=offset)


def decode_frame_of(header: SegmentHeader, data: bytes, *, offset: int) -> FrameHeader:
    """The frame header that was read at `offset` of a segment. Raises FrameError."""
    seed = frame_seed(header.salt, header.number, offset)
    frame = decode_frame_header(data, seed=seed)
    if frame.type is FrameType.OPERATIONS and frame.count < frame.span and not header.compacted:
        raise FrameError(
            f"{frame.count} operations over {frame.span} LSNs, in a segment that was not compacted"
        )
    return frame


def _frame_at(reader: _Reader, header: SegmentHeader, offset: int) -> tuple[FrameHeader, bytes]:
    """The valid frame at `offset`, with its body. Raises FrameError."""
    frame = read_frame_header(reader.get, header=header, offset=offset)
    padded = reader.get(frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES)
    check_body(frame, padded)
    return frame, padded


def _look_behind(
    reader: _Reader, header: SegmentHeader, start: int, file_bytes: int, *, failure: str, expected: int
) -> Damage | None:
    """Facts on what follows the last valid frame, which ends before LSN `expected`: None if only zeros.

    Where operations with just this LSN stand behind the damage, a stamp was damaged. It was synced before anything was
    written behind it, so this is no torn write, and the operations may have been acknowledged.
    """
    evidence = seen = resume = 0
    end = start
    offset = start
    while offset < file_bytes:
        size = min(limits.SCAN_CHUNK_BYTES, file_bytes - offset)
        chunk = reader.get(size, offset)
        if not chunk:
            break
        if chunk != _ZEROS[: len(chunk)]:
            end = offset + len(chunk.rstrip(b"\0"))
            at = chunk.find(FRAME_MAGIC)
            while at >= 0:
                place = offset + at
                if place % SECTOR == 0:
                    try:
                        frame = read_frame_header(reader.get, header=header, offset=place)
                    except FrameError:
                        pass
                    else:
                        evidence = max(evidence, frame.synced_lsn)
                        seen = max(seen, frame.last_lsn)
                        if place > start and not resume:
                            resume = frame.first_lsn
                        if place > start and frame.span and frame.first_lsn == expected:
                            evidence = max(evidence, frame.last_lsn)
                at = chunk.find(FRAME_MAGIC, at + 1)
        offset += len(chunk)
    if end == start:
        return None
    return Damage(
        offset=start, end=end, reason=failure or "bytes behind the last frame", evidence_lsn=evidence, seen_lsn=seen,
        resume_lsn=resume,
    )  # fmt: skip
