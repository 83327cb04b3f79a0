"""The controller on real storage: its throughput beside that of fixed sizes, in turns, in one run.

Each contender has a store of its own, so that all of them grow alike, and the machine's moods hit all of them. After the
warm-up only the best fixed sizes go on: then a round is shorter, and moods change less within it.
"""

from __future__ import annotations

import math
import os
import sqlite3
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

import lmdb

from walbatch.core.controller import BatchResult, Observation
from walbatch.core.surface import ResponseSurface

FIXED_COUNTS = [4, 16, 64, 256, 1024, 4096, 16_384]
COUNT_MAX = 16_384
PAYLOAD_BYTES = 100
TURN_S = 0.25
"""A contender's turn ends with the first batch after so long."""

WARM_UP_SHARE = 0.2
FINALISTS = 3
"""Fixed sizes that go on after the warm-up."""


class Store(Protocol):
    """Where batches go."""

    def apply(self, keys: Sequence[int]) -> None:
        """Store one batch, durably."""

    def close(self) -> None:
        """Release it."""


class Sqlite:
    """A table with a write-ahead log and full synchronisation. With an index and a small cache, it gets slower as it grows."""

    def __init__(self, folder: Path, *, growing: bool) -> None:
        self._connection = sqlite3.connect(folder / "store.db", isolation_level=None)
        for pragma in ("journal_mode=wal", "synchronous=full", f"cache_size={-256 if growing else -65_536}"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, key INTEGER, payload BLOB)")
        if growing:
            self._connection.execute("CREATE INDEX i ON t (key)")
        self._payload = bytes(PAYLOAD_BYTES)

    def apply(self, keys: Sequence[int]) -> None:
        """One batch."""
        self._connection.execute("BEGIN")
        self._connection.executemany(
            "INSERT INTO t (key, payload) VALUES (?, ?)", [(key, self._payload) for key in keys]
        )
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Release it."""
        self._connection.close()


class Lmdb:
    """Puts at random keys, one transaction for each batch, synced."""

    def __init__(self, folder: Path) -> None:
        self._environment = lmdb.open(str(folder), map_size=16 * 2**30)
        self._payload = bytes(PAYLOAD_BYTES)

    def apply(self, keys: Sequence[int]) -> None:
        """One batch."""
        with self._environment.begin(write=True) as transaction:
            for key in keys:
                transaction.put(key.to_bytes(8, "big"), self._payload)

    def close(self) -> None:
        """Release it."""
        self._environment.close()


class File:
    """Appends, one write and one fsync for each batch."""

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        self._payload = bytes(PAYLOAD_BYTES)

    def apply(self, keys: Sequence[int]) -> None:
        """One batch."""
        os.write(self._descriptor, b"".join([key.to_bytes(8, "big") + self._payload for key in keys]))
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Release it."""
        os.close(self._descriptor)


STORES: dict[str, Callable[[Path], Store]] = {
    "SQLite": lambda folder: Sqlite(folder, growing=False),
    "SQLite, growing table": lambda folder: Sqlite(folder, growing=True),
    "LMDB": Lmdb,
    "file with fsync": File,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """What came out for one kind of store."""

    store: str
    ratio: float
    """Throughput of the controller's run to that of the best fixed size, after the warm-up."""
    error: float
    """Standard error of the ratio, from how it differs between rounds."""
    ratio_whole: float
    """The same from the first batch on."""
    lead_count: int
    best_count: int
    operations_s: float
    fixed_operations_s: dict[int, float]
    """Of the finalists."""
    turns: int


@dataclass(slots=True)
class Contender:
    """One store with one way to choose sizes, and its figures for each turn."""

    store: Store
    count: int | None
    operations: list[int]
    seconds: list[float]

    def rate(self, first: int, *, without: int | None = None) -> float:
        """Operations a second, from a turn on, one of them left out."""
        turns = [turn for turn in range(first, len(self.operations)) if turn != without]
        return sum(self.operations[turn] for turn in turns) / sum(self.seconds[turn] for turn in turns)


def measure(name: str, folder: Path, turns: int) -> Real:
    """Let all take turns, in another order each time."""
    random_ = Random(name)
    controller = ResponseSurface(count_max=COUNT_MAX, seed=1)
    with ExitStack() as stack:
        contenders = []
        for count in [None, *FIXED_COUNTS]:
            place = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{count or 'controller'}"
            place.mkdir(parents=True)
            store = STORES[name](place)
            stack.callback(store.close)
            contenders.append(Contender(store, count, [], []))
        own, *fixed = contenders
        first = int(turns * WARM_UP_SHARE)
        for turn in range(turns):
            if turn == first:
                fixed = sorted(fixed, key=lambda contender: contender.rate(0))[-FINALISTS:]
            for contender in random_.sample([own, *fixed], 1 + len(fixed)):
                _take_turn(contender, controller, random_)
    best = max(fixed, key=lambda contender: contender.rate(first))
    return Real(
        store=name,
        ratio=own.rate(first) / best.rate(first),
        error=_ratio_error(own, best, first),
        ratio_whole=own.rate(0) / max(contender.rate(0) for contender in fixed),
        lead_count=controller.describe().lead_count,
        best_count=best.count or 0,
        operations_s=own.rate(first),
        fixed_operations_s={contender.count or 0: contender.rate(first) for contender in fixed},
        turns=turns,
    )


def _ratio_error(own: Contender, other: Contender, first: int) -> float:
    """The jackknife: the ratio without each of the rounds in turn.

    Source: J. W. Tukey, "Bias and confidence in not-quite large samples", 1958.
    """
    rounds = range(first, len(own.operations))
    ratios = [own.rate(first, without=left_out) / other.rate(first, without=left_out) for left_out in rounds]
    return math.sqrt((len(ratios) - 1) * statistics.pvariance(ratios))


def _take_turn(contender: Contender, controller: ResponseSurface, random_: Random) -> None:
    """Deliver until the turn is over. The first batch after the pause is slow, so the controller does not learn from it."""
    operations, spent, first = 0, 0.0, True
    while spent < TURN_S:
        count = contender.count or controller.target().count
        keys = [random_.getrandbits(63) for _ in range(count)]
        started = time.perf_counter()
        contender.store.apply(keys)
        seconds = time.perf_counter() - started
        if contender.count is None:
            controller.observe(
                Observation(
                    count=count, bytes=count * PAYLOAD_BYTES, seconds=seconds,
                    result=BatchResult.DELIVERED, learnable=not first,
                )
            )  # fmt: skip
        operations += count
        spent += seconds
        first = False
    contender.operations.append(operations)
    contender.seconds.append(spent)
