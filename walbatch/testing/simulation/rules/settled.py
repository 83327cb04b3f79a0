"""What counts as settled: by a checkpoint, and by an engine that says it has drained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walbatch.core.routing import shard_of
from walbatch.testing.simulation.history import Checkpointed, Drained, SyncFailed
from walbatch.testing.simulation.record import Record, Rule

SEGMENTS_MAX = 1
"""Segments that are left when everything is settled and checkpointed: the active one."""


def _save(record: Record, event: Checkpointed) -> None:
    """A checkpoint never says settled of what was acknowledged and not applied."""
    record.checkpoint = event.checkpoint
    for payload in record.owed:
        lsn = record.lsns.get(payload)
        if lsn is not None and payload not in record.asked and lsn not in record.given_up:
            check_settled(record, payload, lsn)


def check_settled(record: Record, payload: bytes, lsn: int) -> None:
    """The last checkpoint must not cover what is owed."""
    checkpoint = record.checkpoint
    if checkpoint is None:
        return
    submitted = record.operations[payload].submitted
    covered = lsn <= checkpoint.watermark
    if not covered:
        known = checkpoint.lanes.get(submitted.lane)
        shard = shard_of(submitted.key, record.shards.get(submitted.lane, 1))
        covered = known is not None and shard < len(known.shards) and known.shards[shard].covers(lsn)
    if covered:
        record.report(
            payload, f"(LSN {lsn}) is settled by checkpoint {checkpoint.generation}, and was not applied"
        )


def _drain(record: Record, event: Drained) -> None:
    """Nothing is owed, what was applied of an incarnation has no holes, and the log has shrunk to its minimum."""
    for payload in record.owed:
        operation = record.operations[payload]
        if operation.submitted.grace_ns is None and operation.incarnation != record.incarnation:
            continue
        # What is not logged has no letter when it is given up.
        may_be_dead = payload in record.blamed or operation.submitted.deadline_ns
        if payload in record.asked or (operation.submitted.grace_ns is None and may_be_dead):
            continue
        if payload in record.damaged:
            record.report(payload, "was damaged on the disk, and nobody was told")
        elif payload in record.acknowledged:
            record.report(payload, f"(LSN {record.lsns.get(payload)}) was acknowledged and is lost")
        else:
            record.report(payload, f"(LSN {record.lsns.get(payload)}) was recovered before and is lost")
    for lsn, (_, key) in record.unclear.items():
        record.problems.append(f"LSN {lsn}, acknowledged for the idempotency key {key!r}, is lost")
    doubted = {lsn for payload in (*record.doubted, *record.asked) for lsn in record.lsns_of(payload)}
    again = {lsn for payload in record.outlived for lsn in record.lsns_of(payload)}
    others = (doubted | again).union(record.given_up).difference(record.counted)
    for low, high, count in record.spans.values():
        if high - low >= count + sum(low < lsn < high for lsn in others):
            record.problems.append(
                f"of LSN {low} to {high}, handed out by one incarnation, only {count} were applied"
            )
    if event.segments is not None and event.segments > SEGMENTS_MAX:
        record.problems.append(f"{event.segments} segments are left although everything is settled")


def _fail(record: Record, _event: SyncFailed) -> None:
    """What was only written, and not synced since, may be gone at once: some file systems throw it away."""
    record.failed = True
    record.clear_fragile_keys()
    for payload in list(record.fragile):
        syncs = record.acknowledged[payload].syncs
        if record.operations[payload].submitted.grace_ns and (syncs is None or syncs >= record.syncs):
            record.excuse(payload)


RULES: Final[Mapping[type, Rule]] = {
    Checkpointed: _save,
    Drained: _drain,
    SyncFailed: _fail,
}
