"""What is ready: priorities get their shares, nobody starves, and keys keep their order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch.core.entry import Entry
from walbatch.core.fairness import LOW_SHARE, Line, Lines
from walbatch.core.run import Run
from walbatch.types import NO_OPTIONS, PRIORITY_URGENT


def entry(lsn: int, priority: int = 5, key: bytes = b"") -> Entry:
    return (lsn, key or b"%d" % lsn, b"", priority, lsn, NO_OPTIONS)


def lsns(entries: Iterable[Entry]) -> list[int]:
    return [e[0] for e in entries]


def backlog(priorities: Iterable[int], count: int) -> Lines:
    """So many operations of each priority, in turn."""
    chosen = list(priorities)
    return Lines((entry(i + 1, chosen[i % len(chosen)]) for i in range(count * len(chosen))), keyed=True)


def taken(lines: Lines, count: int, *, batch: int = 1) -> list[int]:
    """The priorities of the next operations, in batches."""
    found: list[int] = []
    while len(found) < count:
        found += [e[3] for e in lines.take(batch, 10**9)[0]]
    return found[:count]


# --- shares -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_each_step_of_priority_doubles_the_share(batch: int) -> None:
    shares = Counter(taken(backlog([5, 6, 7], 1_000), 700, batch=batch))
    assert shares == {5: 100, 6: 200, 7: 400}


def test_a_low_priority_keeps_a_tenth() -> None:
    shares = Counter(taken(backlog([0, 7], 1_000), 1_000))
    assert shares == {0: 100, 7: 900}


def test_urgent_ones_go_before_all_others_but_for_the_tenth() -> None:
    found = taken(backlog([2, 7, 8, 10], 1_000), 1_000)
    shares = Counter(found)
    assert shares[8] + shares[10] == 900
    assert shares[8] == 180, "among urgent ones, too, each step doubles the share"
    assert shares[2] == shares[7] == 50, "the tenth goes by age"


@given(
    priorities=st.lists(st.integers(0, 10), min_size=2, max_size=6, unique=True),
    batch=st.integers(1, 30),
    arrivals=st.lists(st.integers(0, 3), min_size=150, max_size=150),
)
def test_whoever_waits_below_gets_a_tenth_and_nobody_starves(
    priorities: list[int], batch: int, arrivals: list[int]
) -> None:
    """Whatever arrives above: in any ten operations while one waits, one is of a lower priority, and the oldest goes first."""
    lines, lsn, run = Lines((), keyed=False), 0, 0
    for arriving in arrivals:
        for _ in range(arriving):
            lsn += 1
            lines.add(entry(lsn, priorities[lsn * 7 % len(priorities)]))
        for _ in range(min(batch, len(lines))):
            waiting = list(lines)
            top = max(e[3] for e in waiting)
            bar = min(top, PRIORITY_URGENT)
            lower = [e for e in waiting if e[3] < bar]
            (chosen,) = lines.take(1, 10**9)[0]
            if chosen[3] >= bar and lower:
                run += 1
                assert run < LOW_SHARE
            elif lower:
                if run == LOW_SHARE - 1:
                    assert chosen[0] == min(lsns(lower))
                run = 0
            else:
                run = 0 if len({e[3] for e in waiting}) == 1 else min(run + 1, LOW_SHARE - 1)


def test_a_priority_that_had_nothing_has_no_credit_from_that_time() -> None:
    lines = Lines((entry(i, 7) for i in range(1, 1_001)), keyed=True)
    lines.add(entry(5_000, 2))
    taken(lines, 500)
    for lsn in range(2_000, 2_100):
        lines.add(entry(lsn, 6))
    assert Counter(taken(lines, 30))[6] <= 11


def test_where_none_is_lower_a_long_run_changes_nothing() -> None:
    """Of urgent ones alone, all are above the bar: each step of priority doubles the share, however long it goes on."""
    lines = backlog([5, 8, 9], 100)
    taken(lines, 9)
    for lsn in [e[0] for e in lines if e[3] == 5]:
        lines.withdraw([lsn])
    shares = Counter(taken(lines, 90))
    assert (shares[8], shares[9]) == (30, 60)


@pytest.mark.parametrize("keyed", [True, False])
def test_what_comes_at_once_is_taken_as_if_it_had_come_one_by_one(keyed: bool) -> None:
    runs = [
        run_of(1, 70, 5),
        run_of(71, 30, 9),
        run_of(101, 40, 2),
        run_of(141, 3, 5),
        run_of(60_000, 2, 5),
        run_of(150, 2, 5),
    ]
    at_once, one_by_one = Lines((), keyed=keyed), Lines((), keyed=keyed)
    for run in runs:
        at_once.extend(run)
        for e in run:
            one_by_one.add(e)
    assert (len(at_once), at_once.bytes, at_once.urgent) == (
        len(one_by_one),
        one_by_one.bytes,
        one_by_one.urgent,
    )
    assert lsns(at_once.withdraw([150])) == lsns(one_by_one.withdraw([150])) == [150], (
        "it stands behind what is younger"
    )
    assert at_once.take(200, 10**9) == one_by_one.take(200, 10**9)


# --- columns ------------------------------------------------------------------------------------------------


def run_of(first_lsn: int, count: int, priority: int = 5) -> Run:
    found = range(first_lsn, first_lsn + count)
    return Run(
        found, [b"%d" % (lsn % 9) for lsn in found], [bytes(lsn % 5) for lsn in found], priority, first_lsn
    )


@given(
    counts=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    takes=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 300)), min_size=1, max_size=12),
    gone=st.sets(st.integers(1, 600), max_size=5),
)  # fmt: skip
def test_a_line_gives_what_came_in_order_within_the_bounds(
    counts: list[int], takes: list[tuple[int, int]], gone: set[int]
) -> None:
    line, first_lsn, left = Line(), 1, list[Entry]()
    for count in counts:
        line.extend(run_of(first_lsn, count))
        left += run_of(first_lsn, count)
        first_lsn += count
    for count, bytes_max in takes:
        runs, size = line.take(count, bytes_max)
        found = [e for run in runs for e in run]
        assert found == left[: len(found)]
        assert size == sum(len(e[1]) + len(e[2]) for e in found) == sum(run.bytes for run in runs)
        assert size <= bytes_max or len(found) == 1
        del left[: len(found)]
        if left and len(found) < count:
            assert size + len(left[0][1]) + len(left[0][2]) > bytes_max, "there was room for one more"
        assert lsns(line.withdraw(gone)) == [e[0] for e in left if e[0] in gone]
        left = [e for e in left if e[0] not in gone]
        assert list(line) == left
        assert (len(line), line.bytes) == (len(left), sum(len(e[1]) + len(e[2]) for e in left))
        assert (line.lowest_lsn(), line.oldest_ns()) == ((left[0][0], left[0][4]) if left else (0, 0))
        if not left:
            return


def test_what_was_taken_of_a_long_run_does_not_stay_in_memory() -> None:
    line = Line()
    line.extend(run_of(1, 1_000))
    for _ in range(999):
        line.take(1, 10**6)
        assert sum(map(len, line._runs)) <= max(2 * len(line), 1)


def test_what_comes_back_joins_what_it_stands_next_to() -> None:
    """A batch that comes back one by one must not cost a run for each operation."""
    line = Line()
    line.extend(run_of(500, 100))
    for lsn in range(1, 100):
        line.add_back((lsn, b"k", b"", 5, 7, NO_OPTIONS))
    line.add_back((550_000, b"k", b"", 5, 7, NO_OPTIONS))
    assert len(line._runs) == 3
    assert lsns(line) == [*range(1, 100), *range(500, 600), 550_000]


# --- keys ---------------------------------------------------------------------------------------------------


def test_a_higher_priority_pulls_its_elders_forward() -> None:
    lines = Lines(
        [entry(1, 5, b"a"), entry(2, 2, b"b"), entry(3, 5, b"b"), entry(4, 9, b"b"), entry(5, 9, b"c")],
        keyed=True,
    )
    assert lsns(lines.take(9, 10**9)[0]) == [2, 3, 4, 5, 1]


def test_without_order_nobody_is_pulled() -> None:
    lines = Lines([entry(1, 2, b"a"), entry(2, 9, b"a")], keyed=False)
    assert lsns(lines.take(9, 10**9)[0]) == [2, 1]


@given(
    rows=st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 10)), max_size=60),
    counts=st.lists(st.integers(1, 9), min_size=1),
)
def test_a_key_keeps_its_order_whatever_the_priorities(
    rows: list[tuple[bytes, int]], counts: list[int]
) -> None:
    lines = Lines((), keyed=True)
    pushed, found = 0, []
    while pushed < len(rows) or len(lines):
        for count in counts:
            for key, priority in rows[pushed : pushed + count]:
                pushed += 1
                lines.add(entry(pushed, priority, key))
            found += lines.take(count, 10**9)[0]
    for key in (b"a", b"b", b"c"):
        mine = [e[0] for e in found if e[1] == key]
        assert mine == sorted(mine)
    assert sorted(lsns(found)) == list(range(1, len(rows) + 1))


# --- taking out and putting back ----------------------------------------------------------------------------


def both(entries: list[Entry]) -> list[Line | Lines]:
    line = Line()
    for e in entries:
        line.add(e)
    return [line, Lines(entries, keyed=True), Lines(entries, keyed=False)]


def all_of(lines: Line | Lines) -> list[int]:
    if isinstance(lines, Lines):
        return lsns(lines.take(10**6, 10**9)[0])
    return lsns(e for run in lines.take(10**6, 10**9)[0] for e in run)


def test_some_or_many_are_withdrawn_and_come_back_where_they_were() -> None:
    entries = [entry(lsn) for lsn in range(1, 2_001)]
    for wanted in ([700], [3, 900, 5_000], list(range(500, 1_500)), [], [5_000]):
        for lines in both(entries):
            found = lines.withdraw(wanted)
            assert lsns(found) == [lsn for lsn in wanted if lsn <= 2_000]
            assert (len(lines), lines.bytes) == (
                2_000 - len(found),
                sum(len(e[1]) for e in entries) - sum(len(e[1]) for e in found),
            )
            assert lines.withdraw(wanted) == []
            for e in found:
                lines.add_back(e)
            assert all_of(lines) == list(range(1, 2_001))
            assert (len(lines), lines.bytes, lines.urgent, lines.oldest_ns(), lines.lowest_lsn()) == (
                0,
                0,
                0,
                0,
                0,
            )


def test_an_operation_is_inserted_where_its_lsn_belongs() -> None:
    for lines in both([entry(5, 9), entry(9, 9)]):
        for lsn in (7, 1, 11):
            lines.add_back(entry(lsn, 9))
        assert (len(lines), lines.urgent, lines.oldest_ns(), lines.lowest_lsn()) == (5, 5, 1, 1)
        assert lsns(lines) == [1, 5, 7, 9, 11]
        assert all_of(lines) == [1, 5, 7, 9, 11]


def test_the_younger_operations_of_several_keys_are_withdrawn_from_columns() -> None:
    line = Line()
    for first_lsn in (1, 101, 301):
        line.extend(run_of(first_lsn, 90))
    line.take(5, 10**6)
    before = list(line)
    found = line.withdraw_keys({b"1": 20, b"2": 0, b"none": 0})
    assert found == [e for e in before if e[1] == b"2" or (e[1] == b"1" and e[0] > 20)]
    left = [e for e in before if e not in found]
    assert list(line) == left
    assert (len(line), line.bytes) == (len(left), sum(len(e[1]) + len(e[2]) for e in left))
    assert line.withdraw_keys({b"none": 0}) == []


def test_a_line_out_of_order_is_searched_as_a_whole() -> None:
    """What was fetched ahead stands before what is older."""
    lines = Lines([entry(lsn) for lsn in [900, *range(1, 500)]], keyed=True)
    assert lsns(lines.withdraw([1])) == [1]
    assert lsns(lines.withdraw([900])) == [900]


def test_the_younger_operations_of_a_key_are_withdrawn_in_order() -> None:
    lines = Lines([entry(lsn, 5 + lsn % 3, b"ab"[lsn % 2 : lsn % 2 + 1]) for lsn in range(1, 11)], keyed=True)
    assert lsns(lines.withdraw_key(b"a", 4)) == [6, 8, 10]
    assert lines.withdraw_key(b"a", 4) == []
    assert lines.withdraw_key(b"x", 0) == []
    assert sorted(all_of(lines)) == [1, 2, 3, 4, 5, 7, 9]


def test_what_was_taken_from_the_middle_does_not_stay_in_memory() -> None:
    lines = Lines((entry(lsn, 5, b"%d" % (lsn % 500)) for lsn in range(1, 1_001)), keyed=True)
    lines.withdraw(range(2, 1_001))
    assert sum(map(len, lines._lines.values())) < 200
    assert all_of(lines) == [1]
    assert lines._gone == set()


def test_its_state_shows() -> None:
    line, lines, _ = both([entry(1, 9), entry(2, 9)])
    assert repr(line) == "<Line of 2, 2 urgent>"
    assert repr(lines) == "<Lines of 2, 2 urgent, priorities [9]>"
