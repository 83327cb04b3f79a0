"""Each rule of the oracle, broken once, and kept by a history that is fine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Checkpointed,
    Drained,
    Ended,
    Event,
    Opened,
    Resolved,
    Submitted,
    SyncFailed,
)
from walbatch.testing.simulation.images import Cut
from walbatch.testing.simulation.oracle import Oracle
from walbatch.types import Checkpoint, LaneMark, Mark

MS = 1_000_000


def submitted(payload: bytes, grace_ns: int | None = 0, key: bytes = b"k") -> Submitted:
    return Submitted(lane="put", key=key, payload=payload, grace_ns=grace_ns)


def acknowledged(payload: bytes, lsn: int | None, at_ms: int = 0) -> Acknowledged:
    return Acknowledged(payload=payload, lsn=lsn, at_ns=at_ms * MS)


def applied(payload: bytes, lsn: int | None, key: bytes = b"k", lane: str = "put") -> AppliedTo:
    return AppliedTo(lane=lane, store=b"s", lsn=lsn, key=key, payload=payload)


def power(at_ms: int = 0) -> Ended:
    return Ended(cut=Cut.POWER, at_ns=at_ms * MS)


def checkpointed(watermark: int, *ranges: tuple[int, int]) -> Checkpointed:
    mark = Mark(watermark=watermark, ranges=ranges)
    return Checkpointed(Checkpoint(
        generation=1, epoch=1, watermark=watermark, durable_lsn=9, segment=1, settled_count=0,
        lanes={"put": LaneMark(shards=(mark,))},
    ))  # fmt: skip


A, B = submitted(b"a"), submitted(b"b")
KILL = Ended(cut=Cut.KILL, at_ns=0)

FINE: dict[str, Sequence[Event]] = {
    "applied, lost with the process, and applied again": [
        A, acknowledged(b"a", 1), applied(b"a", 1), power(), Opened(), applied(b"a", 1), checkpointed(1), Drained(),
    ],
    "never acknowledged, and lost": [A, power(), Opened(), Drained()],
    "never acknowledged, and kept": [A, power(), Opened(), applied(b"a", 1), Drained()],
    "lost within the grace of its lane": [
        submitted(b"a", 20 * MS), acknowledged(b"a", 1, 100), power(110), Opened(), Drained(),
    ],
    "not logged, and lost with its process": [submitted(b"a", None), acknowledged(b"a", None), KILL, Opened(), Drained()],
    "acknowledged late by a sync that had succeeded": [A, SyncFailed("f"), acknowledged(b"a", 1), applied(b"a", 1)],
    "a failed sync of an earlier life": [SyncFailed("f"), KILL, Opened(), A, acknowledged(b"a", 1), applied(b"a", 1)],
    "other keys in other orders": [
        A, submitted(b"b", key=b"l"), applied(b"b", 2, key=b"l"), applied(b"a", 1),
    ],
}  # fmt: skip

WRONG: dict[str, Sequence[Event]] = {
    "'a' (LSN 1) was acknowledged and is lost": [A, acknowledged(b"a", 1), power(), Opened(), Drained()],
    "'b' (LSN 1) was acknowledged and is lost": [
        submitted(b"b", 20 * MS), acknowledged(b"b", 1, 100), power(200), Opened(), Drained(),
    ],
    "'i' (LSN 1) was acknowledged and is lost": [  # a kill loses nothing, and what was exposed must stay
        submitted(b"i", 20 * MS), acknowledged(b"i", 1, 100), KILL, Opened(), power(100), Opened(), Drained(),
    ],
    "'a' (LSN None) was acknowledged and is lost": [submitted(b"a", None), acknowledged(b"a", None), Drained()],
    "never submitted": [applied(b"a", 1)],
    "and applied to put as b'other'": [A, applied(b"a", 1, key=b"other")],
    "were both applied as LSN 1": [A, B, applied(b"a", 1), applied(b"b", 1)],
    "were both acknowledged as LSN 1": [A, acknowledged(b"a", 1), B, acknowledged(b"b", 1)],
    "has two LSNs: 1 and 2": [A, acknowledged(b"a", 1), applied(b"a", 2)],
    "was applied after LSN 2 of the same key": [A, B, applied(b"b", 2), applied(b"a", 1)],
    "'b' got LSN 1, but 2 was acknowledged before": [A, acknowledged(b"a", 2), B, acknowledged(b"b", 1)],
    "although a sync had failed": [SyncFailed("f"), A, acknowledged(b"a", 1)],
    "(LSN 1) is settled by checkpoint 1": [A, acknowledged(b"a", 1), checkpointed(1), applied(b"a", 1)],
    "(LSN 3) is settled by checkpoint 1": [A, acknowledged(b"a", 3), checkpointed(1, (3, 4)), applied(b"a", 3)],
    "a ticket that nobody resolved": [A, Resolved(payload=b"a", done=False, applied=False)],
    "a ticket that says applied, and was not": [A, Resolved(payload=b"a", done=True, applied=True)],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_a_history_that_keeps_the_guarantees_has_no_problems(name: str) -> None:
    assert Oracle().judge(FINE[name]) == []


@pytest.mark.parametrize("expected", WRONG)
def test_each_breach_is_reported_in_words(expected: str) -> None:
    assert any(expected in problem for problem in Oracle().judge(WRONG[expected]))


def test_a_second_effect_is_a_breach_only_where_exactly_once_was_promised() -> None:
    events: list[Event] = [A, applied(b"a", 1), applied(b"a", 1)]
    assert Oracle().judge(events) == []
    assert "took effect 2 times" in Oracle(exactly_once={"put"}).judge(events)[0]


def test_order_is_no_breach_where_none_was_promised() -> None:
    events: list[Event] = [A, B, applied(b"b", 2), applied(b"a", 1)]
    assert Oracle(unordered={"put"}).judge(events) == []
