"""walbatch as a subject, through its public names, with the settings that everybody gets.

The idea needed to read it: the lane is paused, as no other subject delivers anything while it takes; draining resumes it, and ends
when the engine is closed, because only then the checkpoint which says that all is settled is on disk for certain.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import walbatch as wb
from walbatch.bench.subject import Role, Subject, Take

LANE: Final = "put"


def _ignore(payloads: Sequence[bytes]) -> None:
    """Be a backend that does nothing."""
    del payloads


class Walbatch(Subject):
    """An engine with one lane, its backend a function that does nothing."""

    name: ClassVar[str] = "walbatch"
    title: ClassVar[str] = "walbatch"
    role: ClassVar[Role] = Role.OWN
    note: ClassVar[str] = (
        "default settings; its lane is paused but in w5, which ends when the checkpoint is on disk (close)"
    )

    def __init__(self, settings: wb.Settings | None = None) -> None:
        super().__init__()
        self._settings = settings
        self._engine: wb.Engine | None = None
        self._async_engine: wb.AsyncEngine | None = None
        self._take: Take = _ignore

    @property
    def engine(self) -> wb.Engine:
        """The engine that is open."""
        assert self._engine is not None
        return self._engine

    def open(self, folder: Path) -> None:
        """Open a new store, its lane paused."""
        lanes = {LANE: wb.Lane(self._apply)}
        self._engine = wb.Engine.open(folder / "store", lanes=lanes, settings=self._settings)
        self._engine.pause(LANE)

    def _apply(self, batch: wb.Batch) -> None:
        self._take(batch.payloads)

    def put(self, item: Any) -> None:
        """`submit`."""
        assert self._engine is not None
        key, payload = item
        self._engine.submit(LANE, key=key, payload=payload)

    def put_group(self, group: Any) -> None:
        """`submit_many`."""
        assert self._engine is not None
        self._engine.submit_many(LANE, group)

    def drain(self, count: int, take: Take) -> int:
        """Resume the lane, flush, and close the engine: everything is delivered, and the checkpoint is durable."""
        engine = self.engine
        self._take = take
        started = time.perf_counter()
        engine.resume(LANE)
        engine.flush(LANE)
        self.extra["flush_rate"] = count / (time.perf_counter() - started)
        engine.close(drain=True, timeout=None)
        return engine.stats().applied

    def close(self) -> None:
        """Close the engine; what was not drained stays in its log."""
        if self._engine is not None:
            self._engine.close(drain=False)
            self._engine = None

    async def open_in_loop(self, folder: Path) -> None:
        """Open a new store for asyncio, its lane paused."""
        lanes = {LANE: wb.Lane(self._apply)}
        self._async_engine = await wb.AsyncEngine.open(folder / "store", lanes=lanes, settings=self._settings)
        self._async_engine.pause(LANE)

    async def put_in_loop(self, item: Any) -> None:
        """`await submit`."""
        assert self._async_engine is not None
        key, payload = item
        await self._async_engine.submit(LANE, key=key, payload=payload)

    async def close_in_loop(self) -> None:
        """Close it."""
        if self._async_engine is not None:
            await self._async_engine.close(drain=False)
            self._async_engine = None
