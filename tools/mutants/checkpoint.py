"""Mistakes about what is settled, and about the state that remembers it."""

from __future__ import annotations

from typing import Final

from tools.mutants.mutant import Edit, Mutant

CHECKPOINTER: Final = "walbatch/runtime/checkpointer.py"
ASSEMBLY: Final = "walbatch/engine/assembly.py"
ENVELOPE: Final = "walbatch/storage/envelope.py"
SETTLEMENT: Final = "walbatch/core/settlement.py"
OVERVIEW: Final = "walbatch/runtime/overview.py"
STATE: Final = "walbatch/storage/checkpoint.py"
STATEFILE: Final = "walbatch/storage/statefile.py"

_SETTLED: Final = "                watermark=min(watermarks, default=self._flow.end_lsn),\n"

MUTANTS: Final = (
    Mutant(
        name="the checkpoint calls durable what was only submitted",
        row="checkpoint ahead of the log after a power cut",
        edits=(
            Edit(
                ASSEMBLY,
                "durable_lsn=lambda: self.committer.durable_lsn,",
                "durable_lsn=lambda: self.committer.submitted_lsn,",
            ),
        ),
        hint="images:steady/8",
    ),
    Mutant(
        name="a shard's watermark is its highest settled operation",
        row="maximum instead of contiguous minimum",
        edits=(
            Edit(
                SETTLEMENT,
                "        return self.frontier if first is None else first - 1\n",
                "        return self.frontier if first is None else max(first - 1, self._highest_settled)\n",
            ),
        ),
        hint="images:partial",
    ),
    Mutant(
        name="a shard's mark covers its holes",
        row="maximum instead of contiguous minimum",
        edits=(
            Edit(
                SETTLEMENT,
                "            watermark = first - 1\n            highest",
                "            watermark = max(first - 1, self._highest_settled)\n            highest",
            ),
        ),
        hint="images:partial",
    ),
    Mutant(
        name="the checkpoint takes the maximum over the shards",
        row="minimum over the shards that answered",
        edits=(Edit(OVERVIEW, _SETTLED, _SETTLED.replace("min(", "max(")),),
        hint="images:partial",
    ),
    Mutant(
        name="the checkpoint leaves out the shards that wait for their backend",
        row="minimum over the shards that answered",
        edits=(
            Edit(
                OVERVIEW,
                "            watermarks = [self._watermark(shard) for shard in self._shards if shard.lane.logged]\n",
                """\
            watermarks = [
                self._watermark(shard) for shard in self._shards if shard.lane.logged and not len(shard.queue)
            ]
""",
            ),
        ),
        hint="images:partial",
    ),
    Mutant(
        name="what a backend was handed counts as settled",
        row="checkpoint committed before the backend's own durability",
        edits=(
            Edit(
                SETTLEMENT,
                "        first = self._first(without)\n        return self.frontier if first",
                "        first = None\n        return self.frontier if first",
            ),
        ),
        hint="images:sick_lane",
    ),
    Mutant(
        name="a failed save of the checkpoint is ignored and the log trimmed by it",
        row="LMDB commit error ignored",
        edits=(
            Edit(
                CHECKPOINTER,
                "        self._state.save_checkpoint(checkpoint)\n",
                """\
        try:
            self._state.save_checkpoint(checkpoint)
        except (StorageError, OSError):
            _logger.warning("not saved")
""",
            ),
        ),
        hint="faults:roll/save_checkpoint",
    ),
    Mutant(
        name="a lane's watermark does not count for the others",
        row="minimum over the shards that answered",
        edits=(
            Edit(
                OVERVIEW,
                "            watermarks = [self._watermark(shard) for shard in self._shards if shard.lane.logged]\n",
                "            watermarks = [self._watermark(shard) for shard in self._lanes[0].shards]\n",
            ),
        ),
        hint="images:sick_lane",
    ),
    Mutant(
        name="the CRC of a value in state is not checked",
        row="under bit rot LMDB may answer silently stale or wrong",
        edits=(Edit(ENVELOPE, "    if magic != MAGIC or stored != computed:\n", "    if magic != MAGIC:\n"),),
        hint="conformance:state",
    ),
    Mutant(
        name="the state of another store is accepted",
        row="state/ lost, or from another store",
        edits=(Edit(ENVELOPE, "    if owner != store_uuid:\n", "    if len(owner) != len(store_uuid):\n"),),
        hint="conformance:state",
    ),
    Mutant(
        name="the older generation of the checkpoint is believed",
        row="stale checkpoint",
        edits=(
            Edit(
                STATE,
                "        newest = max(found, key=lambda checkpoint: checkpoint.generation, default=None)\n",
                "        newest = min(found, key=lambda checkpoint: checkpoint.generation, default=None)\n",
            ),
        ),
        hint="conformance:state",
    ),
    Mutant(
        name="both generations of the checkpoint stand in the same place",
        row="stale checkpoint",
        edits=(
            Edit(STATE, "        key = _SLOTS[checkpoint.generation % 2]\n", "        key = _SLOTS[0]\n"),
            Edit(
                STATE,
                "    if key not in _SLOTS or _SLOTS[checkpoint.generation % 2] != key:\n",
                "    if key not in _SLOTS:\n",
            ),
        ),
        hint="conformance:state",
    ),
    Mutant(
        name="what a failed save left is saved over as if nothing had happened",
        row="a sync error sticky on one path only: checkpoint",
        edits=(
            Edit(
                "walbatch/storage/tables.py",
                "            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:\n"
                "                self._failure = error\n"
                "            raise\n",
                "            raise\n",
            ),
        ),
        hint="conformance:state",
    ),
)
