"""What a copy tells: while it is under way, and at its end. Frozen values, and the counting behind them.

What is not here: how they are shown (`cli.copy`).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from walbatch import limits


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyProgress:
    """A table that is being copied, after one more page was read or batch was applied. Counts are rows of this run."""

    table: str
    size: int
    """About how many rows the table has."""
    read: int
    """Rows that were read so far, earlier runs included."""
    copied: int
    failed: int
    batches: int
    failed_batches: int
    batch_s_average: float
    last_batch_rows: int
    last_batch_s: float
    rows_per_s: float
    memory_bytes: int
    peak_memory_bytes: int
    is_paused: bool
    """Reading waits for memory, or for the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What comparing two tables found."""

    source_rows: int
    target_rows: int
    is_equal: bool
    """Counts and checksums are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """What became of a table. Counts are rows of this run unless named otherwise."""

    table: str
    target: str
    is_created: bool
    read_before: int
    """Rows that earlier runs had read: what of them was not in the target yet came from the store."""
    read: int
    copied: int
    failed: int
    """Rows that are dead letters now, those of earlier runs included."""
    batches: int
    failed_batches: int
    batch_s_average: float
    batch_s_max: float
    batch_rows_max: int
    seconds: float
    rows_per_s: float
    is_complete: bool
    """All rows were read, and are in the target or failed."""
    verification: Verification | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What became of a copy."""

    tables: tuple[TableReport, ...]
    store: str
    is_store_kept: bool
    """It holds what is left to do, or what failed. Otherwise it is removed."""
    seconds: float
    peak_memory_bytes: int
    remaining: int
    """Rows that were read, and are in the store."""
    error: str | None
    """Why the copy ended before it was complete."""

    @property
    def failed(self) -> int:
        """Rows that failed: dead letters of the store."""
        return sum(table.failed for table in self.tables)

    @property
    def is_complete(self) -> bool:
        """Everything was read, and is in the target or failed."""
        return self.error is None and all(table.is_complete for table in self.tables)

    @property
    def is_equal(self) -> bool:
        """Nothing that was compared differs."""
        return all(table.verification is None or table.verification.is_equal for table in self.tables)


ProgressFunction = Callable[[CopyProgress], None]

_logger = logging.getLogger("walbatch")
_STATM: Final = Path("/proc/self/statm")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Memory:
    """What this process has in memory, as the kernel counts it, and the most that was seen."""

    def __init__(self, ceiling_bytes: int) -> None:
        self.ceiling_bytes: Final = ceiling_bytes
        self.peak_bytes = 0
        self.look()

    def look(self) -> int:
        """Bytes that are resident now; 0 where the system does not say."""
        try:
            with _STATM.open("rb") as file:
                used = int(file.read(limits.KIB).split()[1]) * _PAGE_BYTES
        except (OSError, ValueError, IndexError):
            return 0
        self.peak_bytes = max(self.peak_bytes, used)
        return used

    def is_short(self, part: float, extra_bytes: int = 0) -> bool:
        """Whether more than this part of the ceiling is in use, with `extra_bytes` more."""
        return self.look() + extra_bytes >= part * self.ceiling_bytes

    def release(self) -> None:
        """Give back what nobody uses any more: the allocator keeps it otherwise."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@dataclass
class Tally:
    """Counts what happens to one table. `observe` runs in threads of the engine, the rest in that of the copy."""

    table: str
    target: str
    size: int
    memory: Memory
    news: threading.Condition
    progress: ProgressFunction | None
    is_created: bool = False
    read_before: int = 0
    read: int = 0
    copied: int = 0
    failed: int = 0
    batches: int = 0
    failed_batches: int = 0
    batch_s: float = 0.0
    batch_s_max: float = 0.0
    batch_rows_max: int = 0
    last: tuple[int, float] = (0, 0.0)
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    progressed: float = field(default_factory=time.monotonic)
    is_paused: bool = False
    is_complete: bool = False

    def observe(self, rows: int, failed: int, seconds: float, is_applied: bool) -> None:  # noqa: FBT001 - see Observer
        """A batch has ended."""
        with self.news:
            if is_applied:
                self.batches += 1
                self.copied += rows
                self.failed += failed
                self.batch_s += seconds
                self.batch_s_max = max(self.batch_s_max, seconds)
                self.batch_rows_max = max(self.batch_rows_max, rows + failed)
                self.last = (rows + failed, seconds)
                self.progressed = time.monotonic()
            else:
                self.failed_batches += 1
            self.news.notify_all()
        self.tell()

    def tell(self) -> None:
        """Call the user's function. What it raises is logged, and it is not called again: the batch was applied."""
        if self.progress is not None:
            try:
                self.progress(self.now())
            except Exception:
                self.progress = None
                _logger.exception("the progress function of a copy failed")

    @property
    def batch_s_average(self) -> float:
        """Seconds of a batch."""
        return self.batch_s / self.batches if self.batches else 0.0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return (self.ended or time.monotonic()) - self.started

    def now(self) -> CopyProgress:
        """How far it is."""
        seconds = self.seconds
        return CopyProgress(
            table=self.table, size=max(self.size, self.read_before + self.read), read=self.read_before + self.read,
            copied=self.copied, failed=self.failed, batches=self.batches, failed_batches=self.failed_batches,
            batch_s_average=self.batch_s_average, last_batch_rows=self.last[0], last_batch_s=self.last[1],
            rows_per_s=self.copied / seconds if seconds else 0.0, memory_bytes=self.memory.look(),
            peak_memory_bytes=self.memory.peak_bytes, is_paused=self.is_paused,
        )  # fmt: skip

    def report(self, *, failed: int, verification: Verification | None) -> TableReport:
        """What became of it. `failed` rows are dead letters."""
        return TableReport(
            table=self.table, target=self.target, is_created=self.is_created, read_before=self.read_before, read=self.read,
            copied=self.copied, failed=failed, batches=self.batches, failed_batches=self.failed_batches,
            batch_s_average=self.batch_s_average, batch_s_max=self.batch_s_max, batch_rows_max=self.batch_rows_max,
            seconds=self.seconds, rows_per_s=self.copied / self.seconds if self.seconds else 0.0, is_complete=self.is_complete,
            verification=verification,
        )  # fmt: skip
