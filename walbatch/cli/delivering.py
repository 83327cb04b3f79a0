"""Delivers what is pending in an open engine, as long as that makes progress."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from walbatch.cli.output import Step
from walbatch.engine import Engine
from walbatch.errors import ResultTimeout

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
    dead: int
    """Operations that became dead letters since the engine was opened, or were such already when the log still held them."""
    elapsed_s: float
    errors: Mapping[str, str]


def deliver(engine: Engine, *, pending: int, served: int, patience: Patience, step: Step) -> Delivered:
    """Flush until nothing is left or patience ends, then close the engine.

    `pending` operations were pending when it was opened or have been submitted since, and `served` of them have a
    backend. The engine is closed in any case; what is not delivered stays in its log.
    """
    started = progressed = time.monotonic()
    done = 0
    errors: dict[str, str] = {}
    try:
        while served:
            try:
                engine.flush(timeout=POLL_S)
            except ResultTimeout:
                pass
            else:
                break
            now, settled = time.monotonic(), pending - engine.stats().pending
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
        remaining=report.remaining,
        dead=engine.stats().dead,
        elapsed_s=time.monotonic() - started,
        errors=errors if report.remaining else {},
    )
