"""What the engine says of an operation: its ticket, resolved once and truly, and its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, assert_never

from walbatch.testing.simulation.history import Resolved, StatusTold
from walbatch.testing.simulation.record import Record, Rule
from walbatch.types import OperationStatus


def _resolve(record: Record, event: Resolved) -> None:
    """Every ticket resolves, once, and tells the truth."""
    if not event.done:
        record.report(event.payload, "has a ticket that nobody resolved")
    if event.times is not None and event.times > 1:
        record.report(event.payload, f"has a ticket that was resolved {event.times} times")
    if event.done and event.times == 0:
        record.report(event.payload, "has a ticket that was resolved, and did not tell its listener")
    payload = event.payload
    operation = record.operations[payload]
    is_repeat = operation.submitted.idempotency_key and record.once.get(record.scope_of(operation)) != payload
    if payload in record.excused or is_repeat:
        return
    if event.applied and payload not in record.applied:
        record.report(payload, "has a ticket that says applied, and was not")
    is_requeued = payload in record.requeued
    if event.applied and not is_requeued and (payload in record.buried or payload in record.cancelled):
        record.report(payload, "has a ticket that says applied, and was given up")
    if (
        event.dead
        and not is_requeued
        and payload not in record.buried
        and operation.submitted.grace_ns is not None
    ):
        record.report(payload, "has a ticket that says dead, and no letter")
    if event.cancelled and not any(
        payload in table for table in (record.cancelled, record.asked, record.doubted)
    ):
        record.report(payload, "has a ticket that says cancelled, and nobody wanted that")


def _tell_status(record: Record, event: StatusTold) -> None:
    """A status is true; what was given up long ago counts as applied, unless its letter is there."""
    payload = event.payload
    if payload in record.excused or payload in record.astray:
        return
    came_to_be = payload in record.acknowledged or payload in record.exposed
    if not came_to_be and record.operations[payload].incarnation != record.incarnation:
        return  # whether it did, nobody knows
    gone = any(
        payload in table
        for table in (record.cancelled, record.asked, record.doubted, record.buried, record.requeued)
    )
    lsn, watermark = (
        event.lsn or record.lsns.get(payload, 0),
        record.checkpoint.watermark if record.checkpoint else 0,
    )
    match event.status:
        case OperationStatus.APPLIED:
            is_true = payload in record.applied or (gone and lsn <= watermark)
        case OperationStatus.DEAD:
            is_true = payload in record.buried
        case OperationStatus.CANCELLED:
            is_true = gone
        case OperationStatus.PENDING | OperationStatus.IN_FLIGHT:
            is_true = payload not in record.cancelled
        case _:
            assert_never(event.status)
    if not is_true:
        record.report(payload, f"(LSN {lsn}) is said to be {event.status}, and is not")


RULES: Final[Mapping[type, Rule]] = {
    Resolved: _resolve,
    StatusTold: _tell_status,
}
