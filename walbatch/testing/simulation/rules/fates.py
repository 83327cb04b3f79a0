"""What is given up: dead letters are there as long as nobody wants otherwise, and what is cancelled stays so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walbatch.testing.simulation.history import (
    Blamed,
    Buried,
    CancelAsked,
    Cancelled,
    CancelRefused,
    DropAsked,
    Letters,
    RequeueAsked,
    Unburied,
)
from walbatch.testing.simulation.record import Operation, Record, Rule, short
from walbatch.testing.simulation.rules.names import name
from walbatch.types import DeadLetter, DeathReason


def _blame(record: Record, event: Blamed) -> None:
    """A backend that applies younger ones in the same call has decided on their order itself."""
    record.blamed[event.payload] = None
    if event.applied:
        record.passed[event.payload] = record.passed.get(event.payload, ()) + event.applied


def _bury(record: Record, event: Buried) -> None:
    """A letter is what was submitted, for a reason that there was."""
    for letter in event.letters:
        operation = record.operations.get(letter.payload)
        _check_letter(record, operation, letter)
        if operation is None:
            continue
        known = record.letters.get(letter.lsn)
        if known is not None:
            if known != letter:
                record.report(letter.payload, f"(LSN {letter.lsn}) has a dead letter that has changed")
            continue
        name(record, operation, letter.lsn)
        record.letters[letter.lsn] = letter
        record.given_up[letter.lsn] = None
        if letter.lsn == record.lsns.get(letter.payload):
            record.buried[letter.payload] = letter.lsn
            record.owed.pop(letter.payload, None)
            record.damaged.pop(letter.payload, None)


def _check_letter(record: Record, operation: Operation | None, letter: DeadLetter) -> None:
    payload = letter.payload
    if operation is None or (operation.submitted.lane, operation.submitted.key) != (
        letter.lane,
        letter.key,
    ):
        record.problems.append(
            f"invented: {short(payload)} (LSN {letter.lsn}) is a dead letter and was never submitted"
        )
    elif letter.reason is DeathReason.DEADLINE:
        if not operation.submitted.deadline_ns:
            record.report(payload, f"(LSN {letter.lsn}) missed a deadline that it does not have")
    elif payload not in record.blamed:
        record.report(
            payload, f"(LSN {letter.lsn}) was given up ({letter.reason}), and no backend had blamed it"
        )
    if payload in record.cancelled:
        record.report(payload, f"(LSN {letter.lsn}) was cancelled, and is a dead letter")


def _unbury(record: Record, event: Unburied) -> None:
    """A letter that somebody wanted requeued is an operation that is owed, unless that was applied meanwhile."""
    for lsn in event.lsns:
        letter = record.letters.pop(lsn, None)
        if letter is None:
            continue
        payload = letter.payload
        if lsn not in record.removable:
            record.report(payload, f"(LSN {lsn}) is no dead letter any more, and nobody wanted that")
        if record.buried.get(payload) != lsn:
            continue  # it has died again since, or was applied
        if lsn in record.requeued.get(payload, ()):
            del record.buried[payload]
            if record.removable.get(lsn) or payload in record.lied:
                # Wanted requeued, perhaps in vain, and dropped; or said to be applied, in vain.
                record.exposed.pop(payload, None)
                record.excuse(payload)
                continue
            if record.lsns[payload] == lsn or record.lsns[payload] not in record.effects:
                record.applied.pop(payload, None)
                record.owed[payload] = None


def _look_at_letters(record: Record, event: Letters) -> None:
    """All letters are there, once, but those that somebody may have removed; and no others."""
    seen: dict[int, DeadLetter] = {}
    for letter in event.letters:
        if letter.lsn in seen:
            record.report(letter.payload, f"(LSN {letter.lsn}) has two dead letters")
        seen[letter.lsn] = letter
        if letter != record.letters.get(letter.lsn):
            record.report(
                letter.payload,
                f"(LSN {letter.lsn}) is shown as a dead letter, and was never buried like that",
            )
    gone = [lsn for lsn in record.letters if lsn not in seen]
    for lsn in gone:
        if lsn not in record.removable:
            record.report(record.letters[lsn].payload, f"(LSN {lsn}) has lost its dead letter")
    _unbury(record, Unburied(lsns=tuple(lsn for lsn in gone if lsn in record.removable)))


def _want_requeued(record: Record, event: RequeueAsked) -> None:
    letter = record.letters.get(event.lsn)
    if letter is None:
        return
    record.removable.setdefault(event.lsn, False)
    before = record.requeued.get(letter.payload, ())
    if event.lsn not in before:
        record.requeued[letter.payload] = (*before, event.lsn)


def _want_dropped(record: Record, event: DropAsked) -> None:
    record.removable[event.lsn] = True


def _want_cancelled(record: Record, event: CancelAsked) -> None:
    record.asked[event.payload] = record.asked.get(event.payload, 0) + 1
    if event.lsn is not None:
        name(record, record.operations[event.payload], event.lsn)


def _cancel(record: Record, event: Cancelled) -> None:
    """It is settled from here on: whatever is applied after it is a breach."""
    payload = event.payload
    _refuse_cancel(record, event)
    if not event.told:
        record.report(payload, "was cancelled, and its ticket was not resolved by then")
    if payload in record.cancelled:
        record.report(payload, "was cancelled twice")
    if payload in record.buried:
        record.report(payload, "is a dead letter, and was cancelled")
    record.cancelled[payload] = None
    record.owed.pop(payload, None)
    lsn = record.lsns.get(payload)
    if lsn is not None:
        record.given_up[lsn] = None


def _refuse_cancel(record: Record, event: Cancelled | CancelRefused) -> None:
    count = record.asked.pop(event.payload, 0) - 1
    if count > 0:
        record.asked[event.payload] = count


RULES: Final[Mapping[type, Rule]] = {
    Blamed: _blame,
    Buried: _bury,
    Unburied: _unbury,
    Letters: _look_at_letters,
    RequeueAsked: _want_requeued,
    DropAsked: _want_dropped,
    CancelAsked: _want_cancelled,
    Cancelled: _cancel,
    CancelRefused: _refuse_cancel,
}
