"""What the engine reports of itself, as frozen values. The counting is done where the work is done.

Not here: how anything is counted (`core.statistics`), and what counts as healthy (`core.health`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a quantity is distributed. Quantiles are within 5 % of the exact ones; all are 0 where nothing was counted."""

    count: int = 0
    average: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    maximum: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CutStats:
    """The batches that were cut for one reason. Averages are 0 where nothing was counted."""

    batches: int = 0
    failed_batches: int = 0
    operations: int = 0
    bytes: int = 0
    applied: int = 0
    retried: int = 0
    dead: int = 0
    count_average: float = 0.0
    """Operations in a batch."""
    seconds_average: float = 0.0
    """What a batch took, over those that have ended."""
    queue_s_average: float = 0.0
    """What an operation had waited when its batch was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """The batches of a shard, a lane or an engine, since it was opened.

    An operation counts once for each batch that it was in. What is called an estimate is none of the engine's own
    measurements: it says what would have been.
    """

    operations: int = 0
    """Handed to the backend: `batched` and `individual` together."""
    batched: int = 0
    """Operations that went in company."""
    individual: int = 0
    """Operations that went alone."""
    applied: int = 0
    retried: int = 0
    dead: int = 0
    batches: int = 0
    failed_batches: int = 0
    """Batches of which nothing was applied because the whole batch failed."""
    in_flight: int = 0
    """Batches that were cut and have not ended."""
    bytes: int = 0
    """Keys and payloads."""
    count_average: float = 0.0
    bytes_average: float = 0.0
    seconds: Spread = field(default_factory=Spread)
    """What a batch took, from its cut to its answer."""
    queue_seconds: Spread = field(default_factory=Spread)
    """What an operation had waited when its batch was cut. The oldest of a batch counts with its own time, the others with
    their mean."""
    throughput: float = 0.0
    """Operations applied in a second, over the last ten."""
    throughput_overall: float = 0.0
    """The same since the opening."""
    target_count: int = 0
    """The present size target; the mean of the shards where there are several."""
    efficiency: float = 0.0
    """How full batches were: operations by the sum of the size targets at their cuts, 0 to 1."""
    error_rate: float = 0.0
    """Share of the answers for operations that were not "applied", 0 to 1."""
    load: float = 0.0
    """Share of the last ten seconds in which the backend had a batch, 0 to 1; the mean of the shards."""
    saved_calls: int = 0
    """Calls that batching saved against one for each operation, of batches that did not fail."""
    call_s: float | None = None
    """Estimate: fixed cost of a call, F in "seconds of a batch = F + c x operations" (least squares, weighted by
    1 / operations); None while the sizes that were seen are too alike to tell F from c."""
    saved_s: float | None = None
    """Estimate: what these calls would have taken, `saved_calls` x F."""
    cuts: Mapping[str, CutStats] = field(default_factory=dict)
    """By cut reason."""
    results: Mapping[str, int] = field(default_factory=dict)
    """Batches by what became of them as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerStats:
    """What a size controller believes. None where it does not know."""

    name: str
    lead_count: int
    """The size it holds to be the best."""
    cap_count: int
    """The largest size it would ask for now."""
    cost_s: float | None = None
    """Seconds for each operation at the lead."""
    latency_s: float | None = None
    """Seconds of a batch at the lead, at the quantile of the latency target."""
    target_unreachable: bool = False
    """No size keeps the latency target."""
    samples: int = 0
    drifts: int = 0
    """How often the cost changed so much that what had been learnt was discarded."""
    reason: str = ""
    """Why the last batch got the size it had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStats:
    """One shard of a lane, since the engine was opened. Counts are operations unless named otherwise."""

    shard: int
    in_memory: int = 0
    in_memory_bytes: int = 0
    in_flight: int = 0
    in_flight_batches: int = 0
    delayed: int = 0
    """Waiting for the time before which they must not be delivered."""
    reading_back: bool = False
    """Its next operations wait in the log rather than in memory."""
    settled_lsn: int = 0
    breaker: str = "closed"
    """"closed", "open" or "half open"."""
    controller: ControllerStats | None = None
    batches: BatchStats = field(default_factory=BatchStats)
    last_error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """One lane, since the engine was opened. Counts are operations unless named otherwise."""

    submitted: int
    applied: int
    retried: int
    """Operations handed to the backend again after a failed try."""
    batches: int
    failed_batches: int
    cut_reasons: Mapping[str, int]
    in_memory: int
    in_memory_bytes: int
    in_flight: int
    reading_back: int
    """Shards whose next operations wait in the log rather than in memory."""
    settled_lsn: int
    """Every operation of this lane up to this LSN is settled."""
    paused: bool
    held: bool
    """The lane has no backend: its operations stay in the log."""
    last_error: str | None
    dead: int = 0
    cancelled: int = 0
    delayed: int = 0
    """Waiting for the time before which they must not be delivered."""
    breaker: str = "closed"
    """The worst of its shards: "open" before "half open" before "closed"."""
    in_flight_batches: int = 0
    concurrency: int = 1
    """Batches that may be in flight at once."""
    controller: ControllerStats | None = None
    """That of its busiest shard; each shard has its own."""
    batch_stats: BatchStats = field(default_factory=BatchStats)
    shards: tuple[ShardStats, ...] = ()
    usual_rate: float = 0.0
    """What the history of the last days says of this hour: operations in a second; 0 where it says nothing."""
    usual_count: float = 0.0
    """The same: operations in a batch."""
    usual_seconds: float = 0.0
    """The same: seconds of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of an engine. LSNs are watermarks; `pending` is what is durable and not yet settled.

    At every moment `submitted + pending_at_open == applied + dead + cancelled + pending`: see `unaccounted`.
    """

    state: str
    submitted_lsn: int
    durable_lsn: int
    settled_lsn: int
    checkpointed_lsn: int
    pending: int
    commits: int
    """Commit groups written."""
    syncs: int
    committed: int
    """Operations written to the log."""
    disk_bytes: int
    lanes: Mapping[str, LaneStats] = field(default_factory=dict)
    submitted: int = 0
    """Logged operations that were accepted since the opening."""
    pending_at_open: int = 0
    """Logged operations that an earlier incarnation had left."""
    applied: int = 0
    dead: int = 0
    cancelled: int = 0
    unlogged: int = 0
    """Operations of lanes with durability "none" that wait in memory; outside the identity above."""
    memory_bytes: int = 0
    """What walbatch's queues hold now."""
    peak_memory_bytes: int = 0
    """The most they held at any time."""
    batch_stats: BatchStats = field(default_factory=BatchStats)

    @property
    def unaccounted(self) -> int:
        """Operations that entered and are neither settled nor pending: 0 unless the engine has lost count."""
        entered = self.submitted + self.pending_at_open
        return entered - (self.applied + self.dead + self.cancelled + self.pending)


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReport:
    """What `close` achieved. `remaining` operations are safe in the log and will be replayed by the next open."""

    settled: int
    """Operations settled while closing."""
    dead: int
    """Of these, operations that were given up: they are dead letters."""
    remaining: int
    elapsed_s: float
    reason: str
    """"drained", "not drained", "timeout", "failed: …"."""


class HealthVerdict(enum.StrEnum):
    """How an engine is, or how bad one reason is."""

    OK = "ok"
    DEGRADED = "degraded"
    """It works, but somebody should look."""
    FAILING = "failing"
    """Something is not being done, and will not be until somebody acts."""


class HealthCheck(enum.StrEnum):
    """What was looked at."""

    STOPPED = "stopped"
    """The engine failed and acknowledges nothing more."""
    CLOSED = "closed"
    """Somebody closed the engine."""
    BACKEND_BROKEN = "backend broken"
    """A backend said that somebody must repair something: its shard stands still."""
    NONSENSE = "nonsense"
    """A backend answers with what is no answer."""
    STUCK = "stuck"
    """A batch has been in flight for longer than its time limit."""
    ABANDONED = "abandoned"
    """Calls of backends that were given up and have not returned."""
    MEMORY = "memory"
    DISK = "disk"
    DEAD_LETTERS = "dead letters"
    BREAKER = "breaker"
    FAILURES = "failures"
    """The last batches of a shard all failed, and its breaker is closed."""
    PAUSED = "paused"
    """A lane is paused, and has work."""
    HELD = "held"
    """A lane has no backend, and has work."""
    GROWING = "growing"
    """A queue grows although its backend works."""
    RETRY_BUDGET = "retry budget"
    LATENCY_TARGET = "latency target"
    """No size of batch keeps the latency target."""
    DELAYED = "delayed"
    """Delayed operations fill the memory of a shard: what is behind them in the log waits as they do."""
    SYNC = "sync"
    """Syncs of the log are slow."""
    CLOCK = "clock"
    """The wall clock jumped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReason:
    """One thing that is not as it should be. `lane` and `shard` say where, None where that is no question."""

    name: HealthCheck
    verdict: HealthVerdict
    text: str
    """What happened, and what to do next."""
    lane: str | None = None
    shard: int | None = None
    value: float = 0.0
    """What was measured, in the unit of `limit`."""
    limit: float = 0.0
    """From where on it is a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The verdict on an engine: that of its worst reason. Reasons stand worst first."""

    verdict: HealthVerdict = HealthVerdict.OK
    reasons: tuple[HealthReason, ...] = ()
