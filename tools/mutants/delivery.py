"""Mistakes between the log and the backends."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

COMMITTER: Final = "walbatch/runtime/committer.py"
DELIVERY: Final = "walbatch/core/delivery.py"
FLOW: Final = "walbatch/runtime/delivery.py"
DISPATCHER: Final = "walbatch/runtime/dispatcher.py"
LMDB: Final = "walbatch/backends/lmdb.py"
MARK: Final = "walbatch/core/mark.py"
PLACES: Final = "walbatch/core/places.py"
READBACK: Final = "walbatch/runtime/readback.py"

_ANSWERED: Final = "        else:\n            try:\n                verdict = judge("

MUTANTS: Final = (
    Mutant(
        name="a transactional backend does not look at its mark",
        row="double replay where exactly-once was promised",
        edits=(
            Edit(
                MARK,
                "    return None if len(fresh) == len(batch.lsns) else fresh\n",
                "    return None if fresh or settled_max else fresh\n",
            ),
        ),
        hint="images:unreliable_transactional_backend/8",
    ),
    Mutant(
        name="the mark of the first shard is used for all",
        row="double replay where exactly-once was promised",
        edits=(
            Edit(
                "walbatch/lanes.py",
                "[backend.applied_mark(shard) for shard",
                "[backend.applied_mark(0) for shard",
            ),
        ),
        hint="images:exact_keys",
    ),
    Mutant(
        name="the mark covers what the batch does not hold",
        row="double replay where exactly-once was promised",
        edits=(
            Edit(
                FLOW,
                "            mark = shard.ledger.mark(epoch=self._epoch, settling=lsns)\n",
                "            mark = Mark(epoch=self._epoch, watermark=end_lsn)\n",
            ),
        ),
        hint="images:transactional",
    ),
    Mutant(
        name="a backend takes batches of an engine that a newer one replaced",
        row="double replay where exactly-once was promised",
        edits=(
            Edit(
                MARK,
                "    if batch.mark is not None and held.epoch > batch.mark.epoch:\n",
                "    if batch.mark is not None and held.epoch > batch.mark.epoch + 2**40:\n",
            ),
        ),
        hint="conformance:backend",
    ),
    Mutant(
        name="LMDB commits a batch without its mark",
        row="double replay where exactly-once was promised",
        edits=(Edit(LMDB, "            if union != held:\n", "            if union == held:\n"),),
        hint="conformance:backend",
    ),
    Mutant(
        name="LMDB applies again what its mark covers",
        row="double replay where exactly-once was promised",
        edits=(
            Edit(
                LMDB,
                "fresh = fresh_indexes(batch, held) if batch.mark is not None else None\n",
                "fresh = None\n",
            ),
        ),
        hint="conformance:backend",
    ),
    Mutant(
        name="what follows a failed operation of its key counts as applied",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                DELIVERY,
                "        held = (order is Order.KEY and key in failed_keys) or (order is Order.SHARD and bool(retry))\n",
                "        held = order is Order.SHARD and bool(retry)\n",
            ),
        ),
        hint="answers:later",
    ),
    Mutant(
        name="a new batch overtakes what waits for its retry",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                PLACES,
                "        if name in self.holds or self.holds.waits(entry[0]):\n",
                "        if self.holds.waits(entry[0]):\n",
            ),
            Edit(
                PLACES,
                "        if len(self.holds) and self._order is not Order.NONE:\n            return False\n",
                "",
            ),
            Edit(
                PLACES,
                "        line = self.line\n        if isinstance(line, Lines):\n            found",
                "        line = self.line if not keys else Line()\n        if isinstance(line, Lines):\n            found",
            ),
        ),
        hint="schedules:partial",
    ),
    Mutant(
        name="what is tried again goes to the end of the queue",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                PLACES,
                "        self._make_ready(self.holds.release(now_ns))\n",
                "        self._make_ready(self.holds.release(now_ns)[::-1])\n",
            ),
            Edit(
                PLACES,
                "        self._suit(entry[3], limits.LSN_MAX)\n        self.line.add_back(entry)\n",
                "        self._suit(entry[3], limits.LSN_MAX)\n        self.line.add(entry)\n",
            ),
        ),
        hint="schedules:partial",
    ),
    Mutant(
        name="a failed batch is tried again in another order",
        row="order broken by the retry of an earlier batch",
        edits=(
            Edit(
                PLACES,
                "        again = Parcel(list(flight.entries), tries",
                "        again = Parcel(flight.entries[::-1], tries",
            ),
        ),
        hint="answers:silence",
    ),
    Mutant(
        name="a batch is taken for applied although its backend raised",
        row="k of n applied, then an error",
        edits=(
            Edit(
                FLOW,
                _ANSWERED,
                "            failure, verdict = None, judge(job.batch, None, lane.order)\n" + _ANSWERED,
            ),
        ),
        hint="images:unreliable_backend",
    ),
    Mutant(
        name="a time-out is taken for applied",
        row="timed out but applied",
        edits=(
            Edit(
                FLOW,
                _ANSWERED,
                """\
            if isinstance(error, TimeoutError):
                failure, verdict = None, judge(job.batch, None, lane.order)
"""
                + _ANSWERED,
            ),
        ),
        hint="answers:silence",
    ),
    Mutant(
        name="a batch whose backend raised is given up",
        row="timed out but applied",
        edits=(
            Edit(
                PLACES,
                "        self.parcels.wait(again, retry_at_ns)\n",
                "",
            ),
        ),
        hint="schedules:unanswered",
    ),
    Mutant(
        name="an operation counts as applied although the backend asked to try it again",
        row="k of n applied, then an error",
        edits=(
            Edit(
                DELIVERY,
                "            case Retry():\n",
                "            case Retry() if not index:\n",
            ),
            Edit(
                DELIVERY,
                "            case _:\n                applied[index] = outcome.result\n",
                "            case _:\n                applied[index] = None\n",
            ),
        ),
        hint="images:partial",
    ),
    Mutant(
        name="the mark is not asked whether it covers what is to be tried again",
        row="k of n applied, then an error",
        edits=(Edit(FLOW, "                self._check_mark(job, verdict)\n", ""),),
        hint="answers:careless",
    ),
    Mutant(
        name="a group that becomes durable does not wake a sleeping timer",
        row="a lost wake-up that leaves the last partial batch",
        edits=(Edit(DISPATCHER, "        if urgent or self._idle:\n", "        if urgent:\n"),),
        hint="schedules:awaited",
    ),
    Mutant(
        name="the timer goes to sleep without a last look at its inbox",
        row="a lost wake-up that leaves the last partial batch",
        edits=(
            Edit(
                DISPATCHER,
                "                    if self._idle and self._inbox:\n                        continue",
                "                    if self._idle and False:\n                        continue",
            ),
        ),
        hint="ticks:awaited/400",
    ),
    Mutant(
        name="a group without a leader does not wake the committer",
        row="a lost wake-up that leaves the last partial batch",
        edits=(
            Edit(
                COMMITTER,
                "                elif opened and not wait:\n                    self._rouse()\n",
                "",
            ),
        ),
        hint="schedules:nowait",
    ),
    Mutant(
        name="a leader that is done does not wake the next one",
        row="a lost wake-up that leaves the last partial batch",
        edits=(
            Edit(
                COMMITTER,
                "            if turn is not None:\n                turn.set()\n        if self._sleepers",
                "        if self._sleepers",
            ),
        ),
        hint="schedules:threads",
    ),
    Mutant(
        name="a worker is not woken for a job",
        row="a lost wake-up that leaves the last partial batch",
        edits=(
            Edit(
                "walbatch/runtime/workers.py",
                "            self._work.notify_all()\n        for",
                "        for",
            ),
        ),
        hint="schedules:awaited",
    ),
    Mutant(
        name="a log full of settled operations is full for ever",
        row="a full disk waiting for a flush that waits for the disk",
        edits=(
            Edit(
                COMMITTER,
                "        if self._log.checkpointed_lsn >= self._durable_lsn:\n            return None",
                "        if self._log.checkpointed_lsn < 0:\n            return None",
            ),
        ),
        hint="schedules:too_large_for_the_log",
    ),
    Mutant(
        name="a store on a full disk cannot be opened",
        row="a full disk waiting for a flush that waits for the disk",
        edits=(
            Edit(
                "walbatch/storage/segment.py",
                "        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:\n            raise\n        file.truncate(0)\n",
                "        raise\n",
            ),
        ),
        hint="schedules:full_disk",
    ),
    Mutant(
        name="an interval lane is delivered before it is synced",
        row="replaying an unsynced tail to a backend and then losing it to a power cut",
        edits=(
            Edit(
                COMMITTER,
                "        if not synced:\n            pending.durable.resolve()\n",
                "        if not synced:\n            self._hand_on((pending,))\n            pending.durable.resolve()\n",
            ),
        ),
        hint="images:exact_interval",
    ),
    Mutant(
        name="a shard that has caught up misses the groups that came in meanwhile",
        row="a lost wake-up that leaves the last partial batch",
        edits=(
            Edit(
                READBACK,
                "            shard.cursor = Cursor(end, end_lsn + 1) if grown else None\n",
                "            shard.cursor = None\n",
            ),
        ),
        hint="schedules:single/300",
    ),
    Mutant(
        name="a shard whose queue is full forgets where it stopped",
        row="a full disk waiting for a flush that waits for the disk",
        edits=(
            Edit(
                READBACK,
                "                self._stay(shard, frame, lsn)\n                reading.discard(shard)\n",
                "                self._stay(shard, frame, lsn)\n",
            ),
            Edit(
                READBACK,
                "                self._stay(shard, frame, run.lsns[taken])\n                reading.discard(shard)\n",
                "                self._stay(shard, frame, run.lsns[taken])\n",
            ),
        ),
        hint="schedules:overflow",
    ),
)
