"""Writes one segment in the place of a run of neighbours, with only the operations that are not settled.

What is not here: which run (`core.compaction`), and giving the new file its name (`log`).

The idea needed to read it: the new segment has the number and the salt of the last of the run, so that its successor
follows it; and it begins where the first one began, so that it follows that one's predecessor. Operations keep their
LSNs, and the LSNs between them belong to its frames as holes. So the log stays in the order of its LSNs, and recovery
finds a chain as before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import zstandard

from walbatch import limits
from walbatch.core.columns import Columns, decode_body, encode_body
from walbatch.core.compaction import (
    EXAMINED_MAX,
    Run,
    SegmentUse,
    Unsettled,
    by_shard,
    choose_run,
    is_superfluous,
    unsettled_rows,
)
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_LOST,
    SECTOR,
    SEGMENT_COMPACTED,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
)
from walbatch.core.scanner import read_frame_header
from walbatch.ports import File, FileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.segment import ClosedSegment, SegmentWriter
from walbatch.types import NO_OPTIONS, Checkpoint, Options

_logger = logging.getLogger("walbatch")

FRAME_BYTES: Final = 256 * limits.KIB
"""Small frames are joined up to this size: a shard that reads back little at a time decodes a frame again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """What came of it. `written`: the file is complete and synced; else it is no smaller than it may be, and is of no use.

    `unsettled` and `unsettled_bytes`: what was found in each segment of the run.
    """

    header: SegmentHeader
    written: bool
    end_offset: int
    file_bytes: int
    unsettled: tuple[Unsettled, ...]
    unsettled_bytes: tuple[int, ...]


FAILED_STEPS_MAX: Final = 64
"""Steps that are left out after failures: a full disk is not written to again and again."""


class Compactions:
    """What a log remembers from one step of compaction to the next. Of one thread."""

    def __init__(self, *, dropped: Checkpoint | None, level: int) -> None:
        self.dropped = dropped
        """The marks that stand in the log: under them, and under no others, operations were dropped."""
        self.superseded: dict[int, int] = {}
        """Segments that were merged into a later one and are not removed yet, with their bytes."""
        self.compressor = zstandard.ZstdCompressor(level=level)
        self._start = 0
        self._seen: tuple[int, ...] = ()
        self._fruitless: set[int] = set()
        self._failures = 0
        self._waits = 0

    def __repr__(self) -> str:
        return f"<Compactions {self._failures} failures in a row, {len(self.superseded)} segments to remove>"

    def choose(
        self, closed: Sequence[ClosedSegment], covered: Checkpoint, *, segment_bytes: int
    ) -> Run | None:
        """The run to rewrite in this step; None if there is none, or the last steps failed."""
        if self._waits:
            self._waits -= 1
            return None
        start = self._start if self._start < len(closed) else 0
        seen = (covered.epoch, covered.generation, len(closed), closed[-1].header.number if closed else 0)
        if seen != self._seen:
            self._seen, self._fruitless = seen, set()
        if start in self._fruitless:
            return None  # nothing has changed since it was looked at
        run = choose_run(
            [use_of(segment) for segment in closed], covered, segment_bytes=segment_bytes, start=start
        )
        if run is None:
            self._fruitless.add(start)
            self._start = start + EXAMINED_MAX
        return run

    def succeeded(self) -> None:
        """A step was done."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """A step could not be done: the next ones wait, twice as long each time."""
        self._failures += 1
        self._waits = min(2**self._failures, FAILED_STEPS_MAX)
        _logger.warning("a compaction of the log was given up and will be tried again: %s", error)


class DamagedSegmentError(Exception):
    """A segment of the run does not hold what it should."""

    def __init__(self, number: int, problem: str) -> None:
        self.number = number
        super().__init__(problem)


def use_of(segment: ClosedSegment) -> SegmentUse:
    """A closed segment as the decision sees it."""
    return SegmentUse(
        file_bytes=segment.file_bytes, first_lsn=segment.header.first_lsn, last_lsn=segment.last_lsn, unsettled=segment.unsettled,
        unsettled_bytes=segment.unsettled_bytes, damaged=segment.damaged,
    )  # fmt: skip


def merged_header(run: Sequence[ClosedSegment], *, wall_ns: int) -> SegmentHeader:
    """The header of the segment that takes the place of `run`."""
    first, last = run[0].header, run[-1].header
    flags = SEGMENT_COMPACTED
    for segment in run:
        flags |= segment.header.flags
    return replace(
        last, first_lsn=first.first_lsn, prev_number=first.prev_number, prev_salt=first.prev_salt,
        prev_last_lsn=first.prev_last_lsn, operations_before=first.operations_before,
        checkpointed_lsn=max(segment.header.checkpointed_lsn for segment in run), created_wall_ns=wall_ns, flags=flags,
    )  # fmt: skip


def rewrite(
    fs: FileSystem, layout: Layout, run: Sequence[ClosedSegment], covered: Checkpoint, *, path: str, bytes_max: int | None,
    wall_ns: int, compress_bytes_min: int | None, compressor: zstandard.ZstdCompressor,
) -> Rewritten:  # fmt: skip
    """Write the file at `path`, complete and synced. Once it exceeds `bytes_max` the rest is only counted.

    Crash story: nobody knows the file until it is renamed, and what an interruption leaves is removed by the next opening.

    Memory: a frame of a source, and FRAME_BYTES. Raises DamagedSegmentError, OSError; StorageError for a failed sync.
    """
    header = merged_header(run, wall_ns=wall_ns)
    discard(fs, path)
    file = fs.create(path)
    try:
        output = _Output(
            SegmentWriter(file, path, header), bytes_max=bytes_max, wall_ns=wall_ns, compress_bytes_min=compress_bytes_min,
            compressor=compressor,
        )  # fmt: skip
        found = [_copy_unsettled(fs, layout, segment, covered, output) for segment in run]
        written = output.complete(run[-1].last_lsn)
        writer = output.writer
        return Rewritten(
            header=header, written=written, end_offset=writer.offset, file_bytes=writer.file_bytes,
            unsettled=tuple(unsettled for unsettled, _ in found), unsettled_bytes=tuple(size for _, size in found),
        )  # fmt: skip
    finally:
        file.close()


def discard(fs: FileSystem, path: str) -> None:
    """Remove a file that was given up, if it is there."""
    if fs.exists(path):
        fs.unlink(path)


def _copy_unsettled(
    fs: FileSystem, layout: Layout, segment: ClosedSegment, covered: Checkpoint, output: _Output
) -> tuple[Unsettled, int]:
    """Give `output` what is not settled; returns what that is, and its part of the file."""
    if is_superfluous(use_of(segment), covered):
        return {}, 0  # nothing of it is needed, so nothing of it is read
    unsettled: Counter[tuple[str, int | None]] = Counter()
    unsettled_raw = raw = 0
    file = fs.open_read(layout.segment(segment.header.number))
    try:
        for offset, frame in _frames(file, segment):
            raw += frame.raw_bytes
            if frame.last_lsn <= covered.watermark:
                continue
            if frame.type is FrameType.VOID and frame.flags & FLAG_LOST:
                output.void(frame.first_lsn, frame.last_lsn, flags=FLAG_LOST)
            elif frame.type is FrameType.OPERATIONS:
                at = offset + limits.FRAME_HEADER_BYTES
                columns = decode_body(frame, file.read(frame.total_bytes - limits.FRAME_HEADER_BYTES, at))
                rows = unsettled_rows(columns, frame.first_lsn, frame.last_lsn, covered)
                output.take(columns, rows, first_lsn=frame.first_lsn, wall_ns=frame.wall_ns)
                unsettled.update(by_shard(columns, rows, covered))
                unsettled_raw += frame.raw_bytes * len(rows) // frame.count
    except FrameError as error:
        raise DamagedSegmentError(segment.header.number, str(error)) from error
    finally:
        file.close()
    return unsettled, (segment.file_bytes - SECTOR) * unsettled_raw // max(1, raw)


def _frames(file: File, segment: ClosedSegment) -> Iterator[tuple[int, FrameHeader]]:
    """Offset and header of every frame that counts in a segment. Raises FrameError unless they name all its LSNs, in order."""
    offset, expected = SECTOR, segment.header.first_lsn
    while offset < segment.end_offset and expected <= segment.last_lsn:
        frame = read_frame_header(file.read, header=segment.header, offset=offset)
        if frame.first_lsn != expected:
            raise FrameError(f"frame of LSN {frame.first_lsn} where {expected} was expected")
        yield offset, frame
        expected += frame.span
        offset += frame.total_bytes
    if expected != segment.last_lsn + 1:
        raise FrameError(f"its frames end before LSN {expected}, and should reach {segment.last_lsn}")


class _Output:
    """The frames of the new segment in the making: operations are collected, and written a frame at a time."""

    def __init__(
        self, writer: SegmentWriter, *, bytes_max: int | None, wall_ns: int, compress_bytes_min: int | None,
        compressor: zstandard.ZstdCompressor,
    ) -> None:  # fmt: skip
        self.writer = writer
        self._bytes_max = bytes_max
        self._wall_ns = wall_ns
        self._compress_bytes_min = compress_bytes_min
        self._compressor = compressor
        self._exceeded = False
        self._clear()
        writer.write_header()

    def _clear(self) -> None:
        self._lsns: list[int] = []
        self._kinds: dict[str, int] = {}
        self._kind_indexes: list[int] = []
        self._priorities: list[int] = []
        self._keys: list[bytes] = []
        self._payloads: list[bytes] = []
        self._options: list[Options] = []
        self._bytes = 0
        self._written_wall_ns = 0

    def take(self, columns: Columns, rows: Sequence[int], *, first_lsn: int, wall_ns: int) -> None:
        """Add operations of a frame, in LSN order."""
        lsns = columns.lsns(first_lsn)
        for row in rows:
            kind, key, payload = (
                columns.kinds[columns.kind_indexes[row]],
                columns.keys[row],
                columns.payloads[row],
            )
            options = columns.options[row] if columns.options else NO_OPTIONS
            size = len(key) + len(payload) + len(options.idempotency_key)
            if self._lsns and (
                self._bytes + size > FRAME_BYTES
                or len(self._lsns) >= limits.FRAME_COUNT_MAX
                or (kind not in self._kinds and len(self._kinds) >= limits.KINDS_MAX)
            ):
                self._write(self._lsns[-1])
            if self._exceeded:
                return
            self._lsns.append(lsns[row])
            self._kind_indexes.append(self._kinds.setdefault(kind, len(self._kinds)))
            self._priorities.append(columns.priorities[row])
            self._keys.append(key)
            self._payloads.append(payload)
            self._options.append(options)
            self._bytes += size
            self._written_wall_ns = max(self._written_wall_ns, wall_ns)

    def void(self, first_lsn: int, last_lsn: int, *, flags: int) -> None:
        """Add a range of LSNs that names no operation."""
        if not self._exceeded:
            self._write(first_lsn - 1)
            self._append_void(last_lsn, flags=flags)

    def complete(self, last_lsn: int) -> bool:
        """Write the rest up to `last_lsn` and the footer, and sync. Returns whether the file became small enough."""
        if not self._exceeded:
            self._write(last_lsn)
        if self._exceeded:
            return False
        self.writer.seal(wall_ns=self._wall_ns)
        return True

    def _write(self, last_lsn: int) -> None:
        """Write what was collected as a frame that reaches `last_lsn`, or a range without operations."""
        first_lsn = self.writer.last_lsn + 1
        if not self._lsns:
            if last_lsn >= first_lsn:
                self._append_void(last_lsn, flags=0)
            return
        span = last_lsn - first_lsn + 1
        body = encode_body(
            Columns(
                kinds=tuple(self._kinds), kind_indexes=self._kind_indexes, priorities=self._priorities, keys=self._keys,
                payloads=self._payloads, options=self._options if any(o is not NO_OPTIONS for o in self._options) else (),
                lsn_offsets=[lsn - first_lsn for lsn in self._lsns] if span > len(self._lsns) else (),
            ),
            compress_bytes_min=self._compress_bytes_min, compressor=self._compressor,
        )  # fmt: skip
        if self._bytes_max is not None and self.writer.offset + body.total_bytes + SECTOR > self._bytes_max:
            self._exceeded = True
            return
        names = list(self._kinds)
        self.writer.append(
            body, type=FrameType.OPERATIONS, first_lsn=first_lsn, span=span, synced_lsn=first_lsn - 1,
            wall_ns=self._written_wall_ns,
            kind_counts=Counter(names[index] for index in self._kind_indexes), priority=max(self._priorities),
        )  # fmt: skip
        self._clear()

    def _append_void(self, last_lsn: int, *, flags: int) -> None:
        first_lsn = self.writer.last_lsn + 1
        self.writer.append(
            EMPTY_BODY, type=FrameType.VOID, first_lsn=first_lsn, span=last_lsn - first_lsn + 1, synced_lsn=first_lsn - 1,
            wall_ns=self._wall_ns, flags=flags,
        )  # fmt: skip
