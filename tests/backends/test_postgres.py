"""PostgreSQL as a backend, on real servers: exactly once in effect, whatever becomes of connections and servers."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

psycopg = pytest.importorskip(
    "psycopg", reason="PostgresBackend needs psycopg: pip install 'walbatch[postgres]'"
)

from tests.backends.proxy import Loss, Proxy  # noqa: E402 - what needs psycopg
from tests.backends.servers import COUNTED, database, own_server, shared_server  # noqa: E402
from tests.backends.sqlsuite import USERS, SqlSuite, user  # noqa: E402
from tools.postgres import Server  # noqa: E402
from walbatch.backends import open_backend, strip_password, url_of  # noqa: E402
from walbatch.backends.postgres import PostgresBackend  # noqa: E402
from walbatch.backends.sql.table import Table  # noqa: E402
from walbatch.errors import (  # noqa: E402
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    RetryBatch,
    StorageError,
)
from walbatch.testing.contracts import STORE  # noqa: E402
from walbatch.types import Applied, Failures, Mark, Operation, Rejected  # noqa: E402

__all__ = ["own_server", "shared_server"]

DEADLINE_S = 60


class TestPostgres(SqlSuite):
    count_call: ClassVar[str] = (
        "INSERT INTO counts VALUES (%s, 1) ON CONFLICT (name) DO UPDATE SET count = counts.count + 1"
    )
    check_call: ClassVar[str] = "INSERT INTO checked VALUES (%s)"

    @pytest.fixture(autouse=True)
    def _on(self, shared_server: Server) -> None:
        self.server = shared_server

    def target(self, path: Path) -> str:
        return self.server.conninfo(database(self.server, path))

    def make(self, path: Path, table: Any = None, **options: Any) -> PostgresBackend:
        return PostgresBackend(self.target(path), table, **options)

    def run(self, path: Path, *statements: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.target(path)) as connection:
            rows: list[tuple[Any, ...]] = []
            for statement in statements:
                cursor = connection.execute(statement.encode())
                rows = cursor.fetchall() if cursor.description else []
            return rows

    # --- types ----------------------------------------------------------------------------------------------------

    TYPES: ClassVar[dict[str, tuple[str, object, object]]] = {
        "integer": ("integer", 7, 7),
        "integer from text": ("integer", "7", 7),
        "numeric": ("numeric(10,2)", 1.25, 1.25),
        "double": ("double precision", 0.1, 0.1),
        "boolean": ("boolean", True, True),
        "text": ("text", 'quotes "\' \\ and { }, and %', 'quotes "\' \\ and { }, and %'),
        "empty text": ("text", "", ""),
        "the text NULL": ("text", "NULL", "NULL"),
        "nothing": ("text", None, None),
        "as long as may be": ("varchar(3)", "abc", "abc"),
        "padded": ("char(3)", "ab", "ab "),
        "json": ("jsonb", {"a": [1, None]}, {"a": [1, None]}),
        "array": ("integer[]", "{1,2}", [1, 2]),
        "bits": ("bit(3)", "101", "101"),
        "bytes": ("bytea", "text", b"text"),
        "uuid": ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", None),
        "time": ("timestamptz", "2026-01-02T03:04:05Z", None),
    }  # fmt: skip

    @pytest.mark.parametrize("kind", TYPES)
    def test_a_value_reaches_a_column_of_its_type(self, tmp_path: Path, kind: str) -> None:
        type_, value, expected = self.TYPES[kind]
        self.run(tmp_path, f"CREATE TABLE t (id text PRIMARY KEY, v {type_})")
        with self.with_table(
            tmp_path, Table("t", key="id", columns="v", key_codec="text", codec="json")
        ) as backend:
            self.apply(backend, self.batch([(b"k", json.dumps({"v": value}).encode())]))
        ((found,),) = self.run(tmp_path, "SELECT v FROM t")
        if expected is not None or value is None:
            assert found == expected

    REFUSED: ClassVar[dict[str, tuple[str, object, str]]] = {
        "too long": ("varchar(3)", "abcd", "too long"),
        "too long to be padded": ("char(3)", "abcd", "too long"),
        "no number": ("integer", "seven", "invalid input syntax"),
        "too large a number": ("smallint", 70_000, "out of range"),
        "no json": ("jsonb", "{", "json"),
        "NUL": ("text", "a\0b", "NUL"),
        "half a character": ("text", "\ud800", "surrogates"),
        "outside of a domain": ("positive", -1, "positive"),
    }  # fmt: skip

    @pytest.mark.parametrize("kind", REFUSED)
    def test_a_value_that_its_type_cannot_have_is_refused_alone_and_never_changed(
        self, tmp_path: Path, kind: str
    ) -> None:
        type_, value, says = self.REFUSED[kind]
        self.run(
            tmp_path,
            "CREATE DOMAIN positive AS integer CHECK (value > 0)",
            f"CREATE TABLE t (id text PRIMARY KEY, v {type_})",
        )
        with self.with_table(
            tmp_path, Table("t", key="id", columns="v", key_codec="text", codec="json")
        ) as backend:
            answer = backend.apply(
                self.batch([(b"a", b"{}"), (b"k", json.dumps({"v": value}).encode()), (b"z", b"{}")])
            )
        assert isinstance(answer, Failures)
        assert [*answer.outcomes] == [1]
        assert says in str(answer.outcomes[1])
        assert self.run(tmp_path, "SELECT id FROM t ORDER BY id") == [("a",), ("z",)]

    def test_a_trigger_may_refuse_a_row_in_its_own_words(self, tmp_path: Path) -> None:
        self.run(
            tmp_path, self.users,
            "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF new.name = 'Eve' THEN RAISE 'not you'; END IF; "
            "RETURN new; END $$", "CREATE TRIGGER no BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION no()",
        )  # fmt: skip
        with self.with_table(tmp_path, USERS) as backend:
            answer = backend.apply(self.batch([user(1, "Ann", None), user(2, "Eve", None)]))
        assert isinstance(answer, Failures)
        assert answer.outcomes[1] == Rejected("not you (SQLSTATE P0001)")

    def test_keys_that_are_one_to_the_table_are_applied_in_their_order(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            "CREATE COLLATION same (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        )
        self.run(tmp_path, "CREATE TABLE t (id text COLLATE same PRIMARY KEY, v text)")
        with self.with_table(
            tmp_path, Table("t", key="id", columns="v", key_codec="text", codec="text")
        ) as backend:
            self.apply(backend, self.batch([(b"KEY", b"1"), (b"other", b"x"), (b"key", b"2")]))
        assert self.run(tmp_path, "SELECT v FROM t ORDER BY v") == [("2",), ("x",)]

    def test_a_table_may_lie_in_a_schema(self, tmp_path: Path) -> None:
        self.run(tmp_path, "CREATE SCHEMA app")
        with self.with_table(tmp_path, "app.pages") as backend:
            self.apply(backend, self.batch(self.pairs(2)))
        assert self.run(tmp_path, "SELECT count(*) FROM app.pages") == [(2,)]

    def test_bytes_reach_a_domain_over_bytes_as_they_are(self, tmp_path: Path) -> None:
        self.run(
            tmp_path, "CREATE DOMAIN blob AS bytea", "CREATE DOMAIN small AS blob CHECK (length(value) < 100)",
            "CREATE TABLE t (key small PRIMARY KEY, payload small)",
        )  # fmt: skip
        pairs = [(b"\\x41", b"\\x41"), (b"\xff", b"C:\\\\temp")]
        with self.with_table(tmp_path, Table("t", empty_deletes=True)) as backend:
            for first_lsn in (1, 11):
                self.apply(backend, self.batch(pairs, first_lsn=first_lsn))
            self.apply(backend, self.batch([(b"\xff", b"")], first_lsn=21))
        assert self.run(tmp_path, "SELECT key::bytea, payload::bytea FROM t") == pairs[:1]

    # --- locks and time limits ------------------------------------------------------------------------------------

    def test_who_locks_the_row_of_the_mark_makes_the_batch_wait_and_come_again(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend, psycopg.connect(self.target(tmp_path)) as other:
            backend.limit_time(0.4)
            other.execute("SELECT 1 FROM walbatch_marks FOR UPDATE")
            with pytest.raises(RetryBatch, match="lock timeout"):
                backend.apply(self.batch(self.pairs(2)))
            other.rollback()
            self.apply(backend, self.batch(self.pairs(2)))
        self.check_content(tmp_path, self.pairs(2))

    def test_a_statement_that_takes_longer_than_the_lane_allows_is_cut_smaller(self, tmp_path: Path) -> None:
        def sleep(cursor: Any, operation: Operation) -> None:
            cursor.execute("SELECT pg_sleep(30)")

        with self.with_table(tmp_path, write=sleep) as backend:
            backend.limit_time(0.4)
            with pytest.raises(BatchTooLarge, match="longer than the lane allows"):
                backend.apply(self.batch(self.pairs(2)))
            with pytest.raises(RetryBatch, match="statement timeout"):
                backend.apply(self.batch(self.pairs(1)))

    def test_a_batch_that_two_calls_apply_at_once_takes_effect_once(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)
        entered = threading.Event()

        def slow(cursor: Any, operation: Operation) -> int | None:
            self.count(cursor, operation)
            entered.set()
            cursor.execute("SELECT pg_sleep(0.2)")
            return operation.lsn

        batch = self.batch([(b"a", b""), (b"b", b"")])
        with self.with_table(tmp_path, write=slow) as backend, ThreadPoolExecutor(2) as pool:
            first = pool.submit(backend.apply, batch)
            assert entered.wait(DEADLINE_S)
            second = pool.submit(backend.apply, batch)
            assert first.result(DEADLINE_S) == [Applied(1), Applied(2)]
            assert second.result(DEADLINE_S) == [Applied(None), Applied(None)]
        assert sorted(self.run(tmp_path, "SELECT name, count FROM counts")) == [("a", 1), ("b", 1)]

    def test_a_deadlock_makes_the_batch_come_again(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts, "INSERT INTO counts VALUES ('a', 0), ('b', 0)")
        held = threading.Event()

        def both(cursor: Any, operation: Operation) -> None:
            cursor.execute("SET LOCAL deadlock_timeout = '100ms'")
            self.count(cursor, operation)
            held.set()
            cursor.execute("SELECT 1 FROM counts WHERE name = 'b' FOR UPDATE")

        with (
            self.with_table(tmp_path, write=both) as backend,
            psycopg.connect(self.target(tmp_path)) as other,
        ):
            other.execute("SET deadlock_timeout = '20s'")
            other.execute("SELECT 1 FROM counts WHERE name = 'b' FOR UPDATE")
            with ThreadPoolExecutor(1) as pool:
                applying = pool.submit(backend.apply, self.batch([(b"a", b"")]))
                assert held.wait(DEADLINE_S)
                other.execute("SELECT 1 FROM counts WHERE name = 'a' FOR UPDATE")
                with pytest.raises(RetryBatch, match="deadlock"):
                    applying.result(DEADLINE_S)
        assert self.run(tmp_path, "SELECT name, count FROM counts ORDER BY name") == [("a", 0), ("b", 0)]

    # --- connections ----------------------------------------------------------------------------------------------

    def end_connections(self, path: Path) -> int:
        with psycopg.connect(self.target(path), autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity "
                "WHERE application_name = 'walbatch' AND datname = current_database()"
            ).fetchone()
        assert row is not None
        return int(row[0])

    def test_connections_that_were_ended_meanwhile_are_replaced_without_a_failure(
        self, tmp_path: Path
    ) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            for number in range(3):
                self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=number + 1))
                assert self.end_connections(tmp_path) == 1
            assert backend.applied_mark(0).covers(3)
        self.check_content(tmp_path, self.pairs(3))

    def test_a_connection_that_is_ended_in_the_middle_of_a_batch_leaves_nothing_of_it(
        self, tmp_path: Path
    ) -> None:
        self.run(tmp_path, self.counts)
        times = 0

        def attacked(cursor: Any, operation: Operation) -> None:
            nonlocal times
            self.count(cursor, operation)
            times += 1
            if times == 2:
                assert self.end_connections(tmp_path)

        batch = self.batch([(b"a", b""), (b"b", b""), (b"c", b"")])
        with self.with_table(tmp_path, write=attacked) as backend:
            with pytest.raises(RetryBatch):
                backend.apply(batch)
            assert backend.applied_mark(0) == Mark()
            backend.apply(batch)
        assert sorted(self.run(tmp_path, "SELECT name, count FROM counts")) == [("a", 1), ("b", 1), ("c", 1)]

    @pytest.fixture
    def proxy(self, shared_server: Server) -> Iterator[Proxy]:
        proxy = Proxy(shared_server.folder)
        yield proxy
        proxy.close()

    def counting(self, path: Path, proxy: Proxy) -> PostgresBackend:
        self.run(path, self.counts)
        backend = PostgresBackend(proxy.conninfo(database(self.server, path)), write=self.count)
        backend.limit_time(2.0)
        backend.open(self.lane, self.shards, STORE)
        return backend

    def test_a_commit_whose_answer_is_lost_is_found_to_have_taken_place(
        self, tmp_path: Path, proxy: Proxy
    ) -> None:
        backend = self.counting(tmp_path, proxy)
        proxy.loss = Loss.ANSWER
        assert backend.apply(self.batch([(b"a", b""), (b"b", b"")])) == [Applied(1), Applied(2)]
        assert proxy.loss is None
        backend.close()
        assert sorted(self.run(tmp_path, "SELECT name, count FROM counts")) == [("a", 1), ("b", 1)]

    def test_a_commit_that_never_arrives_is_found_not_to_have_taken_place(
        self, tmp_path: Path, proxy: Proxy
    ) -> None:
        backend = self.counting(tmp_path, proxy)
        proxy.loss = Loss.REQUEST
        with pytest.raises(RetryBatch, match="did not take place"):
            backend.apply(self.batch([(b"a", b"")]))
        assert backend.apply(self.batch([(b"a", b"")])) == [Applied(1)]
        backend.close()
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    def test_while_the_server_is_at_the_commit_the_question_waits(self, tmp_path: Path, proxy: Proxy) -> None:
        backend = self.counting(tmp_path, proxy)
        self.run(
            tmp_path,
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON counts DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()",
        )  # fmt: skip
        proxy.loss = Loss.WHILE_AT_WORK
        assert backend.apply(self.batch([(b"a", b"")])) == [Applied(1)]
        backend.close()
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    def test_while_nobody_can_tell_the_batch_comes_again(self, tmp_path: Path, proxy: Proxy) -> None:
        backend = self.counting(tmp_path, proxy)
        proxy.loss = Loss.REQUEST_SILENT
        with pytest.raises(RetryBatch, match="cannot be read now"):
            backend.apply(self.batch([(b"a", b"")]))
        proxy.release()
        assert backend.apply(self.batch([(b"a", b"")])) == [Applied(1)]
        backend.close()
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    # --- a batch in one statement ---------------------------------------------------------------------------------

    def effects(self, path: Path) -> dict[bytes, int]:
        return dict(self.run(path, "SELECT key, count FROM effects"))

    def test_from_the_second_batch_on_rows_and_mark_go_in_one_statement(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(tmp_path, *COUNTED)
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(self.pairs(2)))
            monkeypatch.setattr(backend, "_try", None)
            for number in range(1, 9):  # also when the statement has been prepared
                self.apply(backend, self.batch(self.pairs(2, start=2 * number), first_lsn=2 * number + 1))
            monkeypatch.undo()
            assert backend.applied_mark(0).covers(18)
            self.apply(backend, self.batch(self.pairs(20)))
        self.check_content(tmp_path, self.pairs(20))
        assert set(self.effects(tmp_path).values()) == {1}

    @pytest.mark.parametrize("loss", Loss)
    def test_wherever_a_batch_in_one_statement_loses_its_connection_it_takes_effect_once(
        self, tmp_path: Path, loss: Loss
    ) -> None:
        self.run(tmp_path, *COUNTED)
        proxy = Proxy(self.server.folder, request=b"the second", answer=b"SELECT 1\0")
        backend = PostgresBackend(proxy.conninfo(database(self.server, tmp_path)), "pages")
        backend.limit_time(4.0)
        backend.open(self.lane, self.shards, STORE)
        if loss is Loss.WHILE_AT_WORK:
            self.run(
                tmp_path,
                "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$",
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON pages DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW WHEN (new.payload = 'the second') EXECUTE FUNCTION slow()",
            )  # fmt: skip
        assert backend.apply(self.batch([(b"1", b"the first")])) is None
        proxy.loss = loss
        second = self.batch([(b"1", b"the second"), (b"2", b"the second")], first_lsn=2)
        assert backend.apply(second) is None
        assert proxy.loss is None, "else nothing was lost"
        proxy.release()
        assert backend.apply(second) is None
        assert backend.apply(self.batch([(b"3", b"the third")], first_lsn=4)) is None
        backend.close()
        proxy.close()
        assert self.effects(tmp_path) == {b"1": 2, b"2": 1, b"3": 1}

    def test_a_mark_that_somebody_else_has_moved_is_not_trusted(self, tmp_path: Path) -> None:
        self.run(tmp_path, *COUNTED)
        with self.with_table(tmp_path, "pages") as one, self.with_table(tmp_path, "pages") as other:
            self.apply(one, self.batch(self.pairs(1)))
            self.apply(other, self.batch(self.pairs(4)))
            self.apply(one, self.batch(self.pairs(6)))
            self.apply(other, self.batch(self.pairs(8)))
            assert one.applied_mark(0) == other.applied_mark(0)
            self.run(tmp_path, "UPDATE walbatch_marks SET epoch = 9", "SELECT 1")
            with pytest.raises(BackendBroken, match="restore"):
                one.apply(self.batch(self.pairs(1, start=8), first_lsn=9))
        assert self.effects(tmp_path) == {key: 1 for key, _ in self.pairs(8)}

    def test_a_row_that_is_refused_in_one_statement_is_refused_alone(self, tmp_path: Path) -> None:
        self.run(tmp_path, *COUNTED)
        with self.with_table(tmp_path, "pages") as backend:
            for first in (1, 11, 21):
                pairs = [
                    (b"%d" % lsn, b"bad" if lsn == first + 7 else b"good") for lsn in range(first, first + 10)
                ]
                answer = backend.apply(self.batch(pairs, first_lsn=first))
                assert isinstance(answer, Failures)
                assert [*answer.outcomes] == [7]
                self.apply(backend, self.batch([(b"again", b"good")], first_lsn=first + 100))
        effects = self.effects(tmp_path)
        assert effects.pop(b"again") == 3
        assert effects == {b"%d" % lsn: 1 for lsn in range(1, 31) if lsn % 10 != 8}

    def test_a_constraint_that_speaks_up_at_the_end_of_one_statement_undoes_it(self, tmp_path: Path) -> None:
        self.run(
            tmp_path, "CREATE TABLE parents (id bytea PRIMARY KEY)",
            "CREATE TABLE pages (key bytea PRIMARY KEY, payload bytea REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)",
            "INSERT INTO parents VALUES ('a')",
        )  # fmt: skip
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch([(b"1", b"a")]))
            with pytest.raises(BatchRejected, match="foreign key"):
                backend.apply(self.batch([(b"2", b"a"), (b"3", b"b")], first_lsn=2))
            assert not backend.applied_mark(0).covers(2)
            self.apply(backend, self.batch([(b"2", b"a")], first_lsn=2))
        self.check_content(tmp_path, [(b"1", b"a"), (b"2", b"a")])

    def test_a_statement_waits_for_the_mark_no_longer_than_for_other_locks(self, tmp_path: Path) -> None:
        self.run(tmp_path, *COUNTED)
        with self.with_table(tmp_path, "pages") as backend, psycopg.connect(self.target(tmp_path)) as other:
            self.apply(backend, self.batch(self.pairs(2)))
            backend.limit_time(0.4)
            for lock in ("SELECT 1 FROM walbatch_marks FOR UPDATE", "LOCK TABLE pages"):
                self.apply(backend, self.batch(self.pairs(2)))
                other.execute(lock.encode())
                with pytest.raises(RetryBatch, match="lock timeout"):
                    backend.apply(self.batch(self.pairs(4)))
                other.rollback()
            self.apply(backend, self.batch(self.pairs(4)))
        assert self.effects(tmp_path) == {key: 1 for key, _ in self.pairs(4)}

    # --- marks that are gone, and commits -------------------------------------------------------------------------

    def test_a_row_of_a_mark_that_is_gone_stops_the_shard(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.run(tmp_path, "DELETE FROM walbatch_marks")
            with pytest.raises(BackendBroken, match="restore"):
                backend.apply(self.batch(self.pairs(1)))

    def test_commits_wait_for_the_disk_whatever_the_database_says(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        name = database(self.server, tmp_path)
        self.run(tmp_path, f"ALTER DATABASE {name} SET synchronous_commit = off")
        shown: list[str] = []

        def look(cursor: Any, operation: Operation) -> None:
            shown.extend(cursor.execute("SHOW synchronous_commit").fetchone())

        with caplog.at_level(logging.WARNING, "walbatch"), self.with_table(tmp_path, write=look) as backend:
            backend.apply(self.batch(self.pairs(1)))
        assert shown == ["on"]
        assert not caplog.records

    def test_commits_wait_for_the_disk_whatever_the_server_is_told_later(self, own_server: Server) -> None:
        backend = PostgresBackend(own_server.conninfo(), "pages")
        backend.open(self.lane, self.shards, STORE)
        try:
            backend.apply(self.batch(self.pairs(1)))
            (connection,) = backend._connections._free
            with psycopg.connect(own_server.conninfo(), autocommit=True) as other:
                other.execute("ALTER SYSTEM SET synchronous_commit = off")
                other.execute("SELECT pg_reload_conf()")
                deadline = time.monotonic() + DEADLINE_S
                while other.execute("SHOW synchronous_commit").fetchone() != ("off",):
                    assert time.monotonic() < deadline
            assert connection.raw.execute("SHOW synchronous_commit").fetchone() == ("on",)
        finally:
            backend.close()

    UNLOGGED: ClassVar[dict[str, tuple[list[str], str]]] = {
        "a table": (["CREATE UNLOGGED TABLE t (key bytea PRIMARY KEY, payload bytea)"], "'t' is UNLOGGED"),
        "a partition": (
            ["CREATE TABLE t (key bytea PRIMARY KEY, payload bytea) PARTITION BY HASH (key)",
             "CREATE TABLE t0 PARTITION OF t FOR VALUES WITH (modulus 2, remainder 0)",
             "CREATE UNLOGGED TABLE t1 PARTITION OF t FOR VALUES WITH (modulus 2, remainder 1)"],
            "'t' has a partition, t1, which is UNLOGGED",
        ),
        "marks": (
            [
                "CREATE UNLOGGED TABLE walbatch_marks (store uuid, lane text, shard integer, epoch bigint, mark bytea)",
                "CREATE UNIQUE INDEX i ON walbatch_marks (store, lane, shard)",
            ],
            "'walbatch_marks' is UNLOGGED",
        ),
        "a table of a session": ([], "'pg_temp.t' is TEMPORARY"),
    }  # fmt: skip

    @pytest.mark.parametrize("case", UNLOGGED)
    def test_tables_that_a_crash_empties_are_refused(self, tmp_path: Path, case: str) -> None:
        statements, says = self.UNLOGGED[case]
        self.run(tmp_path, *statements, "SELECT 1")
        backend = self.make(tmp_path, "t" if statements else "pg_temp.t")
        with pytest.raises(ConfigError, match=says):
            backend.open(self.lane, self.shards, STORE)

    # --- what a write function must not do ------------------------------------------------------------------------

    def test_an_error_that_write_keeps_to_itself_stops_the_shard(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)

        def swallow(cursor: Any, operation: Operation) -> None:
            with contextlib.suppress(psycopg.errors.UniqueViolation):
                cursor.execute("INSERT INTO counts VALUES (%s, 1)", (operation.key.decode(),))

        with self.with_table(tmp_path, write=swallow) as backend:
            with pytest.raises(BackendBroken, match="savepoint"):
                backend.apply(self.batch([(b"a", b""), (b"b", b""), (b"b", b"")]))
            with pytest.raises(BackendBroken, match="savepoint"):
                backend.apply(self.batch([(b"b", b""), (b"b", b"")]))
        assert self.run(tmp_path, "SELECT * FROM counts") == []

    @pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
    def test_a_transaction_that_write_has_ended_and_begun_again_is_noticed(
        self, tmp_path: Path, ending: str
    ) -> None:
        self.run(tmp_path, self.counts)

        def end(cursor: Any, operation: Operation) -> None:
            cursor.execute(ending)
            cursor.execute("BEGIN")

        with self.with_table(tmp_path, write=end) as backend:
            with pytest.raises(BackendBroken, match="must not commit"):
                backend.apply(self.batch([(b"a", b""), (b"b", b"")]))
            assert backend.applied_mark(0) == Mark()

    def test_an_error_inside_of_a_savepoint_is_the_write_functions_own_business(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)

        def insert(cursor: Any, operation: Operation) -> None:
            with contextlib.suppress(psycopg.errors.UniqueViolation), cursor.connection.transaction():
                cursor.execute("INSERT INTO counts VALUES (%s, 1)", (operation.key.decode(),))

        with self.with_table(tmp_path, write=insert) as backend:
            self.apply(backend, self.batch([(b"a", b""), (b"a", b"")]))
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    def test_a_batch_in_one_statement_does_so_too_and_is_isolated_as_ever(self, tmp_path: Path) -> None:
        name = database(self.server, tmp_path)
        self.run(
            tmp_path, f"ALTER DATABASE {name} SET synchronous_commit = off",
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'",
            "CREATE TABLE pages (key bytea PRIMARY KEY, payload bytea)", "CREATE TABLE seen (setting text)",
            "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO seen VALUES "
            "(current_setting('synchronous_commit')), (current_setting('transaction_isolation')); RETURN NULL; END $$",
            "CREATE TRIGGER see AFTER INSERT ON pages FOR EACH ROW EXECUTE FUNCTION see()",
        )  # fmt: skip
        with self.with_table(tmp_path, "pages") as backend:
            for lsn in (1, 2):
                self.apply(backend, self.batch(self.pairs(1, start=lsn), first_lsn=lsn))
        assert self.run(tmp_path, "SELECT setting FROM seen") == [("on",), ("read committed",)] * 2

    def test_texts_reach_a_database_of_another_encoding_or_are_refused_alone(self, tmp_path: Path) -> None:
        name = f"{database(self.server, tmp_path)}_latin"
        with psycopg.connect(self.server.conninfo(), autocommit=True) as connection:
            connection.execute(
                f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0".encode()
            )
        backend = PostgresBackend(self.server.conninfo(name), Table("t", key_codec="text", codec="text"))
        backend.open(self.lane, self.shards, STORE)
        for lsn in (1, 4):
            pairs = [(b"%d" % lsn, "\u00e4".encode()), (b"no", "\u20ac".encode()), (b"last", b"x")]
            answer = backend.apply(self.batch(pairs, first_lsn=lsn))
            assert isinstance(answer, Failures)
            assert [*answer.outcomes] == [1]
        backend.close()
        with psycopg.connect(self.server.conninfo(name), client_encoding="UTF8") as connection:
            rows = connection.execute("SELECT key, payload FROM t ORDER BY key").fetchall()
        assert rows == [("1", "\u00e4"), ("4", "\u00e4"), ("last", "x")]

    # --- opening --------------------------------------------------------------------------------------------------

    def test_a_database_that_does_not_exist_is_a_config_error(self) -> None:
        with pytest.raises(ConfigError, match="make the database"):
            PostgresBackend(self.server.conninfo("absent"), "t").open("put", 1, STORE)

    def test_a_server_that_is_away_is_a_storage_error(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="is the server running"):
            PostgresBackend(f"host={tmp_path} dbname=x", "t").open("put", 1, STORE)

    def test_a_user_who_may_not_make_tables_is_told_so(self, tmp_path: Path) -> None:
        self.run(tmp_path, "DROP ROLE IF EXISTS nobody_special", "CREATE ROLE nobody_special LOGIN")
        backend = PostgresBackend(
            f"{self.target(tmp_path)} user=nobody_special".replace("user=postgres ", ""), "t"
        )
        with pytest.raises(ConfigError, match="grant"):
            backend.open("put", 1, STORE)


# --- servers that die ---------------------------------------------------------------------------------------------


def test_a_server_that_is_killed_and_restarted_in_the_middle_of_batches_has_each_effect_once(
    own_server: Server, tmp_path: Path
) -> None:
    with psycopg.connect(own_server.conninfo()) as connection:
        connection.execute("CREATE TABLE counts (name text PRIMARY KEY, count bigint NOT NULL)")
    deaths = [signal.SIGQUIT, signal.SIGKILL, signal.SIGINT]
    calls = 0

    def attacked(cursor: Any, operation: Operation) -> None:
        nonlocal calls
        cursor.execute(TestPostgres.count_call, (operation.key.decode(),))
        calls += 1
        if calls % 4 == 3 and deaths:
            own_server.stop(deaths.pop())

    suite = TestPostgres()
    backend = PostgresBackend(own_server.conninfo(), write=attacked)
    backend.open("put", 2, STORE)
    for number in range(6):
        batch = suite.batch([(b"%d.%d" % (number, part), b"") for part in range(3)], first_lsn=3 * number + 1)
        while True:
            try:
                backend.apply(batch)
            except RetryBatch:
                if own_server._process is None:
                    with pytest.raises(RetryBatch):
                        backend.apply(batch)
                    with pytest.raises(StorageError):
                        backend.applied_mark(0)
                    own_server.start()
            else:
                break
    assert backend.applied_mark(0).covers(18)
    backend.close()
    assert not deaths
    with psycopg.connect(own_server.conninfo()) as connection:
        found = connection.execute("SELECT count, count(*) FROM counts GROUP BY count").fetchall()
    assert found == [(1, 18)]


# --- URLs and passwords -------------------------------------------------------------------------------------------

URLS = {
    "postgresql://app:secret@db.example:5433/queue?table=t&sslmode=require": (
        "postgresql:///queue?table=t&host=db.example&port=5433&sslmode=require&user=app"
    ),
    "postgres://db/queue?table=s.t": "postgresql:///queue?table=s.t&host=db",
    "postgresql://app:se?secret@db/queue?table=t": "postgresql:///queue?table=t&host=db&user=app",
    "postgresql://db:5432/queue?table=t&user=a@b": "postgresql:///queue?table=t&host=db&port=5432&user=a%40b",
    "postgresql:///queue?host=/run/postgresql&password=secret&table=t": "postgresql:///queue?table=t&host=%2Frun%2Fpostgresql",
    "postgresql:///q%20r?table=a%26b&key=x,y&key_codec=json&columns=&codec=json": (
        "postgresql:///q%20r?table=a%26b&key=x,y&columns=&key_codec=json&codec=json"
    ),
}


@pytest.mark.parametrize(("url", "remembered"), URLS.items())
def test_what_is_remembered_of_a_url_makes_it_again_and_has_no_password(url: str, remembered: str) -> None:
    backend = open_backend(url, allow_python=False)
    assert url_of(backend) == remembered
    assert "secret" not in repr(backend)
    again = open_backend(remembered, allow_python=False)
    assert url_of(again) == remembered
    assert strip_password(remembered) == remembered


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://app:hunter2@db/queue", "names no table"),
        ("postgresql://app:hunter2@db/queue?table=t&table=u", "must stand there once"),
        ("postgresql://app:hunter2@db/queue?table=t&codec=xml", "codec is 'xml'"),
        ("postgresql://app:hunter2@db/queue?table=t&create=perhaps", "must be true or false"),
        ("postgresql://app:hunter2@db/queue?table=t&nonsense=1", "no URL of a database"),
        ("postgresql:queue?table=t", "must begin with"),
        ("postgresql://app:hunt/er2?table=hunter2@db/queue?table=t", "as %2F"),
        ("postgresql://app:hunter2?hunter2@db/queue", "names no table"),
        ("postgresql://app:x?hunter2@db/queue?table=t&codec=xml", "codec is 'xml'"),
    ],
)
def test_a_url_that_cannot_be_right_is_refused_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_backend(url, allow_python=False)
    assert "hunter2" not in str(caught.value)


def test_a_password_does_not_reach_an_error(shared_server: Server) -> None:
    backend = PostgresBackend(
        f"host={shared_server.folder} user=nobody password=hunter2 dbname=postgres", "t"
    )
    with pytest.raises(ConfigError) as caught:
        backend.open("put", 1, STORE)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(backend)


def test_without_psycopg_it_is_said_what_to_install() -> None:
    program = (
        "import sys; sys.modules['psycopg'] = None\n"
        "import walbatch as wb\n"
        "def url(): wb.backends.open_backend('postgresql:///x?table=t', allow_python=False)\n"
        "for use in (lambda: wb.PostgresBackend, url):\n"
        "    try: use()\n"
        "    except (ImportError, wb.ConfigError) as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["PostgresBackend needs psycopg 3: pip install 'walbatch[postgres]'"] * 2


def test_a_database_is_imported_only_when_it_is_used() -> None:
    program = "import sys, walbatch; assert not {'psycopg', 'sqlite3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
