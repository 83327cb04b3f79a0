"""`walbatch verify` and `walbatch inspect`: what they show, and that they change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import walbatch as wb
from tests.cli.program import assert_one_line, walbatch
from tests.stores import TINY, flip, make_store, picture
from tests.support import FAST
from walbatch import inspection, limits
from walbatch.salvage import salvage_store

SECTOR = limits.SECTOR_BYTES


@pytest.mark.parametrize("name", ["verify", "verify --audit", "inspect"])
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_a_look_changes_nothing(tmp_path: Path, name: str, clean: bool) -> None:
    made = make_store(tmp_path / "q", clean=clean)
    before = picture(made.path)
    ended = walbatch(*name.split(), made.path)
    assert (ended.code, ended.error) == (0, "")
    assert picture(made.path) == before


def test_verify_says_what_it_has_read(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    ended = walbatch("verify", made.path, "--audit")
    first, last = ended.output.splitlines()
    assert first.startswith(f"{made.path}: {len(made.segments)} segments, ")
    assert ", 30 operations, " in first
    assert first.endswith(", every CRC checked twice")
    assert last == "sound"
    document = walbatch("verify", made.path, "--json").document
    assert (document["operations"], document["audited"], document["problems"], document["exit"]) == (
        30,
        False,
        [],
        0,
    )
    assert document["error"] is None


def test_verify_shows_every_damage_and_says_what_to_do(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[2], SECTOR + 100)
    flip(made.segments[5], 100)
    ended = walbatch("verify", made.path)
    assert ended.code == 4
    assert (
        "W6: damaged or cut below what the next segment proves (frame body does not match its CRC) (segment 3"
        in ended.output
    )
    assert "W3: the segment's header is damaged" in ended.output
    assert "sound" not in ended.output
    assert_one_line(ended, [made.segments[2].name, "offset 512", "--salvage"])
    assert "walbatch verify" not in ended.error, "that is what was done"
    document = walbatch("verify", made.path, "--json").document
    assert {("W6", 3), ("W3", 6)} <= {(case["label"], case["segment"]) for case in document["cases"]}
    assert document["exit"] == 4


def test_verify_reports_what_only_the_audit_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "q", count=2)
    monkeypatch.setattr(inspection.tally, "crc32c_audit", lambda data, seed: 7)
    ended = walbatch("verify", made.path, "--audit")
    assert ended.code == 4
    assert "segment 1 at offset 0: the two CRC-32C implementations disagree" in ended.output
    assert_one_line(ended, ["keep a copy"])


def test_inspect_draws_the_log(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", kinds=("put", "log"), settle="log", shards=2)
    flip(made.segments[3], SECTOR + 100)
    ended = walbatch("inspect", made.path)
    assert ended.code == 4
    lines = ended.output.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0] == f"store       {made.path}"
    assert "pending     " in ended.output
    drawn = next(line for line in lines if line.startswith("["))
    assert len(drawn) <= 80
    assert drawn.count("|") == len(made.segments) - 1
    assert set(drawn) <= set("[]|#=.!")
    assert drawn.split("|")[3].strip("!") == ""
    assert "        4     1" not in ended.output
    row = next(line for line in lines if line.split()[:2] == ["4", "1"])
    assert row.endswith("W6 corrupt")
    assert "lane shards     pending  backend" in lines
    assert_one_line(ended, [made.segments[3].name])


def test_inspect_draws_the_newest_of_many_segments(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", count=100)
    assert len(made.segments) > 30
    drawn = next(
        line for line in walbatch("inspect", made.path).output.splitlines() if line.startswith("...[")
    )
    assert len(drawn) <= 80
    assert drawn.count("|") == 23


def test_inspect_shows_what_is_settled(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q", settle="put", count=40)
    ended = walbatch("inspect", made.path)
    drawn = next(line for line in ended.output.splitlines() if line.startswith("["))
    assert set(drawn) <= set("[]|#.")
    assert "settled     LSN 40" in ended.output
    assert "pending     0 operations" in ended.output


def test_inspect_shows_what_a_salvage_gave_up(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[3], SECTOR + 100)
    salvage_store(made.path)
    ended = walbatch("inspect", made.path)
    assert ended.code == 0
    assert "1 LSNs were given up by a salvage" in ended.output
    assert "quarantine/ holds 2 files" in ended.output
    document = walbatch("inspect", made.path, "--json").document
    assert [segment["lost"] for segment in document["segment_list"] if segment["lost"]] == [1]
    assert len(document["quarantine"]) == 2


def test_inspect_of_a_new_store(tmp_path: Path) -> None:
    with wb.Engine.open(
        tmp_path / "q", lanes={"put": wb.Lane(wb.LmdbBackend(tmp_path / "b"), shards=3)}, settings=TINY
    ):
        pass
    ended = walbatch("inspect", tmp_path / "q")
    assert ended.code == 0
    assert f"put       3           0  lmdb://{tmp_path}/b" in ended.output
    document = walbatch("inspect", tmp_path / "q", "--json").document
    assert document["lanes"] == {"put": {"pending": 0, "shards": 3, "url": f"lmdb://{tmp_path}/b"}}
    assert document["live"] is False


def test_inspect_says_what_its_rows_mean(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    lines = walbatch("inspect", made.path).output.splitlines()
    assert "  W5: complete, and followed by another segment" in lines
    assert "  W10: cleanly closed" in lines
    assert not any("docs/" in line for line in lines)


def test_inspect_draws_a_half_settled_segment_as_that(tmp_path: Path) -> None:
    lanes = {"put": wb.Lane(lambda batch: None, trigger=FAST), "log": wb.Lane(None)}
    with wb.Engine.open(tmp_path / "q", lanes=lanes) as engine:
        engine.submit_many("log", [(b"k", b"v")] * 20)
        engine.submit_many("put", [(b"k", b"v")] * 60)
        engine.flush("put", timeout=30)
        engine.close(drain=False)
    output = walbatch("inspect", tmp_path / "q").output
    (segment,) = walbatch("inspect", tmp_path / "q", "--json").document["segment_list"]
    drawn = next(line for line in output.splitlines() if line.startswith("["))
    assert drawn.count("#") == pytest.approx(3 * drawn.count("="), abs=4)
    assert segment["pending"] == 20
    assert 0 < segment["frame_bytes"] < segment["bytes"]
    assert "in frames" in output
