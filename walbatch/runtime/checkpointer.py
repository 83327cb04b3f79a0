"""Persists what is settled, then trims the log and compacts it.

What is not here: what is settled (`dispatcher`), and how a checkpoint is stored (behind `ports.StateStore`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from walbatch.errors import StorageError, WalbatchError
from walbatch.ports import Clock, Log, StateStore, Thread, Threads
from walbatch.runtime.overview import Settled
from walbatch.types import Checkpoint, LaneMark, Mark

_logger = logging.getLogger("walbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointBase:
    """Where the checkpoints of this run begin."""

    generation: int
    epoch: int
    settled_count: int


class Checkpointer:
    """One thread that checkpoints at an interval.

    `checkpoint` may also be called from one other thread once it has stopped.
    """

    def __init__(
        self, *, log: Log, state: StateStore, clock: Clock, threads: Threads, interval_ns: int, base: CheckpointBase,
        settled: Callable[[], Settled], durable_lsn: Callable[[], int], on_failure: Callable[[WalbatchError], None],
        before: Callable[[int], int | None] = lambda _: None,
    ) -> None:  # fmt: skip
        """`before` saves what must be durable before the log is trimmed; it is told what both generations cover.

        It returns the LSN behind which nothing may go from the log, if it could not save everything: the disk is full.
        """
        self._before = before
        self._log = log
        self._state = state
        self._clock = clock
        self._threads = threads
        self._interval_ns = interval_ns
        self._base = base
        self._generation = base.generation
        self._settled = settled
        self._durable_lsn = durable_lsn
        self._on_failure = on_failure
        self._last: Checkpoint | None = None
        self.checkpointed_lsn = 0
        self._covered: Checkpoint | None = None
        """The generation before the last: both cover what it covers."""
        self._kept_lsn: int | None = None
        """The log must keep what lies behind it; None: what the checkpoint covers may go."""
        self._made_room = False
        self._stop = threads.condition()
        self._stopping = False
        self._thread: Thread | None = None

    def __repr__(self) -> str:
        return f"<Checkpointer generation {self._generation}, lsn {self.checkpointed_lsn}>"

    def start(self) -> None:
        """Start the thread."""
        self._thread = self._threads.spawn("walbatch-checkpoint", self._run)

    def stop(self, timeout_ns: int | None) -> bool:
        """End the thread. Returns whether it ended."""
        with self._stop:
            self._stopping = True
            self._stop.notify_all()
        return self._thread is None or self._thread.is_current() or self._thread.join(timeout_ns)

    def _run(self) -> None:
        while True:
            with self._stop:
                if not self._stopping:
                    self._stop.wait(self._interval_ns)
                if self._stopping:
                    return
            try:
                self._checkpoint_in_room()
                self._compact()
            except (StorageError, OSError) as error:
                self._on_failure(StorageError(f"the checkpoint failed: {error}", errno=error.errno))
                return
            except BaseException as error:  # the thread's outermost frame
                _logger.critical("the checkpointer died", exc_info=True)
                self._on_failure(
                    WalbatchError(f"the checkpointer died ({error!r}): close the engine and report this")
                )
                return

    def _checkpoint_in_room(self) -> None:
        """Checkpoint; at once again where that made room on a full disk, before somebody else takes it."""
        try:
            self.checkpoint()
            while self._made_room and not self._stopping:
                self.checkpoint()
        except (StorageError, OSError) as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            _logger.warning("the checkpoint waits for room on the disk: %s", error)

    def _compact(self) -> None:
        """Compact the log by what both generations cover: a step at a time, until the next checkpoint is due."""
        until = self._clock.monotonic_ns() + self._interval_ns
        if self._covered is None:
            return
        covered = self._covered if self._kept_lsn is None else _cut(self._covered, self._kept_lsn)
        while not self._stopping and self._log.compact(covered):
            if self._clock.monotonic_ns() >= until:
                return

    def checkpoint(self) -> bool:
        """Save a checkpoint if anything changed, then trim. Returns whether it saved.

        Crash story: the backends had made durable what is settled; a checkpoint is durable before any segment that it makes
        superfluous is unlinked. The log is trimmed only as far as *both* generations of the checkpoint go, so losing the
        last one means that the one before it counts: more is replayed, nothing is missing. So does what compactions drop.

        What `before` could not save is in the log only, and stays there although the checkpoint covers it.
        """
        # Taken in this order: the log was durable at least this far, and every settled operation lies below it.
        settled = self._settled()
        durable_lsn = max(self._durable_lsn(), settled.watermark)
        segment = self._log.end.segment
        last, covered = self._last, self._covered
        # Where nothing settles, how far the log reached still matters: that is what shows the loss of its end.
        unchanged = (
            last is not None
            and covered is not None
            and last.watermark == settled.watermark == covered.watermark
            and last.lanes == settled.lanes == covered.lanes
            and (last.segment, last.durable_lsn) == (segment, durable_lsn)
        )
        if unchanged and self._kept_lsn is None:
            return False
        self._made_room = False
        self._kept_lsn = self._before(0 if covered is None else covered.watermark)
        if unchanged:
            self._trim()
            return False
        checkpoint = Checkpoint(
            generation=self._generation + 1, epoch=self._base.epoch, watermark=settled.watermark, durable_lsn=durable_lsn,
            segment=segment, settled_count=self._base.settled_count + settled.settled_count, lanes=settled.lanes,
        )  # fmt: skip
        self._state.save_checkpoint(checkpoint)
        self._generation += 1
        self._last = checkpoint
        self.checkpointed_lsn = settled.watermark
        if last is not None:
            self._covered = last
            self._trim()
        return True

    def _trim(self) -> None:
        assert self._covered is not None
        lsn = self._covered.watermark
        if self._kept_lsn is None:
            self._log.trim(lsn)
        else:
            self._made_room = self._log.trim(min(lsn, self._kept_lsn)) > 0


def _cut(covered: Checkpoint, lsn: int) -> Checkpoint:
    """What a checkpoint covers up to an LSN."""
    lanes = {
        name: LaneMark(shards=tuple(_cut_mark(mark, lsn) for mark in lane.shards))
        for name, lane in covered.lanes.items()
    }
    return replace(covered, watermark=min(covered.watermark, lsn), lanes=lanes)


def _cut_mark(mark: Mark, lsn: int) -> Mark:
    ranges = tuple((first, min(last, lsn)) for first, last in mark.ranges if first <= lsn)
    return replace(mark, watermark=min(mark.watermark, lsn), ranges=ranges)
