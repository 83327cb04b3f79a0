"""The search for urgent operations brings them forward as they are: with their elders, their delays and their deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.runtime.fakes import StillClock
from tests.runtime.shards import lane_of_one
from walbatch.runtime import express as module
from walbatch.runtime.express import Express
from walbatch.runtime.lane import Cursor, Lane
from walbatch.runtime.readback import ReadBack
from walbatch.types import NO_OPTIONS, Options, Order, Position

FIRST, END = Position(1, 64), Position(1, 640)


@dataclass
class Frame:
    """One frame that holds a whole backlog."""

    lsns: Sequence[int]
    keys: Sequence[bytes]
    priorities: Sequence[int]
    options: Sequence[Options]
    position: Position = FIRST
    next_position: Position = END
    wall_ns: int = 0
    kinds: Sequence[str] = ("put",)

    @property
    def last_lsn(self) -> int:
        return self.lsns[-1]

    @property
    def kind_indexes(self) -> Sequence[int]:
        return [0] * len(self.lsns)

    @property
    def payloads(self) -> Sequence[bytes]:
        return [b"payload"] * len(self.lsns)


BACKLOG = (
    (10, b"vip", 5, Options(deadline_ns=900)),
    (11, b"other", 5, NO_OPTIONS),
    (12, b"vip", 9, Options(deadline_ns=500)),
    (13, b"late", 9, Options(not_before_ns=300)),
    (14, b"vip", 5, NO_OPTIONS),
    (15, b"now", 9, NO_OPTIONS),
)


def search(lane: Lane, clock: StillClock, *rows: tuple[int, bytes, int, Options]) -> ReadBack:
    """One search in a backlog that nobody has read, to its end."""
    read_back = ReadBack([lane], given_up=set(), is_dead=lambda _: False, clock=clock)
    express = Express([lane], read_back=read_back, clock=clock)
    lsns, keys, priorities, options = zip(*rows, strict=True)
    frame = Frame(lsns=lsns, keys=keys, priorities=priorities, options=options)
    lane.shards[0].cursor = Cursor(FIRST, 0)
    while (wish := express.step(BACKLOG[-1][0])) is not None:
        position, _, kinds, _ = wish
        assert kinds == {"put"}
        express.take(frame if position == FIRST else None)
    return read_back


def ahead(lane: Lane) -> list[int]:
    """What was brought forward and not read in its turn."""
    return [lsn for lsn, *_ in BACKLOG if lane.shards[0].ledger.is_ahead(lsn)]


@pytest.mark.parametrize(("order", "found"), [(Order.KEY, [10, 12, 13, 15]), (Order.NONE, [12, 13, 15])],
                         ids=["with elders", "without order"])  # fmt: skip
def test_what_is_urgent_comes_forward_with_its_times(order: Order, found: list[int]) -> None:
    lane, clock = lane_of_one(order=order), StillClock()
    start = clock.monotonic_ns()
    search(lane, clock, *BACKLOG)
    queue = lane.shards[0].queue
    assert ahead(lane) == found
    assert queue.delayed_lsns == {13}
    assert [e[0] for e in queue.expire(start + 499)] == []
    assert [e[0] for e in queue.expire(start + 500)] == [12]
    queue.drop([12])
    assert [e[0] for e in queue.expire(start + 900)] == [lsn for lsn in found if lsn == 10]


def test_a_key_with_too_many_elders_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COUNT_MAX", 3)
    lane = lane_of_one()
    search(lane, StillClock(), *BACKLOG)
    assert ahead(lane) == [13, 15], "the elder of the vip did not fit"


def test_what_was_brought_forward_is_not_read_again_in_its_turn() -> None:
    lane, clock = lane_of_one(), StillClock()
    read_back = search(lane, clock, *BACKLOG)
    lsns, keys, priorities, options = zip(*BACKLOG, strict=True)
    read_back.feed(
        lane.shards,
        Frame(lsns=lsns, keys=keys, priorities=priorities, options=options),
        end_lsn=BACKLOG[-1][0],
    )
    queue = lane.shards[0].queue
    assert len(queue) == len(BACKLOG)
    assert ahead(lane) == []
    situation = lane.shards[0].situation(
        clock.monotonic_ns(), draining=True, memory_pressed=False, probing=False
    )
    reason = queue.due(situation)
    assert reason is not None
    applied = [e[0] for e in queue.cut(situation, reason).entries]
    assert sorted(applied) == [10, 11, 12, 14, 15], "the other one is delayed"
    assert [lsn for lsn in applied if lsn in {10, 12, 14}] == [10, 12, 14]
    assert applied.index(12) < applied.index(11)
