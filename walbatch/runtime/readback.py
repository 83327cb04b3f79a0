"""Fills shards from the log: which to read for next, and what of a frame goes to which of them.

What is not here: reading (the dispatcher's reader thread does that through `ports.Log`), and locks: the dispatcher holds its own.

The idea needed to read it: shards at the same place of the log share the reading. They move on together; one whose queue is
full stays behind at the first operation that it could not take.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.core.entry import Entry
from walbatch.core.routing import shards_of
from walbatch.core.run import Run, dealt
from walbatch.ports import Clock, DecodedFrame
from walbatch.runtime.lane import Cursor, Lane, Shard
from walbatch.types import NO_OPTIONS, Position


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """What came of a frame.

    So many operations turned out to be `applied`, `dead` or `cancelled` and had not been counted; `passed_over` are the LSNs of
    all that were applied (whoever waits for one that was given up has been told so); `waiting` names held lanes with the first
    LSN that waits in them.
    """

    applied: int = 0
    dead: int = 0
    cancelled: int = 0
    passed_over: Sequence[int] = ()
    waiting: Sequence[tuple[str, int]] = ()


NOTHING_FED: Final = Fed()

Hands = Mapping[int, Run]
"""What each shard of a lane gets of a frame."""


class ReadBack:
    """The shards that are reading back. Not thread-safe: its owner locks."""

    def __init__(
        self, lanes: Sequence[Lane], *, given_up: set[int], is_dead: Callable[[int], bool], clock: Clock
    ) -> None:
        """`given_up`: operations that were cancelled, or are dead, although the log holds them."""
        self.given_up = given_up
        self.cancelling: set[int] = set()
        """Operations whose cancellation is being written: nobody reads past them."""
        self._is_dead = is_dead
        self._clock = clock
        self._by_name = {lane.setup.name: lane for lane in lanes}
        self._shards = [shard for lane in lanes for shard in lane.shards]

    def __repr__(self) -> str:
        return f"<ReadBack {sum(shard.cursor is not None for shard in self._shards)} of {len(self._shards)} shards>"

    @property
    def has_taken_back(self) -> bool:
        """Whether there is anything that may not be delivered."""
        return bool(self.given_up or self.cancelling)

    def before_taken_back(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The operations, in LSN order, before the first that may not be delivered, or not yet."""
        if not self.has_taken_back:
            return entries
        taken_back = (index for index, entry in enumerate(entries) if self.is_taken_back(entry[0]))
        return entries[: next(taken_back, len(entries))]

    def is_taken_back(self, lsn: int) -> bool:
        """Whether an operation may not be delivered, or not yet."""
        return lsn in self.given_up or lsn in self.cancelling

    def cohort(self, end_lsn: int, *, sparing: bool) -> list[Shard]:
        """The shards to read for next: those at the oldest cursor among the ones that want it.

        `sparing`: memory is short, so nothing is read ahead, only for shards that have nothing left to do.
        """
        wanting = [
            shard for shard in self._shards
            if (shard.starves if sparing else shard.wants_refill) and shard.cursor and shard.cursor.next_lsn <= end_lsn + 1
        ]  # fmt: skip
        cursors = [shard.cursor for shard in wanting if shard.cursor]
        oldest = min(cursors, key=lambda cursor: cursor.next_lsn, default=None)
        return [
            shard for shard in wanting if oldest and shard.cursor and shard.cursor.position == oldest.position
        ]

    @staticmethod
    def catch_up(cohort: Sequence[Shard], end: Position, end_lsn: int, *, grown: bool) -> None:
        """The log held nothing for these shards up to `end_lsn`, the last that was durable when the read began; `end` is behind it.

        If groups came in since (`grown`), the shards go on reading there, since those passed them by; else they are live.
        """
        for shard in cohort:
            shard.ledger.advance(end_lsn)
            shard.cursor = Cursor(end, end_lsn + 1) if grown else None

    def deal(self, frame: DecodedFrame) -> Hands | None:
        """A frame of one lane, divided among its shards; None where there is more to say of its operations. Needs no lock."""
        priority, count = frame.priorities[0], len(frame.keys)
        if len(frame.kinds) > 1 or frame.options or frame.priorities.count(priority) != count:
            return None
        lane = self._by_name.get(frame.kinds[0])
        if lane is None:
            return {}
        run = Run(frame.lsns, frame.keys, frame.payloads, priority, self._clock.monotonic_ns())
        shards = lane.setup.shards
        return {0: run} if shards == 1 else dealt(run, shards_of(frame.keys, shards), shards)

    def feed(
        self, cohort: Sequence[Shard], frame: DecodedFrame, hands: Hands | None = None, *, end_lsn: int
    ) -> Fed:
        """Give a frame's operations to the shards it was read for. A shard that reaches `end_lsn`, and no further, is live.

        `hands`: the frame as `deal` has divided it. A frame that was merged may reach beyond what the shards have taken over: then
        a shard waits until they have, too.
        """
        reading = set(cohort)
        fed = NOTHING_FED
        if hands is None or not self._give(reading, frame, hands):
            fed = self._give_each(reading, frame)
        for shard in reading:
            shard.ledger.advance(frame.last_lsn)
            shard.cursor = (
                None if frame.last_lsn == end_lsn else Cursor(frame.next_position, frame.last_lsn + 1)
            )
        return fed

    def _give(self, reading: set[Shard], frame: DecodedFrame, hands: Hands) -> bool:
        """Give shards what is theirs, all at once. False, and nothing is done, where operations have to be looked at.

        A shard that cannot take all of it stays behind, and is not `reading` any more.
        """
        lane = self._by_name.get(frame.kinds[0])
        takers = [
            (shard, _first_missed(shard)) for shard in reading if shard.lane is lane and shard.index in hands
        ]
        if takers and (self.has_taken_back or takers[0][0].lane.held):
            return False
        if any(shard.ledger.knows_from(max(first, frame.lsns[0])) for shard, first in takers):
            return False
        for shard, first in takers:
            run = hands[shard.index]
            passed = bisect_left(run.lsns, first)
            if passed:
                run = run.part(passed, len(run))
            taken = shard.take_in_run(run) if len(run) else 0
            if taken < len(run):
                self._stay(shard, frame, run.lsns[taken])
                reading.discard(shard)
        return True

    @staticmethod
    def _stay(shard: Shard, frame: DecodedFrame, lsn: int) -> None:
        """A shard has no room for this operation of its own, and will read it again."""
        shard.cursor = Cursor(frame.position, lsn)
        shard.ledger.advance(lsn - 1)

    def _give_each(self, reading: set[Shard], frame: DecodedFrame) -> Fed:
        """`_give` for all cases: with a look at each operation."""
        now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        options = frame.options or [NO_OPTIONS] * len(frame.keys)
        lanes = [self._by_name.get(kind) for kind in frame.kinds]
        routes = {
            index: shards_of(frame.keys, lane.setup.shards)
            for index, lane in enumerate(lanes) if lane is not None and any(shard.lane is lane for shard in reading)
        }  # fmt: skip
        applied = dead = cancelled = 0
        passed_over: list[int] = []
        waiting: list[tuple[str, int]] = []
        rows = zip(
            frame.lsns, frame.kind_indexes, frame.keys, frame.payloads, frame.priorities, options, strict=True
        )
        for row, (lsn, kind_index, key, payload, priority, option) in enumerate(rows):
            lane = lanes[kind_index]
            if lane is None or kind_index not in routes:
                continue
            shard = lane.shards[routes[kind_index][row]]
            if shard not in reading or not shard.misses(lsn):
                continue
            if shard.ledger.is_ahead(lsn):
                shard.ledger.reach(lsn)
            elif lsn in self.given_up:
                if self._is_dead(lsn):
                    dead += shard.ledger.pass_over(lsn)
                else:
                    cancelled += shard.ledger.pass_over(lsn)
            elif shard.ledger.initial.covers(lsn):
                applied += shard.ledger.pass_over(lsn)
                passed_over.append(lsn)
            elif shard.has_room and lsn not in self.cancelling:
                shard.take_in((lsn, key, payload, priority, now_ns, option), now_ns=now_ns, wall_ns=wall_ns)
                if lane.held:
                    waiting.append((lane.setup.name, lsn))
            else:
                self._stay(shard, frame, lsn)
                reading.discard(shard)
        return Fed(applied=applied, dead=dead, cancelled=cancelled, passed_over=passed_over, waiting=waiting)


def _first_missed(shard: Shard) -> int:
    """From which LSN on a shard that is reading back has not seen its operations."""
    assert shard.cursor is not None
    return max(shard.cursor.next_lsn, shard.ledger.frontier + 1)
