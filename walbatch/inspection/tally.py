"""What is counted while the frames of a log go by: all of it, and what is pending of each lane.

What is not here: reading the log (`storage.survey`).

The idea needed to read it: what the checkpoint does not call settled is pending, unless the next opening passes it over all the
same: it is dead or cancelled, or compactions have taken it for settled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from walbatch import limits
from walbatch.core.checksum import crc32c_audit
from walbatch.core.columns import Columns, decode_body
from walbatch.core.frame import SECTOR, FrameError, FrameHeader, FrameType, SegmentHeader, frame_seed
from walbatch.core.routing import shards_of
from walbatch.inspection.reports import Count
from walbatch.ports import File
from walbatch.storage.observation import Settled
from walbatch.types import Checkpoint, Mark


@dataclass(slots=True, kw_only=True)
class SegmentCount:
    """What the frames of one segment hold."""

    pending: int = 0
    """Operations."""
    frame_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class Tally:
    """What is counted while frames go by. `open_segment` is for the audit; None: no audit. Close it after one."""

    settled: Settled
    open_segment: Callable[[int], File] | None = None
    pending: dict[str, Count] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    """Of the operations in the log, settled or not."""
    segments: dict[int, SegmentCount] = field(default_factory=dict)
    passed_over: int = 0
    """Operations that the checkpoint does not call settled, and that are not pending."""
    frames: int = 0
    operations: int = 0
    total_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    _file: File | None = None

    def visit(self, number: int, header: SegmentHeader) -> Callable[[int, FrameHeader, bytes], None]:
        """A function that sees every valid frame of segment `number`."""
        if self.open_segment is not None:
            self.close()
            self._file = self.open_segment(number)
            self._audit(number, 0, SECTOR, 0)

        counted = self.segments[number] = SegmentCount()

        def see(offset: int, frame: FrameHeader, padded: bytes) -> None:
            self.frames += 1
            counted.frame_bytes += frame.total_bytes
            self.total_bytes += frame.total_bytes
            if self.open_segment is not None:
                seed = frame_seed(header.salt, number, offset)
                self._audit(number, offset, limits.FRAME_HEADER_BYTES, seed)
                if crc32c_audit(padded, 0) != frame.body_crc:
                    self._disagree(number, offset)
            if frame.type is FrameType.OPERATIONS:
                counted.pending += self.count(number, offset, frame, padded)

        return see

    def count(self, number: int, offset: int, frame: FrameHeader, padded: bytes) -> int:
        """Count the operations of one frame, and what of them is pending. Returns the latter."""
        self.operations += frame.count
        try:
            columns = decode_body(frame, padded)
        except FrameError as error:
            self.problems.append(f"segment {number} at offset {offset}: {error}, although its CRC is right")
            return 0
        pending = 0
        self.kinds.update(columns.kinds)
        for index, kind in enumerate(columns.kinds):
            rows = _unsettled_rows(frame, columns, index, marks_of(kind, self.settled.checkpoint))
            if rows:
                unsettled, rows = len(rows), self._without_passed_over(frame, columns, kind, rows)
                self.passed_over += unsettled - len(rows)
            if rows:
                count = self.pending.setdefault(kind, Count())
                count.operations += len(rows)
                count.bytes += sum(len(columns.keys[row]) + len(columns.payloads[row]) for row in rows)
                pending += len(rows)
        return pending

    def _without_passed_over(
        self, frame: FrameHeader, columns: Columns, kind: str, rows: Sequence[int]
    ) -> Sequence[int]:
        """Those of the rows of a kind that the next opening delivers."""
        settled = self.settled
        lsns = columns.lsns(frame.first_lsn)
        if settled.given_up:
            rows = [row for row in rows if lsns[row] not in settled.given_up]
        if settled.passed_over is not settled.checkpoint:
            marks = marks_of(kind, settled.passed_over)
            route = shards_of(columns.keys, len(marks))
            rows = [row for row in rows if not marks[route[row]].covers(lsns[row])]
        return rows

    def close(self) -> None:
        """Release the segment that was audited last."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _audit(self, number: int, offset: int, size: int, seed: int) -> None:
        """Check the CRC at the end of a header with the second implementation."""
        assert self._file is not None
        data = self._file.read(size, offset)
        if crc32c_audit(data[:-4], seed) != int.from_bytes(data[-4:], "little"):
            self._disagree(number, offset)

    def _disagree(self, number: int, offset: int) -> None:
        self.problems.append(f"segment {number} at offset {offset}: the two CRC-32C implementations disagree")


def _unsettled_rows(
    frame: FrameHeader, columns: Columns, kind: int, marks: tuple[Mark, ...]
) -> Sequence[int]:
    """The rows of one kind (by index) that its shards' marks do not call settled."""
    if frame.last_lsn <= min(mark.watermark for mark in marks):
        return ()
    every = range(frame.count)
    rows = every if len(columns.kinds) == 1 else [row for row in every if columns.kind_indexes[row] == kind]
    if all(mark.watermark < frame.first_lsn and not mark.ranges for mark in marks):
        return rows
    route = shards_of(columns.keys, len(marks))
    lsns = columns.lsns(frame.first_lsn)
    return [row for row in rows if not marks[route[row]].covers(lsns[row])]


def marks_of(kind: str, checkpoint: Checkpoint | None) -> tuple[Mark, ...]:
    """What of each shard of a kind is settled."""
    known = checkpoint.lanes.get(kind) if checkpoint else None
    if known is not None and known.shards:
        return known.shards
    return (Mark(watermark=checkpoint.watermark if checkpoint else 0),)
