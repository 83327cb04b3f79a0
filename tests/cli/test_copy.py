"""`walbatch copy`: what it says, and how it ends."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.cli.program import assert_one_line, walbatch
from walbatch.cli.copy import default_store


def make(path: Path, *statements: str) -> str:
    with closing(sqlite3.connect(path)) as db, db:
        for statement in statements:
            db.execute(statement)
    return f"sqlite://{path}"


def content(path: Path, table: str = "t") -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path)) as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


@pytest.fixture
def source(tmp_path: Path) -> str:
    return make(
        tmp_path / "source.db", "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)", "CREATE TABLE u (id INTEGER PRIMARY KEY)",
        "INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3, 'c')",
    )  # fmt: skip


def test_a_copy_says_what_it_copied(source: str, tmp_path: Path) -> None:
    target = tmp_path / "target.db"
    done = walbatch(
        "copy",
        source,
        f"sqlite://{target}",
        "--table",
        "t=t2",
        "--create",
        "--verify",
        "--store",
        tmp_path / "store",
    )
    assert (done.code, done.error) == (0, "")
    assert done.output.startswith("t to t2: 3 copied, 1 batch of ")
    assert "equal (3 rows)" in done.output
    assert content(target, "t2") == [(1, "a"), (2, "b"), (3, "c")]


def test_json_has_every_figure_and_a_file_has_every_batch(source: str, tmp_path: Path) -> None:
    lines = tmp_path / "batches.jsonl"
    done = walbatch(
        "copy", source, f"sqlite:{tmp_path}/target.db", "--table", "t", "--table", "u", "--create", "--json", "--batches", lines,
        "--store", tmp_path / "store",
    )  # fmt: skip
    document = done.document
    assert (done.code, document["exit"], document["failed"], document["remaining"], document["error"]) == (
        0,
        0,
        0,
        0,
        None,
    )
    table = document["tables"][0]
    assert (table["table"], table["copied"], table["failed"], table["batches"], table["is_created"]) == (
        "t",
        3,
        0,
        1,
        True,
    )
    assert table["batch_s_average"] > 0
    assert document["peak_memory_bytes"] > 0
    (batch,) = map(json.loads, lines.read_text().splitlines())
    assert (batch["table"], batch["last_batch_rows"], batch["copied"]) == ("t", 3, 3)


def test_failed_rows_end_in_3_are_listed_by_dlq_and_arrive_once_the_cause_is_gone(
    source: str, tmp_path: Path
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    to = make(target, "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT CHECK (x <> 'b'))")
    arguments = ("copy", source, to, "--table", "t", "--store", store)
    done = walbatch(*arguments)
    assert done.code == 3
    assert "1 failed" in done.output
    assert_next(done.error, f"1 row has failed: see walbatch dlq list {store}")
    listed = walbatch("dlq", "list", store)
    assert "CHECK constraint failed" in listed.output
    make(
        target,
        "ALTER TABLE t RENAME TO old",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)",
        "INSERT INTO t SELECT * FROM old",
    )
    assert walbatch(*arguments).code == 0
    assert len(content(target)) == 3
    assert not store.exists()


def assert_next(error: str, words: str) -> None:
    assert error.startswith("next: ")
    assert words in error


def test_a_verification_that_finds_a_difference_ends_in_3(source: str, tmp_path: Path) -> None:
    to = make(
        tmp_path / "target.db",
        "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)",
        "INSERT INTO t VALUES (7, 'more')",
    )
    done = walbatch("copy", source, to, "--table", "t", "--verify", "--store", tmp_path / "store")
    assert done.code == 3
    assert "DIFFERENT (3 rows in the source, 4 in the target)" in done.output
    assert_next(done.error, "the tables differ")


WRONG = {
    "no table": ([], ["name the tables to copy", "the source has t, u"]),
    "a table that is not there": (["--table", "nope"], ["no table 'nope'", "it has t, u"]),
    "a target that is not there": (["--table", "t"], ["no table 't'", "--create"]),
    "a table twice": (["--table", "t", "--table", "t"], ["twice"]),
    "no name": (["--table", "=t"], ["must be NAME"]),
    "two tables to one": (["--table", "t=x", "--table", "u=x", "--create"], ["2 tables would come to 'x'"]),
    "memory that is no size": (["--table", "t", "--memory", "much"], ["--memory 'much'"]),
    "memory that is too small": (["--table", "t", "--create", "--memory", "1M"], ["too few", "allow"]),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_one_line_and_ends_in_2(
    arguments: list[str], words: list[str], source: str, tmp_path: Path
) -> None:
    done = walbatch(
        "copy", source, f"sqlite://{tmp_path}/target.db", *arguments, "--store", tmp_path / "store"
    )
    assert done.code == 2
    assert_one_line(done, words)
    assert not (tmp_path / "target.db").exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("sqlite:///nowhere/at.all", ["does not exist"]), ("mysql://db/app", ["is no URL of a database that tables are copied"]),
        ("sqlite:///x?table=t", ["names a table"]), ("sqlite:///x?mode=ro", ["nothing is known behind its ?"]),
    ],
)  # fmt: skip
def test_a_source_that_is_none_is_named(place: str, words: list[str], tmp_path: Path) -> None:
    done = walbatch(
        "copy", place, f"sqlite://{tmp_path}/target.db", "--table", "t", "--store", tmp_path / "store"
    )
    assert done.code == 2
    assert_one_line(done, words)


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    url = "postgresql://app:secret@127.0.0.1:1/app?connect_timeout=2"
    done = walbatch(
        "copy", url, f"sqlite://{tmp_path}/target.db", "--table", "t", "--store", tmp_path / "store"
    )
    assert done.code == 8
    assert "127.0.0.1" in done.error
    assert "secret" not in done.error + done.output


def test_a_copy_that_names_no_store_has_one_of_its_own(source: str, tmp_path: Path) -> None:
    to = make(tmp_path / "target.db", "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT CHECK (x <> 'b'))")
    done = walbatch(
        "copy", source, to, "--table", "t", "--json", env={"XDG_STATE_HOME": str(tmp_path / "state")}
    )
    assert done.code == 3
    (store,) = (tmp_path / "state" / "walbatch").iterdir()
    assert done.document["store"] == str(store)
    assert store.name.startswith("copy-")
    assert store.stat().st_mode & 0o077 == 0


def test_the_own_store_is_told_by_source_target_and_tables_without_the_password() -> None:
    def of(user: str, *tables: str) -> str:
        return default_store(f"postgresql://{user}@db/app", "sqlite:///x", dict.fromkeys(tables, ""))

    assert of("app:secret", "a", "b") == of("app:other", "b", "a")
    assert of("app", "a") != of("app", "a", "b")


@pytest.mark.parametrize(
    "place",
    [
        "postgresql://u:se%zzcret@h/d", "postgresql://u:se cret@h/d", "postgresql://u:secret@h:port/d?sslmode",
        "host=h password=secret dbname=d", "postgresql:secret", "secret",
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["source", "target"])
def test_what_is_no_url_is_never_repeated(role: str, place: str, source: str, tmp_path: Path) -> None:
    places = (place, source) if role == "source" else (source, place)
    for store in (["--store", str(tmp_path / "store")], []):
        done = walbatch("copy", *places, "--table", "t", *store)
        assert done.code == 2
        assert_one_line(done, [f"the {role} is no URL of a database"])
        assert "cret" not in done.error


def test_the_store_of_a_copy_that_names_none_is_the_same_by_whatever_path(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = default_store(source, f"sqlite://{tmp_path}/target.db", {"t": ""})
    assert default_store("sqlite:source.db", "sqlite:./target.db", {"t": ""}) == whole
