"""tools/backlog.py: a backlog beyond memory arrives once and in order; and what did not would be noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import walbatch as wb
from tools import backlog
from tools.backlog import Counting, Stream

ROOT = Path(__file__).resolve().parent.parent


def test_a_backlog_beyond_memory_arrives_once_and_in_order(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/backlog.py", "--count", "20000", "--memory-mib", "1", "--dir", tmp_path, "--json"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["problems"] == []
    assert figures["drain"]["delivered"] == 20_000
    assert figures["submit"]["flowed"] == 2_000
    assert figures["submit"]["queue_peak_mib"] < 4
    assert figures["drain"]["queue_peak_mib"] < 4
    assert (
        0
        < figures["drain"]["urgent_first_s"]
        <= figures["drain"]["urgent_last_s"]
        <= figures["drain"]["seconds"]
    )
    assert not list(tmp_path.iterdir()), "it cleans up"


def stream(*parts: list[int]) -> Stream:
    found = Stream()
    for lsns in parts:
        found.take(lsns, [b"%032d" % lsn for lsn in lsns])
    return found


def test_how_operations_were_cut_into_batches_makes_no_difference() -> None:
    assert stream([1, 2, 3, 7]) == stream([1], [], [2, 3], [7])


@pytest.mark.parametrize(
    "parts",
    [
        [[1, 2, 3]],
        [[1, 2, 3], [7, 8]],
        [[1, 2, 3, 3], [7]],
        [[1, 2, 3], [3, 7]],
        [[1, 3, 2], [7]],
        [[7], [1, 2, 3]],
        [[1, 2, 4], [7]],
    ],
    ids=["missing", "too many", "twice", "again", "swapped", "late", "another one"],
)
def test_a_stream_that_differs_is_noticed(parts: list[list[int]]) -> None:
    assert backlog.differences("put", [stream([1, 2, 3, 7])], [stream(*parts)])


def test_other_bytes_are_noticed() -> None:
    changed = Stream()
    changed.take([1, 2], [b"%032d" % 1, b"%032d" % 3])
    (problem,) = backlog.differences("put", [stream([1, 2])], [changed])
    assert "not the same" in problem


def batch(lsns: list[int], urgent: set[int]) -> wb.Batch:
    return wb.Batch(
        lane="put", shard=0, store=bytes(16), lsns=lsns, keys=[b"k"] * len(lsns), payloads=[b"%032d" % lsn for lsn in lsns],
        priorities=[9 if lsn in urgent else 5 for lsn in lsns], attempt=1, reason=wb.CutReason.COUNT, mark=None,
    )  # fmt: skip


def test_urgent_operations_are_counted_apart() -> None:
    counting = Counting()
    counting.apply(batch([90, 1, 2], {90}))
    counting.apply(batch([3, 91, 7], {91}))
    counting.apply(batch([91], {91}))
    assert counting.streams[0] == stream([1, 2, 3, 7])
    assert sorted(counting.urgent) == [90, 91]
    assert counting.doubled == 1


GROWTHS: dict[str, tuple[Callable[[int], int], int]] = {
    "as large as its bounds": (lambda bound: bound, 0), "larger": (lambda bound: bound + 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("growth", GROWTHS)
def test_memory_that_grows_with_the_backlog_is_a_problem(growth: str) -> None:
    size, problems = GROWTHS[growth]
    peaks = [100, 100 + size(2 * 64 + backlog.GROWTH_MIB_MAX)]
    figures = {"drain": {"peaks": peaks, "problems": []}}
    assert len(backlog._problems(figures, 64)) == problems
