"""What of the LSNs that are gone was not settled, and so is lost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from walbatch.core.recovery import StoreFacts
from walbatch.types import Mark, Range, merge_ranges, ranges_of


def settled_lsn(facts: StoreFacts) -> int:
    """Everything up to this LSN is settled: by the checkpoint, or by one that a segment's header has seen."""
    headers = [segment.header.checkpointed_lsn for segment in facts.segments if segment.header is not None]
    return max([facts.checkpoint.watermark if facts.checkpoint else 0, *headers])


def unsettled(facts: StoreFacts, gaps: Iterable[Range], given_up: Collection[int]) -> tuple[Range, ...]:
    """The LSNs in `gaps` that may have named an operation which is neither settled nor given up.

    Nobody knows any more to which shard a lost LSN belonged; only what all of them have settled is certain.
    """
    lanes = facts.checkpoint.lanes.values() if facts.checkpoint else ()
    marks = [mark for lane in lanes for mark in lane.shards] or [Mark()]
    ranges = [span for gap in gaps for mark in marks for span in _not_covered(gap, mark)]
    dead = Mark(ranges=tuple(ranges_of(sorted(given_up))))
    left = [span for lost in merge_ranges(ranges, settled_lsn(facts)) for span in _not_covered(lost, dead)]
    return tuple(left)


def _not_covered(span: Range, mark: Mark) -> Iterator[Range]:
    """The parts of `span` that a mark does not call settled."""
    at, last = max(span[0], mark.watermark + 1), span[1]
    for low, high in mark.ranges:
        if low > last:
            break
        if low > at:
            yield at, low - 1
        at = max(at, high + 1)
    if at <= last:
        yield at, last
