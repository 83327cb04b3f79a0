"""The figures of lanes and shards as frozen values, taken under the dispatcher's lock.

What is not here: counting. Whoever does the work counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from walbatch.core.breaker import BreakerState
from walbatch.core.history import Expectation
from walbatch.core.statistics import batch_stats
from walbatch.metrics import BatchStats, ControllerStats, LaneStats, ShardStats
from walbatch.runtime.lane import Lane, Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the dispatcher knows, at one moment. `applied`, `dead`, `cancelled` and `settled` are of logged operations."""

    lanes: Mapping[str, LaneStats]
    settled_lsn: int
    settled: int
    applied: int
    dead: int
    cancelled: int
    unlogged: int
    memory_bytes: int
    peak_memory_bytes: int
    batch_stats: BatchStats


def lane_stats(
    lane: Lane, *, now_ns: int, watermark: Callable[[Shard], int], expected: Expectation | None
) -> LaneStats:
    """A lane's figures."""
    shards = tuple(_shard_stats(shard, now_ns=now_ns, watermark=watermark) for shard in lane.shards)
    busiest = max(shards, key=lambda shard: shard.batches.batches)
    whole = batch_stats([shard.tally for shard in lane.shards], now_ns=now_ns)
    return LaneStats(
        submitted=lane.submitted, applied=lane.applied, retried=lane.retried, batches=lane.batches,
        failed_batches=lane.failed_batches, cut_reasons={reason: cut.batches for reason, cut in whole.cuts.items()},
        in_memory=_total(shards, "in_memory"), in_memory_bytes=_total(shards, "in_memory_bytes"),
        in_flight=_total(shards, "in_flight"), reading_back=_total(shards, "reading_back"),
        settled_lsn=min(shard.settled_lsn for shard in shards), paused=lane.paused, held=lane.held, last_error=lane.last_error,
        dead=lane.dead, cancelled=lane.cancelled, delayed=_total(shards, "delayed"),
        breaker=max((shard.breaker for shard in shards), key=_SEVERITY.index), in_flight_batches=lane.in_flight,
        concurrency=lane.slots, controller=busiest.controller, batch_stats=whole, shards=shards,
        usual_rate=expected.rate if expected else 0.0, usual_count=expected.count if expected else 0.0,
        usual_seconds=expected.seconds if expected else 0.0,
    )  # fmt: skip


_SEVERITY = [BreakerState.CLOSED.value, BreakerState.HALF_OPEN.value, BreakerState.OPEN.value]


def _total(shards: Sequence[ShardStats], name: str) -> int:
    return sum(getattr(shard, name) for shard in shards)


def _shard_stats(shard: Shard, *, now_ns: int, watermark: Callable[[Shard], int]) -> ShardStats:
    queue, state = shard.queue, shard.controller.describe()
    return ShardStats(
        shard=shard.index, in_memory=len(queue), in_memory_bytes=queue.memory_bytes,
        in_flight=sum(map(len, queue.flights.values())), in_flight_batches=len(queue.flights),
        delayed=len(queue.delayed_lsns), reading_back=shard.cursor is not None, settled_lsn=watermark(shard),
        breaker=shard.breaker.state.value, batches=shard.tally.snapshot(now_ns=now_ns), last_error=shard.broken,
        controller=ControllerStats(
            name=state.name, lead_count=state.lead_count, cap_count=state.cap_count, cost_s=state.cost_s, latency_s=state.latency_s,
            target_unreachable=state.latency_unreachable, samples=state.samples, drifts=state.drifts, reason=shard.target_reason,
        ),
    )  # fmt: skip
