"""Operations: acknowledged only when safe, delivered only when they may be, applied once where that is promised, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walbatch.testing.simulation.history import Acknowledged, AppliedTo, Given, Lied, Submitted
from walbatch.testing.simulation.record import Operation, Record, Rule, short
from walbatch.testing.simulation.rules.names import is_repeat, name
from walbatch.testing.simulation.rules.settled import check_settled

DEADLINE_SLACK_NS = 1_000_000
"""What a batch may need from its cut to the call of its backend, while no time passes but that of reading clocks."""


def _submit(record: Record, event: Submitted) -> None:
    assert event.payload not in record.operations, "payloads name operations: they must be distinct"
    record.syncs = event.syncs or 0
    record.operations[event.payload] = Operation(
        event, record.highest_lsn, record.failed, record.life, record.incarnation
    )
    if event.idempotency_key:
        scope = event.lane, event.idempotency_key
        record.of_key[scope] = (*record.of_key.get(scope, ()), event.payload)


def _acknowledge(record: Record, event: Acknowledged) -> None:
    """Acknowledged means synced: a sync that began after the submit has succeeded, and none failed before it."""
    payload = event.payload
    operation = record.operations[payload]
    record.syncs = event.syncs or 0
    if (
        operation.submitted.idempotency_key
        and event.lsn is not None
        and is_repeat(record, operation, event.lsn)
    ):
        return
    record.acknowledged[payload] = event
    if operation.submitted.grace_ns != 0:
        record.fragile[payload] = None
        if record.failed and not operation.after_failure and _unsynced(operation, event):
            record.excuse(payload)  # written before the sync failed, and heard of in that moment
    elif (
        event.syncs is not None
        and operation.submitted.syncs is not None
        and event.syncs <= operation.submitted.syncs
    ):
        record.report(payload, "was acknowledged, and no sync has succeeded since it was submitted")
    # What is not logged hangs on no sync, and may be taken in the moment before the engine learns of the failure.
    if operation.after_failure and operation.submitted.grace_ns is not None:
        record.report(payload, "was acknowledged although a sync had failed before it was submitted")
    if not record.is_final(payload) and payload not in record.excused:
        record.owed[payload] = None
    lsn = event.lsn
    if lsn is None:
        return
    name(record, operation, lsn)
    other = record.acknowledged_names.setdefault(lsn, payload)
    if other != payload:
        record.report(payload, f"and {short(other)} were both acknowledged as LSN {lsn}")
    record.highest_lsn = max(record.highest_lsn, lsn)
    if payload in record.owed:
        check_settled(record, payload, lsn)


def _give(record: Record, event: Given) -> None:
    """No backend sees what is cancelled or dead, nor what it is too early or too late for."""
    for lsn, payload in event.operations:
        operation = record.operations.get(payload)
        if operation is None:
            record.problems.append(
                f"invented: {short(payload)} (LSN {lsn}) was delivered and never submitted"
            )
            continue
        if payload in record.cancelled:
            record.report(payload, f"(LSN {lsn}) was delivered, although it had been cancelled")
        if lsn in record.letters:
            record.report(payload, f"(LSN {lsn}) was delivered, although it is a dead letter")
        submitted = operation.submitted
        if payload in record.requeued:
            continue  # then it has no times any more
        if event.latest_wall_ns < submitted.not_before_ns:
            early = submitted.not_before_ns - event.latest_wall_ns
            record.report(payload, f"(LSN {lsn}) was delivered {early / 1e9:.6f} s before its time")
        if submitted.deadline_ns and event.earliest_wall_ns > submitted.deadline_ns + DEADLINE_SLACK_NS:
            late = event.earliest_wall_ns - submitted.deadline_ns
            record.report(payload, f"(LSN {lsn}) was delivered {late / 1e9:.6f} s after its deadline")


def _apply(record: Record, event: AppliedTo) -> None:
    payload = event.payload
    operation = record.operations.get(payload)
    if operation is None:
        record.problems.append(
            f"invented: {short(payload)} (LSN {event.lsn}) was applied and never submitted"
        )
        return
    submitted = operation.submitted
    if (submitted.lane, submitted.key) != (event.lane, event.key):
        record.report(
            payload,
            f"was submitted to {submitted.lane} as {submitted.key!r}, and applied to {event.lane} as {event.key!r}",
        )
    times = record.applied.get(payload, 0) + 1
    record.applied[payload] = times
    lsn = event.lsn
    if lsn is None:
        record.owed.pop(payload, None)
        return
    name(record, operation, lsn)
    _check_identity(record, event, payload)
    other = record.names.setdefault((event.store, lsn), payload)
    if other != payload:
        record.report(payload, f"and {short(other)} were both applied as LSN {lsn}")
    effects = record.effects[lsn] = record.effects.get(lsn, 0) + 1
    if effects > 1:
        if event.lane in record.exactly_once:
            record.report(payload, f"took effect {effects} times on a transactional backend")
        return
    if not any(
        payload in table
        for table in (record.owed, record.excused, record.buried, record.doubted, record.requeued)
    ):
        check_settled(record, payload, lsn)  # it had been, before the user knew of it
    record.owed.pop(payload, None)
    record.damaged.pop(payload, None)
    if payload not in record.outlived:
        record.count(operation.incarnation, lsn)
    _check_order(record, event, lsn)


def _check_identity(record: Record, event: AppliedTo, payload: bytes) -> None:
    """What was requeued is known by the LSN that it had first."""
    if event.identity is None:
        return
    identity = (*record.outlived.get(payload, ()), event.lsn)[0]
    if event.identity != identity:
        record.report(
            payload,
            f"(LSN {event.lsn}) was delivered as {event.identity}, and was submitted as {identity}",
        )


def _lie(record: Record, event: Lied) -> None:
    """The engine is excused, the operation may still come."""
    payload = event.payload
    operation = record.operations.get(payload)
    if operation is None or payload in record.applied:
        return
    if event.lsn is not None:
        if payload in record.requeued:
            record.given_up[event.lsn] = None
        elif payload not in record.lied:
            record.count(operation.incarnation, event.lsn)
    record.excuse(payload)
    record.exposed.pop(payload, None)
    record.lied[payload] = None


def _check_order(record: Record, event: AppliedTo, lsn: int) -> None:
    """First applications of a key (or of a shard) come in the order of their LSNs."""
    lane = event.lane
    if lane in record.unordered or event.payload in record.lied or event.payload in record.astray:
        return
    if lsn in record.forgotten:
        return
    unit = record.unit(lane, event.key)
    newest = record.newest.get(unit, 0)
    if newest > lsn and newest not in record.passed.get(event.payload, ()):
        what = f"shard {unit[1]}" if lane in record.by_shard else f"key {event.key!r}"
        record.report(event.payload, f"(LSN {lsn}) was applied after LSN {newest} of the same {what}")
    record.newest[unit] = max(newest, lsn)


def _unsynced(operation: Operation, event: Acknowledged) -> bool:
    """Whether no sync had succeeded since an operation was submitted, when it was acknowledged; or nobody can tell."""
    before = operation.submitted.syncs
    return event.syncs is None or before is None or event.syncs <= before


RULES: Final[Mapping[type, Rule]] = {
    Submitted: _submit,
    Acknowledged: _acknowledge,
    Given: _give,
    AppliedTo: _apply,
    Lied: _lie,
}
