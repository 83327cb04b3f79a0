"""Backends that answer badly: one operation is to come again, silence, and a mark that covers too much.

What is not here: what the model backends of the simulation do. These apply what the oracle would blame the engine for, so what
must hold is asserted here: whatever is answered, everything is applied in the end, or the engine says that it stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import walbatch as wb
from walbatch.testing.shipped import open_engine
from walbatch.testing.simulation import Machine, Process
from walbatch.testing.simulation.workload import QUICK
from walbatch.types import Applied, Batch, Mark, Retry

OPERATIONS: Final = 4


class _Answering:
    """A backend that applies what it likes and answers what it likes, `mistakes` times; then it is well."""

    def __init__(self, how: str, mistakes: int = 1) -> None:
        self.how = how
        self.left = mistakes
        self.applied: dict[int, bytes] = {}
        self.content: dict[bytes, bytes] = {}

    def apply(self, batch: Batch) -> Any:
        rows = list(zip(batch.lsns, batch.keys, batch.payloads, strict=True))
        self.left -= 1
        if self.left < 0:
            return self._take(rows)
        match self.how:
            case "later":  # the first is to come again, the others were applied
                self._take(rows[1:])
                return [Retry(error="later"), *[Applied()] * (len(rows) - 1)]
            case "silence":
                raise TimeoutError("no answer, and nothing applied")
            case _:
                raise AssertionError(self.how)

    def _take(self, rows: list[tuple[int, bytes, bytes]]) -> None:
        for lsn, key, payload in rows:
            self.applied[lsn] = payload
            self.content[key] = payload


class _Careless(_Answering):
    """Transactional, and stores the mark of a batch of which it asks to try a part again."""

    def __init__(self, how: str, mistakes: int = 1) -> None:
        super().__init__(how, mistakes)
        self.mark = Mark()

    def applied_mark(self, shard: int) -> Mark:
        return self.mark

    def apply(self, batch: Batch) -> Any:
        rows = [
            row
            for row in zip(batch.lsns, batch.keys, batch.payloads, strict=True)
            if not self.mark.covers(row[0])
        ]
        self.left -= 1
        half = len(rows) if self.left < 0 else len(rows) // 2
        self._take(rows[:half])
        if batch.mark is not None:
            self.mark = self.mark.union(batch.mark)
        return (
            None
            if half == len(rows)
            else [*[Applied()] * half, *[Retry(error="later")] * (len(batch) - half)]
        )


ANSWERS: Final[dict[str, Callable[[str], _Answering]]] = {
    "later": _Answering,
    "silence": _Answering,
    "careless": _Careless,
}


def breach(scene: str, seed: int) -> str:
    """One life, and what is wrong with it; "" for nothing."""
    process = Process(Machine(), [], seed=seed, life="0")
    backend = ANSWERS[scene](scene)
    submitted: dict[int, bytes] = {}
    failed = False

    def use() -> None:
        nonlocal failed
        lane = wb.Lane(backend, trigger=wb.Trigger(count=OPERATIONS, linger_ms=50))
        engine = open_engine(process, {"put": lane}, QUICK)
        with contextlib.suppress(wb.WalbatchError):
            for number in range(OPERATIONS):
                payload = b"%d" % number
                submitted[engine.submit("put", key=b"k", payload=payload).lsn or 0] = payload
        engine.close(timeout=60)
        failed = engine.stats().state == "failed"

    process.run(use)
    if failed:
        return ""
    if backend.applied != submitted:
        return f"{len(submitted) - len(backend.applied)} operations were never applied"
    last = submitted[max(submitted)]
    if backend.content[b"k"] != last:
        return f"the key ends as {backend.content[b'k']!r}, and {last!r} was submitted last"
    return ""
