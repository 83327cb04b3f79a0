"""The queue of one shard: when a batch is cut, what goes into it, and what waits for a retry.

What is not here: threads, backends, and how the queue is filled (live, or read back from the log).

The idea needed to read it: one batch of a shard is in flight at a time. An operation that must be tried again
holds its key (order "key"), its shard (order "shard") or only itself (order "none") until its time comes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count as counter

from walbatch import limits
from walbatch.types import CutReason, Order

Entry = tuple[int, bytes, bytes, int, int]
"""(LSN or sequence number, key, payload, priority, arrival in monotonic ns)."""


def entry_bytes(entry: Entry) -> int:
    """What an entry costs in memory."""
    return len(entry[1]) + len(entry[2]) + limits.OPERATION_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLimits:
    """The trigger of a lane, in the units of the core."""

    count: int
    bytes: int
    linger_ns: int


class ShardQueue:
    """Pure state of one shard's queue.

    Not thread-safe: its owner locks. `memory_bytes` counts everything not settled.
    """

    def __init__(self, *, order: Order, cut_limits: CutLimits) -> None:
        self.order = order
        self.limits = cut_limits
        self.in_flight: list[Entry] = []
        self.failures = 0
        self.memory_bytes = 0
        self._ready: deque[Entry] = deque()
        self._ready_bytes = 0
        self._blocked_until = 0
        self._held: dict[object, list[Entry]] = {}
        self._held_count = 0
        # What was cut and is not settled: each may cost the shard's mark a range, so there is a bound.
        self._stragglers = 0
        self._highest_cut = 0
        self._timers: list[tuple[int, int, object]] = []
        self._tie = counter()

    def __repr__(self) -> str:
        return (
            f"<ShardQueue {len(self._ready)} ready, {self._held_count} held, {len(self.in_flight)} in flight>"
        )

    def __len__(self) -> int:
        return len(self._ready) + self._held_count + len(self.in_flight)

    @property
    def ready(self) -> int:
        """Operations that could go at once."""
        return len(self._ready)

    def push(self, entry: Entry) -> None:
        """A new operation, in LSN order."""
        cost = entry_bytes(entry)
        self._ready.append(entry)
        self._ready_bytes += cost
        self.memory_bytes += cost

    def release(self, now_ns: int) -> None:
        """Let go of what has waited long enough for its retry."""
        while self._timers and self._timers[0][0] <= now_ns:
            _, _, hold = heapq.heappop(self._timers)
            entries = self._held.pop(hold)
            self._held_count -= len(entries)
            self._return(entries)

    def _return(self, entries: list[Entry]) -> None:
        """Put entries back in front, oldest first: they are older than anything behind them that has their key."""
        self._ready.extendleft(reversed(entries))
        self._ready_bytes += sum(map(entry_bytes, entries))

    def due(self, now_ns: int, *, flush_lsn: int, draining: bool, window_full: bool) -> CutReason | None:
        """Whether a batch should be cut now, and why. Call `release` first."""
        if self.in_flight or not self._ready or now_ns < self._blocked_until:
            return None
        if self._is_full():
            return None
        if len(self._ready) >= self.limits.count:
            return CutReason.COUNT
        if self._ready_bytes - len(self._ready) * limits.OPERATION_OVERHEAD_BYTES >= self.limits.bytes:
            return CutReason.BYTES
        if draining:
            return CutReason.DRAIN
        if self._ready[0][0] <= flush_lsn:
            return CutReason.FLUSH
        if window_full:
            return CutReason.BACKLOG
        if now_ns >= self._lingers_until():
            return CutReason.LINGER
        return None

    def _is_full(self) -> bool:
        """Whether nothing new may be cut until something that was cut before is settled."""
        return self._stragglers >= limits.RANGES_MAX and self._ready[0][0] > self._highest_cut

    def _lingers_until(self) -> int:
        """When the first operation has lingered long enough; what was cut before has waited for its retry instead."""
        first = self._ready[0]
        return 0 if first[0] <= self._highest_cut else first[4] + self.limits.linger_ns

    def next_due_ns(self) -> int | None:
        """When time alone will make something due; None if it will not."""
        if self.in_flight:
            return None
        times = [self._timers[0][0]] if self._timers else []
        if self._ready and not self._is_full():
            times.append(max(self._blocked_until, self._lingers_until()))
        return min(times, default=None)

    def cut(self) -> list[Entry]:
        """Take the next batch, in order and within count and bytes; one larger operation goes alone."""
        assert not self.in_flight
        taken: list[Entry] = []
        taken_bytes = 0
        while self._ready and len(taken) < self.limits.count:
            entry = self._ready[0]
            size = len(entry[1]) + len(entry[2])
            if taken and taken_bytes + size > self.limits.bytes:
                break
            if entry[0] > self._highest_cut:
                if self._stragglers >= limits.RANGES_MAX:
                    break
                self._stragglers += 1
                self._highest_cut = entry[0]
            self._ready.popleft()
            self._ready_bytes -= entry_bytes(entry)
            if self._held and self.order is Order.KEY and entry[1] in self._held:
                self._held[entry[1]].append(entry)
                self._held_count += 1
                continue
            taken.append(entry)
            taken_bytes += size
        self.in_flight = taken
        return taken

    def finish(self) -> list[Entry]:
        """All of the batch in flight is settled."""
        entries, self.in_flight = self.in_flight, []
        self.memory_bytes -= sum(map(entry_bytes, entries))
        self._stragglers -= len(entries)
        self.failures = 0
        self._blocked_until = 0
        return entries

    def fail(self, *, retry_at_ns: int) -> None:
        """The whole batch failed: it goes back in front, and the shard waits."""
        entries, self.in_flight = self.in_flight, []
        self._return(entries)
        self.failures += 1
        self._blocked_until = retry_at_ns

    def finish_partly(self, settled: Iterable[int], retry_at_ns: dict[int, int]) -> None:
        """Some of the batch is settled (indexes); the others wait until their times (index to ns)."""
        entries, self.in_flight = self.in_flight, []
        settled_count = 0
        for index in settled:
            self.memory_bytes -= entry_bytes(entries[index])
            settled_count += 1
        assert settled_count + len(retry_at_ns) == len(entries)
        self._stragglers -= settled_count
        self.failures = 0 if settled_count else self.failures + 1
        if self.order is Order.SHARD:
            self._return([entries[index] for index in sorted(retry_at_ns)])
            self._blocked_until = max(retry_at_ns.values(), default=0)
            return
        until: dict[object, int] = {}
        for index in sorted(retry_at_ns):
            entry = entries[index]
            hold: object = entry[1] if self.order is Order.KEY else entry[0]
            self._held.setdefault(hold, []).append(entry)
            self._held_count += 1
            until[hold] = max(until.get(hold, 0), retry_at_ns[index])
        for hold, time in until.items():
            heapq.heappush(self._timers, (time, next(self._tie), hold))
