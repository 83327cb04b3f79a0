"""Which closed segments to rewrite without what is settled, and what of them is settled. Pure.

What is not here: reading and writing them (`storage/compaction.py`).

The idea needed to read it: a mark covers every LSN of its shard up to where it ends, but for the operations that are
pending. So what it leaves uncovered between two LSNs bounds what is unsettled there, without reading anything; how many bytes
that is, one reading of the segment tells. A run of neighbours is rewritten into one segment if that frees at least half of it, or
if none of them is much larger than the others: so no byte is written more often than the logarithm of the sizes, and few small
segments are left.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch import limits
from walbatch.core.columns import Columns
from walbatch.core.routing import shard_of, shards_of
from walbatch.types import Checkpoint, Mark

OVERHEAD_BYTES: Final = 3 * limits.SECTOR_BYTES
"""A segment without operations: header, the range of its LSNs, footer."""

RUN_COUNT_MAX: Final = 64
"""Segments that one step merges."""

STEP_BYTES_MIN: Final = limits.MIB
"""What one step may read, however small segments are: several small ones are merged at once. Else it is a segment."""

EXAMINED_MAX: Final = 256
"""Segments that one step looks at: the next step goes on where it stopped."""

BALANCE_PERCENT: Final = 66
"""What the largest of a run may have of its bytes, where merging frees little: the others grow by half at least."""


ROW_BYTES: Final = 32
"""About what an operation takes beside its key and its payload."""


@dataclass(frozen=True, slots=True)
class Held:
    """Operations of one kind and shard in a segment: how many, and their bytes of the file; None: only the footer was read."""

    count: int
    size: int | None = None


Unsettled = Mapping[tuple[str, int | None], Held]
"""Operations by kind and shard; the shard is None where only a footer was read: then they are spread over all shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentUse:
    """What is known of a closed segment.

    `unsettled`: operations that were not settled when somebody looked last; None: nobody has looked. `content_bytes`: what all
    its frames take. `since`: what had been settled when it was rewritten with all else, where that was before this opening.
    """

    file_bytes: int
    first_lsn: int
    last_lsn: int
    unsettled: Unsettled | None
    content_bytes: int
    since: Checkpoint | None = None
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbours to rewrite into one segment: indexes of the first, and behind the last.

    `bytes_max`: what it may have, so that it was worth it: half of what they have, or no more than that if it makes one of
    several.
    """

    start: int
    end: int
    bytes_max: int


def unsettled_rows(columns: Columns, first_lsn: int, last_lsn: int, covered: Checkpoint) -> Sequence[int]:
    """The rows of a frame that `covered` does not call settled, ascending. `last_lsn`: the frame's.

    What belongs to a lane that it does not know is not settled above its watermark.
    """
    lsns = columns.lsns(first_lsn)
    several = len(columns.kinds) > 1
    unsettled: list[int] = []
    for index, kind in enumerate(columns.kinds):
        lane = covered.lanes.get(kind)
        marks = lane.shards if lane is not None else (Mark(),)
        if all(mark.watermark >= last_lsn for mark in marks):
            continue
        rows: Sequence[int] = range(len(lsns))
        if several:
            rows = [row for row in rows if columns.kind_indexes[row] == index]
        if any(mark.ranges or mark.watermark >= first_lsn for mark in marks):
            route = shards_of(columns.keys, len(marks))
            rows = [row for row in rows if not marks[route[row]].covers(lsns[row])]
        unsettled += (
            rows if first_lsn > covered.watermark else [row for row in rows if lsns[row] > covered.watermark]
        )
    return sorted(unsettled) if several else unsettled


def by_kind(totals: Mapping[str, int]) -> Unsettled:
    """What a footer tells."""
    return {(kind, None): Held(count) for kind, count in totals.items() if count}


def by_shard(columns: Columns, rows: Sequence[int], covered: Checkpoint, frame_bytes: int) -> Unsettled:
    """Rows of a frame by kind and shard, and what they have of its bytes."""
    if not rows:
        return {}
    counts: Counter[tuple[str, int | None]] = Counter()
    sizes: Counter[tuple[str, int | None]] = Counter()
    for row in rows:
        kind = columns.kinds[columns.kind_indexes[row]]
        lane = covered.lanes.get(kind)
        place = kind, shard_of(columns.keys[row], len(lane.shards)) if lane is not None else None
        counts[place] += 1
        sizes[place] += ROW_BYTES + len(columns.keys[row]) + len(columns.payloads[row])
    total = ROW_BYTES * len(columns.keys) + sum(map(len, columns.keys)) + sum(map(len, columns.payloads))
    return {place: Held(count, -(-frame_bytes * sizes[place] // total)) for place, count in counts.items()}


def summed(parts: Iterable[Unsettled]) -> Unsettled:
    """What was measured in several frames, or segments, together."""
    counts: Counter[tuple[str, int | None]] = Counter()
    sizes: Counter[tuple[str, int | None]] = Counter()
    for part in parts:
        for place, held in part.items():
            counts[place] += held.count
            sizes[place] += held.size or 0
    return {place: Held(count, sizes[place]) for place, count in counts.items()}


def measured_bytes(unsettled: Unsettled) -> int:
    """What operations take that were measured."""
    return sum(held.size or 0 for held in unsettled.values())


def scaled(unsettled: Unsettled, content_bytes: int, of_bytes: int) -> Unsettled:
    """What was measured as `of_bytes` takes `content_bytes`."""
    return {
        place: Held(held.count, -(-(held.size or 0) * content_bytes // max(1, of_bytes)))
        for place, held in unsettled.items()
    }


def choose_run(
    uses: Sequence[SegmentUse], covered: Checkpoint, *, segment_bytes: int, start: int = 0
) -> Run | None:
    """The run that frees most, among `EXAMINED_MAX` segments from index `start` on; None if nothing is worth it."""
    window = range(start, min(len(uses), start + EXAMINED_MAX))
    facts = {index: _Left.of(uses[index], covered) for index in window}
    best: Run | None = None
    best_gain = (0, 0)
    for first in window:
        for run, gain in _runs_from(facts, first, segment_bytes):
            if gain > best_gain:
                best, best_gain = run, gain
    return best


@dataclass(frozen=True, slots=True)
class _Left:
    """What a segment has, what of it is left when it is rewritten, and what has to be read for that: in bytes."""

    file_bytes: int
    left: int
    read: int
    damaged: bool

    @classmethod
    def of(cls, use: SegmentUse, covered: Checkpoint) -> _Left:
        left = unsettled_bytes(use, covered)
        return cls(use.file_bytes, left, 0 if is_superfluous(use, covered) else use.file_bytes, use.damaged)


def _runs_from(
    facts: Mapping[int, _Left], first: int, segment_bytes: int
) -> Iterator[tuple[Run, tuple[int, int]]]:
    """The runs that begin at `first` and are worth it, each with what it frees, and how many segments it makes one of."""
    total = left = read = largest = 0
    for index in range(first, first + RUN_COUNT_MAX):
        segment = facts.get(index)
        if segment is None or segment.damaged:
            return
        if 2 * segment.left > max(segment.file_bytes, segment_bytes):
            return  # it is large, and most of it is needed
        total += segment.file_bytes
        left += segment.left
        read += segment.read
        largest = max(largest, segment.file_bytes)
        if index > first and (
            read > max(segment_bytes, STEP_BYTES_MIN) or left + OVERHEAD_BYTES > segment_bytes
        ):
            return
        gain = max(0, total - left - OVERHEAD_BYTES), index + 1 - first
        if 2 * (left + OVERHEAD_BYTES) <= total:
            yield Run(first, index + 1, total // 2), gain
        elif index > first and 100 * largest <= BALANCE_PERCENT * total and left <= total:
            yield Run(first, index + 1, total), gain


def is_superfluous(use: SegmentUse, covered: Checkpoint) -> bool:
    """Whether it is certain, without reading it, that nothing of a segment is needed any more."""
    if use.last_lsn <= covered.watermark:
        return True
    return use.unsettled is not None and not any(
        uncovered(mark, first, use.last_lsn)
        for kind, shard in use.unsettled
        for first, marks in (_marks_of(kind, shard, use, covered),)
        for mark in marks
    )


def unsettled_bytes(use: SegmentUse, covered: Checkpoint) -> int:
    """About how many bytes of a segment belong to operations that are not settled.

    Operations of one shard count as equally large, where they were measured. Where only the footer was read, or nothing, no more
    than there may be at least: to find out how much it is costs one reading, and is done once.
    """
    if not use.unsettled:
        return 0
    if any(held.size is None for held in use.unsettled.values()):
        return _bytes_by_footer(use, use.unsettled, covered)
    size = 0
    for (kind, shard), held in use.unsettled.items():
        first, marks = _marks_of(kind, shard, use, covered)
        count = min(held.count, max(uncovered(mark, first, use.last_lsn) for mark in marks))
        size += -(-(held.size or 0) * count // held.count)
    return size


def _bytes_by_footer(use: SegmentUse, unsettled: Unsettled, covered: Checkpoint) -> int:
    """What operations take of which only numbers are known.

    While no shard has passed the segment, all of them count as equally large. Once one has, nothing is known: what it has
    settled may be next to nothing, or nearly all.
    """
    if use.since is not None and not _has_moved(use, unsettled, use.since, covered):
        return use.content_bytes
    count = 0
    for (kind, shard), held in unsettled.items():
        first, marks = _marks_of(kind, shard, use, covered)
        if any(_end(mark) >= use.last_lsn for mark in marks):
            return 0
        left = min(uncovered(mark, first, use.last_lsn) for mark in marks)
        if len(marks) == 1:
            count += min(held.count, left)
        else:  # all of them may belong to the shard that has settled most
            count += max(0, held.count - (use.last_lsn - use.first_lsn + 1 - left))
    return -(-use.content_bytes * count // sum(held.count for held in unsettled.values()))


def _has_moved(use: SegmentUse, unsettled: Unsettled, since: Checkpoint, covered: Checkpoint) -> bool:
    """Whether anything that a segment may hold was settled since."""
    for kind, shard in unsettled:
        first, marks = _marks_of(kind, shard, use, covered)
        first_then, marks_then = _marks_of(kind, shard, use, since)
        if len(marks) != len(marks_then) or any(
            uncovered(mark, first, use.last_lsn) < uncovered(then, first_then, use.last_lsn)
            for mark, then in zip(marks, marks_then, strict=True)
        ):
            return True
    return False


def _end(mark: Mark) -> int:
    """The last LSN that a mark covers."""
    return mark.ranges[-1][1] if mark.ranges else mark.watermark


def _marks_of(
    kind: str, shard: int | None, use: SegmentUse, covered: Checkpoint
) -> tuple[int, tuple[Mark, ...]]:
    """The first LSN above the watermark, and the marks that may cover operations of a kind (and shard) from there on."""
    lane = covered.lanes.get(kind)
    # What is not known covers nothing.
    marks = (Mark(),) if lane is None else lane.shards if shard is None else (lane.shards[shard],)
    return max(use.first_lsn, covered.watermark + 1), marks


def uncovered(mark: Mark, first: int, last: int) -> int:
    """How many LSNs from `first` to `last` a mark does not cover."""
    first = max(first, mark.watermark + 1)
    count = max(0, last - first + 1)
    if not count:
        return 0
    for low, high in mark.ranges[max(0, bisect_left(mark.ranges, (first,)) - 1) :]:
        if low > last:
            break
        count -= max(0, min(high, last) - max(low, first) + 1)
    return count
