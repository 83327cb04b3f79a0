"""What the engine reports of itself, as frozen values. The counting is done where the work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of an engine. LSNs are watermarks; `pending` is what is durable and not yet settled."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReport:
    """What `close` achieved. `remaining` operations are safe in the log and will be replayed by the next open."""

    settled: int
    """Operations settled while closing."""
    remaining: int
    elapsed_s: float
    reason: str
    """"drained", "not drained", "timeout", "failed: …"."""
