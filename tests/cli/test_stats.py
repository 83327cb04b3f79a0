"""`walbatch stats`: the figures of a store that nobody has open, and of one that an engine is at work in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import walbatch as wb
from tests.cli.program import assert_one_line, walbatch
from tests.fates import make_fates
from tests.storage.states import plant, tamper
from tests.stores import TINY, flip, make_store, picture
from tests.support import FAST
from walbatch import limits
from walbatch.core.controller import LatencyAimd
from walbatch.core.history import HISTORY, History
from walbatch.storage.checkpoint import LmdbState
from walbatch.storage.filesystem import RealFileSystem
from walbatch.storage.layout import Layout, read_identity


def refuse_even(batch: wb.Batch) -> list[wb.Applied | wb.Rejected]:
    return [wb.Applied() if lsn % 2 else wb.Rejected("no") for lsn in batch.lsns]


def made(path: Path) -> Path:
    """Four operations of put, two of them dead; three of log, pending."""
    lanes = {"put": wb.Lane(refuse_even, shards=2, trigger=FAST), "log": wb.Lane(None)}
    with wb.Engine.open(path, lanes=lanes, settings=TINY) as engine:
        for number in range(4):
            engine.submit("put", key=b"%d" % number, payload=b"12345", idempotency_key=b"i%d" % number)
        engine.submit_many("log", [(b"k", b"payload")] * 3)
        engine.flush("put", timeout=30)
    return path


def learn(path: Path, snapshots: dict[tuple[str, int], bytes]) -> None:
    _, uuid = read_identity(RealFileSystem(), Layout(str(path)))
    assert uuid is not None
    state = LmdbState.open(str(path / "state"), uuid)
    state.save_controllers(snapshots)
    state.close()


def test_it_counts_by_lane_what_is_pending_dead_and_remembered(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    document = walbatch("stats", path, "--json").document
    whole = {
        name: document[name]
        for name in ("pending", "settled_count", "dead_letters", "idempotency_keys", "live", "exit")
    }
    assert whole == {
        "pending": 3, "settled_count": 4, "dead_letters": 2, "idempotency_keys": 4, "live": False, "exit": 0,
    }  # fmt: skip
    assert document["log_bytes"] == sum(segment.stat().st_size for segment in (path / "wal").glob("*.seg"))
    assert document["state_bytes"] > 0
    put, log = document["lanes"]["put"], document["lanes"]["log"]
    assert (put["pending"], put["dead_letters"], put["dead_letter_bytes"], put["idempotency_keys"]) == (
        0,
        2,
        12,
        4,
    )
    assert (log["pending"], log["pending_bytes"], log["dead_letters"], log["shards"]) == (3, 24, 0, 1)


def test_people_see_the_same_figures_and_what_to_do(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    ended = walbatch("stats", path)
    assert ended.code == 0
    assert "pending       3 operations, durable up to LSN 7" in ended.output
    assert "dead letters  2, 12 B" in ended.output
    assert "idempotency   4 keys in state/" in ended.output
    rows = {line.split()[0]: line.split() for line in ended.output.splitlines() if line}
    assert rows["log"][:3] == ["log", "1", "3"]
    assert rows["put"][:3] == ["put", "2", "0"]
    assert ended.error == f"next: see the dead letters with walbatch dlq list {path}\n"


def test_it_tells_the_sizes_that_controllers_have_learnt(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    sizes = [LatencyAimd(start=40).snapshot(), LatencyAimd(start=200).snapshot()]
    learn(path, {("put", 0): sizes[0], ("put", 1): sizes[1], ("log", 0): b"of a later version"})
    assert "40 to 200, over 2 shards" in walbatch("stats", path).output
    lanes = walbatch("stats", path, "--json").document["lanes"]
    assert [(found["shard"], found["name"], found["lead_count"]) for found in lanes["put"]["controllers"]] == [
        (0, "aimd", 40), (1, "aimd", 200),
    ]  # fmt: skip
    assert lanes["log"]["controllers"] == [{"shard": 0, "name": None}]
    assert "not readable" in walbatch("stats", path).output


def test_of_a_lane_with_a_fixed_size_it_says_so(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    lanes = {
        "put": wb.Lane(lambda batch: None, trigger=wb.Trigger(count=2), shards=2),
        "log": wb.Lane(lambda batch: None, controller=wb.Fixed(2)),
    }
    with wb.Engine.open(path, lanes=lanes, settings=TINY) as engine:
        engine.submit_many("put", [(b"k", b"v")] * 4)
        engine.submit_many("log", [(b"k", b"v")] * 4)
        engine.flush(timeout=30)
    fixed = {"shard": 0, "name": "fixed"}
    lanes_shown = walbatch("stats", path, "--json").document["lanes"]
    assert fixed in lanes_shown["log"]["controllers"]
    lines = walbatch("stats", path).output.splitlines()
    assert any(line.startswith("log ") and line.endswith("  fixed") for line in lines)
    assert not any("not readable" in line for line in lines)


def test_what_is_settled_is_not_said_to_end_at_lsn_0(tmp_path: Path) -> None:
    lanes = {"put": wb.Lane(lambda batch: None), "log": wb.Lane(None)}
    with wb.Engine.open(tmp_path / "q", lanes=lanes, settings=TINY) as engine:
        engine.submit("log", key=b"k")
        engine.submit_many("put", [(b"k", b"v")] * 3)
        engine.flush("put", timeout=30)
        engine.close(drain=False)
    assert "settled       3 operations\n" in walbatch("stats", tmp_path / "q").output
    path = make_store(tmp_path / "p", settle="put", count=4).path
    assert "settled       4 operations; none up to LSN 4 is pending\n" in walbatch("stats", path).output


def test_a_rate_that_was_not_watched_for_long_enough_is_said_to_be_unknown(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    history = History()
    history.observe("put", time.time_ns(), count=30, bytes=3_000, seconds=0.5)
    learn(path, {HISTORY: history.encode()})
    assert "unknown yet" in walbatch("stats", path).output


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_it_changes_nothing(tmp_path: Path, clean: bool) -> None:
    path = make_store(tmp_path / "q", clean=clean).path
    before = picture(path)
    assert walbatch("stats", path).code == 0
    assert picture(path) == before


def test_it_works_beside_an_engine(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    with wb.Engine.open(path, lanes={"log": wb.Lane(None)}, settings=TINY) as engine:
        engine.submit("log", key=b"k")
        document = walbatch("stats", path, "--json").document
        assert (document["live"], document["pending"], document["dead_letters"]) == (True, 4, 2)
        engine.close(drain=False)


def test_a_new_store_has_nothing(tmp_path: Path) -> None:
    with wb.Engine.open(tmp_path / "q", lanes={"put": wb.Lane(None)}, settings=TINY):
        pass
    ended = walbatch("stats", "q", cwd=tmp_path)
    assert (ended.code, ended.error) == (0, "")
    assert "pending       0 operations" in ended.output


def test_damage_in_the_log_is_shown_beside_the_figures(tmp_path: Path) -> None:
    store = make_store(tmp_path / "q")
    flip(store.segments[2], limits.SECTOR_BYTES + 100)
    ended = walbatch("stats", store.path)
    assert ended.code == 4
    assert "log " in ended.output
    assert_one_line(ended, [store.segments[2].name])


def test_what_cannot_be_read_of_state_is_said(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    tamper(path / "state", "letters", (2).to_bytes(8, "big"), lambda value: value[:-1])
    ended = walbatch("stats", path)
    assert ended.code == 4
    assert "the dead letter 2" in ended.output
    assert_one_line(ended, ["dead letters are damaged", "walbatch dlq list"])
    assert walbatch("stats", path, "--json").document["dead_letters"] == 1
    plant(path / "state", "letters", (2).to_bytes(8, "big"), b"short")
    assert walbatch("stats", path).code == 4


def test_it_tells_what_the_last_days_were_like_at_this_hour(tmp_path: Path) -> None:
    path = made(tmp_path / "q")
    history, now_ns = History(), time.time_ns()
    for second in range(200):
        history.observe("put", now_ns + second * 10**9, count=30, bytes=3_000, seconds=0.5)
    learn(path, {HISTORY: history.encode()})
    ended = walbatch("stats", path)
    title, head, row = ended.output.splitlines()[-5:-2]
    assert (title, head.split()) == (
        "usual at this hour", ["lane", "operations/s", "operations/batch", "time/batch"],
    )  # fmt: skip
    name, rate, count, seconds, unit = row.split()
    assert (name, unit) == ("put", "ms")
    assert float(rate) == pytest.approx(30, rel=0.1)
    assert float(count) == pytest.approx(30, rel=0.1)
    assert float(seconds) == pytest.approx(500, rel=0.1)
    lanes = walbatch("stats", path, "--json").document["lanes"]
    assert lanes["put"]["usual"]["batch_count"] == pytest.approx(30, rel=0.1)
    assert lanes["log"]["usual"] is None


def test_what_was_given_up_is_neither_pending_nor_hidden(tmp_path: Path) -> None:
    fates = make_fates(tmp_path / "q")
    document = walbatch("stats", fates.path, "--json").document
    assert (document["pending"], document["passed_over"], document["dead_letters"]) == (
        len(fates.pending),
        5,
        2,
    )
    assert "passed over   5 operations that the log still holds" in walbatch("stats", fates.path).output


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_what_is_no_store_is_wrong_usage(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    ended = walbatch("stats", name, cwd=tmp_path)
    assert (ended.code, ended.output) == (2, "")
    assert_one_line(ended, ["check the path"])
