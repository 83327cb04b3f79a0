"""Delivers what is pending in an open engine, as long as that makes progress."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from walbatch.cli.output import Step
from walbatch.errors import BackendError, ResultTimeout
from walbatch.inspection import look, passes_over

if TYPE_CHECKING:
    from walbatch.engine import Engine

POLL_S = 0.2
STOP_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to deliver: `timeout` seconds in all (None: without end), `stall` seconds without progress."""

    timeout: float | None
    stall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """What came of it. `errors` has the last error of each lane that left something."""

    count: int
    """Operations that a backend has applied since the engine was opened."""
    remaining: int
    elapsed_s: float
    errors: Mapping[str, str]


def deliver(engine: Engine, *, served: int, patience: Patience, step: Step) -> Delivered:
    """Flush until nothing is left or patience ends, then close the engine.

    `served` operations are pending and have a backend. The engine is closed in any case; what is not delivered stays in
    its log.
    """
    started = progressed = time.monotonic()
    before, done = _settled(engine), 0
    errors: dict[str, str] = {}
    try:
        while served:
            try:
                engine.flush(timeout=POLL_S)
            except ResultTimeout:
                pass
            except BackendError:
                break  # what is left waits for somebody to repair a backend
            else:
                break
            now, settled = time.monotonic(), _settled(engine) - before
            if settled > done:
                done, progressed = settled, now
            step(done, served)
            if now - progressed > patience.stall or (
                patience.timeout is not None and now - started > patience.timeout
            ):
                break
        errors = {kind: lane.last_error for kind, lane in engine.stats().lanes.items() if lane.last_error}
        step(served, served)
    finally:
        report = engine.close(drain=False, timeout=STOP_S)
    return Delivered(
        count=sum(lane.applied for lane in engine.stats().lanes.values()),
        remaining=_left(engine, report.remaining),
        elapsed_s=time.monotonic() - started,
        errors=errors if report.remaining else {},
    )


def _settled(engine: Engine) -> int:
    stats = engine.stats()
    return stats.applied + stats.dead + stats.cancelled


def _left(engine: Engine, remaining: int) -> int:
    """What is left in the log of a closed engine, which says `remaining`.

    It counts also what it would have passed over, had it come to read that; the log itself tells.
    """
    if remaining and passes_over(engine.path):
        return look(engine.path, full=True).store.pending
    return remaining
