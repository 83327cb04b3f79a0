"""What is looked at now and then: memory, the clocks, and whether queues grow; and the facts that a verdict on health needs.

What is not here: the verdict (`core.health`), and what short memory means (`core.pressure`).
"""

from __future__ import annotations

from collections.abc import Sequence

from walbatch.config import NS_PER_S, Adaptive
from walbatch.core.health import ClockWatch, LaneFacts, ShardFacts, Trend
from walbatch.core.pressure import Pressure
from walbatch.ports import Clock, Memory
from walbatch.runtime.calls import Calls
from walbatch.runtime.flushing import stalled_count
from walbatch.runtime.lane import Lane, Shard

LOOK_NS = 1_000_000_000
"""How often."""


class Watch:
    """Looks around. Its owner locks, but for `is_due` and `look`, which reads what the system says."""

    def __init__(self, *, memory: Memory, clock: Clock, lanes: Sequence[Lane]) -> None:
        self._memory = memory
        self._clock = clock
        self._lanes = lanes
        self._clocks = ClockWatch(monotonic_ns=clock.monotonic_ns(), wall_ns=clock.wall_ns())
        self._trends = [Trend() for _ in lanes]
        self._due_ns = 0
        self.memory_bytes = (0, 0)
        """In use, and there is."""
        self.pressure = Pressure.NONE

    def __repr__(self) -> str:
        return f"<Watch memory {self.memory_bytes[0]:,} of {self.memory_bytes[1]:,} bytes, pressure {self.pressure}>"

    def is_due(self, now_ns: int) -> bool:
        """Whether it is time to look again."""
        return now_ns >= self._due_ns

    def look(self) -> tuple[int, int]:
        """What the system says of memory. Not with a lock held: it reads files."""
        return self._memory.look()

    def take_in(self, now_ns: int, memory_bytes: tuple[int, int]) -> None:
        """Remember what was seen."""
        self._due_ns = now_ns + LOOK_NS
        self.memory_bytes = memory_bytes
        self.pressure = self.pressure.after(*memory_bytes)
        self._clocks.observe(monotonic_ns=now_ns, wall_ns=self._clock.wall_ns())
        for lane, trend in zip(self._lanes, self._trends, strict=True):
            trend.observe(now_ns, pending=_pending(lane), settled=lane.submitted - _pending(lane))

    def jump_s(self, now_ns: int) -> float:
        """How far the wall clock jumped of late."""
        return self._clocks.jump_s(monotonic_ns=now_ns)

    def lane_facts(self) -> tuple[LaneFacts, ...]:
        """Every lane."""
        facts = []
        for lane, trend in zip(self._lanes, self._trends, strict=True):
            growth = trend.growth()
            facts.append(
                LaneFacts(
                    name=lane.setup.name, pending=max(0, _pending(lane)), waiting=_waiting(lane), growth=growth.pending,
                    settled=growth.settled, trend_s=growth.seconds, paused=lane.paused, held=lane.held,
                    retries_waiting=lane.retries_waiting,
                )
            )  # fmt: skip
        return tuple(facts)

    def shard_facts(self, now_ns: int, calls: Calls) -> tuple[ShardFacts, ...]:
        """Every shard that has a backend."""
        began = calls.oldest_began_ns()
        return tuple(
            _shard_facts(shard, now_ns, began.get(shard))
            for lane in self._lanes if not lane.held for shard in lane.shards
        )  # fmt: skip


def _pending(lane: Lane) -> int:
    """Submitted and not settled since the opening; negative while an older backlog is being worked off."""
    return lane.submitted - lane.applied - lane.dead - lane.cancelled


def _waiting(lane: Lane) -> int:
    """Operations of a lane that stands still which could go otherwise: those that are known."""
    if lane.held:
        return max(_pending(lane), sum(len(shard.ledger) for shard in lane.shards))
    return sum(stalled_count(shard) for shard in lane.shards) if lane.paused else 0


def _shard_facts(shard: Shard, now_ns: int, began_ns: int | None) -> ShardFacts:
    settings = shard.lane.settings
    state = shard.controller.describe()
    control = settings.controller
    return ShardFacts(
        lane=shard.lane.setup.name, shard=shard.index, in_flight_s=0.0 if began_ns is None else (now_ns - began_ns) / NS_PER_S,
        timeout_s=settings.timeout_s, breaker=shard.breaker.state.value,
        breaker_open_s=0.0 if shard.breaker.opened_at_ns is None else (now_ns - shard.breaker.opened_at_ns) / NS_PER_S,
        broken=shard.broken or "", failures=shard.breaker.fruitless,
        nonsense=shard.nonsense, last_error=shard.lane.last_error or "", latency_s=state.latency_s,
        latency_target_s=control.latency_ms / 1e3 if isinstance(control, Adaptive) and control.latency_ms else None,
        target_unreachable=state.latency_unreachable,
        clogged_bytes=shard.queue.memory_bytes if shard.is_clogged else 0, memory_bytes_max=shard.memory_bytes_max,
    )  # fmt: skip
