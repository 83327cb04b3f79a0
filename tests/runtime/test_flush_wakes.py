"""A flush returns once what it waits for is settled, whatever the lane still has to do."""

from __future__ import annotations

import threading
import time

import walbatch as wb
from tests.memory import MemoryFileSystem, environment
from tests.support import wait_until


class Stepping:
    """A backend that applies as many batches as it is let."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.begun = 0

    def apply(self, batch: wb.Batch) -> None:
        self.begun += len(batch)
        self.go.acquire(timeout=60)


def open_engine(backend: Stepping) -> wb.Engine:
    lanes = {"put": wb.Lane(backend, trigger=wb.Trigger(count=20))}
    return wb.Engine.open("/q", lanes=lanes, environment=environment(MemoryFileSystem()))


def flush_beside(engine: wb.Engine, *, lsn: int) -> threading.Thread:
    """A flush in a thread of its own, once it waits for everything up to `lsn`."""
    thread = threading.Thread(target=lambda: engine.flush("put", timeout=60), daemon=True)
    thread.start()
    shard = engine._dispatcher.lanes[0].shards[0]
    wait_until(lambda: shard.flush_lsn == lsn, what="the flush waits")
    return thread


def submit(engine: wb.Engine, count: int) -> None:
    engine.submit_many("put", [(b"%d" % number, b"") for number in range(count)])


def test_a_flush_does_not_wait_for_what_a_later_flush_waits_for() -> None:
    backend = Stepping()
    with open_engine(backend) as engine:
        submit(engine, 20)
        wait_until(lambda: backend.begun == 20, what="the first batch is in flight")
        first = flush_beside(engine, lsn=20)
        submit(engine, 100)
        second = flush_beside(engine, lsn=120)
        wait_until(lambda: engine.stats().pending == 120, what="all is taken over")
        backend.go.release()
        try:
            wait_until(lambda: not first.is_alive(), what="the first flush returns")
            assert second.is_alive()
        finally:
            backend.go.release(100)


def test_a_flush_with_a_delayed_operation_does_not_wait_for_what_came_later() -> None:
    backend = Stepping()
    with open_engine(backend) as engine:
        engine.submit("put", key=b"later", not_before=time.time() + 3600)
        submit(engine, 20)
        wait_until(lambda: backend.begun == 20, what="the first batch is in flight")
        flush = flush_beside(engine, lsn=21)
        submit(engine, 100)
        wait_until(lambda: engine.stats().pending == 121, what="all is taken over")
        backend.go.release()
        try:
            wait_until(lambda: not flush.is_alive(), what="the flush returns")
        finally:
            backend.go.release(100)
