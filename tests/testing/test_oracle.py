"""Each rule of the oracle, broken once, and kept by a history that is fine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from walbatch.testing.simulation.history import (
    Acknowledged,
    AppliedTo,
    Checkpointed,
    Damaged,
    Drained,
    Ended,
    Event,
    Lied,
    Logged,
    Opened,
    Predicted,
    Refused,
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


# --- syncs, recoveries, looks, damage ---


def counted(payload: bytes, syncs: int, grace_ns: int = 0) -> Submitted:
    return Submitted(lane="put", key=b"k", payload=payload, grace_ns=grace_ns, syncs=syncs)


def told(payload: bytes, lsn: int, syncs: int) -> Acknowledged:
    return Acknowledged(payload=payload, lsn=lsn, at_ns=0, syncs=syncs)


def logged(payload: bytes, lsn: int, key: bytes = b"k") -> Logged:
    return Logged(lsn=lsn, lane="put", key=key, payload=payload)


def look(*found: Logged, **facts: Any) -> Predicted:
    return Predicted(logged=found, **facts)


C = submitted(b"c")
ALL: list[Event] = [A, B, C, acknowledged(b"a", 1), acknowledged(b"b", 2), acknowledged(b"c", 3)]

FINE |= {
    "acknowledged behind a sync": [counted(b"a", 3), told(b"a", 1, 4), applied(b"a", 1), Drained(segments=1)],
    "an interval lane needs no sync": [counted(b"a", 3, 20 * MS), told(b"a", 1, 3)],
    "what was written and never synced may go with a failed sync": [
        counted(b"a", 3, 20 * MS), told(b"a", 1, 3), SyncFailed("f"), Opened(), Drained(),
    ],
    "what was written before a failed sync may go although it was acknowledged in that moment": [
        counted(b"a", 3, 20 * MS), SyncFailed("f"), told(b"a", 1, 3), Opened(), Drained(),
    ],
    "a look predicts what happens": [
        *ALL, power(),
        look(logged(b"a", 1), logged(b"b", 2), logged(b"c", 3), next_lsn=9, cases=("W11",), torn_bytes=40, torn_count=1),
        Opened(next_lsn=9, cases=("W11",), quarantine_bytes=140),
    ],
    "a look predicts a refusal": [*ALL, power(), look(refusal="CorruptionError"), Refused(error="CorruptionError")],
    "what is settled may be missing in the middle": [
        *ALL, applied(b"a", 1), applied(b"b", 2), checkpointed(2), power(), look(logged(b"a", 1), logged(b"c", 3)), Opened(),
    ],
    "LSNs jump from one incarnation to the next": [
        A, acknowledged(b"a", 1), power(), Opened(), B, acknowledged(b"b", 900), applied(b"a", 1), applied(b"b", 900), Drained(),
    ],
    "damage that was told": [*ALL, Damaged(payload=b"b"), Refused(error="CorruptionError", first_lsn=2, last_lsn=2)],
    "damage that did no harm": [A, acknowledged(b"a", 1), Damaged(payload=b"a"), applied(b"a", 1), Drained()],
    "damage to what is settled": [A, acknowledged(b"a", 1), applied(b"a", 1), Damaged(payload=b"a"), Drained()],
    "a lie is the backend's": [
        A, acknowledged(b"a", 1), Lied(payload=b"a", lsn=1), checkpointed(1), Resolved(payload=b"a", done=True, applied=True),
        Drained(),
    ],
}  # fmt: skip

WRONG |= {
    "no sync has succeeded since it was submitted": [counted(b"a", 3), told(b"a", 1, 3)],
    "'i' (LSN 1) was acknowledged and is lost: a sync came between": [
        counted(b"i", 3, 20 * MS), told(b"i", 1, 3), counted(b"a", 4), SyncFailed("f"), Opened(), Drained(),
    ],
    "of LSN 1 to 3, handed out by one incarnation, only 2 were applied": [A, B, C, applied(b"a", 1), applied(b"c", 3), Drained()],
    "holds LSN 1 and 3 of one incarnation, and nothing between": [*ALL, power(), look(logged(b"a", 1), logged(b"c", 3))],
    "holds LSN 1 behind LSN 2": [*ALL, power(), look(logged(b"b", 2), logged(b"a", 1))],
    "(LSN 7) is in the log and was never submitted": [A, look(logged(b"z", 7))],
    "is in the log and was never submitted": [A, acknowledged(b"a", 1), look(logged(b"a", 1, key=b"other"))],
    "'a' has two LSNs: 1 and 4": [A, acknowledged(b"a", 1), look(logged(b"a", 4))],
    "'b' was recovered before, and is no longer in the log": [  # nobody had acknowledged it, and somebody has seen it
        A, B, acknowledged(b"a", 1), power(), look(logged(b"a", 1), logged(b"b", 2)), Opened(), power(), look(logged(b"a", 1)),
    ],
    "'b' (LSN 2) was recovered before and is lost": [
        B, power(), look(logged(b"b", 2)), Opened(), power(), Opened(), Drained(),
    ],
    "'n' (LSN 1) was acknowledged and is lost": [  # a power cut might have taken it, and did not
        submitted(b"n", 20 * MS), acknowledged(b"n", 1), power(), look(logged(b"n", 1)), Opened(), Drained(),
    ],
    "looking at the store has changed it": [look(wrote=True)],
    "predicted CorruptionError, and the store was opened": [look(refusal="CorruptionError"), Opened()],
    "predicted no refusal, and opening raised CorruptionError": [look(), Refused(error="CorruptionError")],
    "predicted ('W10',), and opening found ('W9',)": [look(cases=("W10",)), Opened(cases=("W9",))],
    "predicted to go on at LSN 5, and the engine went on at 6": [look(next_lsn=5), Opened(next_lsn=6)],
    "quarantine/ grew by 5000 bytes, where 40 were torn": [
        look(torn_bytes=40, torn_count=1, quarantine_bytes=7), Opened(quarantine_bytes=5007),
    ],
    "'b' was damaged on the disk, and nobody was told": [*ALL, applied(b"a", 1), Damaged(payload=b"b"), Drained()],
    "'c' was damaged on the disk, and nobody was told": [  # what was told stands elsewhere
        *ALL, Damaged(payload=b"c"), Refused(error="CorruptionError", last_lsn=2), Drained(),
    ],
    "a ticket that was resolved 2 times": [A, Resolved(payload=b"a", done=True, applied=False, times=2)],
    "did not tell its listener": [A, Resolved(payload=b"a", done=True, applied=False, times=0)],
    "4 segments are left although everything is settled": [Drained(segments=4)],
    "(LSN 1) is settled by checkpoint 1, and was not applied": [A, checkpointed(1), acknowledged(b"a", 1)],
    "'a' (LSN 1) is settled by checkpoint 1, and was not applied": [A, checkpointed(1), applied(b"a", 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_a_history_that_keeps_the_guarantees_has_no_problems(name: str) -> None:
    assert Oracle().judge(FINE[name]) == []


@pytest.mark.parametrize("expected", WRONG)
def test_each_breach_is_reported_in_words(expected: str) -> None:
    words = expected.partition(": a sync")[0]
    assert any(words in problem for problem in Oracle().judge(WRONG[expected]))


def test_a_second_effect_is_a_breach_only_where_exactly_once_was_promised() -> None:
    events: list[Event] = [A, applied(b"a", 1), applied(b"a", 1)]
    assert Oracle().judge(events) == []
    assert "took effect 2 times" in Oracle(exactly_once={"put"}).judge(events)[0]


def test_order_is_no_breach_where_none_was_promised() -> None:
    events: list[Event] = [A, B, applied(b"b", 2), applied(b"a", 1)]
    assert Oracle(unordered={"put"}).judge(events) == []


def test_the_order_of_a_whole_shard_is_kept_where_it_was_promised() -> None:
    other = submitted(b"b", key=b"other")
    events: list[Event] = [A, other, applied(b"b", 2, key=b"other"), applied(b"a", 1)]
    assert Oracle().judge(events) == []
    assert "of the same shard 0" in Oracle(by_shard={"put"}).judge(events)[0]
    assert Oracle(by_shard={"put"}, shards={"put": 512}).judge(events) == []


@pytest.mark.parametrize("name", [*FINE, *WRONG])
def test_a_fork_judges_as_one_that_has_taken_everything(name: str) -> None:
    events = [*FINE.get(name, ()), *WRONG.get(name, ())]
    expected = Oracle().judge(events)
    for cut in range(len(events) + 1):
        trunk = Oracle()
        for event in events[:cut]:
            trunk.take(event)
        before = list(trunk.problems)
        twin = trunk.fork()
        assert twin.judge(events[cut:]) == expected
        assert trunk.problems == before, "what a fork takes does not touch the trunk"
        assert trunk.fork().judge(events[cut:]) == expected


def test_a_fork_costs_little() -> None:
    oracle = Oracle()
    for number in range(50):
        payload = b"%d" % number
        oracle.judge([submitted(payload), acknowledged(payload, number + 1), applied(payload, number + 1)])
    started = time.perf_counter()
    for _ in range(1_000):
        oracle.fork()
    assert time.perf_counter() - started < 1.0, "a millisecond each would be a hundred times too much"


def test_what_is_not_logged_may_be_taken_after_a_failed_sync() -> None:
    for grace_ns, problems in ((None, 0), (0, 1)):
        history: list[Event] = [
            Opened(), SyncFailed("/store/wal/1.seg"), Submitted(lane="put", key=b"k", payload=b"p", grace_ns=grace_ns),
            Acknowledged(payload=b"p", lsn=None if grace_ns is None else 1, at_ns=0),
        ]  # fmt: skip
        assert len(Oracle().judge(history)) == problems
