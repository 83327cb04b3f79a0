"""SQLite as a backend: exactly once in effect, whoever else has the file open."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

import walbatch as wb
from tests.backends.sqlsuite import SqlSuite
from walbatch.backends import open_backend, url_of
from walbatch.backends.sql.table import Table
from walbatch.backends.sqlite import SqliteBackend
from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    ConfigError,
    CorruptionError,
    RetryBatch,
    StorageError,
)
from walbatch.testing.contracts import STORE
from walbatch.types import Failures, Mark, Operation

DEADLINE_S = 30


class TestSqlite(SqlSuite):
    count_call: ClassVar[str] = "INSERT INTO counts VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1"
    check_call: ClassVar[str] = "INSERT INTO checked VALUES (?)"

    def make(self, path: Path, table: Any = None, **options: Any) -> SqliteBackend:
        return SqliteBackend(path / "app.db", table, **options)

    def run(self, path: Path, *statements: str) -> list[tuple[Any, ...]]:
        db = sqlite3.connect(path / "app.db")
        try:
            rows: list[tuple[Any, ...]] = []
            for statement in statements:
                rows = db.execute(statement).fetchall()
            db.commit()
            return rows
        finally:
            db.close()

    def test_commits_are_synced_into_a_log(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            assert isinstance(backend, SqliteBackend)
            assert backend._db is not None
            assert backend._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert backend._db.execute("PRAGMA synchronous").fetchone()[0] >= 2
        assert stat.S_IMODE((tmp_path / "app.db").stat().st_mode) == 0o600

    def test_opening_commits_something_so_that_what_it_shows_is_durable(self, tmp_path: Path) -> None:
        for opened in (1, 2, 3):
            with self.with_table(tmp_path, "pages"):
                pass
            assert self.run(tmp_path, "SELECT opened FROM walbatch_marks") == [(opened,)] * self.shards

    def test_who_locks_the_database_makes_the_batch_wait_and_come_again(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            backend.limit_time(0.1)
            other = sqlite3.connect(tmp_path / "app.db", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(RetryBatch, match="locked"):
                backend.apply(self.batch(self.pairs(2)))
            other.execute("ROLLBACK")
            other.close()
            self.apply(backend, self.batch(self.pairs(2)))
        self.check_content(tmp_path, self.pairs(2))

    def test_a_call_that_still_writes_makes_the_next_one_come_again(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)
        begun, go_on = threading.Event(), threading.Event()

        def slow(cursor: Any, operation: Operation) -> None:
            self.count(cursor, operation)
            begun.set()
            assert go_on.wait(DEADLINE_S)

        with self.with_table(tmp_path, write=slow) as backend, ThreadPoolExecutor(1) as pool:
            first = pool.submit(backend.apply, self.batch([(b"a", b"")]))
            assert begun.wait(DEADLINE_S)
            backend.limit_time(0.1)
            with pytest.raises(RetryBatch, match="other shards"):
                backend.apply(self.batch([(b"a", b"")]))
            go_on.set()
            first.result(DEADLINE_S)
            backend.limit_time(None)
            backend.apply(self.batch([(b"a", b"")]))
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    @pytest.mark.parametrize(
        ("column", "types"),
        [
            ("id INTEGER PRIMARY KEY", {bytes, int}), ("id TEXT PRIMARY KEY", {bytes, str, int}),
            ("id PRIMARY KEY", {bytes, str, int}), ("id BLOB PRIMARY KEY", {bytes, str, int}),
            ("id numeric PRIMARY KEY", {bytes}), ("id TEXT COLLATE RTRIM UNIQUE", {bytes}),
            ("id TEXT COLLATE NOCASE, UNIQUE (id COLLATE BINARY)", {bytes}),
        ],
    )  # fmt: skip
    def test_it_knows_which_keys_a_column_keeps_apart(
        self, tmp_path: Path, column: str, types: set[type]
    ) -> None:
        self.run(tmp_path, f"CREATE TABLE t (payload, {column})")
        with self.with_table(tmp_path, Table("t", key="id")) as backend:
            assert isinstance(backend, SqliteBackend)
            assert backend._apart == [types]

    def test_a_table_that_would_be_temporary_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="would be temporary"):
            self.make(tmp_path, "Temp.pages").open("put", 1, STORE)

    @pytest.mark.parametrize(
        "create",
        [
            ["CREATE TABLE t (id TEXT COLLATE NOCASE PRIMARY KEY, v text)"],
            [
                "CREATE TABLE t (id COLLATE NOCASE PRIMARY KEY, v text)",
                "CREATE INDEX i ON t (id COLLATE BINARY)",
            ],
            ["CREATE TABLE t (id TEXT PRIMARY KEY COLLATE NOCASE, v text) WITHOUT ROWID"],
        ],
    )
    def test_keys_that_are_one_to_the_table_end_as_the_last_operation_says(
        self, tmp_path: Path, create: list[str]
    ) -> None:
        self.run(tmp_path, *create)
        table = Table("t", key="id", columns="v", key_codec="text", codec="text", empty_deletes=True)
        with self.with_table(tmp_path, table) as backend:
            self.apply(
                backend,
                self.batch([(b"KEY", b"1"), (b"key", b"2"), (b"KEY", b"3"), (b"x", b"1"), (b"X", b"")]),
            )
        assert self.run(tmp_path, "SELECT v FROM t") == [("3",)]

    @pytest.mark.parametrize("how", ["replaced", "gone"])
    def test_a_file_that_was_replaced_under_us_stops_the_shard(self, tmp_path: Path, how: str) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(self.pairs(1)))
            before = (tmp_path / "app.db").rename(tmp_path / "before.db")
            if how == "replaced":
                shutil.copy(before, tmp_path / "app.db")
            with pytest.raises(BackendBroken, match=how):
                backend.apply(self.batch(self.pairs(2)))
            with pytest.raises(StorageError, match=how):
                backend.applied_mark(0)
        before.replace(tmp_path / "app.db")
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(self.pairs(2)))
        self.check_content(tmp_path, self.pairs(2))

    def test_large_batches_go_in_statements_of_bounded_size(self, tmp_path: Path) -> None:
        pairs = self.pairs(1_203)
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(pairs))
        self.check_content(tmp_path, pairs)

    def test_a_trigger_that_rolls_everything_back_lets_the_batch_be_searched(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.run(
                tmp_path,
                "CREATE TRIGGER no BEFORE INSERT ON pages WHEN new.payload = x'62' BEGIN SELECT RAISE(ROLLBACK, 'never b'); END",
            )
            with pytest.raises(BatchRejected):
                backend.apply(self.batch([(b"1", b"a"), (b"2", b"b")]))
            self.apply(backend, self.batch([(b"1", b"a")]))
        self.check_content(tmp_path, [(b"1", b"a")])

    def test_a_trigger_may_refuse_a_row(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.run(
                tmp_path,
                "CREATE TRIGGER no BEFORE INSERT ON pages WHEN new.payload = x'62' BEGIN SELECT RAISE(ABORT, 'never b'); END",
            )
            answer = backend.apply(self.batch([(b"1", b"a"), (b"2", b"b")]))
            assert isinstance(answer, Failures)
            assert "never b" in str(answer.outcomes[1])

    def test_a_full_disk_makes_the_batch_come_again(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            assert isinstance(backend, SqliteBackend)
            assert backend._db is not None
            backend._db.execute("PRAGMA max_page_count = 12")
            big = [(b"k", bytes(200_000))]
            with pytest.raises(RetryBatch, match="full"):
                backend.apply(self.batch(big))
            assert backend.applied_mark(0) == Mark()
            backend._db.execute("PRAGMA max_page_count = 1000000")
            self.apply(backend, self.batch(big))

    def test_files_that_are_no_database_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "app.db").write_bytes(b"not a database at all, but long enough to look at " * 40)
        with pytest.raises(ConfigError, match="no SQLite database"):
            self.make(tmp_path, "pages").open("put", 1, STORE)

    def test_a_folder_that_is_missing_is_a_storage_error(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="folder must exist"):
            SqliteBackend(tmp_path / "absent" / "app.db", "pages").open("put", 1, STORE)

    def test_a_damaged_file_is_corruption(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(self.pairs(200)))
        data = bytearray((tmp_path / "app.db").read_bytes())
        data[4096 : 3 * 4096] = os.urandom(2 * 4096)
        (tmp_path / "app.db").write_bytes(data)
        with pytest.raises((CorruptionError, ConfigError)):
            self.make(tmp_path, "pages").open("put", 1, STORE)


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "what?", "#1", "caf\u00e9", "a:b@c", "\udcff"])
def test_the_url_of_a_path_makes_it_again(tmp_path: Path, name: str) -> None:
    backend = SqliteBackend(tmp_path / name, "t")
    url = url_of(backend)
    assert url is not None
    assert url.isprintable()
    again = open_backend(url, allow_python=False)
    assert isinstance(again, SqliteBackend)
    assert again.path == backend.path


# --- under an engine ------------------------------------------------------------------------------------------------


def test_the_lanes_time_limit_is_told_to_the_backend_and_so_are_its_changes(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "app.db", "pages")
    with wb.Engine.open(tmp_path / "store", {"put": wb.Lane(backend, timeout_s=7.0)}) as engine:
        assert backend._wait_s() == 3.5
        engine.configure("put", timeout_s=2.0)
        assert backend._wait_s() == 1.0
        engine.configure("put", timeout_s=None)
        assert backend._wait_s() > 3600


def test_of_a_batch_only_the_row_that_breaks_a_constraint_is_dead_and_it_names_the_constraint(
    tmp_path: Path,
) -> None:
    db = sqlite3.connect(tmp_path / "app.db")
    db.execute(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, name TEXT CONSTRAINT has_name CHECK (name <> ''))"
    )
    db.close()
    table = wb.Table("users", key="id", columns="name", key_codec="integer", codec="text")
    lane = wb.Lane(SqliteBackend(tmp_path / "app.db", table))
    with wb.Engine.open(tmp_path / "store", {"users": lane}) as engine:
        lsns = engine.submit_many("users", [(b"1", b"Ann"), (b"2", b""), (b"3", b"Bob")])
        engine.flush(timeout=DEADLINE_S)
        (letter,) = engine.dead_letters()
    assert (letter.lsn, letter.reason) == (lsns[1], wb.DeathReason.REJECTED)
    assert letter.error == "CHECK constraint failed: has_name (SQLITE_CONSTRAINT_CHECK)"
    db = sqlite3.connect(tmp_path / "app.db")
    assert db.execute("SELECT * FROM users").fetchall() == [(1, "Ann"), (3, "Bob")]
    db.close()


def test_recovery_opens_the_backend_that_the_store_remembers(tmp_path: Path) -> None:
    lane = wb.Lane(SqliteBackend(tmp_path / "app.db", "pages"))
    with wb.Engine.open(tmp_path / "store", {"put": lane}) as engine:
        engine.pause("put")
        engine.submit_many("put", [(b"a", b"1"), (b"b", b"2")])
        engine.close(drain=False)
    command = [sys.executable, "-m", "walbatch", "recover", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    db = sqlite3.connect(tmp_path / "app.db")
    assert sorted(db.execute("SELECT key, payload FROM pages")) == [(b"a", b"1"), (b"b", b"2")]
    db.close()
