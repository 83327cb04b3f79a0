"""Files as the backend of a whole engine: killed again and again, on a full disk, and with rows that are refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.backends.test_files import bytes_of, rows_of, shown
from tests.support import wait_until
from walbatch.backends.files.jsonlines import JsonLinesBackend

KILLS = 8
SHARDS = 3
WORKER = """
import sys
import walbatch as wb

path, seed, consumes = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
lane = wb.Lane(wb.JsonLinesBackend(f"{path}/out"), shards=3, trigger=wb.Trigger(count=7, linger_ms=1))
with wb.Engine.open(f"{path}/store", {"put": lane}) as engine:
    print("open", flush=True)
    number = 0
    while True:
        lsns = engine.submit_many("put", [(b"%d" % (number + i), b"life %d" % seed) for i in range(5)])
        number += 5
        print(lsns[0], lsns[-1], flush=True)
"""


def lives(path: Path, *, consumes: bool) -> tuple[set[int], Counter[int]]:
    """Acknowledged LSNs of processes that were killed, and LSNs that a reader has moved away meanwhile."""
    chance = random.Random(3)
    acknowledged: set[int] = set()
    consumed: Counter[int] = Counter()
    for seed in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(seed), str(consumes)],
            stdout=subprocess.PIPE,
            text=True,
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "open\n"
            for _ in range(chance.randrange(1, 60)):
                first, last = map(int, worker.stdout.readline().split())
                acknowledged.update(range(first, last + 1))
                if consumes:
                    consumed += take_away(path)
            worker.send_signal(signal.SIGKILL)
            rest = [line.split() for line in worker.stdout]
            for numbers in rest:
                if len(numbers) == 2:
                    acknowledged.update(range(int(numbers[0]), int(numbers[1]) + 1))
    return acknowledged, consumed


def take_away(path: Path) -> Counter[int]:
    """Read what is there, and move it away: each file is whole."""
    taken: Counter[int] = Counter()
    for file in shown(path / "out"):
        taken.update(row["lsn"] for row in rows_of(file))
        file.rename(path / "taken" / file.name)
    return taken


@pytest.mark.parametrize("consumes", [False, True], ids=["kept", "consumed"])
def test_an_engine_that_is_killed_leaves_each_operation_in_exactly_one_file(
    tmp_path: Path, *, consumes: bool
) -> None:
    (tmp_path / "taken").mkdir()
    acknowledged, consumed = lives(tmp_path, consumes=consumes)
    lane = wb.Lane(JsonLinesBackend(tmp_path / "out"), shards=SHARDS)
    with wb.Engine.open(tmp_path / "store", {"put": lane}) as engine:
        engine.flush(timeout=60)
        assert engine.dead_letters() == []
    found = consumed + Counter(row["lsn"] for file in shown(tmp_path / "out") for row in rows_of(file))
    assert acknowledged <= set(found), "lost"
    assert set(found.values()) == {1}, "written twice"
    assert len(acknowledged) > 5 * KILLS
    assert len(list((tmp_path / "out").glob(".*.tmp"))) == SHARDS, (
        "one staged file for each shard, and no other is left"
    )
    print(f"{len(found):,} operations over {KILLS} kills")


def test_what_cannot_be_written_becomes_a_dead_letter_and_the_rest_is_written(tmp_path: Path) -> None:
    lane = wb.Lane(JsonLinesBackend(tmp_path / "out", line="json"))
    with wb.Engine.open(tmp_path / "store", {"put": lane}) as engine:
        engine.submit_many("put", [(b"%d" % n, b"no" if n == 13 else b"%d" % n) for n in range(40)])
        engine.flush(timeout=30)
        (letter,) = engine.dead_letters()
        assert letter.key == b"13"
        assert "no JSON" in letter.error
    rows = [row for file in shown(tmp_path / "out") for row in rows_of(file)]
    assert [row["payload"] for row in rows] == [n for n in range(40) if n != 13]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_shows_nothing_half_and_all_of_it_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    retry = wb.RetryPolicy(base_s=0.005, ceiling_s=0.05, breaker_s=0.02, breaker_s_max=0.05)
    lane = wb.Lane(JsonLinesBackend(small_disk / "out"), shards=2, trigger=wb.Trigger(count=20), retry=retry)
    count = 300
    with wb.Engine.open(tmp_path / "store", {"put": lane}) as engine:
        engine.submit_many("put", [(b"%d" % n, os.urandom(800)) for n in range(count)])
        wait_until(
            lambda: "No space" in (engine.stats().lanes["put"].last_error or ""), what="the disk is full"
        )
        taken: Counter[int] = Counter()
        while sum(taken.values()) < count:
            files = shown(small_disk / "out")
            for file in files:
                rows = rows_of(file)  # a file that is not whole fails here
                assert all(len(bytes_of(row, "payload")) == 800 for row in rows)
                taken.update(row["lsn"] for row in rows)
                file.unlink()
            if not files:
                wait_until(lambda: bool(shown(small_disk / "out")), what="another file")
        engine.flush(timeout=30)
        assert engine.dead_letters() == []
    assert set(taken.values()) == {1}
    assert len(taken) == count
    assert shown(small_disk / "out") == []
