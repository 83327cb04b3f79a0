"""`walbatch dlq`: dead letters seen, requeued, dropped and exported, and what `recover` says of them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import walbatch as wb
from tests.cli import target
from tests.cli.program import assert_one_line, walbatch
from tests.fates import make_fates
from tests.storage.states import flip as flip_value
from tests.storage.states import tamper
from tests.stores import TINY, Made, flip, make_store, picture
from tests.support import FAST
from walbatch import inspection, limits
from walbatch.storage.lsnkeys import key_of

SECTOR = limits.SECTOR_BYTES
APPLY = "put=python:target:apply"
READING = ("list", "show 3", "export", "list --json", "show 3 --json")
WRITING = ("requeue 3", "requeue --all", "drop 3", "drop --all --yes")


def refuse_third(batch: wb.Batch) -> list[wb.Applied | wb.Rejected]:
    """Every third operation cannot be applied."""
    return [wb.Applied() if lsn % 3 else wb.Rejected(f"no\ntable {lsn}") for lsn in batch.lsns]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store q with nine operations of lane put, of which 3, 6 and 9 are dead letters."""
    (tmp_path / "target.py").write_text(Path(target.__file__).read_text())
    keys = [b"k1", b"k2", b"k3", b"k4", b"k5", b"\xff\0", b"k7", b"k8", b"\x1b[2J"]
    with wb.Engine.open(
        tmp_path / "q", lanes={"put": wb.Lane(refuse_third, shards=2, trigger=FAST)}, settings=TINY
    ) as engine:
        for number, key in enumerate(keys, 1):
            payload = b"\xfe%d" % number if number == 6 else b"payload-%d" % number
            engine.submit(
                "put", key=key, payload=payload, priority=number % 9, idempotency_key=b"id-%d" % number
            )
        engine.flush(timeout=30)
    return tmp_path


def left(folder: Path) -> list[int]:
    """The LSNs of the dead letters."""
    return [letter.lsn for letter in inspection.dead_letters(folder / "q")[0]]


def delivered(folder: Path) -> list[str]:
    path = folder / "delivered.jsonl"
    return path.read_text().splitlines() if path.exists() else []


# --- looking -----------------------------------------------------------------------------------------------------------


def test_the_list_has_a_line_for_each_dead_letter_and_says_what_to_do(folder: Path) -> None:
    ended = walbatch("dlq", "list", "q", cwd=folder)
    assert ended.code == 0
    lines = ended.output.splitlines()
    assert [line.split()[0] for line in lines] == ["lsn", "3", "6", "9", "3"]
    assert lines[1].split()[1:3] == ["put", "rejected"]
    assert lines[1].endswith("k3                no\\ntable 3") or "no\\ntable 3" in lines[1]
    assert lines[-1].startswith("3 dead letters, ")
    assert "\x1b" not in ended.output
    assert ended.error == "next: walbatch dlq show q LSN, or requeue, drop or export\n"


def test_the_list_for_programs_has_everything_but_the_payload(folder: Path) -> None:
    document = walbatch("dlq", "list", "q", "--json", cwd=folder).document
    assert (document["count"], document["error"], document["exit"]) == (3, None, 0)
    first, second, _ = document["letters"]
    assert first.pop("died").endswith("Z")
    assert first == {
        "lsn": 3, "kind": "put", "key": "k3", "priority": 3, "reason": "rejected", "error": "no\ntable 3", "attempts": 0,
        "idempotency_key": "id-3", "payload_bytes": 9,
    }  # fmt: skip
    assert second["key_base64"] == "/wA="


def test_the_list_of_one_lane_leaves_the_others_out(folder: Path) -> None:
    assert walbatch("dlq", "list", "q", "--lane", "put", "--json", cwd=folder).document["count"] == 3
    assert walbatch("load", "q", "--kind", "get", cwd=folder, stdin='{"key": "k"}').code == 0
    assert walbatch("dlq", "list", "q", "--lane", "get", "--json", cwd=folder).document["count"] == 0
    assert walbatch("dlq", "export", "q", "--lane", "get", cwd=folder).output == ""


def test_one_letter_is_shown_whole(folder: Path) -> None:
    ended = walbatch("dlq", "show", "q", "6", cwd=folder)
    assert ended.code == 0
    shown = dict(line.split(None, 1) for line in ended.output.splitlines())
    assert shown["lsn"] == "6"
    assert shown["reason"] == "rejected"
    assert shown["error"] == "no\\ntable 6"
    assert shown["payload"] == "2 B: \\xfe6"
    assert "dlq requeue q 6" in ended.error
    document = walbatch("dlq", "show", "q", "6", "--json", cwd=folder).document
    assert document["payload_base64"] == "/jY="
    assert document["error"] == "no\ntable 6"


def test_of_a_large_payload_people_see_the_beginning(tmp_path: Path) -> None:
    with wb.Engine.open(
        tmp_path / "q", lanes={"put": wb.Lane(lambda batch: [wb.Rejected()])}, settings=TINY
    ) as engine:
        engine.submit("put", key=b"k", payload=b"x" * 10_000)
    ended = walbatch("dlq", "show", "q", "1", cwd=tmp_path)
    assert ended.output.count("x") < 500
    assert "9,600 more" in ended.output
    assert len(walbatch("dlq", "show", "q", "1", "--json", cwd=tmp_path).document["payload"]) == 10_000


def test_an_export_can_be_loaded_elsewhere(folder: Path) -> None:
    exported = walbatch("dlq", "export", "q", cwd=folder)
    assert (exported.code, exported.error) == (0, "")
    assert [row["lsn"] for row in exported.rows] == [3, 6, 9]
    assert walbatch("load", "other", "--kind", "put", cwd=folder, stdin=exported.output).code == 0
    found = [(found.key, found.payload, found.priority) for found in inspection.operations(folder / "other")]
    assert found == [(b"k3", b"payload-3", 3), (b"\xff\0", b"\xfe6", 6), (b"\x1b[2J", b"payload-9", 0)]


@pytest.mark.parametrize("arguments", [*READING, "drop 77", "requeue 77", "drop --all"])
def test_looking_and_what_is_refused_change_nothing(folder: Path, arguments: str) -> None:
    before = picture(folder / "q")
    name, *rest = arguments.split()
    walbatch("dlq", name, "q", *rest, cwd=folder)
    assert picture(folder / "q") == before


def test_beside_an_engine_letters_can_be_seen_and_not_changed(folder: Path) -> None:
    with wb.Engine.open(
        folder / "q", lanes={"put": wb.Lane(refuse_third, shards=2)}, settings=TINY
    ) as engine:
        for arguments in READING:
            name, *rest = arguments.split()
            assert walbatch("dlq", name, "q", *rest, cwd=folder).code == 0
            assert walbatch("dlq", name, "q", *rest, cwd=folder, apart=name == "list").code == 0
        for arguments in WRITING:
            name, *rest = arguments.split()
            ended = walbatch("dlq", name, "q", *rest, cwd=folder)
            assert ended.code == 5
            assert_one_line(ended, [f"process {os.getpid()}", "close that engine"])
        assert len(engine.dead_letters()) == 3


def test_a_store_without_letters_has_none_to_show_and_nothing_to_do(tmp_path: Path) -> None:
    make_store(tmp_path / "q", count=2)
    ended = walbatch("dlq", "list", "q", cwd=tmp_path)
    assert (ended.code, ended.output, ended.error) == (0, "0 dead letters, 0 B\n", "")
    before = picture(tmp_path / "q")
    assert walbatch("dlq", "requeue", "q", "--all", "--json", cwd=tmp_path).document["requeued"] == 0
    assert walbatch("dlq", "drop", "q", "--all", "--yes", cwd=tmp_path).output == "dropped 0 dead letters\n"
    assert walbatch("dlq", "export", "q", cwd=tmp_path).output == ""
    assert picture(tmp_path / "q") == before, "it was not even opened"


# --- requeueing --------------------------------------------------------------------------------------------------------


def test_a_requeued_letter_is_delivered_to_the_backend_that_is_named(folder: Path) -> None:
    ended = walbatch("dlq", "requeue", "q", "3", "9", "--lane", APPLY, cwd=folder)
    assert (ended.code, ended.error) == (0, "")
    assert ended.output == "requeued 2 dead letters: delivered 2, 0 left in the log, 0 dead again\n"
    assert ["payload-3" in line or "payload-9" in line for line in delivered(folder)] == [True, True]
    assert left(folder) == [6]


def test_all_letters_are_delivered_to_a_backend_that_is_remembered(folder: Path) -> None:
    assert walbatch("recover", "q", "--lane", "put=lmdb:blocks", cwd=folder).code == 3
    document = walbatch("dlq", "requeue", "q", "--all", "--json", cwd=folder).document
    assert (document["requeued"], document["delivered"], document["dead"], document["exit"]) == (3, 3, 0, 0)
    assert wb.LmdbBackend(folder / "blocks").get(b"\xff\0") == b"\xfe6"
    assert left(folder) == []
    assert walbatch("recover", "q", cwd=folder).code == 0


def test_without_a_backend_they_wait_in_the_log_and_it_says_so(folder: Path) -> None:
    ended = walbatch("dlq", "requeue", "q", "--all", cwd=folder)
    assert ended.code == 3
    assert "delivered 0, 3 left in the log" in ended.output
    assert ended.error == (
        "next: lane put is held, its operations wait in the log: walbatch recover q --lane put=URL\n"
    )
    assert left(folder) == []
    waiting = [row for row in walbatch("dump", "q", "--pending", cwd=folder).rows if not row["settled"]]
    assert [row.get("key", row.get("key_base64")) for row in waiting] == ["k3", "/wA=", "\x1b[2J"]
    assert walbatch("recover", "q", "--lane", APPLY, cwd=folder).code == 0
    assert len(delivered(folder)) == 3


def test_what_dies_again_is_exit_code_3(folder: Path) -> None:
    (folder / "again.py").write_text(
        "import walbatch as wb\ndef apply(batch):\n    return [wb.Rejected('still')] * len(batch)\n"
    )
    ended = walbatch("dlq", "requeue", "q", "6", "--lane", "put=python:again:apply", cwd=folder)
    assert ended.code == 3
    assert "0 left in the log, 1 dead again" in ended.output
    assert "next: look why with walbatch dlq list q" in ended.error
    letters, _ = inspection.dead_letters(folder / "q")
    assert [(letter.error, letter.options.origin) for letter in letters if letter.lsn > 9] == [("still", 6)]
    rows = walbatch("dlq", "list", "q", "--json", cwd=folder).document["letters"]
    assert [row.get("first_lsn") for row in rows] == [None, None, 6]
    assert [row.get("idempotency_key") for row in rows] == ["id-3", "id-9", None], (
        "the engine's own is not shown"
    )


def test_a_backend_that_is_down_leaves_them_in_the_log(folder: Path) -> None:
    ended = walbatch(
        "dlq", "requeue", "q", "3", "--lane", "put=python:target:fail", "--stall", "0.3", cwd=folder
    )
    assert ended.code == 3
    assert "1 left in the log" in ended.output
    assert "last error of lane put: RuntimeError: the database is down" in ended.error


def test_no_more_are_submitted_in_a_second_than_was_asked_for(folder: Path) -> None:
    started = time.monotonic()
    assert (
        walbatch("dlq", "requeue", "q", "--all", "--per-second", "10", "--lane", APPLY, cwd=folder).code == 0
    )
    assert time.monotonic() - started >= 0.2
    assert len(delivered(folder)) == 3


def test_a_lane_that_is_not_remembered_has_to_be_named(folder: Path) -> None:
    tamper(folder / "q" / "state", "lanes", b"put", lambda _: None)
    ended = walbatch("dlq", "requeue", "q", "--all", cwd=folder)
    assert ended.code == 2
    assert_one_line(ended, ["does not remember lane 'put'", "--lane put=URL"])
    assert left(folder) == [3, 6, 9]


# --- dropping ----------------------------------------------------------------------------------------------------------


def test_a_dropped_letter_is_gone_and_nothing_is_delivered(folder: Path) -> None:
    assert walbatch("load", "q", "--lane", "put", cwd=folder, stdin='{"key": "new"}').code == 0
    assert walbatch("recover", "q", "--lane", "put=lmdb:blocks", "--dry-run", cwd=folder).code == 3
    ended = walbatch("dlq", "drop", "q", "3", "9", cwd=folder)
    assert (ended.code, ended.output, ended.error) == (0, "dropped 2 dead letters\n", "")
    assert left(folder) == [6]
    assert len(walbatch("dump", "q", "--pending", cwd=folder).rows) == 1
    assert walbatch("dlq", "drop", "q", "--all", "--yes", "--json", cwd=folder).document == {
        "dropped": 1,
        "error": None,
        "exit": 0,
    }
    assert left(folder) == []


# --- wrong usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate", "q"], ["frobnicate", "walbatch dlq --help"]),
        (["list"], ["STORE", "walbatch dlq list --help"]),
        (["list", "nowhere"], ["does not exist", "check the path"]),
        (["list", "empty"], ["holds no store"]),
        (["list", "target.py"], ["is a file"]),
        (["show", "q"], ["LSN", "--help"]),
        (["show", "q", "many"], ["LSN", "--help"]),
        (["show", "q", "4"], ["no dead letter has LSN 4", "walbatch dlq list q"]),
        (["show", "q", "-1"], ["--help"]),
        (["export", "nowhere"], ["does not exist"]),
        (["requeue", "q"], ["name LSNs, or --all", "walbatch dlq list q"]),
        (["requeue", "q", "3", "--all"], ["either LSNs or --all, not both"]),
        (["requeue", "q", "3", "4", "99"], ["no dead letter has LSN 4, 99"]),
        (["requeue", "q", *map(str, range(10, 20))], ["LSN 10, 11, 12, 13, 14 and 5 more"]),
        (["requeue", "q", "--all", "--per-second", "0"], ["--per-second", "--help"]),
        (["requeue", "q", "--all", "--lane", "put="], ["KIND=URL"]),
        (["requeue", "q", "--all", "--lane", "put=nonsense"], ["not the URL"]),
        (["requeue", "nowhere", "--all"], ["does not exist"]),
        (["drop", "q"], ["name LSNs, or --all"]),
        (["drop", "q", "--all"], ["for good", "--yes", "walbatch dlq export q"]),
        (["drop", "q", "3", "4"], ["no dead letter has LSN 4"]),
        (["drop", "nowhere", "--all", "--yes"], ["does not exist"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_exit_code_2_and_changes_nothing(
    folder: Path, arguments: list[str], words: list[str]
) -> None:
    (folder / "empty").mkdir()
    before = picture(folder / "q")
    ended = walbatch("dlq", *arguments, cwd=folder)
    assert (ended.code, ended.output) == (2, "")
    assert_one_line(ended, words)
    assert picture(folder / "q") == before
    assert not (folder / "nowhere").exists()


# --- damage ------------------------------------------------------------------------------------------------------------


def lose_letter(store: Path) -> None:
    tamper(store / "state", "letters", key_of(6), flip_value)


def lose_state(store: Path) -> None:
    flip(store / "state" / "data.mdb", 0, count=12_288)


def test_a_damaged_letter_is_told_of_and_the_others_are_shown(folder: Path) -> None:
    lose_letter(folder / "q")
    ended = walbatch("dlq", "list", "q", cwd=folder)
    assert ended.code == 4
    assert "2 dead letters" in ended.output
    assert "the dead letter 6 of lane 'put' is not usable" in ended.error
    assert "quarantine/" in ended.error
    document = walbatch("dlq", "list", "q", "--json", cwd=folder).document
    assert (document["count"], document["exit"]) == (2, 4)
    assert "the dead letter 6" in document["error"]
    ended = walbatch("dlq", "export", "q", cwd=folder)
    assert (ended.code, [row["lsn"] for row in ended.rows]) == (4, [3, 9])
    assert_one_line(ended, ["the dead letter 6"])
    ended = walbatch("dlq", "show", "q", "6", cwd=folder)
    assert ended.code == 4
    assert_one_line(ended, ["the dead letter 6"])
    assert walbatch("dlq", "show", "q", "3", cwd=folder).code == 0


def test_beside_a_damaged_letter_the_others_can_be_requeued(folder: Path) -> None:
    lose_letter(folder / "q")
    ended = walbatch("dlq", "requeue", "q", "--all", "--lane", APPLY, cwd=folder)
    assert (ended.code, len(delivered(folder))) == (4, 2)
    assert "requeued 2 dead letters: delivered 2" in ended.output
    assert "the dead letter 6 of lane 'put'" in ended.error
    assert list((folder / "q" / "quarantine").glob("state-value-*.bytes")), "the damaged one is kept"


@pytest.mark.parametrize("arguments", [*READING, *WRITING])
def test_letters_in_a_damaged_state_are_not_taken_for_none(folder: Path, arguments: str) -> None:
    lose_state(folder / "q")
    before = picture(folder / "q")
    name, *rest = arguments.split()
    ended = walbatch("dlq", name, "q", *rest, cwd=folder)
    assert ended.code == 4
    assert "state is damaged" in (ended.error or ended.output)
    assert ended.error.count("\n") == 1
    assert picture(folder / "q") == before


def newer(made: Made) -> None:
    from tests.cli.test_app import newer_format  # noqa: PLC0415 - the one damage that both need

    newer_format(made)


def identity_as_directory(made: Made) -> None:
    (made.path / "identity").unlink()
    (made.path / "identity").mkdir()


STATES: dict[str, tuple[Callable[[Made], object], int, list[str]]] = {
    "no identity": (lambda made: (made.path / "identity").unlink(), 4, ["identity"]),
    "a damaged identity": (lambda made: flip(made.path / "identity", 30), 4, ["identity is damaged"]),
    "a newer format": (newer, 6, ["Upgrade walbatch"]),
    "identity is a directory": (identity_as_directory, 8, ["Is a directory"]),
}


@pytest.mark.parametrize("name", ["list", "export", "requeue --all", "drop --all --yes"])
@pytest.mark.parametrize("state", STATES)
def test_a_store_that_cannot_be_read_is_no_store_without_letters(
    tmp_path: Path, state: str, name: str
) -> None:
    made = make_store(tmp_path / "q", count=3)
    damage, code, words = STATES[state]
    damage(made)
    command, *rest = name.split()
    ended = walbatch("dlq", command, "q", *rest, cwd=tmp_path)
    assert ended.code == code, ended.error
    assert_one_line(ended, words)


def test_letters_can_be_seen_and_requeued_only_where_the_log_is_sound(folder: Path) -> None:
    first = min((folder / "q" / "wal").glob("*.seg"))
    assert walbatch("load", "q", "--lane", "put", cwd=folder, stdin='{"key": "new"}').code == 0
    last = max((folder / "q" / "wal").glob("*.seg"))
    assert first.exists() or last.exists()
    flip(last, 100)
    assert walbatch("dlq", "list", "q", cwd=folder).code == 0
    for which in ("3", "--all"):
        ended = walbatch("dlq", "requeue", "q", which, "--lane", APPLY, cwd=folder)
        assert ended.code == 4
        assert_one_line(ended, ["Nothing was changed"])
    assert left(folder) == [3, 6, 9]


# --- recover -----------------------------------------------------------------------------------------------------------


def test_a_recovery_that_leaves_dead_letters_is_exit_code_3_and_says_so_in_a_line(folder: Path) -> None:
    for more in (["--dry-run"], []):
        ended = walbatch("recover", "q", "--lane", APPLY, *more, cwd=folder)
        assert ended.code == 3
        assert ended.error == (
            f"3 dead letters are left: see walbatch dlq list {folder / 'q'}, then requeue or drop them\n"
        )
    document = walbatch("recover", "q", "--json", cwd=folder).document
    assert (document["dead_letters"], document["remaining"], document["exit"]) == (3, 0, 3)
    assert walbatch("dlq", "drop", "q", "--all", "--yes", cwd=folder).code == 0
    assert walbatch("recover", "q", "--lane", APPLY, cwd=folder).code == 0


def test_operations_that_die_in_a_recovery_do_not_count_as_delivered(folder: Path) -> None:
    shutil.rmtree(folder / "q")
    make_store(folder / "q", count=4)
    (folder / "again.py").write_text(
        "import walbatch as wb\ndef apply(batch):\n    return [wb.Rejected('no') if n % 2 else wb.Applied() for n in batch.lsns]\n"
    )
    ended = walbatch("recover", "q", "--lane", "put=python:again:apply", cwd=folder)
    assert ended.code == 3
    assert "delivered 2" in ended.output
    assert ", 0 left" in ended.output
    assert ended.error.startswith("2 dead letters are left")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("dlq list q", 4), ("dlq export q", 4), ("dlq show q 6", 4), ("dlq show q 3", 0), ("dlq requeue q 6", 4),
        ("dlq requeue q --all", 4), ("dlq requeue q 3", 0), ("dlq drop q --all --yes", 4), ("dlq drop q 3", 0),
        ("dlq drop q 6", 0), ("stats q", 4), ("verify q", 4), ("recover q --dry-run", 4), ("recover q", 4), ("dump q", 0),
    ],
)  # fmt: skip
def test_whatever_meets_a_damaged_letter_is_exit_code_4_once_the_rest_is_done(
    folder: Path, arguments: str, code: int
) -> None:
    lose_letter(folder / "q")
    more = ["--lane", APPLY] if " requeue " in arguments or arguments.startswith("recover") else []
    ended = walbatch(*arguments.split(), *more, cwd=folder)
    assert ended.code == code, ended.output + ended.error
    if code == 4:
        assert "dead letter" in ended.output + ended.error


def test_a_damaged_letter_can_be_dropped_by_its_lsn_and_then_all_is_well(folder: Path) -> None:
    lose_letter(folder / "q")
    ended = walbatch("dlq", "drop", "q", "6", "--json", cwd=folder)
    assert (ended.code, ended.document["dropped"]) == (0, 1)
    assert list((folder / "q" / "quarantine").glob("state-value-*.bytes")), "its bytes are kept"
    assert walbatch("dlq", "list", "q", cwd=folder).code == 0
    assert left(folder) == [3, 9]
    assert walbatch("dlq", "drop", "q", "6", cwd=folder).code == 2, "now there is none"
    assert walbatch("dlq", "drop", "q", "--all", "--yes", cwd=folder).code == 0
    assert walbatch("recover", "q", "--lane", APPLY, cwd=folder).code == 0


def test_only_those_that_can_be_read_are_dropped_by_all(folder: Path) -> None:
    lose_letter(folder / "q")
    document = walbatch("dlq", "drop", "q", "--all", "--yes", "--json", cwd=folder).document
    assert (document["dropped"], document["exit"]) == (2, 4)
    assert inspection.damaged_letters(folder / "q") == {6}


def test_what_was_dead_before_is_not_dead_again(tmp_path: Path) -> None:
    make_fates(tmp_path / "q")
    (tmp_path / "target.py").write_text(Path(target.__file__).read_text())
    document = walbatch(
        "dlq", "requeue", "q", "2", "--lane", APPLY, "--lane", "log", "--json", cwd=tmp_path
    ).document
    assert (document["requeued"], document["dead"]) == (1, 0)
    assert document["remaining"] == 9, "of the lane that is held, without what was cancelled"


def test_a_recovery_tells_of_a_dead_letter_that_cannot_be_read(folder: Path) -> None:
    lose_letter(folder / "q")
    documents: list[Any] = []
    for more in (["--dry-run"], []):
        documents.append(walbatch("recover", "q", "--lane", APPLY, *more, "--json", cwd=folder).document)
        assert ["the dead letter 6 of lane 'put'" in finding for finding in documents[-1]["findings"]] == [
            True
        ]
    assert [document["dead_letters"] for document in documents] == [2, 2]
    assert [document["exit"] for document in documents] == [4, 4]
    assert all("the dead letter 6" in document["error"] for document in documents)


# --- what was requeued before ------------------------------------------------------------------------------------------


def test_what_was_requeued_before_is_delivered_although_no_letter_is_left(folder: Path) -> None:
    assert walbatch("dlq", "requeue", "q", "--all", cwd=folder).code == 3
    ended = walbatch("dlq", "requeue", "q", "--all", cwd=folder)
    assert ended.code == 3, "nothing can be delivered, and work is left"
    assert ended.output == "requeued 0 dead letters: delivered 0, 3 left in the log, 0 dead again\n"
    assert "lane put is held" in ended.error
    ended = walbatch("dlq", "requeue", "q", "--all", "--lane", APPLY, cwd=folder)
    assert (ended.code, ended.error, len(delivered(folder))) == (0, "", 3)
    assert ended.output == "requeued 0 dead letters: delivered 3, 0 left in the log, 0 dead again\n"


def test_one_that_was_requeued_before_is_told_where_it_is(folder: Path) -> None:
    assert walbatch("dlq", "requeue", "q", "3", cwd=folder).code == 3
    ended = walbatch("dlq", "requeue", "q", "3", cwd=folder)
    assert ended.code == 2
    assert_one_line(
        ended, ["no dead letter has LSN 3", "waits in the log", "walbatch recover q --lane put=URL"]
    )
    assert walbatch("recover", "q", "--lane", APPLY, cwd=folder).code == 3, "two letters are left"
    ended = walbatch("dlq", "requeue", "q", "3", cwd=folder)
    assert ended.code == 2
    assert "waits in the log" not in ended.error


# --- lanes that are not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "recover q --lane putt=lmdb:b", "recover q --lane putt", "recover q --salvage --lane putt",
        "recover q --dry-run --lane putt", "dlq requeue q 3 --lane putt=lmdb:b", "dlq requeue q --all --lane putt",
        "dlq list q --lane putt", "dlq export q --lane putt", "dump q --lane putt",
    ],
)  # fmt: skip
def test_a_lane_that_the_store_does_not_know_is_refused_and_not_added(folder: Path, arguments: str) -> None:
    before = picture(folder / "q")
    ended = walbatch(*arguments.split(), cwd=folder)
    assert (ended.code, ended.output) == (2, "")
    assert_one_line(ended, ["no lane 'putt'", "'put'", "--lane"])
    assert {**picture(folder / "q"), "lock": None} == {**before, "lock": None}


def test_a_lane_that_only_the_log_or_a_letter_knows_is_known(folder: Path) -> None:
    tamper(folder / "q" / "state", "lanes", b"put", lambda _: None)
    assert walbatch("dlq", "list", "q", "--lane", "put", cwd=folder).code == 0
    assert walbatch("dlq", "requeue", "q", "3", "--lane", APPLY, cwd=folder).code == 0
    shutil.rmtree(folder / "q")
    made = make_store(folder / "q", kinds=("put", "log"), count=3)
    shutil.rmtree(made.path / "state")
    (made.path / "wal/dropped").unlink(missing_ok=True)
    assert walbatch("dump", "q", "--lane", "log", "--key", "nobody", cwd=folder).code == 0
    arguments = ["--lane", "put=lmdb:b", "--lane", "log=lmdb:b2", "--shards", "2"]
    assert walbatch("recover", "q", *arguments, cwd=folder).code == 0


def test_shards_for_a_lane_that_has_others_are_refused(folder: Path) -> None:
    for arguments in (["--shards", "5"], ["--shards", "5", "--lane", APPLY]):
        ended = walbatch("recover", "q", *arguments, cwd=folder)
        assert ended.code == 2
        assert_one_line(ended, ["--shards 5", "'put' 2"])
    assert walbatch("recover", "q", "--shards", "2", cwd=folder).code == 3


def test_without_letters_a_damaged_log_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    made = make_store(tmp_path / "q")
    flip(made.segments[2], SECTOR + 100)
    ended = walbatch("dlq", "requeue", "q", "--all", cwd=tmp_path)
    assert (ended.code, ended.output) == (4, "")
    assert_one_line(ended, [made.segments[2].name])
