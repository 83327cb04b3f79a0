"""Where delivery stands: what all threads that take part in it share.

What is not here: the queues themselves (`lane`), and any decision.
"""

from __future__ import annotations

from dataclasses import dataclass

from walbatch.errors import WalbatchError
from walbatch.types import Position


@dataclass(slots=True, kw_only=True)
class Flow:
    """Guarded by the dispatcher's lock. Counts of operations are of logged ones."""

    end: Position
    """Where the log ends, as far as the shards have taken it over, in memory or at their cursors."""
    end_lsn: int
    """The last operation before that."""
    in_flight: int = 0
    """Batches that take a flush slot."""
    abandoned: int = 0
    """Calls that were given up and have not returned."""
    settled: int = 0
    found_applied: int = 0
    """Applied before this run, as a backend's mark said, and not counted by the last checkpoint."""
    found_dead: int = 0
    found_cancelled: int = 0
    unlogged_inbox: int = 0
    """Operations that are not logged, on their way to their shards."""
    peak_memory_bytes: int = 0
    draining: bool = False
    hurried: bool = False
    """A drain is to end as it is."""
    stopping: bool = False
    failure: WalbatchError | None = None
