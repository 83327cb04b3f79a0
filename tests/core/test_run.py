"""Columns of operations: every part of them is the same operations that entries would be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbatch import limits
from walbatch.core.batcher import entry_bytes
from walbatch.core.entry import Entry
from walbatch.core.flight import Flight
from walbatch.core.run import Run, dealt, runs_of
from walbatch.types import NO_OPTIONS, CutReason, Options

SOME = Options(origin=7)


def run_of(
    count: int,
    *,
    first_lsn: int = 10,
    priority: int = 5,
    arrival_ns: int = 3,
    options: Sequence[Options] = (),
) -> Run:
    lsns = range(first_lsn, first_lsn + count)
    return Run(
        lsns,
        [b"%d" % lsn for lsn in lsns],
        [bytes(lsn % 7) for lsn in lsns],
        priority,
        arrival_ns,
        options=options,
    )


def entries_of(run: Run) -> list[Entry]:
    return list(run)


def test_a_run_is_its_operations_one_by_one() -> None:
    assert entries_of(run_of(2)) == [
        (10, b"10", bytes(3), 5, 3, NO_OPTIONS),
        (11, b"11", bytes(4), 5, 3, NO_OPTIONS),
    ]
    assert entries_of(run_of(1, options=[SOME])) == [(10, b"10", bytes(3), 5, 3, SOME)]
    assert repr(run_of(2)) == "<Run of 2 from lsn 10, priority 5>"


@given(
    count=st.integers(1, 40),
    ends=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    has_options=st.booleans(),
)
def test_a_part_is_a_slice_of_the_operations(count: int, ends: tuple[int, int], *, has_options: bool) -> None:
    run = run_of(count, options=[SOME] * count if has_options else ())
    start, stop = min(ends), max(ends)
    part = run.part(start, stop)
    assert entries_of(part) == entries_of(run)[start:stop]
    assert part.bytes == run.size_of(start, stop) == sum(len(e[1]) + len(e[2]) for e in part)


@given(count=st.integers(1, 20), bytes_max=st.integers(0, 200), each=st.sampled_from([0, 5]))
def test_as_many_fit_as_their_bytes_allow(count: int, bytes_max: int, each: int) -> None:
    run = run_of(count)
    fitting = run.count_within(0, count, bytes_max, each)
    sizes = [len(e[1]) + len(e[2]) + each for e in run]
    assert sum(sizes[:fitting]) <= bytes_max
    assert fitting == count or sum(sizes[: fitting + 1]) > bytes_max


@given(
    st.lists(
        st.tuples(st.sampled_from([4, 5]), st.sampled_from([1, 2]), st.sampled_from([NO_OPTIONS, SOME])),
        max_size=20,
    )
)
def test_entries_become_as_few_runs_as_there_are_changes(rows: list[tuple[int, int, Options]]) -> None:
    entries = [
        (lsn, b"k", b"v", priority, arrival, options) for lsn, (priority, arrival, options) in enumerate(rows)
    ]
    runs = list(runs_of(entries))
    assert [entry for run in runs for entry in run] == entries
    changes = sum(row != before for row, before in zip(rows[1:], rows, strict=False))
    assert len(runs) == (1 + changes if rows else 0)
    assert sum(run.bytes for run in runs) == 2 * len(rows)


def test_only_one_that_owns_its_columns_grows() -> None:
    single = Run.of((50, b"k", b"v", 5, 3, NO_OPTIONS))
    assert not run_of(3).takes(single)
    grown = run_of(3).opened()
    assert grown.takes(single)
    grown.join(single)
    assert (grown.lsns, grown.bytes) == ([10, 11, 12, 50], run_of(3).bytes + 2)
    for other in (run_of(1, priority=6), run_of(1, arrival_ns=4), run_of(1, options=[SOME])):
        assert not grown.takes(other)


@given(hands=st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_what_is_dealt_goes_to_one_hand_each_in_its_order(hands: list[int]) -> None:
    run = run_of(len(hands))
    shares = dealt(run, hands, 4)
    assert sorted(shares) == sorted(set(hands))
    for hand, share in shares.items():
        assert entries_of(share) == [entry for entry, to in zip(run, hands, strict=True) if to == hand]
        assert share.bytes == sum(len(e[1]) + len(e[2]) for e in share)


# --- a batch of them ----------------------------------------------------------------------------------------

FLIGHTS = {
    "one run": [run_of(3)],
    "runs one behind the other": [run_of(3), run_of(4, first_lsn=13, arrival_ns=4)],
    "runs with others between them": [run_of(3), run_of(4, first_lsn=20, priority=6)],
    "some with options": [run_of(2), run_of(1, first_lsn=12, options=[SOME])],
    "one with options": [run_of(2, options=[SOME, SOME])],
}


@pytest.mark.parametrize("runs", FLIGHTS.values(), ids=FLIGHTS.keys())
def test_a_batch_of_runs_has_the_columns_of_its_entries(runs: list[Run]) -> None:
    entries = [entry for run in runs for entry in run]
    size = sum(map(entry_bytes, entries))
    as_runs = Flight(1, CutReason.COUNT, runs=runs, bytes=size)
    one_by_one = Flight(1, CutReason.COUNT, entries=entries, bytes=size)
    assert [list(column) for column in as_runs.columns()] == [list(column) for column in one_by_one.columns()]
    assert as_runs.entries == list(as_runs) == entries
    assert list(as_runs.lsns) == list(one_by_one.lsns)
    assert len(as_runs) == len(one_by_one) == len(entries)
    assert as_runs.size == one_by_one.size == size - len(entries) * limits.OPERATION_OVERHEAD_BYTES
    for flight in (as_runs, one_by_one):
        assert sum(time * count for time, count in flight.arrivals_ns) == sum(entry[4] for entry in entries)
        assert sum(count for _, count in flight.arrivals_ns) == len(entries)
        assert not flight.is_part


def test_what_a_backend_gets_of_columns_that_others_hold_cannot_be_changed() -> None:
    run = run_of(3)
    columns = Flight(1, CutReason.COUNT, runs=[run]).columns()
    assert all(isinstance(column, tuple) for column in columns[1:])


def test_its_state_shows() -> None:
    assert (
        repr(Flight(3, CutReason.COUNT, runs=[run_of(2)], tries=1))
        == "<Flight 3 of 2, cut by count, 1 tries>"
    )
