"""What waits behind something: it goes in order, when its time has come and nothing blocks it."""

from __future__ import annotations

from collections.abc import Iterable

from walbatch.core.entry import Entry
from walbatch.core.holds import Holds
from walbatch.types import NO_OPTIONS


def entry(lsn: int) -> Entry:
    return (lsn, b"k", b"", 5, 0, NO_OPTIONS)


def lsns(entries: Iterable[Entry]) -> list[int]:
    return [e[0] for e in entries]


def holds_of(*rows: tuple[int, int]) -> Holds:
    """A hold of operations with their times."""
    holds = Holds()
    for lsn, until_ns in rows:
        if until_ns:
            holds.wait(lsn, until_ns)
        holds.put(b"k", entry(lsn))
    return holds


def test_it_lets_go_up_to_the_first_whose_time_has_not_come() -> None:
    holds = holds_of((1, 100), (2, 0), (3, 300), (4, 200))
    assert (holds.first(), holds.count, len(holds), b"k" in holds) == (100, 4, 1, True)
    assert holds.release(99) == []
    assert lsns(holds.release(100)) == [1, 2]
    assert holds.first() == 300
    assert lsns(holds.release(300)) == [3, 4]
    assert (holds.first(), holds.count, len(holds)) == (None, 0, 0)


def test_only_what_is_tried_again_can_be_hurried() -> None:
    holds = holds_of((1, 100), (2, 0), (3, 300), (4, 200))
    holds.block(b"other")
    holds.hurry({1, 4}, 50)
    assert holds.first() == 50
    assert lsns(holds.release(50)) == [1, 2]
    assert holds.first() == 300, "the third is delayed, and the fourth waits behind it"
    holds.hurry({3}, 400)
    assert holds.first() == 300, "nothing waits longer for being hurried"


def test_it_lets_nothing_go_while_it_is_blocked() -> None:
    holds = holds_of((1, 100), (2, 0))
    holds.block(b"k")
    holds.block(b"k")
    assert (holds.first(), holds.release(500)) == (None, [])
    assert holds.unblock(b"k") == []
    assert holds.unblock(b"k") == [], "its time is looked at with the next release"
    assert lsns(holds.release(500)) == [1, 2]


def test_a_block_alone_is_a_hold_until_it_is_gone() -> None:
    holds = Holds()
    holds.block(b"k")
    assert b"k" in holds
    holds.put(b"k", entry(2))
    assert holds.first() is None
    assert lsns(holds.unblock(b"k")) == [2]
    assert b"k" not in holds


def test_operations_stand_in_lsn_order_whenever_they_come() -> None:
    holds = holds_of((5, 100), (9, 0))
    holds.wait(1, 50)
    holds.put(b"k", entry(1))
    holds.put(b"k", entry(7))
    assert (holds.eldest(b"k"), holds.eldest(b"x"), holds.first()) == (1, 0, 50)
    assert (holds.stops(b"k", 3), holds.stops(b"k", 0), holds.stops(b"x", 3)) == (True, False, False)
    assert lsns(holds.release(50)) == [1]
    assert lsns(holds.release(100)) == [5, 7, 9]


def test_what_is_withdrawn_is_in_nobodys_way() -> None:
    holds = holds_of((1, 900), (2, 0), (3, 0))
    assert lsns(holds.withdraw({1, 3, 4})) == [1, 3]
    assert (holds.count, holds.waits(1)) == (1, True)
    assert lsns(holds.release(0)) == [2]
    holds.forget(1)
    holds.forget(1)
    assert not holds.waits(1)
    holds = holds_of((1, 900))
    assert lsns(holds.withdraw({1})) == [1]
    assert (len(holds), holds.first()) == (0, None)


def test_a_time_that_was_due_under_a_block_is_not_lost() -> None:
    holds = holds_of((1, 100))
    holds.block(b"k")
    holds.put(b"k", entry(2))
    assert holds.release(100) == []
    holds.unblock(b"k")
    assert lsns(holds.release(100)) == [1, 2]


def test_what_is_delayed_is_told_from_what_is_tried_again() -> None:
    holds = holds_of((1, 100), (2, 0))
    holds.wait(7, 100)
    holds.put(b"x", entry(7))
    assert holds.delayed({7}) == {1, 2}
    assert repr(holds) == "<Holds of 3 operations under 2 names>"
