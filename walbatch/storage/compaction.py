"""Writes one segment in the place of a run of neighbours, with only the operations that are not settled.

What is not here: which run (`core.compaction`), and giving the new file its name (`log`).

The idea needed to read it: the new segment has the number and the salt of the last of the run, so that its successor
follows it; and it begins where the first one began, so that it follows that one's predecessor. Operations keep their
LSNs, and the LSNs between them belong to its frames as holes. So the log stays in the order of its LSNs, and recovery
finds a chain as before.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

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
    summed,
    unsettled_rows,
)
from walbatch.core.compression import Compressor
from walbatch.core.frame import (
    EMPTY_BODY,
    FLAG_LOST,
    SECTOR,
    SEGMENT_COMPACTED,
    Body,
    Codec,
    FrameError,
    FrameHeader,
    FrameType,
    SegmentHeader,
)
from walbatch.core.scanner import read_frame_header
from walbatch.ports import FileSystem
from walbatch.storage.layout import Layout
from walbatch.storage.segment import ClosedSegment, SegmentWriter
from walbatch.types import NO_OPTIONS, Checkpoint, Options

_logger = logging.getLogger("walbatch")

FRAME_BYTES: Final = 256 * limits.KIB
"""Small frames are joined up to this size: a shard that reads back little at a time decodes a frame again and again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """What came of it. `written`: the file is complete and synced; else it is no smaller than it may be, and is of no use.

    `unsettled`: what was found in each segment of the run.
    """

    header: SegmentHeader
    written: bool
    end_offset: int
    file_bytes: int
    unsettled: tuple[Unsettled, ...]


FAILED_STEPS_MAX: Final = 64
"""Steps that are left out after failures: a full disk is not written to again and again."""

UNREAD_GENERATIONS: Final = 64
"""Checkpoints until a segment that could not be read is tried again."""

PACE_CHECKPOINTS: Final = 32
"""What the watermark will pass within so many checkpoints, at the pace of the last one, is trimmed as a whole then: to rewrite it
before would cost a drain more than its delivery does."""


class Compactions:
    """What a log remembers from one step of compaction to the next. Of one thread."""

    def __init__(self, *, dropped: Checkpoint | None, level: int) -> None:
        self.dropped = dropped
        """The marks that stand in the log: under them, and under no others, operations were dropped."""
        self.noted: Checkpoint | None = None
        """The last that went into them."""
        self.superseded: dict[int, int] = {}
        """Segments that were merged into a later one and are not removed yet, with their bytes."""
        self.compressor = Compressor(level=level, always=True)
        self.is_exhausted = False
        """Whether there was nothing to do in this step, and will be nothing until something changes."""
        self._since = dropped
        self._warned: set[int] = set()
        self._start = 0
        self._seen: tuple[int, ...] = ()
        self._fruitless: set[int] = set()
        self._unreadable: dict[int, int] = {}
        """Segments that could not be read, each with the generation that tries it again."""
        self._failures = 0
        self._waits = 0
        self._pace: tuple[tuple[int, int], int, int] | None = None
        """Of the last checkpoint: epoch and generation, the watermark, and the LSN that it is expected to reach soon."""

    def __repr__(self) -> str:
        return f"<Compactions {self._failures} failures in a row, {len(self.superseded)} segments to remove>"

    def choose(
        self, closed: Sequence[ClosedSegment], covered: Checkpoint, *, segment_bytes: int
    ) -> Run | None:
        """The run to rewrite in this step; None if there is none among the segments that it looked at, or the last steps failed.

        Each step looks at other segments than the one before it: so none of them waits for what takes long elsewhere.
        """
        self.is_exhausted = True
        self._keep_pace(covered)
        if self._waits:
            self._waits -= 1
            return None
        seen = (covered.epoch, covered.generation, len(closed), closed[-1].header.number if closed else 0)
        if seen != self._seen:
            self._seen, self._fruitless = seen, set()
            self._unreadable = {
                n: until for n, until in self._unreadable.items() if until > covered.generation
            }
        starts = [start for start in range(0, len(closed), EXAMINED_MAX) if start not in self._fruitless]
        if not starts:
            return None  # nothing has changed since they were looked at
        start = next((start for start in starts if start >= self._start), starts[0])
        self._start = start + EXAMINED_MAX
        uses = [self._use_of(segment) for segment in closed[start : start + EXAMINED_MAX]]
        run = choose_run(uses, covered, segment_bytes=segment_bytes)
        if run is not None:
            self.is_exhausted = False
            return replace(run, start=run.start + start, end=run.end + start)
        self._fruitless.add(start)
        self.is_exhausted = len(starts) == 1
        if self.is_exhausted and self._pace is not None and self._pace[2]:
            # Should no checkpoint come before the next round, nothing moves any more: then what was spared is looked at, too.
            self._pace = self._pace[0], self._pace[1], 0
            self._fruitless.clear()
        return None

    def _keep_pace(self, covered: Checkpoint) -> None:
        """Note how far the watermark came with this checkpoint."""
        at = covered.epoch, covered.generation
        if self._pace is not None and self._pace[0] == at:
            return
        moved = 0 if self._pace is None else max(0, covered.watermark - self._pace[1])
        self._pace = at, covered.watermark, covered.watermark + PACE_CHECKPOINTS * moved

    def _use_of(self, segment: ClosedSegment) -> SegmentUse:
        use = use_of(segment)
        soon_trimmed = self._pace is not None and segment.last_lsn <= self._pace[2]
        if soon_trimmed or segment.header.number in self._unreadable:
            return replace(use, damaged=True)
        return replace(use, since=self._since) if segment.header.compacted else use

    def unreadable(self, error: UnreadableSegmentError, covered: Checkpoint) -> None:
        """A segment could not be read: it is left alone for a while, and others are not."""
        self._unreadable[error.number] = covered.generation + UNREAD_GENERATIONS
        _logger.warning(
            "segment %d is not compacted for a while, since it cannot be read: %s", error.number, error
        )

    def not_removed(self, number: int, error: OSError) -> None:
        """A segment that was merged could not be removed: it is tried again."""
        if number not in self._warned:
            self._warned.add(number)
            _logger.warning("segment %d was merged and cannot be removed: %s", number, error)

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


class UnreadableSegmentError(OSError):
    """The file system did not give what a segment of the run holds."""

    def __init__(self, number: int, error: OSError) -> None:
        self.number = number
        super().__init__(str(error))


def use_of(segment: ClosedSegment) -> SegmentUse:
    """A closed segment as the decision sees it."""
    return SegmentUse(
        file_bytes=segment.file_bytes, first_lsn=segment.header.first_lsn, last_lsn=segment.last_lsn, unsettled=segment.unsettled,
        content_bytes=max(0, segment.end_offset - SECTOR), damaged=segment.damaged,
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
    fs: FileSystem, layout: Layout, run: Sequence[ClosedSegment], covered: Checkpoint, *, path: str, bytes_max: int,
    wall_ns: int, compress_bytes_min: int | None, compressor: Compressor,
) -> Rewritten:  # fmt: skip
    """Write the file at `path`, complete and synced. Once it exceeds `bytes_max` the rest is only counted.

    Crash story: nobody knows the file until it is renamed, and what an interruption leaves is removed by the next opening.

    Memory: a frame of a source, and FRAME_BYTES. Raises DamagedSegmentError or UnreadableSegmentError for a source, OSError;
    StorageError for a failed sync.
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
            header=header, written=written, end_offset=writer.offset, file_bytes=writer.file_bytes, unsettled=tuple(found),
        )  # fmt: skip
    finally:
        file.close()


def discard(fs: FileSystem, path: str) -> None:
    """Remove a file that was given up, if it is there."""
    if fs.exists(path):
        fs.unlink(path)


def _copy_unsettled(
    fs: FileSystem, layout: Layout, segment: ClosedSegment, covered: Checkpoint, output: _Output
) -> Unsettled:
    """Give `output` what is not settled; returns what that is."""
    if is_superfluous(use_of(segment), covered):
        return {}  # nothing of it is needed, so nothing of it is read
    unsettled: list[Unsettled] = []
    number = segment.header.number
    with _reading(number):
        file = fs.open_read(layout.segment(number))

    def read(size: int, offset: int) -> bytes:
        with _reading(number):
            return file.read(size, offset)

    try:
        for offset, frame in _frames(read, segment):
            if frame.last_lsn <= covered.watermark:
                continue
            if frame.type is FrameType.VOID and frame.flags & FLAG_LOST:
                output.void(frame.first_lsn, frame.last_lsn, flags=FLAG_LOST)
            elif frame.type is FrameType.OPERATIONS:
                padded = read(
                    frame.total_bytes - limits.FRAME_HEADER_BYTES, offset + limits.FRAME_HEADER_BYTES
                )
                columns = decode_body(frame, padded)
                rows = unsettled_rows(columns, frame.first_lsn, frame.last_lsn, covered)
                if len(rows) == frame.count and frame.raw_bytes >= FRAME_BYTES:
                    output.copy(frame, padded, columns)
                else:
                    output.take(columns, rows, frame)
                unsettled.append(by_shard(columns, rows, covered, frame.total_bytes))
    except FrameError as error:
        raise DamagedSegmentError(number, str(error)) from error
    finally:
        file.close()
    return summed(unsettled)


@contextlib.contextmanager
def _reading(number: int) -> Iterator[None]:
    """Tell an error of a source from one of what is written."""
    try:
        yield
    except OSError as error:
        raise UnreadableSegmentError(number, error) from error


def _frames(read: Callable[[int, int], bytes], segment: ClosedSegment) -> Iterator[tuple[int, FrameHeader]]:
    """Offset and header of every frame that counts in a segment. Raises FrameError unless they name all its LSNs, in order."""
    offset, expected = SECTOR, segment.header.first_lsn
    while offset < segment.end_offset and expected <= segment.last_lsn:
        frame = read_frame_header(read, header=segment.header, offset=offset)
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
        self, writer: SegmentWriter, *, bytes_max: int, wall_ns: int, compress_bytes_min: int | None,
        compressor: Compressor,
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
        self._was_compressed = False

    def take(self, columns: Columns, rows: Sequence[int], frame: FrameHeader) -> None:
        """Add operations of a frame, in LSN order."""
        if self._exceeded:
            return
        lsns = columns.lsns(frame.first_lsn)
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
            self._written_wall_ns = max(self._written_wall_ns, frame.wall_ns)
            self._was_compressed |= frame.codec is not Codec.RAW

    def copy(self, frame: FrameHeader, padded: bytes, columns: Columns) -> None:
        """Add a large frame as it is: cut into smaller ones it might not compress as well."""
        if not self._exceeded:
            self._write(frame.first_lsn - 1)
        if self._exceeds(frame.total_bytes):
            return
        body = Body(
            codec=frame.codec, count=frame.count, stored_bytes=frame.stored_bytes, raw_bytes=frame.raw_bytes,
            parts=(padded,), crc=frame.body_crc,
        )  # fmt: skip
        self._append(body, columns, first_lsn=frame.first_lsn, span=frame.span, wall_ns=frame.wall_ns)

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
        columns = Columns(
            kinds=tuple(self._kinds), kind_indexes=self._kind_indexes, priorities=self._priorities, keys=self._keys,
            payloads=self._payloads, options=self._options if any(o is not NO_OPTIONS for o in self._options) else (),
            lsn_offsets=[lsn - first_lsn for lsn in self._lsns] if span > len(self._lsns) else (),
        )  # fmt: skip
        # What was compressed stays so, whatever is set now: it must not grow.
        compress_bytes_min = 0 if self._was_compressed else self._compress_bytes_min
        body = encode_body(columns, compress_bytes_min=compress_bytes_min, compressor=self._compressor)
        if not self._exceeds(body.total_bytes):
            self._append(body, columns, first_lsn=first_lsn, span=span, wall_ns=self._written_wall_ns)
            self._clear()

    def _exceeds(self, frame_bytes: int) -> bool:
        """Whether the file would become too large with one more frame: then it is given up."""
        self._exceeded |= self.writer.offset + frame_bytes + SECTOR > self._bytes_max
        return self._exceeded

    def _append(self, body: Body, columns: Columns, *, first_lsn: int, span: int, wall_ns: int) -> None:
        self.writer.append(
            body, type=FrameType.OPERATIONS, first_lsn=first_lsn, span=span, synced_lsn=first_lsn - 1, wall_ns=wall_ns,
            kind_counts=Counter(columns.kinds[index] for index in columns.kind_indexes), priority=max(columns.priorities),
        )  # fmt: skip

    def _append_void(self, last_lsn: int, *, flags: int) -> None:
        first_lsn = self.writer.last_lsn + 1
        self.writer.append(
            EMPTY_BODY, type=FrameType.VOID, first_lsn=first_lsn, span=last_lsn - first_lsn + 1, synced_lsn=first_lsn - 1,
            wall_ns=self._wall_ns, flags=flags,
        )  # fmt: skip
