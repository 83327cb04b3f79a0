"""Lives: what a look predicts, what an opening exposes, what an end may lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from walbatch.testing.simulation.history import Damaged, Ended, Logged, Opened, Predicted, Refused, StateLost
from walbatch.testing.simulation.images import Cut
from walbatch.testing.simulation.record import Operation, Record, Rule, short
from walbatch.testing.simulation.rules.names import name

GRACE_SLACK_NS = 10_000_000
"""What an interval lane may exceed its interval by: one wake-up of the thread that syncs."""

NOTE_BYTES_MAX = 512
"""What the note beside a copy in quarantine/ may have."""


def _predict(record: Record, event: Predicted) -> None:
    """A look writes nothing, and sees only what was submitted."""
    record.predicted = event
    if event.wrote:
        record.problems.append("looking at the store has changed it")
    before = None
    for logged in event.logged or ():
        operation = record.operations.get(logged.payload)
        if operation is None or (operation.submitted.lane, operation.submitted.key) != (
            logged.lane,
            logged.key,
        ):
            record.problems.append(
                f"invented: {short(logged.payload)} (LSN {logged.lsn}) is in the log and was never submitted"
            )
            continue
        name(record, operation, logged.lsn)
        if before is not None:
            _check_neighbours(record, before, (operation, logged))
        before = (operation, logged)
    if event.logged is not None:
        kept = {logged.payload for logged in event.logged}
        for payload in record.exposed:
            if payload not in kept and not record.is_final(payload) and not event.refusal:
                record.report(payload, "was recovered before, and is no longer in the log")


def _check_neighbours(record: Record, one: tuple[Operation, Logged], other: tuple[Operation, Logged]) -> None:
    """What is recovered of an incarnation has no holes, but for what is settled.

    Trimmed segments may come back, and compactions drop what is settled above the watermark.
    """
    low, high = one[1].lsn, other[1].lsn
    if high <= low:
        record.problems.append(f"the log holds LSN {high} behind LSN {low}")
        return
    first = max(low, record.checkpoint.watermark if record.checkpoint else 0) + 1
    if first >= high or one[0].incarnation != other[0].incarnation:
        return
    if one[1].payload in record.requeued or other[1].payload in record.requeued:
        return  # its LSN may be of another incarnation
    settled = {
        record.lsns.get(payload) for table in (record.lied, record.doubted, record.asked) for payload in table
    }
    if not settled.union(record.effects, record.given_up).issuperset(range(first, high)):
        record.problems.append(f"the log holds LSN {low} and {high} of one incarnation, and nothing between")


def _open(record: Record, event: Opened) -> None:
    """What was recovered is exposed: from here on it must stay. It is what a look has predicted."""
    record.failed = False
    record.incarnation += 1
    record.fragile.clear()
    _doubt(record)
    predicted, record.predicted = record.predicted, None
    if predicted is None:
        return
    _expose(record, predicted)
    if predicted.refusal:
        record.problems.append(f"a look predicted {predicted.refusal}, and the store was opened")
    if event.cases is not None and event.cases != predicted.cases:
        record.problems.append(f"a look predicted {predicted.cases}, and opening found {event.cases}")
    if event.next_lsn is not None and event.next_lsn != predicted.next_lsn:
        record.problems.append(
            f"a look predicted to go on at LSN {predicted.next_lsn}, and the engine went on at {event.next_lsn}"
        )
    if event.quarantine_bytes is not None:
        grown = event.quarantine_bytes - predicted.quarantine_bytes
        if grown > predicted.torn_bytes + NOTE_BYTES_MAX * predicted.torn_count:
            record.problems.append(
                f"quarantine/ grew by {grown} bytes, where {predicted.torn_bytes} were torn"
            )


def _expose(record: Record, predicted: Predicted) -> None:
    for logged in predicted.logged or ():
        payload = logged.payload
        if logged.lsn in record.given_up:
            continue  # the log may still hold it
        if payload in record.operations and payload not in record.lied:
            record.excused.pop(payload, None)
            record.exposed[payload] = None
            if not record.is_final(payload):
                record.owed[payload] = None


def _refuse(record: Record, event: Refused) -> None:
    """An error at opening tells of damage; and it is what a look has predicted."""
    predicted, record.predicted = record.predicted, None
    if predicted is not None and predicted.refusal != event.error:
        record.problems.append(
            f"a look predicted {predicted.refusal or 'no refusal'}, and opening raised {event.error}"
        )
    low, high = event.first_lsn, event.last_lsn
    for payload in list(record.damaged):
        lsn = record.lsns.get(payload)
        # What stands behind the damage cannot be reached either.
        if lsn is None or (lsn >= low if low is not None else high is None or lsn <= high):
            del record.damaged[payload]
            record.excuse(payload)


def _damage(record: Record, event: Damaged) -> None:
    """Damage to what was acknowledged and is not settled must be told, or do no harm."""
    if event.payload in record.owed:
        record.damaged[event.payload] = None


def _end(record: Record, event: Ended) -> None:
    fragile: dict[bytes, None] = {}
    for payload in record.fragile:
        operation = record.operations[payload]
        grace = operation.submitted.grace_ns
        age = event.at_ns - record.acknowledged[payload].at_ns
        if grace is not None and operation.life == record.life and age >= grace + GRACE_SLACK_NS:
            continue
        if event.cut is Cut.POWER or grace is None:
            record.excuse(payload)
        else:
            fragile[payload] = None  # a kill loses nothing, but a power cut that follows it may
    record.fragile = fragile
    record.life += 1
    _doubt(record)
    if event.cut is Cut.POWER:
        record.clear_fragile_keys()


def _doubt(record: Record) -> None:
    """Nobody will ever hear what became of the cancellations that were under way."""
    for payload in record.asked:
        record.doubted[payload] = None
        record.owed.pop(payload, None)
    record.asked.clear()


def _lose_state(record: Record, event: StateLost) -> None:
    """What was given up may come again, in whatever order; letters are gone; keys are known as far as the log has them."""
    del event
    record.forgotten.update(record.given_up)
    for payload in (*record.buried, *record.cancelled, *record.doubted):
        record.excuse(payload)
        record.astray[payload] = None
    for table in (record.buried, record.cancelled, record.letters, record.once, record.removable):
        table.clear()


RULES: Final[Mapping[type, Rule]] = {
    Predicted: _predict,
    Opened: _open,
    Refused: _refuse,
    Damaged: _damage,
    StateLost: _lose_state,
    Ended: _end,
}
