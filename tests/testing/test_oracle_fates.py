"""The oracle's rules about what is given up, waits for its time, or was submitted before: each broken once, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest

from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Blamed,
    Buried,
    CancelAsked,
    Cancelled,
    CancelRefused,
    Checkpointed,
    Drained,
    DropAsked,
    Ended,
    Event,
    Given,
    Letters,
    Lied,
    Logged,
    Opened,
    Predicted,
    RequeueAsked,
    Resolved,
    StateLost,
    StatusTold,
    Submitted,
    SyncFailed,
    Unburied,
)
from walbatch.testing.simulation.images import Cut
from walbatch.testing.simulation.oracle import Oracle
from walbatch.types import NO_OPTIONS, Checkpoint, DeadLetter, DeathReason, LaneMark, Mark, OperationStatus

MS: Final = 1_000_000
KILL: Final = Ended(cut=Cut.KILL, at_ns=0)
POWER: Final = Ended(cut=Cut.POWER, at_ns=0)


def submitted(
    payload: bytes, *, key: bytes = b"k", idempotency_key: bytes = b"", not_before_ms: int = 0, deadline_ms: int = 0,
    grace_ns: int = 0,
) -> Submitted:  # fmt: skip
    return Submitted(
        lane="put", key=key, payload=payload, grace_ns=grace_ns, idempotency_key=idempotency_key,
        not_before_ns=not_before_ms * MS, deadline_ns=deadline_ms * MS,
    )  # fmt: skip


def acknowledged(payload: bytes, lsn: int) -> Acknowledged:
    return Acknowledged(payload=payload, lsn=lsn, at_ns=0)


def given(payload: bytes, lsn: int, at_ms: int = 0) -> Given:
    return Given(
        lane="put", operations=((lsn, payload),), earliest_wall_ns=at_ms * MS, latest_wall_ns=at_ms * MS
    )


def applied(payload: bytes, lsn: int, *, key: bytes = b"k", identity: int | None = None) -> AppliedTo:
    return AppliedTo(lane="put", store=b"s", lsn=lsn, key=key, payload=payload, identity=identity)


def letter(
    payload: bytes, lsn: int, reason: DeathReason = DeathReason.REJECTED, key: bytes = b"k"
) -> DeadLetter:
    return DeadLetter(
        lsn=lsn, lane="put", key=key, payload=payload, priority=5, options=NO_OPTIONS, reason=reason, error="no", attempts=1,
        died_wall_ns=0,
    )  # fmt: skip


def buried(*letters: DeadLetter) -> Buried:
    return Buried(letters=letters)


def shown(*letters: DeadLetter) -> Letters:
    return Letters(letters=letters)


def checkpointed(watermark: int) -> Checkpointed:
    return Checkpointed(Checkpoint(
        generation=1, epoch=1, watermark=watermark, durable_lsn=9, segment=1, settled_count=0,
        lanes={"put": LaneMark(shards=(Mark(watermark=watermark),))},
    ))  # fmt: skip


def resolved(payload: bytes, **fate: bool) -> Resolved:
    return Resolved(payload=payload, done=True, **{"applied": False, **fate})


A, B, C = submitted(b"a"), submitted(b"b"), submitted(b"c")
LETTER = letter(b"a", 1)
DEAD: Final[Sequence[Event]] = [
    A,
    acknowledged(b"a", 1),
    given(b"a", 1),
    Blamed(payload=b"a"),
    buried(LETTER),
]
CANCELLED: Final[Sequence[Event]] = [
    A,
    acknowledged(b"a", 1),
    CancelAsked(payload=b"a"),
    Cancelled(payload=b"a"),
]
ONCE, AGAIN = submitted(b"a", idempotency_key=b"1"), submitted(b"b", idempotency_key=b"1")

FINE: Final[dict[str, Sequence[Event]]] = {
    "dead, and its letter is there after a crash": [
        *DEAD, resolved(b"a", dead=True), checkpointed(1), POWER, buried(LETTER), Opened(), shown(LETTER), Drained(),
    ],
    "dead between others": [
        A, B, C, acknowledged(b"a", 1), acknowledged(b"b", 2), acknowledged(b"c", 3), applied(b"a", 1), Blamed(payload=b"b"),
        buried(letter(b"b", 2)), applied(b"c", 3), checkpointed(3), Drained(),
    ],
    "dropped": [*DEAD, DropAsked(lsn=1), Unburied(lsns=(1,)), shown(), Drained()],
    "requeued and applied": [
        *DEAD, RequeueAsked(lsn=1), given(b"a", 2), applied(b"a", 2, identity=1), Unburied(lsns=(1,)), shown(), Drained(),
    ],
    "requeued, cut off, requeued again, dead again": [
        *DEAD, RequeueAsked(lsn=1), KILL, buried(LETTER), Opened(), RequeueAsked(lsn=1), given(b"a", 9), buried(letter(b"a", 9)),
        Unburied(lsns=(1,)), shown(letter(b"a", 9)), Drained(),
    ],
    "requeued in vain, and dropped": [
        *DEAD, RequeueAsked(lsn=1), KILL, Predicted(logged=(Logged(lsn=1, lane="put", key=b"k", payload=b"a"),)), buried(LETTER),
        Opened(), DropAsked(lsn=1), Unburied(lsns=(1,)), KILL, Predicted(logged=()), Opened(), Drained(),
    ],
    "requeued in vain, dropped, and still in the log": [
        *DEAD, RequeueAsked(lsn=1), KILL, buried(LETTER), Opened(), DropAsked(lsn=1), Unburied(lsns=(1,)), KILL,
        Predicted(logged=(Logged(lsn=1, lane="put", key=b"k", payload=b"a"),)), Opened(), KILL, Predicted(logged=()), Opened(),
        Drained(),
    ],
    "a backend lied about what was requeued": [
        *DEAD, B, acknowledged(b"b", 2), applied(b"b", 2), POWER, buried(LETTER), Opened(), RequeueAsked(lsn=1), given(b"a", 90),
        Lied(payload=b"a", lsn=90), Unburied(lsns=(1,)), Drained(),
    ],
    "a backend lied about what was requeued between others": [
        *DEAD, RequeueAsked(lsn=1), Unburied(lsns=(1,)), B, acknowledged(b"b", 3), given(b"a", 2), Lied(payload=b"a", lsn=2),
        applied(b"b", 3), Drained(),
    ],
    "a backend applies a younger one, rejects the elder, and takes that after a crash": [
        A, B, acknowledged(b"a", 1), acknowledged(b"b", 2), Blamed(payload=b"a", applied=(2,)), applied(b"b", 2), POWER, Opened(),
        applied(b"a", 1), applied(b"b", 2), Drained(),
    ],
    "what was requeued comes again with its first LSN when the state is lost": [
        *DEAD, RequeueAsked(lsn=1), Unburied(lsns=(1,)), applied(b"a", 2), KILL, StateLost(), Opened(), applied(b"a", 1),
        applied(b"a", 2), Drained(),
    ],
    "asked about what an earlier life had refused": [
        A, CancelAsked(payload=b"a", lsn=1), CancelRefused(payload=b"a"), resolved(b"a"), KILL, Opened(),
        StatusTold(payload=b"a", status=OperationStatus.APPLIED, lsn=1),
    ],
    "asked about by the LSN that it had before it was requeued": [
        *DEAD, RequeueAsked(lsn=1), checkpointed(1), given(b"a", 2), Blamed(payload=b"a"), buried(letter(b"a", 2)),
        Unburied(lsns=(1,)),
        StatusTold(payload=b"a", status=OperationStatus.APPLIED, lsn=1),
    ],
    "what is requeued has no times any more": [
        submitted(b"a", deadline_ms=5), acknowledged(b"a", 1), buried(letter(b"a", 1, DeathReason.DEADLINE)), RequeueAsked(lsn=1),
        given(b"a", 2, 7), applied(b"a", 2), Unburied(lsns=(1,)), Drained(),
    ],
    "cancelled between others": [
        A, B, C, acknowledged(b"a", 1), acknowledged(b"b", 2), acknowledged(b"c", 3), CancelAsked(payload=b"b"),
        Cancelled(payload=b"b"), resolved(b"b", cancelled=True), applied(b"a", 1), applied(b"c", 3), checkpointed(3), Drained(),
    ],
    "a cancellation that nobody answered, and did not happen": [
        A, acknowledged(b"a", 1), CancelAsked(payload=b"a"), KILL, Opened(), applied(b"a", 1), Drained(),
    ],
    "a cancellation that nobody answered, and happened": [
        A, acknowledged(b"a", 1), CancelAsked(payload=b"a"), KILL, Opened(), checkpointed(1), Drained(),
    ],
    "a cancellation that came too late": [
        A, acknowledged(b"a", 1), CancelAsked(payload=b"a"), CancelRefused(payload=b"a"), applied(b"a", 1), Drained(),
    ],
    "a repeat is the first one": [
        ONCE, acknowledged(b"a", 1), AGAIN, acknowledged(b"b", 1), applied(b"a", 1), resolved(b"b", applied=True), Drained(),
    ],
    "a repeat of what nobody was told of, and is there": [
        ONCE, KILL, Opened(), AGAIN, acknowledged(b"b", 1), applied(b"a", 1), resolved(b"b", applied=True), Drained(),
    ],
    "a repeat of what nobody was told of, and is lost": [
        ONCE, POWER, Opened(), AGAIN, acknowledged(b"b", 2), applied(b"b", 2), resolved(b"b", applied=True), Drained(),
    ],
    "one of an interval lane that is lost may be accepted again": [
        submitted(b"a", idempotency_key=b"1", grace_ns=MS), acknowledged(b"a", 1), POWER, Opened(), AGAIN, acknowledged(b"b", 2),
        applied(b"b", 2), Drained(),
    ],
    "one of an interval lane of which nobody was told may be lost twice": [
        submitted(b"a", idempotency_key=b"1", grace_ns=MS), submitted(b"b", idempotency_key=b"1", grace_ns=MS),
        acknowledged(b"b", 1), SyncFailed("f"), Opened(), Drained(),
    ],
    "in its time": [submitted(b"a", not_before_ms=3, deadline_ms=9), given(b"a", 1, 5), applied(b"a", 1)],
    "a jump of the wall clock is nobody's fault": [
        submitted(b"a", not_before_ms=3),
        Given(lane="put", operations=((1, b"a"),), earliest_wall_ns=MS, latest_wall_ns=4 * MS), applied(b"a", 1),
    ],
    "what was given up long ago counts as applied": [
        *CANCELLED, StatusTold(payload=b"a", status=OperationStatus.CANCELLED), checkpointed(1),
        StatusTold(payload=b"a", status=OperationStatus.APPLIED),
    ],
    "without the state nobody knows who was given up": [
        *DEAD, B, acknowledged(b"b", 2), applied(b"b", 2), POWER, StateLost(), Opened(), shown(), given(b"a", 1), applied(b"a", 1),
        Drained(),
    ],
}  # fmt: skip

WRONG: Final[dict[str, Sequence[Event]]] = {
    "'a' (LSN 1) is settled by checkpoint 1, and was not applied": [
        A, acknowledged(b"a", 1), Blamed(payload=b"a"), checkpointed(1),
    ],
    "(LSN 1) was applied after LSN 2 of the same key": [
        A, B, acknowledged(b"a", 1), acknowledged(b"b", 2), Blamed(payload=b"a"), applied(b"b", 2), applied(b"a", 1),
    ],
    "and no backend had blamed it": [A, acknowledged(b"a", 1), buried(LETTER)],
    "missed a deadline that it does not have": [A, buried(letter(b"a", 1, DeathReason.DEADLINE))],
    "is a dead letter and was never submitted": [A, Blamed(payload=b"a"), buried(letter(b"a", 1, key=b"other"))],
    "'a' (LSN 1) was delivered, although it is a dead letter": [*DEAD, KILL, buried(LETTER), Opened(), given(b"a", 1)],
    "'a' (LSN 1) has lost its dead letter": [*DEAD, POWER, Opened(), shown()],
    "'a' (LSN 1) has two dead letters": [*DEAD, shown(LETTER, LETTER)],
    "is shown as a dead letter, and was never buried like that": [*DEAD, shown(letter(b"a", 1, DeathReason.ATTEMPTS))],
    "has a dead letter that has changed": [*DEAD, buried(letter(b"a", 1, DeathReason.ATTEMPTS))],
    "is no dead letter any more, and nobody wanted that": [*DEAD, Unburied(lsns=(1,))],
    "'a' (LSN 1) was acknowledged and is lost": [*DEAD, RequeueAsked(lsn=1), Unburied(lsns=(1,)), Drained()],
    "'a' has two LSNs: 2 and 3": [*DEAD, RequeueAsked(lsn=1), applied(b"a", 2), applied(b"a", 3)],
    "'a' has two LSNs: 1 and 2": [*DEAD, DropAsked(lsn=1), applied(b"a", 2)],
    "was delivered as 2, and was submitted as 1": [*DEAD, RequeueAsked(lsn=1), applied(b"a", 2, identity=2)],
    "'a' (LSN 1) was delivered, although it had been cancelled": [*CANCELLED, KILL, Opened(), given(b"a", 1)],
    "'a' was cancelled twice": [*CANCELLED, CancelAsked(payload=b"a"), Cancelled(payload=b"a")],
    "'a' is a dead letter, and was cancelled": [*DEAD, CancelAsked(payload=b"a"), Cancelled(payload=b"a")],
    "was cancelled, and is a dead letter": [*CANCELLED, Blamed(payload=b"a"), buried(LETTER)],
    "was cancelled, and its ticket was not resolved by then": [
        A, acknowledged(b"a", 1), CancelAsked(payload=b"a"), Cancelled(payload=b"a", told=False),
    ],
    "'a' (LSN 4) was acknowledged and is lost": [
        A, acknowledged(b"a", 4), CancelAsked(payload=b"a"), CancelRefused(payload=b"a"), Drained(),
    ],
    "has a ticket that says cancelled, and nobody wanted that": [A, acknowledged(b"a", 1), resolved(b"a", cancelled=True)],
    "has a ticket that says dead, and no letter": [A, acknowledged(b"a", 1), resolved(b"a", dead=True)],
    "has a ticket that says applied, and was given up": [*DEAD, applied(b"a", 1), resolved(b"a", applied=True)],
    "although 'a' has its idempotency key": [ONCE, acknowledged(b"a", 1), AGAIN, acknowledged(b"b", 2)],
    "was only a repeat of another operation, and was accepted": [
        ONCE, acknowledged(b"a", 1), AGAIN, acknowledged(b"b", 1), applied(b"a", 1), applied(b"b", 2),
    ],
    "'a' was accepted, and so was 'b' with the same idempotency key": [
        ONCE, KILL, Opened(), AGAIN, acknowledged(b"b", 2), applied(b"b", 2), applied(b"a", 3),
    ],
    "LSN 1, acknowledged for the idempotency key b'1', is lost": [
        ONCE, KILL, Opened(), AGAIN, acknowledged(b"b", 1), POWER, Opened(), Drained(),
    ],
    "'a' (LSN 1) is said to be applied, and is not": [
        A, acknowledged(b"a", 1), StatusTold(payload=b"a", status=OperationStatus.APPLIED),
    ],
    "is said to be dead, and is not": [A, acknowledged(b"a", 1), StatusTold(payload=b"a", status=OperationStatus.DEAD)],
    "is said to be pending, and is not": [*CANCELLED, StatusTold(payload=b"a", status=OperationStatus.PENDING)],
    "is said to be cancelled, and is not": [A, StatusTold(payload=b"a", status=OperationStatus.CANCELLED)],
    "was delivered 0.002000 s before its time": [submitted(b"a", not_before_ms=3), given(b"a", 1, 1)],
    "was delivered 0.004000 s after its deadline": [submitted(b"a", deadline_ms=3), given(b"a", 1, 7)],
    "of LSN 1 to 4, handed out by one incarnation, only 2 were applied": [
        A, B, C, acknowledged(b"a", 1), applied(b"a", 1), CancelAsked(payload=b"b"), acknowledged(b"b", 2), Cancelled(payload=b"b"),
        acknowledged(b"c", 4), applied(b"c", 4), Drained(),
    ],
    "the log holds LSN 1 and 4 of one incarnation, and nothing between": [
        A, B, C, acknowledged(b"b", 2), CancelAsked(payload=b"b"), Cancelled(payload=b"b"), POWER,
        Predicted(logged=(Logged(lsn=1, lane="put", key=b"k", payload=b"a"), Logged(lsn=4, lane="put", key=b"k", payload=b"c"))),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_a_history_is_fine(name: str) -> None:
    assert Oracle().judge(FINE[name]) == []


def test_a_call_that_was_given_up_may_apply_what_was_requeued_meanwhile() -> None:
    """On a lane without order, whose calls may be given up."""
    events: list[Event] = [
        A, B, acknowledged(b"a", 1), acknowledged(b"b", 2), given(b"a", 1), Blamed(payload=b"a"), buried(LETTER),
        RequeueAsked(lsn=1), Unburied(lsns=(1,)), applied(b"b", 2), applied(b"a", 3, identity=1), applied(b"a", 1, identity=1),
        Drained(),
    ]  # fmt: skip
    assert Oracle(unordered={"put"}).judge(events) == []


@pytest.mark.parametrize("problem", WRONG)
def test_a_breach_is_found(problem: str) -> None:
    problems = Oracle().judge(WRONG[problem])
    assert any(problem.replace("'a'", "b'a'").replace("'b'", "b'b'") in found for found in problems), problems


@pytest.mark.parametrize("name", FINE)
def test_a_fork_judges_on_its_own(name: str) -> None:
    events = FINE[name]
    for part in range(len(events)):
        oracle = Oracle()
        oracle.judge(events[:part])
        twin = oracle.fork()
        assert twin.judge(events[part:]) == []
        assert oracle.judge(events[part:]) == []
