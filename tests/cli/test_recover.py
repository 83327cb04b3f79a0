"""`walbatch recover`: what it finds, does and says, and that a dry run says it beforehand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import walbatch as wb
from tests.cli import target
from tests.cli.program import ROOT, assert_one_line, environment, walbatch
from tests.fates import make_fates, requeue_half
from tests.stores import Made, flip, make_store, note_dropped, picture
from walbatch import limits
from walbatch.inspection import remembered_lanes

SECTOR = limits.SECTOR_BYTES
FRAME = 2 * SECTOR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "target.py").write_text(Path(target.__file__).read_text())
    return tmp_path


def delivered(folder: Path) -> list[tuple[str, int, str, str]]:
    path = folder / "delivered.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def expected(made: Made, *, without: set[int] | None = None) -> list[tuple[str, int, str, str]]:
    return sorted(
        (kind, lsn, key.decode(), payload.decode())
        for lsn, (kind, key, payload) in made.submitted.items()
        if lsn in made.pending - (without or set())
    )


# --- delivering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_it_delivers_what_is_pending_and_nothing_else(folder: Path, clean: bool) -> None:
    made = make_store(folder / "q", kinds=("put", "log"), settle="log", clean=clean)
    ended = walbatch("recover", "q", "--lane", "put=python:target:apply", cwd=folder)
    assert (ended.code, ended.error) == (0, "")
    assert "30 operations pending" in ended.output
    assert "delivered 30" in ended.output
    assert sorted(delivered(folder)) == expected(made)
    again = walbatch("recover", "q", "--lane", "put=python:target:apply", cwd=folder)
    assert again.code == 0
    assert "delivered 0, 0 left" in again.output
    assert len(delivered(folder)) == 30


def test_a_backend_with_a_url_is_remembered_and_needs_no_more_naming(folder: Path) -> None:
    made = make_store(folder / "q", shards=3)
    assert walbatch("recover", "q", "--to", "lmdb:blocks", cwd=folder).code == 0
    assert (
        walbatch(
            "load", "q", "--kind", "put", "--no-drain", cwd=folder, stdin='{"key": "new", "payload": "p"}'
        ).code
        == 0
    )
    ended = walbatch("recover", "q", "--json", cwd=folder)
    assert (ended.code, ended.document["delivered"]) == (0, 1)
    assert ended.document["lanes"]["put"] == {"pending": 1, "shards": 3, "url": f"lmdb://{folder}/blocks"}
    blocks = wb.LmdbBackend(folder / "blocks")
    assert blocks.get(b"new") == b"p"
    last = {key: payload for _, key, payload in made.submitted.values()}
    assert dict(blocks.items()) == {**last, b"new": b"p"}


def test_remembered_code_is_run_only_where_it_is_named(folder: Path) -> None:
    make_store(folder / "q")
    assert (
        walbatch("recover", "q", "--lane", "put=python:target:fail", "--stall", "0.5", cwd=folder).code == 3
    )
    assert remembered_lanes(folder / "q")["put"].url == "python:target:fail"
    ended = walbatch("recover", "q", cwd=folder)
    assert ended.code == 3
    assert ended.error == (
        "next: name the backend of lane put, for example --lane put=python:target:fail "
        "(python: backends run code, so name it each time)\n"
    )
    assert remembered_lanes(folder / "q")["put"].url == "python:target:fail", "it is still remembered"
    assert walbatch("recover", "q", "--lane", "put=python:target:apply", cwd=folder).code == 0


def test_a_lane_that_is_named_alone_is_held(folder: Path) -> None:
    make_store(folder / "q", kinds=("put", "log"), count=5)
    assert (
        walbatch("recover", "q", "--lane", "put=lmdb:b", "--lane", "log=python:target:apply", cwd=folder).code
        == 0
    )
    walbatch("load", "q", "--lane", "put", "--lane", "log", cwd=folder, stdin='{"kind": "put", "key": "k"}')
    ended = walbatch("recover", "q", "--lane", "put", "--json", cwd=folder)
    assert (ended.code, ended.document["remaining"], ended.document["without_backend"]) == (3, 1, ["put"])
    assert walbatch("recover", "q", "--json", cwd=folder).document["remaining"] == 0


def test_work_that_is_left_is_exit_code_3_and_says_why(folder: Path) -> None:
    make_store(folder / "q")
    ended = walbatch("recover", "q", "--lane", "put=python:target:fail", "--stall", "0.5", cwd=folder)
    assert ended.code == 3
    assert "delivered 0, 30 left" in ended.output
    assert ended.error.splitlines() == [
        "last error of lane put: RuntimeError: the database is down",
        "next: repair the backend and run this again; the operations are safe in the log",
    ]
    ended = walbatch(
        "recover", "q", "--lane", "put=python:target:half", "--timeout", "1", "--json", cwd=folder
    )
    assert (ended.code, ended.document["exit"]) == (3, 3)
    assert ended.document["delivered"] + ended.document["remaining"] == 30
    assert 0 < ended.document["delivered"] <= 15
    ended = walbatch(
        "recover", "q", "--lane", "put=python:target:fail", "--timeout", "0", "--json", cwd=folder
    )
    assert "the database" in ended.document["errors"]["put"]


def test_a_lane_without_a_backend_is_named(folder: Path) -> None:
    made = make_store(folder / "q", kinds=("put", "log"))
    ended = walbatch("recover", "q", "--lane", "put=python:target:apply", cwd=folder)
    assert ended.code == 3
    assert "delivered 30" in ended.output
    assert "30 left" in ended.output
    assert ended.error == (
        "next: name the backend of lane log, for example --lane log=lmdb:///path "
        "or log=python:module:function\n"
    )
    assert {kind for kind, *_ in delivered(folder)} == {"put"}
    assert len(delivered(folder)) == len(made.submitted) // 2


def test_to_is_for_a_store_with_one_lane(folder: Path) -> None:
    make_store(folder / "q", kinds=("put", "log"), count=2)
    ended = walbatch("recover", "q", "--to", "python:target:apply", cwd=folder)
    assert ended.code == 2
    assert_one_line(ended, ["log, put", "--lane KIND=URL"])
    assert (
        walbatch("recover", "q", "--to", "python:target:apply", "--lane", "log=lmdb:b", cwd=folder).code == 0
    )


def test_a_store_that_lost_its_state_has_the_shards_that_compactions_noted(folder: Path) -> None:
    made = make_store(folder / "q", shards=3)
    note_dropped(made.path)
    shutil.rmtree(made.path / "state")
    arguments = ["recover", "q", "--to", "lmdb:blocks", "--json"]
    dry = walbatch(*arguments, "--dry-run", cwd=folder)
    real = walbatch(*arguments, cwd=folder)
    assert (dry.code, real.code) == (0, 0)
    assert dry.document["pending"] == real.document["delivered"] == len(made.pending)
    assert remembered_lanes(made.path)["put"].shards == 3


def test_a_new_store_needs_nothing(folder: Path) -> None:
    with wb.Engine.open(folder / "q", lanes={"put": wb.Lane(None)}):
        pass
    ended = walbatch("recover", "q", cwd=folder)
    assert (ended.code, ended.error) == (0, "")


def test_a_store_that_lost_its_state_is_delivered_again_with_the_shards_that_are_named(folder: Path) -> None:
    made = make_store(folder / "q", shards=3)
    assert walbatch("recover", "q", "--to", "lmdb:blocks", cwd=folder).code == 0
    walbatch("load", "q", "--kind", "put", "--no-drain", cwd=folder, stdin='{"key": "new", "payload": "p"}')
    shutil.rmtree(made.path / "state")
    (made.path / "wal/dropped").unlink(missing_ok=True)
    ended = walbatch("recover", "q", cwd=folder)
    assert ended.code == 3
    assert "S7" in ended.output
    assert "--lane put=" in ended.error
    ended = walbatch("recover", "q", "--to", "lmdb:blocks", cwd=folder)
    assert ended.code == 2
    assert_one_line(ended, ["3 shards"])
    assert walbatch("recover", "q", "--to", "lmdb:blocks", "--shards", "3", cwd=folder).code == 0
    assert wb.LmdbBackend(folder / "blocks").get(b"new") == b"p"


# --- kill -9 ---------------------------------------------------------------------------------------------------------

WRITER = """
import os, sys, walbatch as wb
settings = wb.Settings(segment_bytes=8192, disk_bytes_max=2**30, checkpoint_ms=5, timer_ms=5)
lanes = {"put": wb.Lane(wb.LmdbBackend("blocks"), shards=2, trigger=wb.Trigger(count=5, linger_ms=1)), "log": wb.Lane(None)}
engine = wb.Engine.open("q", lanes=lanes, settings=settings)
for number in range(10**9):
    lsns = engine.submit_many("put", [(b"%d" % number, b"put-%d" % number)] * 2)
    engine.submit("log", key=b"%d" % number, payload=b"log-%d" % number)
    print(number, flush=True)
"""


def test_after_kill_9_everything_acknowledged_is_recovered(folder: Path) -> None:
    acknowledged = -1
    with subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            acknowledged = int(line)
            if acknowledged == 150:
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    dry = walbatch("recover", "q", "--lane", "log=python:target:apply", "--dry-run", "--json", cwd=folder)
    ended = walbatch("recover", "q", "--lane", "log=python:target:apply", "--json", cwd=folder)
    assert (dry.code, ended.code) == (0, 0)
    assert ended.document["cases"] == dry.document["cases"]
    blocks = wb.LmdbBackend(folder / "blocks")
    logged = {key: payload for _, _, key, payload in delivered(folder)}
    for number in range(acknowledged + 1):
        assert blocks.get(b"%d" % number) == b"put-%d" % number
        assert logged[str(number)] == f"log-{number}"


# --- the dry run -----------------------------------------------------------------------------------------------------


def tear(made: Made) -> None:
    """A write that was cut short, behind the last frame."""
    segment = made.segments[-1]
    data = bytearray(segment.read_bytes())
    end = len(data.rstrip(b"\0"))
    at = -(-end // SECTOR) * SECTOR
    data[at:] = b"torn".ljust(100, b"!").ljust(max(SECTOR, len(data) - at), b"\0")
    segment.write_bytes(data)


def lose_state(made: Made) -> None:
    shutil.rmtree(made.path / "state")


def lose_log(made: Made) -> None:
    for path in made.segments:
        path.unlink()


def damage_state(made: Made) -> None:
    flip(made.path / "state" / "data.mdb", 0, count=12288)


def both(*damages: Callable[[Made], object]) -> Callable[[Made], None]:
    def damage(made: Made) -> None:
        for each in damages:
            each(made)

    return damage


SITUATIONS: dict[str, tuple[Callable[[Made], object], int, int]] = {
    # what happened to the store; the exit code of recover, and of recover --salvage
    "nothing": (lambda made: None, 0, 0),
    "a torn tail": (tear, 0, 0),
    "no state": (lose_state, 0, 0),
    "damaged state": (damage_state, 0, 0),
    "a damaged frame": (lambda made: flip(made.segments[3], SECTOR + 100), 4, 7),
    "a damaged header": (lambda made: flip(made.segments[3], 100), 4, 0),
    "a missing segment": (lambda made: made.segments[3].unlink(), 4, 7),
    "a missing first segment": (lambda made: made.segments[0].unlink(), 4, 7),
    "a missing last segment": (lambda made: made.segments[-1].unlink(), 4, 7),
    "a damaged frame and a torn tail": (both(lambda made: flip(made.segments[3], SECTOR + 100), tear), 4, 7),
    "a damaged frame and no state": (
        both(lambda made: flip(made.segments[3], SECTOR + 100), lose_state),
        4,
        7,
    ),
    "no identity": (lambda made: (made.path / "identity").unlink(), 4, 4),
    "no log": (lose_log, 4, 4),
}


@pytest.mark.parametrize("salvage", [False, True], ids=["", "salvage"])
@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_dry_run_writes_nothing_and_says_what_the_real_run_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, situation: str, clean: bool, salvage: bool
) -> None:
    monkeypatch.chdir(folder)
    made = make_store(folder / "q", kinds=("put", "log"), settle="log", clean=clean, count=20)
    damage, code, salvaged_code = SITUATIONS[situation]
    damage(made)
    arguments = [
        "recover",
        "q",
        "--lane",
        "put=python:tests.cli.target:apply",
        "--lane",
        "log=python:tests.cli.target:apply",
        "--json",
    ]
    arguments += ["--shards", "2", *(["--salvage"] if salvage else [])]
    before = picture(made.path)
    dry = walbatch(*arguments, "--dry-run")
    assert picture(made.path) == before
    assert delivered(folder) == []
    real = walbatch(*arguments)
    wanted = salvaged_code if salvage else code
    assert (dry.code, real.code) == (wanted, wanted), real.error
    if real.code == 4:
        after = picture(made.path)
        assert {name: state for name, state in after.items() if name != "lock"} == {
            name: state for name, state in before.items() if name != "lock"
        }
        assert dry.document == real.document
        return
    same = {"dry_run": True, "delivered": real.document["delivered"], "elapsed_s": real.document["elapsed_s"]}
    assert {**real.document, **same} == {**dry.document, **same}
    assert real.document["delivered"] == dry.document["pending"]
    lost = {lsn for first, last in real.document["lost"] for lsn in range(first, min(last, 1000) + 1)}
    after_lsn = real.document["end_lost_after"]
    for _, lsn, _, payload in delivered(folder):
        assert made.submitted[lsn][2].decode() == payload
        assert lsn not in lost
    missing = made.pending - {lsn for _, lsn, _, _ in delivered(folder)}
    assert all(lsn in lost or (after_lsn is not None and lsn > after_lsn) for lsn in missing)
    again = walbatch(*arguments)
    assert (again.code, again.document["pending"], again.document["lost"]) == (0, 0, [])


@pytest.mark.parametrize("cancelled", [0, 3])
@pytest.mark.parametrize("served", ["both lanes", "one lane", "none"])
def test_a_dry_run_knows_what_was_given_up_before_a_checkpoint_did(
    folder: Path, served: str, cancelled: int
) -> None:
    made = make_fates(folder / "q", cancelled=cancelled)
    lanes = {"both lanes": ["put", "log"], "one lane": ["put"], "none": []}[served]
    arguments = [
        "recover",
        "q",
        *(each for lane in lanes for each in ("--lane", f"{lane}=python:target:apply")),
        "--json",
    ]
    before = picture(made.path)
    dry = walbatch(*arguments, "--dry-run", cwd=folder)
    assert picture(made.path) == before
    real = walbatch(*arguments, cwd=folder)
    assert (dry.code, real.code) == (3, 3), "two dead letters are left"
    same = {"dry_run": True, "delivered": 0, "elapsed_s": 0.0}
    assert {**real.document, **same} == {**dry.document, **same}
    assert dry.document["pending"] == len(made.pending)
    assert real.document["delivered"] == dry.document["pending"] - dry.document["remaining"]
    assert {lsn for _, lsn, _, _ in delivered(folder)} <= made.pending
    assert len(delivered(folder)) == real.document["delivered"]


def test_a_dry_run_knows_that_a_letter_was_submitted_again(folder: Path) -> None:
    make_fates(folder / "work", dead=(2,), cancelled=0)
    requeue_half(folder / "q", 2, work=folder / "work")
    arguments = [
        "recover",
        "q",
        "--lane",
        "put=python:target:apply",
        "--lane",
        "log=python:target:apply",
        "--json",
    ]
    dry = walbatch(*arguments, "--dry-run", cwd=folder)
    real = walbatch(*arguments, cwd=folder)
    assert (dry.code, real.code) == (0, 0), real.output
    assert (dry.document["dead_letters"], real.document["dead_letters"]) == (0, 0)
    assert dry.document["pending"] == real.document["delivered"] == 24


@pytest.mark.parametrize("salvage", [False, True], ids=["", "salvage"])
def test_a_salvage_counts_what_was_given_up_neither_as_pending_nor_as_lost(
    folder: Path, salvage: bool
) -> None:
    made = make_fates(folder / "q")
    if salvage:
        flip(min((made.path / "wal").glob("*.seg")), SECTOR * 3 + 100)  # the frame of LSN 3 or so
    arguments = [
        "recover",
        "q",
        "--salvage",
        "--lane",
        "put=python:target:apply",
        "--lane",
        "log=python:target:apply",
        "--json",
    ]
    dry = walbatch(*arguments, "--dry-run", cwd=folder).document
    real = walbatch(*arguments, cwd=folder).document
    same = {"dry_run": True, "delivered": 0, "elapsed_s": 0.0}
    assert {**real, **same} == {**dry, **same}
    lost = {lsn for first, last in real["lost"] for lsn in range(first, last + 1)}
    assert bool(lost) == salvage
    assert not lost & (made.dead | made.cancelled)
    assert {lsn for _, lsn, _, _ in delivered(folder)} == made.pending - lost
    assert (real["remaining"], real["pending"]) == (0, len(made.pending - lost))
    again = walbatch(*arguments, cwd=folder).document
    assert (again["pending"], again["remaining"]) == (0, 0)


def test_a_dry_run_in_words(folder: Path) -> None:
    made = make_store(folder / "q", clean=False)
    tear(made)
    ended = walbatch("recover", "q", "--dry-run", cwd=folder)
    assert ended.code == 3
    lines = ended.output.splitlines()
    assert lines[0].endswith("30 operations pending")
    assert lines[1].startswith("  W9: torn tail that nothing proves")
    assert lines[2] == "  lane put: 30 pending, remembered backend: none"
    assert lines[3].startswith("would copy a torn tail of 100 bytes to quarantine/")
    assert lines[-1].endswith("30 left; nothing was written")


# --- salvage ---------------------------------------------------------------------------------------------------------


def test_corruption_is_refused_with_what_to_do_and_salvaged_on_demand(folder: Path) -> None:
    made = make_store(folder / "q")
    flip(made.segments[3], SECTOR + FRAME + 100)
    ended = walbatch("recover", "q", "--lane", "put=python:target:apply", cwd=folder)
    assert ended.code == 4
    assert ended.output == ""
    assert_one_line(ended, [made.segments[3].name, "offset 1536", "operations 11 to 12", "W6", "--salvage"])
    assert delivered(folder) == []

    ended = walbatch("recover", "q", "--salvage", "--dry-run", cwd=folder)
    assert ended.code == 7
    assert "would be LOST: LSN 11 to 11 (1 operation at most)" in ended.output

    ended = walbatch("recover", "q", "--lane", "put=python:target:apply", "--salvage", cwd=folder)
    assert ended.code == 7
    assert "LOST: LSN 11 to 11 (1 operation at most)" in ended.output
    assert "delivered 29" in ended.output
    assert sorted(delivered(folder)) == expected(made, without={11})
    assert walbatch("recover", "q", "--salvage", "--lane", "put=python:target:apply", cwd=folder).code == 0
    shown = walbatch("inspect", "q", cwd=folder).output
    assert "quarantine/ holds 2 files" in shown


def test_a_lost_end_is_told_apart_from_a_known_loss(folder: Path) -> None:
    made = make_store(folder / "q")
    made.segments[-1].unlink()
    ended = walbatch("recover", "q", "--salvage", "--to", "python:target:apply", cwd=folder)
    assert ended.code == 7
    assert "LOST: whatever was acknowledged after LSN 30; nothing tells how much" in ended.output


def test_the_environment_can_ask_for_the_traceback(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from walbatch.cli import main; main()", "verify", "nowhere"], cwd=folder, capture_output=True,
        env=environment(WALBATCH_DEBUG="1"), check=False, text=True,
    )  # fmt: skip
    assert "Traceback" in done.stderr
    assert os.path.basename(__file__) not in done.stderr


@pytest.mark.parametrize("clean", [True, False], ids=["closed", "killed"])
def test_a_dry_run_says_why_lsns_are_skipped(folder: Path, clean: bool) -> None:
    made = make_store(folder / "q", clean=clean)
    ended = walbatch("recover", made.path, "--dry-run", "--lane", "put=python:target:apply", cwd=folder)
    assert ("(after an unclean end the log skips LSNs)" in ended.output) is not clean


def test_a_salvage_with_a_mistyped_lane_changes_nothing(folder: Path) -> None:
    made = make_store(folder / "q")
    flip(made.segments[3], SECTOR + 100)
    before = picture(made.path)
    ended = walbatch("recover", "q", "--salvage", "--lane", "putt=lmdb:b", cwd=folder)
    assert ended.code == 2
    assert_one_line(ended, ["no lane 'putt'", "its lane is 'put'"])
    assert {**picture(made.path), "lock": None} == {**before, "lock": None}


@pytest.mark.parametrize(
    ("situation", "words"),
    [("no identity", ["restore identity from any copy"]), ("no log", ["restore wal/", "another path"])],
)
@pytest.mark.parametrize("name", ["recover", "verify", "inspect", "stats", "dump"])
def test_a_salvage_is_not_recommended_where_it_has_nothing_to_work_with(
    folder: Path, name: str, situation: str, words: list[str]
) -> None:
    made = make_store(folder / "q", count=3)
    SITUATIONS[situation][0](made)
    ended = walbatch(name, "q", cwd=folder)
    assert ended.code == 4
    assert_one_line(ended, words)
    assert "--salvage" not in ended.error
    assert "at offset" not in ended.error
    assert "walbatch verify" not in ended.error


def test_a_backend_that_cannot_be_made_is_not_said_to_be_gone_for_certain(folder: Path) -> None:
    make_store(folder / "q", count=3)
    ended = walbatch("recover", "q", "--lane", "put=lmdb:///proc/x/y", cwd=folder)
    assert ended.code == 8
    assert_one_line(ended, ["/proc/x/y", "cannot be made"])
