"""A shard takes in at once what it would have taken in one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.shards import shard_of_one
from walbatch import limits
from walbatch.core.batcher import Entry
from walbatch.runtime.lane import Shard
from walbatch.types import NO_OPTIONS, Options, Order

NOW_NS, WALL_NS = 1_000, 50_000
DELAYED = Options(not_before_ns=WALL_NS + 100)
MORTAL = Options(deadline_ns=WALL_NS + 200)


def entry(lsn: int, key: bytes = b"k", *, priority: int = 5, options: Options = NO_OPTIONS) -> Entry:
    return (lsn, key, b"payload", priority, NOW_NS, options)


def delivered(shard: Shard, now_ns: int) -> list[list[int]]:
    """The batches of a drain at that time, without what has missed its deadline."""
    queue, batches = shard.queue, []
    queue.release(now_ns)
    queue.drop([e[0] for e in queue.expire(now_ns)])
    situation = shard.situation(now_ns, draining=True, memory_pressed=False, probing=False)
    while (reason := queue.due(situation)) is not None:
        flight = queue.cut(situation, reason)
        batches.append([e[0] for e in queue.finish(flight.number)])
    return batches


@given(
    order=st.sampled_from(Order),
    earlier=st.integers(0, 2),
    rows=st.lists(
        st.tuples(
            st.sampled_from([b"a", b"b"]), st.sampled_from([5, 5, 5, 5, 2, 9]),
            st.sampled_from([NO_OPTIONS, NO_OPTIONS, NO_OPTIONS, Options(origin=7), DELAYED, MORTAL]),
        ),
        max_size=12,
    ),
    room=st.integers(0, 10),
)  # fmt: skip
def test_many_operations_come_in_as_if_one_by_one(
    order: Order, earlier: int, rows: list[tuple[bytes, int, Options]], room: int
) -> None:
    entries = [
        entry(10 + i, key, priority=priority, options=options)
        for i, (key, priority, options) in enumerate(rows)
    ]
    bytes_max = room * (limits.OPERATION_OVERHEAD_BYTES + 8) + 1
    at_once, one_by_one = (shard_of_one(order=order, memory_bytes_max=bytes_max) for _ in range(2))
    for shard in (at_once, one_by_one):
        for lsn in range(1, earlier + 1):
            shard.take_in(entry(lsn), now_ns=NOW_NS, wall_ns=WALL_NS)
    taken = at_once.take_in_many(entries, now_ns=NOW_NS, wall_ns=WALL_NS)
    for expected in entries:
        if not one_by_one.has_room:
            break
        one_by_one.take_in(expected, now_ns=NOW_NS, wall_ns=WALL_NS)
    assert len(at_once.queue) == len(one_by_one.queue) == earlier + taken
    assert at_once.queue.memory_bytes == one_by_one.queue.memory_bytes
    assert repr(at_once.ledger) == repr(one_by_one.ledger)
    for now_ns in (NOW_NS, NOW_NS + 100, NOW_NS + 200):
        assert delivered(at_once, now_ns) == delivered(one_by_one, now_ns)
    assert len(at_once.queue) == 0


def test_operations_fetched_ahead_have_their_times_on_the_monotonic_clock() -> None:
    shard = shard_of_one()
    shard.take_in(entry(1), now_ns=NOW_NS, wall_ns=WALL_NS)
    shard.take_in_ahead(
        [entry(900, b"x", priority=9, options=DELAYED), entry(901, b"y", priority=9, options=MORTAL), entry(902, b"z", priority=9)],
        now_ns=NOW_NS, wall_ns=WALL_NS,
    )  # fmt: skip
    assert [shard.ledger.is_ahead(lsn) for lsn in (1, 900, 901, 902)] == [False, True, True, True]
    assert shard.queue.delayed_lsns == {900}
    assert delivered(shard, NOW_NS + 99) == [[901, 902, 1]]
    assert delivered(shard, NOW_NS + 100) == [[900]]
