"""What a store goes on with, and what it refuses: the rest of its rows is in one target only."""

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.copying.places import ROOT, count, finished, lite
from walbatch.copying import CopyProgress, CopyReport, copy_tables
from walbatch.errors import ConfigError, CorruptionError, UnsupportedFormat

ROWS = 30_000


class Interruption(BaseException):
    """Ends a copy as Ctrl-C does."""


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str, call: Callable[[], object]) -> None:
    """End a call where the course of a copy calls `where`."""

    def end(*_: object) -> None:
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(f"walbatch.copying.course.{where}", end)
        with pytest.raises(Interruption):
            call()


def interrupted(source: str, target: str, store: Path, *, after: int = 8_000) -> None:
    """A copy of table t that ends in the middle, with rows in its store that are not in the target yet."""
    code = (
        "import os, sys; from walbatch.copying import copy_tables\n"
        "def tell(now):\n"
        f"    if now.copied >= {after} and now.read > now.copied: os.kill(os.getpid(), 9)\n"
        "copy_tables(sys.argv[1], sys.argv[2], ['t'], store=sys.argv[3], create=True, progress=tell)"
    )
    command = [sys.executable, "-c", code, source, target, str(store)]
    assert subprocess.run(command, cwd=ROOT, timeout=60, check=False).returncode == -signal.SIGKILL


@pytest.fixture
def source(tmp_path: Path) -> str:
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS})"
    return lite(
        tmp_path / "source.db", "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)",
        f"INSERT INTO t {numbers} SELECT i, 'x' || i FROM n",
        "CREATE TABLE u (id INTEGER PRIMARY KEY)", "INSERT INTO u VALUES (1)",
    )  # fmt: skip


def copy(source: str, target: Path, store: Path, *tables: str, verify: bool = False) -> CopyReport:
    return copy_tables(source, f"sqlite://{target}", tables or ["t"], store=store, create=True, verify=verify)


def test_a_target_that_was_made_anew_is_refused_and_nothing_is_lost(source: str, tmp_path: Path) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupted(source, f"sqlite://{target}", store)
    for file in tmp_path.glob("target.db*"):
        file.unlink()
    with pytest.raises(ConfigError, match="knows nothing of this copy"):
        copy(source, target, store)
    assert store.exists()
    for place in (store, *tmp_path.glob("target.db*")):
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert not copy(source, target, store).is_store_kept
    assert count(target) == ROWS


def test_a_target_that_was_taken_back_is_refused_where_rows_between_it_and_the_store_are_missing(
    source: str, tmp_path: Path
) -> None:
    target, backup, store = tmp_path / "target.db", tmp_path / "backup.db", tmp_path / "store"
    with contextlib.closing(sqlite3.connect(target, check_same_thread=False)) as db:

        def tell(now: CopyProgress) -> None:
            if now.copied and not backup.exists():
                with contextlib.closing(sqlite3.connect(backup)) as other:
                    db.backup(other)
            if now.copied >= 8_000 and not db.in_transaction:
                db.execute("BEGIN IMMEDIATE")  # from here on nothing arrives

        report = copy_tables(
            source, f"sqlite://{target}", ["t"], store=store, create=True, stall_s=0.5, batch_s=0.5, progress=tell
        )  # fmt: skip
        assert report.error is not None
        assert report.remaining
        assert 0 < count(backup) < count(target) < ROWS
        db.rollback()
    for file in tmp_path.glob("target.db*"):
        file.unlink()
    backup.rename(target)
    with pytest.raises(ConfigError, match="the target was taken back"):
        copy(source, target, store)


def test_a_target_that_was_taken_back_gets_the_rest_again_where_nothing_waits_in_the_store(
    source: str, tmp_path: Path
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    lite(target, "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT CHECK (id <> 20000))")
    assert copy(source, target, store).failed == 1
    with contextlib.closing(sqlite3.connect(target)) as db, db:
        key = bytes.fromhex("0100") + b"i" + (4_000).to_bytes(8, "little")
        db.execute("UPDATE walbatch_copies SET number = 4000, key = ?", (key,))
        db.execute("DELETE FROM t WHERE id > 4000")
    assert copy(source, target, store).failed
    assert count(target) == ROWS - 1


@pytest.mark.parametrize("what", ["target", "source", "tables"])
def test_a_store_is_refused_for_another_copy_before_anything_is_made(
    what: str, source: str, tmp_path: Path
) -> None:
    target, store, other = tmp_path / "target.db", tmp_path / "store", tmp_path / "other.db"
    interrupted(source, f"sqlite://{target}", store)
    if what == "source":
        shutil.copy(tmp_path / "source.db", other)
        source = f"sqlite://{other}"
    with pytest.raises(ConfigError, match="begun for something else: tables t from") as caught:
        copy(source, other if what == "target" else target, store, *(["u"] if what == "tables" else ["t"]))
    assert "remove the store to begin anew" in str(caught.value)
    assert what != "target" or not other.exists()


def test_dead_letters_of_a_table_outlast_a_copy_of_another_with_the_same_store(
    source: str, tmp_path: Path
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    lite(target, "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT CHECK (id <> 7))")
    assert copy(source, target, store).failed == 1
    with pytest.raises(ConfigError, match="begun for something else"):
        copy(source, target, store, "u")
    assert store.exists()


def test_the_same_files_are_the_same_copy_by_whatever_path(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupted(source, f"sqlite://{target}", store)
    monkeypatch.chdir(tmp_path)
    report = copy_tables("sqlite:source.db", "sqlite:./target.db", ["t"], store=store)
    assert (report.is_store_kept, count(target)) == (False, ROWS)


def test_a_copy_that_ends_before_its_record_is_written_begins_again(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupt(monkeypatch, "write", lambda: copy(source, target, store))
    assert (store / "identity").exists()
    assert not copy(source, target, store).is_store_kept
    assert count(target) == ROWS


def test_a_record_that_is_damaged_or_newer_is_refused(source: str, tmp_path: Path) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupted(source, f"sqlite://{target}", store)
    for text in ("", "{", "[]", '{"format": 1}', '{"format": 1, "source": 1, "target": "", "tables": {}}'):
        (store / "copy.json").write_text(text)
        with pytest.raises(CorruptionError, match="nothing tells what is in the store"):
            copy(source, target, store)
    (store / "copy.json").write_text('{"format": 2}')
    with pytest.raises(UnsupportedFormat):
        copy(source, target, store)
    (store / "copy.json").unlink()
    with pytest.raises(ConfigError, match="the store of something else"):
        copy(source, target, store)


# --- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["renamed", "forgotten", "half removed"])
def test_a_copy_that_is_killed_while_its_store_is_removed_is_complete_for_the_next_run(
    point: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    lite(target, "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)", "CREATE TABLE effects (id)")
    lite(target, "CREATE TRIGGER counted AFTER INSERT ON t BEGIN INSERT INTO effects VALUES (new.id); END")
    where = {"renamed": "_Course._forget", "forgotten": "_remove_done", "half removed": "shutil.rmtree"}[
        point
    ]
    interrupt(monkeypatch, where, lambda: copy(source, target, store))
    assert not store.exists()
    lite(target, "DELETE FROM effects")
    report = copy(source, target, store, verify=True)
    assert (report.is_complete, report.is_equal, report.is_store_kept) == (True, True, False)
    assert report.tables[0].copied == 0
    assert (count(target, "effects"), count(target, "walbatch_copies")) == (0, 0)
    assert finished(tmp_path)
    assert copy(source, target, store).tables[0].copied == ROWS  # the one after that is a new copy


@pytest.mark.parametrize("what", ["removed", "emptied"])
def test_a_target_that_has_nothing_of_a_complete_copy_gets_all_rows_again(
    what: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupt(monkeypatch, "_remove_done", lambda: copy(source, target, store))
    if what == "removed":
        target.unlink()
    else:
        lite(target, "DELETE FROM t")
    assert copy(source, target, store).tables[0].copied == ROWS
    assert finished(tmp_path)


def test_what_is_left_of_the_store_of_another_copy_is_removed(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, store = tmp_path / "target.db", tmp_path / "store"
    interrupt(monkeypatch, "_remove_done", lambda: copy(source, target, store))
    assert copy(source, target, store, "u").tables[0].copied == 1
    assert finished(tmp_path)
