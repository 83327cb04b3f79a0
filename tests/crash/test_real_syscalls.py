"""System calls that fail inside a real process."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.modes import syscalls
from tools.modes.syscalls import Bench, Kind, Strike
from tools.modes.tally import Job, Tally


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    tally = Tally(mode=syscalls.MODE)
    with syscalls.bench_of(tmp_path_factory.mktemp("shim"), tally) as found:
        if found is None:
            pytest.skip(tally.skipped)
        found.prepare()
        yield found


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.WRITE, Kind.FDATASYNC, Kind.FSYNC, Kind.RENAME], ids=str)
def test_a_failing_call_loses_nothing(bench: Bench, kind: Kind, forever: bool) -> None:
    strike = Strike(begin="new", kind=kind, error=errno.EIO, number=2, forever=forever)
    assert bench.run(strike) == []
    assert bench.control.hits >= 1


def test_calls_below_the_folder_are_counted_in_every_library(bench: Bench) -> None:
    strike = Strike(begin="killed", kind=Kind.WRITE, error=errno.EIO, number=1_000_000, forever=False)
    assert bench.run(strike) == []
    counts = dict(zip(Kind, bench.control.counts, strict=True))
    # `MKDIR` and `ALLOCATE` are Python's, `FDATASYNC` is Python's and LMDB's, and `LOCK` is flock(2) and LMDB's fcntl(2).
    assert min(counts[kind] for kind in Kind if kind is not Kind.UNLINK) > 0
    assert bench.control.hits == 0


def test_every_kind_of_call_is_failed_with_every_errno_that_it_may_have() -> None:
    counts = {"new": [2] * len(Kind)}
    strikes = syscalls.strikes_of(counts, seed=1)
    cells = {strike.cell for strike in strikes}
    assert {strike.cell for strike in strikes[: len(cells)]} == cells, "the first ones visit each cell"
    assert {strike.kind for strike in strikes} == set(Kind)
    assert not any(strike.forever and strike.error == errno.EINTR for strike in strikes)
    assert len(set(strikes)) == len(strikes)


def test_a_run_is_told_in_a_line_that_does_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if syscalls.compiler() is None:
        pytest.skip("There is no C compiler, which the failing calls take.")
    monkeypatch.setattr(syscalls, "REPLAYS", 1)
    strike = Strike(begin="new", kind=Kind.ALLOCATE, error=errno.ENOSPC, number=1, forever=False)
    assert syscalls.replay(f"{syscalls.MODE} {strike.words()}", tmp_path) == []


def test_parts_share_the_strikes(tmp_path: Path) -> None:
    tally = syscalls.run(Job(seed=1, count=4, part=1, parts=50, scratch=tmp_path), lambda _: None)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.figures["runs"] == 4
    assert not tally.failures, tally.failures[0]
