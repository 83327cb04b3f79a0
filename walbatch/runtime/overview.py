"""What the others want to know of delivery: what is settled, what was learnt, how much, how fast, and whether all is well.

What is not here: counting, and looking around (`watch`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.core.health import LaneFacts, ShardFacts
from walbatch.core.history import HISTORY, History
from walbatch.core.statistics import batch_stats
from walbatch.ports import Clock, Condition
from walbatch.runtime.calls import Calls
from walbatch.runtime.flow import Flow
from walbatch.runtime.lane import Lane, Shard
from walbatch.runtime.report import Report, lane_stats
from walbatch.runtime.watch import Watch
from walbatch.types import LaneMark

SNAPSHOT_NS: Final = 10_000_000_000
"""How often what the size controllers have learnt goes to state/."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What the checkpointer needs, taken at one moment."""

    watermark: int
    lanes: Mapping[str, LaneMark]
    settled_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a verdict on health needs of the dispatcher, taken at one moment."""

    memory_bytes: int
    memory_bytes_max: int
    abandoned: int
    clock_jump_s: float
    lanes: tuple[LaneFacts, ...]
    shards: tuple[ShardFacts, ...]


class Overview:
    """Looks at everything at one moment. Safe from any thread, but for `note_memory`."""

    def __init__(
        self, *, cond: Condition, flow: Flow, clock: Clock, lanes: Sequence[Lane], calls: Calls, history: History, watch: Watch,
        epoch: int, await_taking_over: Callable[[], None],
    ) -> None:  # fmt: skip
        """`await_taking_over`, with the lock held, waits until what was durable is in the shards: for a moment at most."""
        # The dispatcher's: it guards all that is looked at.
        self._cond = cond
        self._flow = flow
        self._clock = clock
        self._lanes = lanes
        self._shards = [shard for lane in lanes for shard in lane.shards]
        self._calls = calls
        self._history = history
        self._watch = watch
        self._epoch = epoch
        self._await_taking_over = await_taking_over
        self._snapshots_due_ns = 0

    def __repr__(self) -> str:
        return f"<Overview of {len(self._lanes)} lanes>"

    def note_memory(self) -> int:
        """The bytes of all queues. With the lock held."""
        held = sum(shard.queue.memory_bytes for shard in self._shards)
        self._flow.peak_memory_bytes = max(self._flow.peak_memory_bytes, held)
        return held

    def facts(self) -> Facts:
        """What a verdict on health needs of here. To be called after looking around: the timer of an idle engine sleeps."""
        now_ns = self._clock.monotonic_ns()
        with self._cond:
            used, limit = self._watch.memory_bytes
            return Facts(
                memory_bytes=used, memory_bytes_max=limit, abandoned=self._flow.abandoned, clock_jump_s=self._watch.jump_s(now_ns),
                lanes=self._watch.lane_facts(), shards=self._watch.shard_facts(now_ns, self._calls),
            )  # fmt: skip

    def _watermark(self, shard: Shard) -> int:
        """Every operation of the shard up to this LSN is settled. Called with the lock held."""
        if shard.cursor is None and shard.lane.logged:
            shard.ledger.advance(self._flow.end_lsn)
        return shard.ledger.watermark()

    def settled(self) -> Settled:
        """The settled state, consistent at one moment."""
        with self._cond:
            watermarks = [self._watermark(shard) for shard in self._shards if shard.lane.logged]
            lanes = {
                lane.setup.name: LaneMark(shards=tuple(shard.ledger.checkpoint_mark(epoch=self._epoch) for shard in lane.shards))
                for lane in self._lanes if lane.logged
            }  # fmt: skip
            return Settled(
                watermark=min(watermarks, default=self._flow.end_lsn),
                lanes=lanes,
                settled_count=self._flow.settled,
            )

    def controllers(self, now_ns: int, *, last: bool) -> dict[tuple[str, int], bytes]:
        """What the size controllers of logged lanes have learnt, now and then and at the `last`: snapshots by lane and shard."""
        with self._cond:
            if now_ns < self._snapshots_due_ns and not last:
                return {}
            self._snapshots_due_ns = now_ns + SNAPSHOT_NS
            changed = [
                shard for lane in self._lanes if lane.logged for shard in lane.shards if shard.has_learnt
            ]
            if not changed:
                return {}
            learnt = {(shard.lane.setup.name, shard.index): shard.snapshot() for shard in changed}
            return {**learnt, HISTORY: self._history.encode()}

    def report(self) -> Report:
        """Every lane's figures, at one moment."""
        with self._cond:
            self._await_taking_over()
            now_ns, wall_ns = self._clock.monotonic_ns(), self._clock.wall_ns()
            lanes = {
                lane.setup.name: lane_stats(
                    lane,
                    now_ns=now_ns,
                    watermark=self._watermark,
                    expected=self._history.expect(lane.setup.name, wall_ns),
                )
                for lane in self._lanes
            }
            logged = [lane for lane in self._lanes if lane.logged]
            flow = self._flow
            memory_bytes = self.note_memory()
            return Report(
                lanes=lanes, settled=flow.settled, applied=flow.found_applied + sum(lane.applied for lane in logged),
                settled_lsn=min((self._watermark(s) for s in self._shards if s.lane.logged), default=self._flow.end_lsn),
                dead=flow.found_dead + sum(lane.dead for lane in logged),
                cancelled=flow.found_cancelled + sum(lane.cancelled for lane in logged),
                unlogged=sum(len(shard.queue) for shard in self._shards if not shard.lane.logged),
                memory_bytes=memory_bytes, peak_memory_bytes=self._flow.peak_memory_bytes,
                batch_stats=batch_stats([shard.tally for shard in self._shards], now_ns=now_ns),
            )  # fmt: skip

    def settled_lsn(self) -> int:
        """The settled watermark over all lanes."""
        with self._cond:
            return min(
                (self._watermark(s) for s in self._shards if s.lane.logged), default=self._flow.end_lsn
            )

    def settled_count(self) -> int:
        """Logged operations settled since this engine was opened, those that a backend's mark reported included."""
        with self._cond:
            return self._flow.settled

    def dead_count(self) -> int:
        """Logged operations given up since this engine was opened."""
        with self._cond:
            return sum(lane.dead for lane in self._lanes if lane.logged)

    def unlogged_count(self) -> int:
        """Operations of lanes that log nothing which are left: they end with the engine."""
        with self._cond:
            return sum(len(shard.queue) for shard in self._shards if not shard.lane.logged)
