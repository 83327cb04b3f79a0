"""Fills shards from the log: which to read for next, and what of a frame goes to which of them.

What is not here: reading (the dispatcher's reader thread does that through `ports.Log`), and locks: the dispatcher holds its own.

The idea needed to read it: shards at the same place of the log share the reading. They move on together; one whose queue is
full stays behind at the first operation that it could not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.core.routing import shards_of
from walbatch.ports import DecodedFrame
from walbatch.runtime.lane import Cursor, Lane, Shard
from walbatch.types import Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """What came of a frame.

    `counted` operations turned out to be settled and had not been counted; `passed_over` are the LSNs of all that were settled;
    `waiting` names held lanes with the first LSN that waits in them.
    """

    counted: int = 0
    passed_over: Sequence[int] = ()
    waiting: Sequence[tuple[str, int]] = ()


NOTHING_FED: Final = Fed()


class ReadBack:
    """The shards that are reading back. Not thread-safe: its owner locks."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._by_name = {lane.setup.name: lane for lane in lanes}
        self._shards = [shard for lane in lanes for shard in lane.shards]

    def __repr__(self) -> str:
        return f"<ReadBack {sum(shard.cursor is not None for shard in self._shards)} of {len(self._shards)} shards>"

    def cohort(self) -> list[Shard]:
        """The shards to read for next: those at the oldest cursor among the ones that want it."""
        wanting = [shard for shard in self._shards if shard.wants_refill]
        oldest = min((shard.cursor.position for shard in wanting if shard.cursor), default=None)
        return [shard for shard in wanting if shard.cursor and shard.cursor.position == oldest]

    @staticmethod
    def catch_up(cohort: Sequence[Shard], end: Position, end_lsn: int, *, grown: bool) -> None:
        """The log held nothing for these shards below `end`, which was the end of what is durable when the read began.

        If groups came in since (`grown`), the shards go on reading there, since those passed them by; else they are live.
        """
        for shard in cohort:
            shard.ledger.advance(end_lsn)
            shard.cursor = Cursor(end, end_lsn + 1) if grown else None

    def feed(self, cohort: Sequence[Shard], frame: DecodedFrame, *, end: Position, now_ns: int) -> Fed:
        """Give a frame's operations to the shards it was read for. A shard that reaches `end` is live."""
        reading = set(cohort)
        lanes = [self._by_name.get(kind) for kind in frame.kinds]
        routes = {
            index: shards_of(frame.keys, lane.setup.shards)
            for index, lane in enumerate(lanes) if lane is not None and any(shard.lane is lane for shard in cohort)
        }  # fmt: skip
        counted = 0
        passed_over: list[int] = []
        waiting: list[tuple[str, int]] = []
        rows = zip(frame.lsns, frame.kind_indexes, frame.keys, frame.payloads, frame.priorities, strict=True)
        for row, (lsn, kind_index, key, payload, priority) in enumerate(rows):
            lane = lanes[kind_index]
            if lane is None or kind_index not in routes:
                continue
            shard = lane.shards[routes[kind_index][row]]
            if shard not in reading or not shard.misses(lsn):
                continue
            if shard.ledger.initial.covers(lsn):
                counted += shard.ledger.pass_over(lsn)
                passed_over.append(lsn)
            elif shard.has_room:
                shard.queue.push((lsn, key, payload, priority, now_ns))
                shard.ledger.admit(lsn)
                if lane.held:
                    waiting.append((lane.setup.name, lsn))
            else:
                shard.cursor = Cursor(frame.position, lsn)
                shard.ledger.advance(lsn - 1)
                reading.discard(shard)
        for shard in reading:
            shard.ledger.advance(frame.last_lsn)
            shard.cursor = (
                None if frame.next_position >= end else Cursor(frame.next_position, frame.last_lsn + 1)
            )
        return Fed(counted=counted, passed_over=passed_over, waiting=waiting)
