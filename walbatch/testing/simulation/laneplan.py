"""A lane of a workload: everything of a `Lane` but its backend, which each process makes anew."""

from __future__ import annotations

from dataclasses import dataclass, field

from walbatch.config import INTERVAL_MS, Lane, RetryPolicy, Trigger
from walbatch.testing.simulation.machine import Process

PROMPT = Trigger(count=4, linger_ms=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """A lane of a workload: everything of a `Lane` but its backend."""

    transactional: bool = False
    shards: int = 1
    order: str = "key"
    durability: str = "sync"
    interval_ms: float = 20.0
    trigger: Trigger = PROMPT
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout_s: float | None = 30.0
    strategy: str = "parallel"
    held: bool = False
    """Without a backend: its operations stay in the log."""

    def lane(self, name: str, process: Process) -> Lane:
        """The lane, with a model backend."""
        backend = None if self.held else process.backend(name, transactional=self.transactional)
        interval_ms = self.interval_ms if self.durability == "interval" else INTERVAL_MS
        return Lane(
            backend, shards=self.shards, order=self.order, durability=self.durability, interval_ms=interval_ms,
            trigger=self.trigger, retry=self.retry, timeout_s=self.timeout_s, strategy=self.strategy,
        )  # fmt: skip
