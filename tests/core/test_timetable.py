"""Names with a time each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.timetable import Timetable


def test_names_come_out_when_their_time_has_come_earliest_first() -> None:
    times: Timetable[str] = Timetable()
    for name, time_ns in (("c", 30), ("a", 10), ("b", 20)):
        times.set(name, time_ns)
    assert (times.first(), len(times), "a" in times, set(times)) == (10, 3, True, {"a", "b", "c"})
    assert (times.get("b"), times.get("x")) == (20, None)
    assert times.due(9) == []
    assert times.due(20) == ["a", "b"]
    assert (times.first(), "a" in times) == (30, False)
    assert repr(times) == "<Timetable of 1, first 30>"


def test_the_last_time_that_was_set_holds() -> None:
    times: Timetable[str] = Timetable()
    times.set("a", 10)
    times.set("a", 20)
    assert times.first() == 20
    assert times.due(19) == []
    assert times.due(20) == ["a"]
    assert times.first() is None


def test_a_name_that_was_discarded_does_not_come() -> None:
    times: Timetable[str] = Timetable()
    times.set("a", 10)
    times.discard("a")
    times.discard("b")
    assert (times.due(10), times.first(), len(times)) == ([], None, 0)


def test_its_memory_does_not_grow_with_what_was_discarded() -> None:
    times: Timetable[int] = Timetable()
    for name in range(10_000):
        times.set(name, 10**9)
        times.discard(name)
    assert len(times._heap) < 200


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 20))) | st.integers(0, 25),
        max_size=150,
    )
)
def test_it_is_a_dictionary_with_a_clock(events: list[tuple[str, int | None] | int]) -> None:
    times: Timetable[str] = Timetable()
    expected: dict[str, int] = {}
    for event in events:
        if isinstance(event, int):
            late = {name for name, time_ns in expected.items() if time_ns <= event}
            assert set(times.due(event)) == late
            expected = {name: time_ns for name, time_ns in expected.items() if name not in late}
        elif event[1] is None:
            times.discard(event[0])
            expected.pop(event[0], None)
        else:
            times.set(event[0], event[1])
            expected[event[0]] = event[1]
        assert (len(times), times.first()) == (len(expected), min(expected.values(), default=None))
