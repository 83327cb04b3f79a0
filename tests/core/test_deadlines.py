"""Deadlines: each is due once, and again where its operation could not be taken out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.deadlines import Deadlines


def test_a_deadline_is_due_once_when_it_has_passed() -> None:
    deadlines = Deadlines()
    assert not deadlines
    for lsn, deadline_ns in ((1, 300), (2, 100), (3, 200)):
        deadlines.set(lsn, deadline_ns)
    assert (len(deadlines), deadlines.first()) == (3, 100)
    assert deadlines.due(99) == []
    assert deadlines.due(200) == [2, 3]
    assert deadlines.due(200) == []
    assert (len(deadlines), deadlines.first()) == (1, 300)


def test_what_could_not_be_taken_out_is_looked_at_again_when_it_can() -> None:
    deadlines = Deadlines()
    deadlines.set(1, 100)
    deadlines.missed(deadlines.due(100))
    assert (len(deadlines), deadlines.first(), deadlines.due(500)) == (1, None, [])
    assert repr(deadlines) == "<Deadlines of 0 operations, 1 more were missed>"
    deadlines.look_again(1)
    assert deadlines.due(0) == [1]
    assert not deadlines


def test_what_was_not_missed_is_not_looked_at_before_its_time() -> None:
    deadlines = Deadlines()
    deadlines.set(1, 100)
    deadlines.look_again(1)
    deadlines.look_again(2)
    assert (deadlines.due(99), len(deadlines)) == ([], 1)


def test_what_is_settled_has_no_deadline() -> None:
    deadlines = Deadlines()
    for lsn in (1, 2):
        deadlines.set(lsn, 100)
    deadlines.missed(deadlines.due(100))
    deadlines.set(3, 200)
    deadlines.forget([1, 3, 9])
    assert (len(deadlines), deadlines.first()) == (1, None)
    deadlines.look_again(1)
    assert deadlines.due(0) == []


@given(st.lists(st.tuples(st.sampled_from("soft"), st.integers(1, 5), st.integers(0, 20)), max_size=60))
def test_no_deadline_is_forgotten_or_told_twice(events: list[tuple[str, int, int]]) -> None:
    deadlines = Deadlines()
    running: dict[int, int] = {}
    missed: set[int] = set()
    for what, lsn, time_ns in events:
        match what:
            case "s" if lsn not in missed:
                deadlines.set(lsn, time_ns)
                running[lsn] = time_ns
            case "o":
                deadlines.look_again(lsn)
                if lsn in missed:
                    missed.remove(lsn)
                    running[lsn] = 0
            case "f":
                deadlines.forget([lsn])
                running.pop(lsn, None)
                missed.discard(lsn)
            case _:
                due = deadlines.due(time_ns)
                assert sorted(due) == sorted(lsn for lsn, at_ns in running.items() if at_ns <= time_ns)
                missed |= set(due)
                running = {lsn: at_ns for lsn, at_ns in running.items() if lsn not in due}
                deadlines.missed(due)
        assert len(deadlines) == len(running) + len(missed)
        assert deadlines.first() == min(running.values(), default=None)
