"""Urgent operations of a backlog that is still on disk: found, with their elders, and brought before the rest.

What is not here: reading (the dispatcher's reader does that), and what goes first in a queue (`core.fairness`).

The idea needed to read it: a search has two passes. The first goes from frame to frame that holds an urgent operation, as the
footers say. The second, for lanes that keep the order of a key, reads what lies before the last of them, for elders with the same
keys. Shards go on being filled meanwhile: what they have read by the end of the search is left out. A search is bounded in
operations and bytes; what exceeds that keeps its place in the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from walbatch.core.batcher import Entry
from walbatch.core.routing import shard_of
from walbatch.ports import Clock, DecodedFrame
from walbatch.runtime.lane import Cursor, Lane, Shard
from walbatch.runtime.readback import ReadBack
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT, Order, Position

COUNT_MAX: Final = 10_000
"""Operations that one search brings forward, elders included: each may cost its shard's mark a range."""
BYTES_SHARE: Final = 4
"""And at most this part of what their shard may hold in memory."""


@dataclass(slots=True)
class _Found:
    """What was found for one shard."""

    entries: dict[int, Entry] = field(default_factory=dict)
    keys: dict[bytes, int] = field(default_factory=dict)
    """Where a key keeps its order: its last urgent operation."""
    too_many: set[bytes] = field(default_factory=set)
    """Keys with more elders than there is room for: their operations stay where they are."""
    size: int = 0


class Express:
    """One search at a time. Not thread-safe: its owner locks, and reads the frames that it asks for."""

    def __init__(self, lanes: Sequence[Lane], *, read_back: ReadBack, clock: Clock) -> None:
        self._read_back = read_back
        self._by_name = {lane.setup.name: lane for lane in lanes}
        self._shards = [
            shard for lane in lanes if lane.logged and not lane.held and lane.order is not Order.SHARD for shard in lane.shards
        ]  # fmt: skip
        self._clock = clock
        self._wanted = True
        self._searched: Cursor | None = None
        self._position: Position | None = None
        self._next_lsn = 0
        self._end_lsn = 0
        self._for_elders = False
        self._found: dict[Shard, _Found] = {}
        self._wanted_keys: set[bytes] = set()

    def __repr__(self) -> str:
        state = "idle" if self._position is None else "looking for elders" if self._for_elders else "looking"
        return f"<Express {state}, {sum(len(found.entries) for found in self._found.values())} found>"

    def want(self) -> None:
        """An urgent operation was submitted to a shard that is reading back."""
        self._wanted = True

    def step(self, end_lsn: int) -> tuple[Position, int, frozenset[str], int] | None:
        """What to read next: position, next LSN, kinds, and the lowest priority that counts; None: nothing.

        `end_lsn`: the last operation of the log that is durable.
        """
        if self._position is None:
            if not self._wanted:
                return None
            self._wanted = False
            cursor = min((shard.cursor for shard in self._shards if shard.cursor), key=_age, default=None)
            if cursor is None:
                return None
            if self._searched is not None and self._searched.next_lsn > cursor.next_lsn:
                cursor = self._searched
            self._position, self._next_lsn = cursor.position, cursor.next_lsn
            self._end_lsn = end_lsn
            self._for_elders = False
            self._found = {}
        kinds = frozenset(shard.lane.setup.name for shard in self._shards if shard.cursor is not None)
        return self._position, self._next_lsn, kinds, 0 if self._for_elders else PRIORITY_URGENT

    def take(self, frame: DecodedFrame | None) -> bool:
        """The frame that was asked for; None: there is none any more. Returns whether something was brought forward."""
        if frame is not None and frame.lsns[0] <= self._end_lsn:
            self._collect(frame)
            self._position, self._next_lsn = frame.next_position, frame.last_lsn + 1
            if not self._for_elders:
                self._searched = Cursor(self._position, self._next_lsn)
            return False
        if not self._for_elders and any(found.keys for found in self._found.values()):
            self._for_elders = True
            self._wanted_keys = {key for found in self._found.values() for key in found.keys}
            cursor = min((shard.cursor for shard in self._found if shard.cursor), key=_age, default=None)
            if cursor is not None:
                self._position, self._next_lsn = cursor.position, cursor.next_lsn
                return False
        return self._finish()

    def _collect(self, frame: DecodedFrame) -> None:
        """Urgent operations in the first pass, elders of their keys in the second."""
        now_ns = self._clock.monotonic_ns()
        if self._for_elders and self._wanted_keys.isdisjoint(frame.keys):
            return
        options = frame.options or [NO_OPTIONS] * len(frame.keys)
        lanes = [self._by_name.get(kind) for kind in frame.kinds]
        for row, (lsn, kind, key, priority) in enumerate(
            zip(frame.lsns, frame.kind_indexes, frame.keys, frame.priorities, strict=True)
        ):
            if lsn > self._end_lsn:
                break  # a frame that was merged may reach beyond what the shards have taken over
            if not self._for_elders and priority < PRIORITY_URGENT:
                continue
            lane = lanes[kind]
            if lane is None or lane.held or lane.order is Order.SHARD:
                continue
            shard = lane.shards[shard_of(key, lane.setup.shards)]
            found = self._found.get(shard)
            if self._for_elders and (found is None or lsn > found.keys.get(key, 0) or lsn in found.entries):
                continue
            if not shard.misses(lsn):
                continue
            if found is None:
                found = self._found[shard] = _Found()
            size = len(key) + len(frame.payloads[row])
            count_max = min(COUNT_MAX, shard.ledger.room_ahead)
            if len(found.entries) >= count_max or found.size + size > shard.memory_bytes_max // BYTES_SHARE:
                found.too_many.add(key)
                continue
            found.entries[lsn] = (lsn, key, frame.payloads[row], priority, now_ns, options[row])
            found.size += size
            if lane.order is Order.KEY and not self._for_elders:
                found.keys[key] = lsn

    def _finish(self) -> bool:
        """Bring forward what the shards have not read meanwhile."""
        brought = False
        now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
        for shard, found in self._found.items():
            entries = list(self._still_missing(shard, found))
            if entries and len(entries) <= shard.ledger.room_ahead:
                shard.take_in_ahead(entries, now_ns=now_ns, wall_ns=wall_ns)
                brought = True
        self._position = None
        self._found = {}
        return brought

    def _still_missing(self, shard: Shard, found: _Found) -> Iterator[Entry]:
        """Entries, oldest first, that nobody has read or settled since. A key of which too much was found stays behind, whole."""
        behind = {
            found.entries[lsn][1] for lsn in self._read_back.cancelling if lsn in found.entries
        } | found.too_many
        for lsn in sorted(found.entries):
            entry = found.entries[lsn]
            settled = (
                shard.ledger.initial.covers(lsn)
                or lsn in self._read_back.given_up
                or shard.ledger.is_ahead(lsn)
            )
            if shard.misses(lsn) and not settled and entry[1] not in behind:
                yield entry


def _age(cursor: Cursor) -> int:
    return cursor.next_lsn
