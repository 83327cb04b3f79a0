"""What is read back in columns comes to the same shards, in the same way, as what is looked at one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.fakes import StillClock
from tests.runtime.shards import lane_of_shards
from walbatch import limits
from walbatch.runtime.lane import Cursor, Lane
from walbatch.runtime.readback import NOTHING_FED, Fed, ReadBack
from walbatch.types import Mark, Options, Position

HERE, NEXT = Position(1, 64), Position(1, 640)
OTHER = "another lane"
KNOWN = [Mark(), Mark(watermark=99), Mark(watermark=110), Mark(ranges=((90, 120),))]


@dataclass
class Frame:
    """Operations of one lane, which came at once."""

    lsns: Sequence[int]
    keys: Sequence[bytes]
    kinds: Sequence[str] = ("put",)
    kind_indexes: Sequence[int] = ()
    priorities: Sequence[int] = ()
    options: Sequence[Options] = ()
    position: Position = HERE
    next_position: Position = NEXT
    wall_ns: int = 0

    def __post_init__(self) -> None:
        self.kind_indexes = self.kind_indexes or [0] * len(self.lsns)
        self.priorities = self.priorities or [5] * len(self.lsns)
        self.payloads = [b"payload"] * len(self.lsns)

    @property
    def last_lsn(self) -> int:
        return self.lsns[-1]


def frame_of(count: int, *, first_lsn: int = 100, step: int = 1) -> Frame:
    lsns = range(first_lsn, first_lsn + count * step, step)
    return Frame(lsns=lsns if step == 1 else list(lsns), keys=[b"%d" % lsn for lsn in lsns])


def feed(lane: Lane, frame: Frame, *, at_once: bool, end_lsn: int, given_up: set[int] | None = None) -> Fed:
    read_back = ReadBack([lane], given_up=given_up or set(), is_dead=lambda _: False, clock=StillClock())
    return read_back.feed(lane.shards, frame, read_back.deal(frame) if at_once else None, end_lsn=end_lsn)


def state(lane: Lane) -> list[object]:
    return [
        (
            repr(shard.cursor),
            repr(shard.ledger),
            [e[:4] for e in shard.queue._places.line],
            shard.queue.memory_bytes,
        )
        for shard in lane.shards
    ]


@given(
    shards=st.integers(1, 3), count=st.integers(1, 60), step=st.integers(1, 2), room=st.integers(1, 70), passed=st.integers(0, 70),
    frontier=st.integers(0, 160), known=st.sampled_from(KNOWN),
    given_up=st.sets(st.integers(95, 165), max_size=2), is_last=st.booleans(), names=st.sampled_from(["put", OTHER]),
)  # fmt: skip
def test_a_frame_comes_in_at_once_as_it_would_one_by_one(
    *, shards: int, count: int, step: int, room: int, passed: int, frontier: int, known: Mark, given_up: set[int], is_last: bool,
    names: str,
) -> None:  # fmt: skip
    frame = frame_of(count, step=step)
    frame.kinds = (names,)
    lanes = [
        lane_of_shards(shards, memory_bytes_max=room * (limits.OPERATION_OVERHEAD_BYTES + 10), known=known)
        for _ in range(2)
    ]
    found: list[Fed] = []
    for at_once, lane in enumerate(lanes):
        for shard in lane.shards:
            shard.cursor = Cursor(HERE, 95 + passed)
            shard.ledger.frontier = frontier
        end_lsn = frame.last_lsn if is_last else 1_000
        fed = feed(lane, frame, at_once=bool(at_once), end_lsn=end_lsn, given_up=given_up)
        found.append(replace(fed, passed_over=list(fed.passed_over), waiting=list(fed.waiting)))
    assert found[0] == found[1]
    assert state(lanes[0]) == state(lanes[1])


def test_what_is_new_comes_in_without_a_look_at_each_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Fed:
        raise AssertionError("nothing here needs a look")

    monkeypatch.setattr(ReadBack, "_give_each", never)
    lane = lane_of_shards(2)
    for shard in lane.shards:
        shard.cursor = Cursor(HERE, 100)
    assert feed(lane, frame_of(50), at_once=True, end_lsn=149) is NOTHING_FED
    assert sum(shard.queue.ready for shard in lane.shards) == 50
    assert [shard.cursor for shard in lane.shards] == [None, None]


VARIED = {
    "two priorities": Frame(lsns=[1, 2], keys=[b"a", b"b"], priorities=[5, 6]),
    "options": Frame(lsns=[1], keys=[b"a"], options=[Options(origin=3)]),
    "two lanes": Frame(lsns=[1, 2], keys=[b"a", b"b"], kinds=["put", OTHER], kind_indexes=[0, 1]),
}


@pytest.mark.parametrize("frame", VARIED.values(), ids=VARIED.keys())
def test_where_there_is_more_to_say_each_operation_is_looked_at(frame: Frame) -> None:
    lane = lane_of_shards(1)
    read_back = ReadBack([lane], given_up=set(), is_dead=lambda _: False, clock=StillClock())
    assert read_back.deal(frame) is None


def test_a_lane_without_backend_says_what_waits_in_it() -> None:
    lane = lane_of_shards(1)
    lane.held = True
    lane.shards[0].cursor = Cursor(HERE, 100)
    assert feed(lane, frame_of(1), at_once=True, end_lsn=1_000).waiting == [("put", 100)]
