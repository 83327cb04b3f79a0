"""What an operation is called: its LSN, and whose the LSN is where several submissions have one idempotency key."""

from __future__ import annotations

from walbatch.testing.simulation.record import Operation, Record, short


def name(record: Record, operation: Operation, lsn: int) -> None:
    """An operation has this LSN. Another one than before only for each letter of it that was requeued."""
    payload = operation.submitted.payload
    is_first = payload not in record.lsns
    known = record.lsns.setdefault(payload, lsn)
    if is_first and operation.submitted.idempotency_key:
        _stand_alone(record, operation, lsn)
    if known != lsn and lsn not in record.outlived.get(payload, ()):
        if known > lsn or len(record.outlived.get(payload, ())) >= len(record.requeued.get(payload, ())):
            record.report(payload, f"has two LSNs: {known} and {lsn}")
        else:
            record.outlived[payload] = (*record.outlived.get(payload, ()), known)
            record.lsns[payload] = lsn
    elif lsn <= operation.above_lsn:
        problem = f"got LSN {lsn}, but {operation.above_lsn} was acknowledged before it was submitted"
        if f"{short(payload)} {problem}" not in record.problems:
            record.report(payload, problem)


def is_repeat(record: Record, operation: Operation, lsn: int) -> bool:
    """Whether this LSN, with which a submission was acknowledged, is that of an earlier one with the same idempotency key.

    Who among them it is may show later, where no process lived to tell.
    """
    submitted = operation.submitted
    scope = submitted.lane, submitted.idempotency_key
    others = [
        other for other in record.of_key[scope] if other != submitted.payload and other not in record.repeats
    ]
    first = next((other for other in others if lsn in record.lsns_of(other)), None)
    if first is not None:
        record.repeats[submitted.payload] = None
        if not record.is_final(first) and first not in record.excused:
            record.owed[first] = None
        return True
    once = record.once.get(scope)
    if once == submitted.payload:
        return False  # it was seen before its user heard of it
    if once is not None and once not in record.excused:
        record.report(
            submitted.payload,
            f"(LSN {lsn}) was accepted, although {short(once)} has its idempotency key",
        )
    if any(other not in record.acknowledged and other not in record.lsns for other in others):
        record.unclear[lsn] = scope
        return True
    record.once[scope] = submitted.payload
    return False


def _stand_alone(record: Record, operation: Operation, lsn: int) -> None:
    """It has an LSN of its own: so it is no repeat, and the others of its idempotency key are."""
    payload, scope = operation.submitted.payload, record.scope_of(operation)
    if payload in record.repeats:
        record.report(payload, "was only a repeat of another operation, and was accepted")
    once = record.once.get(scope)
    if once is None or once in record.excused:
        record.once[scope] = payload
    elif once != payload:
        record.report(payload, f"was accepted, and so was {short(once)} with the same idempotency key")
    if record.unclear.pop(lsn, None) is not None and not record.is_final(payload):
        record.owed[payload] = None
