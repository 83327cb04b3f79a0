"""Calls of backends that are under way: when they began, and when they should have returned.

What is not here: making calls, and what follows when one takes too long (`delivery`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Final
from weakref import ref

from walbatch.config import NS_PER_S
from walbatch.core.batcher import Flight
from walbatch.runtime.lane import Shard
from walbatch.types import Batch


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Job:
    """A batch on its way to a backend."""

    shard: Shard
    flight: Flight
    batch: Batch
    teaches: bool
    """Whether the size controller may learn from it."""
    timeout_ns: int | None = None
    """How long its call may take; set when it begins, whatever is configured later."""
    limit_ns: int | None = None
    """When to look at it: when it must have returned, and from then on now and then."""
    began_ns: int = 0
    since_ns: int = 0
    """Since when its worker has gone on from batch to batch; 0: it has begun with this one."""
    given_up: bool = False
    interrupted: bool = False
    is_overdue: bool = False
    """It has been said that it takes too long."""

    @property
    def timeout_s(self) -> float:
        """How long its call may take; 0 without a limit."""
        return (self.timeout_ns or 0) / NS_PER_S

    def holds(self, lsn: int) -> bool:
        """Whether the batch has this logged operation."""
        return lsn in self.batch.lsns


_inside: Final[ContextVar[tuple[ref[Job], ...]]] = ContextVar("walbatch_calls", default=())
"""The calls that a piece of code is a part of, the outermost first. Weak: what a backend starts may outlive its call by far."""


class Calls:
    """The calls that have not returned. Guarded by the dispatcher's lock, but for `enter`, `leave` and `is_inside`."""

    def __init__(self) -> None:
        self._running: set[Job] = set()

    def __repr__(self) -> str:
        return f"<Calls {len(self._running)} under way>"

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._running)

    @staticmethod
    def enter(job: Job) -> Token[tuple[ref[Job], ...]]:
        """What runs until `leave` is a part of the call: asyncio tasks that start here, and the threads that they use, too."""
        return _inside.set((*_inside.get(), ref(job)))

    @staticmethod
    def leave(token: Token[tuple[ref[Job], ...]]) -> None:
        """The end of what `enter` began."""
        _inside.reset(token)

    def is_inside(self) -> bool:
        """Whether the caller is a part of a call that has not returned. In any thread."""
        return any(job() in self._running for job in _inside.get())

    def begin(self, job: Job, now_ns: int) -> None:
        """The backend is about to be called."""
        job.timeout_ns = job.shard.lane.timeout_ns
        job.began_ns = now_ns
        job.limit_ns = None if job.timeout_ns is None else now_ns + job.timeout_ns
        self._running.add(job)

    def end(self, job: Job) -> None:
        """It has returned."""
        self._running.discard(job)

    def late(self, now_ns: int) -> list[Job]:
        """Those that have taken too long and are not given up."""
        return [job for job in self._running if job.limit_ns is not None and now_ns >= job.limit_ns]

    def may_apply(self, lsn: int) -> bool:
        """Whether a call that was given up may still apply this operation."""
        return any(job.given_up and job.holds(lsn) for job in self._running)

    def next_limit_ns(self) -> int | None:
        """When the next one will have taken too long; None while none can."""
        return min(
            (job.limit_ns for job in self._running if job.limit_ns is not None),
            default=None,
        )

    def oldest_began_ns(self) -> dict[Shard, int]:
        """When the oldest call of each shard began that has not returned."""
        began: dict[Shard, int] = {}
        for job in self._running:
            began[job.shard] = min(job.began_ns, began.get(job.shard, job.began_ns))
        return began
