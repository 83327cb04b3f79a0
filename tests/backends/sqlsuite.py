"""What both SQL backends must do beyond the contracts, on a database that each of them brings."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from walbatch.backends import open_backend
from walbatch.backends.sql import applying
from walbatch.backends.sql.backend import SqlBackend
from walbatch.backends.sql.table import Table
from walbatch.core.mark import encode_mark
from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    BatchTooLarge,
    ConfigError,
    CorruptionError,
    EngineClosed,
    Fenced,
)
from walbatch.testing.contracts import STORE, Pair, TransactionalBackendContract
from walbatch.types import Applied, Failures, Mark, Operation, Rejected

USERS = Table("users", key="id", columns=("name", "email"), key_codec="integer", codec="json")


class SqlSuite(TransactionalBackendContract):
    """A subclass says how to make a backend, how to run SQL, and how its dialect spells a few things."""

    count_call: ClassVar[str]
    """Adds one to the count of a name, which is its only parameter."""
    check_call: ClassVar[str]
    """Inserts its only parameter, a text, into `checked`."""
    users: ClassVar[str] = (
        "CREATE TABLE users (id bigint PRIMARY KEY, name text, email text UNIQUE CHECK (email LIKE '%@%'), "
        "role text NOT NULL DEFAULT 'guest')"
    )
    counts: ClassVar[str] = "CREATE TABLE counts (name text PRIMARY KEY, count bigint NOT NULL)"
    checked: ClassVar[str] = "CREATE TABLE checked (text text CONSTRAINT is_good CHECK (text <> 'bad'))"

    def make(self, path: Path, table: Any = None, **options: Any) -> SqlBackend:
        raise NotImplementedError

    def run(self, path: Path, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements, and return the rows of the last one."""
        raise NotImplementedError

    def make_backend(self, path: Path) -> Any:
        return self.make(path, "pages")

    def content(self, path: Path) -> Iterable[Pair]:
        return self.run(path, "SELECT key, payload FROM pages")

    @contextlib.contextmanager
    def with_table(self, path: Path, table: Any = None, **options: Any) -> Iterator[SqlBackend]:
        backend = self.make(path, table, **options)
        backend.open(self.lane, self.shards, STORE)
        try:
            yield backend
        finally:
            backend.close()

    def users_of(self, path: Path) -> list[tuple[Any, ...]]:
        return self.run(path, "SELECT id, name, email, role FROM users ORDER BY id")

    def count(self, cursor: Any, operation: Operation) -> int:
        """A write that shows every repetition."""
        cursor.execute(self.count_call, (operation.key.decode(),))
        return operation.lsn or 0

    def check(self, cursor: Any, operation: Operation) -> str:
        """A write that the database may refuse."""
        self.count(cursor, operation)
        cursor.execute(self.check_call, (operation.payload.decode(),))
        return operation.payload.decode()

    # --- mapping --------------------------------------------------------------------------------------------------

    def test_json_objects_become_columns(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        with self.with_table(tmp_path, USERS) as backend:
            self.apply(backend, self.batch([user(1, "Ann", "a@x"), user(2, "Bo\u00df", None), (b"3", b"{}")]))
            assert self.users_of(tmp_path) == [
                (1, "Ann", "a@x", "guest"),
                (2, "Bo\u00df", None, "guest"),
                (3, None, None, "guest"),
            ]

    def test_an_empty_payload_deletes_the_row(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        with self.with_table(tmp_path, USERS) as backend:
            self.apply(backend, self.batch([user(1, "Ann", "a@x"), user(2, "Bo", "b@x")]))
            self.apply(backend, self.batch([(b"1", b""), (b"7", b"")], first_lsn=3))
            assert self.users_of(tmp_path) == [(2, "Bo", "b@x", "guest")]

    def test_within_a_batch_the_last_of_a_key_counts_and_a_row_put_after_its_delete_is_new(
        self, tmp_path: Path
    ) -> None:
        self.run(
            tmp_path,
            self.users,
            "INSERT INTO users VALUES (1, 'Ann', 'a@x', 'admin'), (2, 'Bo', 'b@x', 'admin')",
        )
        with self.with_table(tmp_path, USERS) as backend:
            pairs = [
                user(1, "Anna", "a@x"),
                (b"2", b""),
                user(2, "Bob", "b@x"),
                user(3, "C", None),
                (b"3", b""),
            ]
            self.apply(backend, self.batch(pairs))
        assert self.users_of(tmp_path) == [(1, "Anna", "a@x", "admin"), (2, "Bob", "b@x", "guest")]

    @pytest.mark.parametrize("first", ["the delete", "the put"])
    def test_what_is_freed_and_taken_in_one_batch_is_no_conflict(self, tmp_path: Path, first: str) -> None:
        self.run(tmp_path, self.users, "INSERT INTO users VALUES (1, 'Ann', 'a@x', 'admin')")
        pairs = [(b"1", b""), user(2, "Ann", "a@x")]
        with self.with_table(tmp_path, USERS) as backend:
            self.apply(backend, self.batch(pairs if first == "the delete" else pairs[::-1]))
        assert self.users_of(tmp_path) == [(2, "Ann", "a@x", "guest")]

    def test_a_table_that_others_point_to_keeps_the_order_of_deletes_and_puts(self, tmp_path: Path) -> None:
        self.run(
            tmp_path, self.users, "CREATE TABLE orders (id bigint PRIMARY KEY, owner bigint REFERENCES users (id))",
            "INSERT INTO users VALUES (1, 'Ann', 'a@x', 'admin')", "SELECT 1",
        )  # fmt: skip
        with self.with_table(tmp_path, USERS) as backend:
            answer = backend.apply(self.batch([user(2, "Ann", "a@x"), (b"1", b""), user(3, "Bo", "a@x")]))
            assert isinstance(answer, Failures)
            assert [*answer.outcomes] == [0]
        assert self.users_of(tmp_path) == [(3, "Bo", "a@x", "guest")]

    # What comes to the same key in Python, or in the database, but not in both: keys, and rows at the end.
    LIKE: ClassVar[dict[str, tuple[str, list[Pair], list[tuple[str, str]]]]] = {
        "one to Python": (
            "text", [(b"[1]", b'{"v": "a"}'), (b"[1.0]", b'{"v": "b"}'), (b'["1"]', b'{"v": "c"}')], [("1", "c"), ("1.0", "b")],
        ),
        "one to the database": (
            "numeric", [(b"[1]", b'{"v": "a"}'), (b"[1.0]", b'{"v": "b"}'), (b"[1]", b'{"v": "c"}')], [("1", "c")],
        ),
        "deleted as another": ("numeric", [(b"[1]", b'{"v": "a"}'), (b"[1.0]", b"")], []),
        "put again as another": ("numeric", [(b"[1]", b""), (b"[2]", b'{"v": "x"}'), (b"[2.0]", b'{"v": "y"}')], [("2", "y")]),
    }  # fmt: skip

    @pytest.mark.parametrize("case", LIKE)
    def test_keys_are_one_where_they_are_to_the_database_and_end_as_the_last_operation_says(
        self, tmp_path: Path, case: str
    ) -> None:
        type_, pairs, rows = self.LIKE[case]
        self.run(tmp_path, f"CREATE TABLE t (id {type_} PRIMARY KEY, v text)", "SELECT 1")
        table = Table("t", key="id", columns="v", key_codec="json", codec="json")
        with self.with_table(tmp_path, table) as backend:
            for first_lsn in (1, 11):  # the second batch may go in one statement
                self.apply(backend, self.batch(pairs, first_lsn=first_lsn))
                found = self.run(tmp_path, "SELECT id, v FROM t")
                assert (
                    sorted(
                        (str(key).removesuffix(".0") if type_ == "numeric" else key, v) for key, v in found
                    )
                    == rows
                )

    def test_a_delete_reaches_only_what_it_would_have_reached_in_its_turn(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            "CREATE TABLE nodes (id bigint PRIMARY KEY, parent bigint REFERENCES nodes (id) ON DELETE CASCADE, note text)",
            "INSERT INTO nodes VALUES (1, NULL, 'old root'), (3, NULL, 'new root'), (2, 1, 'kept'), (5, 2, 'below it')",
        )
        table = Table("nodes", key="id", columns="parent", key_codec="integer", codec="json")
        with self.with_table(tmp_path, table) as backend:
            self.apply(backend, self.batch([(b"2", b'{"parent": 3}'), (b"1", b""), (b"6", b'{"parent": 5}')]))
        assert self.run(tmp_path, "SELECT id, parent, note FROM nodes ORDER BY id") == [
            (2, 3, "kept"), (3, None, "new root"), (5, 2, "below it"), (6, 5, None),
        ]  # fmt: skip

    def test_several_key_columns_come_from_an_array(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            "CREATE TABLE seen (host text, port integer, up boolean, note text, PRIMARY KEY (host, port))",
        )
        table = Table("seen", key=("host", "port"), columns=("up", "note"), key_codec="json", codec="json")
        with self.with_table(tmp_path, table) as backend:
            pairs = [
                (b'["a", 80]', b'{"up": true, "note": {"b": [1]}}'),
                (b'["a", 81]', b'{"up": false}'),
                (b'["a", 80]', b'{"up": false}'),
            ]
            self.apply(backend, self.batch(pairs))
            self.apply(backend, self.batch([(b'["a",81]', b"")], first_lsn=9))
        assert [tuple(row) for row in self.run(tmp_path, "SELECT host, port, up, note FROM seen")] == [
            ("a", 80, False, None)
        ]

    def test_functions_can_read_keys_and_payloads(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        table = Table(
            "users", key="id", columns=("name",), key_codec=lambda key: (key[0],),
            codec=lambda payload: {"name": payload.decode()} if payload != b"gone" else None,
        )  # fmt: skip
        with self.with_table(tmp_path, table) as backend:
            assert backend.url is None  # type: ignore[attr-defined]
            answer = backend.apply(
                self.batch([(b"\1", b"Ann"), (b"\2", b""), (b"\1", b"gone"), (b"\3", b"\xff")])
            )
            assert isinstance(answer, Failures)
            assert [*answer.outcomes] == [3]
            assert [row[:2] for row in self.users_of(tmp_path)] == [(2, "")]
            self.apply(backend, self.batch([(b"\2", b"gone"), (b"\5", b"Eve")], first_lsn=5))
        assert [row[:2] for row in self.users_of(tmp_path)] == [(5, "Eve")]

    def test_names_that_need_quotes_are_quoted(self, tmp_path: Path) -> None:
        table = Table('or"der %b?s', key="%s", columns=('pay"load',))
        with self.with_table(tmp_path, table) as backend:
            self.apply(backend, self.batch([(b"k", b"v")]))
            self.apply(backend, self.batch([(b"k", b"w")], first_lsn=2))
        assert self.run(tmp_path, 'SELECT "%s", "pay""load" FROM "or""der %b?s"') == [(b"k", b"w")]

    # --- refused rows ---------------------------------------------------------------------------------------------

    def test_a_row_that_breaks_a_constraint_is_rejected_with_the_databases_message_and_the_rest_applied(
        self, tmp_path: Path
    ) -> None:
        self.run(tmp_path, self.users)
        pairs = [
            user(1, "A", "a@x"),
            user(2, "B", "nonsense"),
            user(3, "C", "c@x"),
            user(4, "D", "a@x"),
            user(5, "E", "e@x"),
        ]
        with self.with_table(tmp_path, USERS) as backend:
            batch = self.batch(pairs)
            answer = backend.apply(batch)
            assert isinstance(answer, Failures)
            assert sorted(answer.outcomes) == [1, 3]
            assert all(isinstance(outcome, Rejected) for outcome in answer.outcomes.values())
            texts = [
                outcome.error.lower() for outcome in answer.outcomes.values() if isinstance(outcome, Rejected)
            ]
            assert "check constraint" in texts[0]
            assert "unique constraint" in texts[1]
            assert "email" in texts[0]
            assert backend.applied_mark(0) == Mark(epoch=1, ranges=((1, 1), (3, 3), (5, 5)))
            again = backend.apply(batch)
            assert again == answer, "what was not applied comes again, and is refused again"
        assert [row[0] for row in self.users_of(tmp_path)] == [1, 3, 5]

    def test_a_mark_that_leaves_something_out_moves_on_once_that_is_settled(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        with self.with_table(tmp_path, USERS) as backend:
            backend.apply(
                self.batch([user(1, "A", "a@x"), user(2, "B", "no")], mark=Mark(epoch=1, watermark=2))
            )
            assert backend.applied_mark(0) == Mark(epoch=1, watermark=1)
            backend.apply(self.batch([user(3, "C", "c@x")], first_lsn=3, mark=Mark(epoch=1, watermark=3)))
            assert backend.applied_mark(0) == Mark(epoch=1, watermark=3)

    def test_what_cannot_be_read_is_rejected_by_itself(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        bad = [
            (b"x", b"{}"), (b"1", b"[1]"), (b"1", b"{"), (b"1", b'{"nme": "typo"}'), (b"1", b"\xff"), (b"1", b'{"name": NaN}'),
            (b"9" * 30, b"{}"), (b"1", b'{"name": 1, "name": 2}'), (b"1", b"[" * 100_000), (b"1", b'{"name": "\\ud800"}'),
            (b"9" * 19, b"{}"),
        ]  # fmt: skip
        with self.with_table(tmp_path, USERS) as backend:
            answer = backend.apply(self.batch([*bad, user(2, "Bo", None)]))
            assert isinstance(answer, Failures)
            assert sorted(answer.outcomes) == [*range(len(bad) - 1)] + [len(bad) - 1] * (
                b"9" * 19 > b"%d" % (2**63)
            )
        assert [row[:2] for row in self.users_of(tmp_path)] == [(2, "Bo")]

    def test_any_rows_are_refused_and_all_others_applied(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        first = 1
        with self.with_table(tmp_path, USERS) as backend:
            for bad in (set(), {0}, {15}, {7, 8}, {0, 1, 2, 3}, {*range(0, 16, 2)}, {*range(16)}):
                pairs = [
                    user(first + place, "U", f"{first + place}{'' if place in bad else '@x'}")
                    for place in range(16)
                ]
                answer = backend.apply(self.batch(pairs, first_lsn=first))
                assert set(answer.outcomes if isinstance(answer, Failures) else ()) == bad
                found = {row[0] for row in self.users_of(tmp_path) if row[0] >= first}
                assert found == {first + place for place in range(16)} - {first + place for place in bad}
                first += 16

    def test_too_many_refused_rows_ask_for_a_smaller_batch_and_nothing_is_applied(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(tmp_path, self.users)
        monkeypatch.setattr(applying, "REFUSED_MAX", 3)
        monkeypatch.setattr(applying, "REFUSED_COUNT_MAX", 8)
        pairs = [user(1, "good", "a@x"), *(user(number, "U", "bad") for number in range(2, 20))]
        with self.with_table(tmp_path, USERS) as backend:
            with pytest.raises(BatchTooLarge) as caught:
                backend.apply(self.batch(pairs))
            assert caught.value.count == 8
            assert self.users_of(tmp_path) == []
            answer = backend.apply(self.batch(pairs[:8]))
            assert isinstance(answer, Failures)
            assert len(answer.outcomes) == 7

    # --- write ----------------------------------------------------------------------------------------------------

    def test_write_runs_once_in_effect_for_each_operation_in_order(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)
        pairs = [(b"a", b""), (b"b", b""), (b"a", b"")]
        with self.with_table(tmp_path, write=self.count) as backend:
            assert backend.apply(self.batch(pairs)) == [Applied(1), Applied(2), Applied(3)]
            assert backend.apply(self.batch(pairs)) == [Applied(None)] * 3
            assert backend.apply(self.batch([*pairs, (b"c", b"")])) == [Applied(None)] * 3 + [Applied(4)]
        assert sorted(self.run(tmp_path, "SELECT name, count FROM counts")) == [("a", 2), ("b", 1), ("c", 1)]

    def test_of_write_only_the_operation_that_is_refused_is_undone(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts, self.checked)
        texts = [b"1", b"bad", b"2", b"3", b"bad", b"4"]
        with self.with_table(tmp_path, write=self.check) as backend:
            answer = backend.apply(self.batch([(b"k%d" % number, text) for number, text in enumerate(texts)]))
        assert isinstance(answer, list)
        assert [type(outcome) for outcome in answer] == [
            Applied,
            Rejected,
            Applied,
            Applied,
            Rejected,
            Applied,
        ]
        assert answer[3] == Applied("3")
        assert all("is_good" in outcome.error for outcome in answer if isinstance(outcome, Rejected))
        assert self.run(tmp_path, "SELECT text FROM checked") == [("1",), ("2",), ("3",), ("4",)]
        assert sorted(self.run(tmp_path, "SELECT name, count FROM counts")) == [
            ("k0", 1),
            ("k2", 1),
            ("k3", 1),
            ("k5", 1),
        ]

    def test_what_else_write_raises_undoes_the_whole_batch(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.counts)

        def fail(cursor: Any, operation: Operation) -> None:
            self.count(cursor, operation)
            if operation.key == b"b":
                raise ZeroDivisionError

        with self.with_table(tmp_path, write=fail) as backend:
            with pytest.raises(ZeroDivisionError):
                backend.apply(self.batch([(b"a", b""), (b"b", b"")]))
            assert backend.applied_mark(0) == Mark()
            backend.apply(self.batch([(b"a", b"")]))
        assert self.run(tmp_path, "SELECT name, count FROM counts") == [("a", 1)]

    def test_a_statement_of_write_that_cannot_run_stops_the_shard(self, tmp_path: Path) -> None:
        with (
            self.with_table(tmp_path, write=self.count) as backend,
            pytest.raises(BackendBroken, match="counts"),
        ):
            backend.apply(self.batch([(b"a", b"")]))

    @pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
    def test_write_must_not_end_the_transaction(self, tmp_path: Path, ending: str) -> None:
        self.run(tmp_path, self.counts)

        def end(cursor: Any, operation: Operation) -> None:
            cursor.execute(ending)

        with (
            self.with_table(tmp_path, write=end) as backend,
            pytest.raises(BackendBroken, match="must not commit"),
        ):
            backend.apply(self.batch([(b"a", b""), (b"b", b"")]))

    # --- marks ----------------------------------------------------------------------------------------------------

    def test_a_damaged_mark_is_never_taken_for_none(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.apply(backend, self.batch(self.pairs(1)))
            self.run(tmp_path, "UPDATE walbatch_marks SET epoch = 9")
            with pytest.raises(CorruptionError, match="restore"):
                backend.applied_mark(0)
            with pytest.raises(BackendBroken, match="restore"):
                backend.apply(self.batch(self.pairs(1)))

    def test_a_newer_engine_fences_an_older_one_that_is_still_open(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as old, self.with_table(tmp_path, "pages") as new:
            self.apply(old, self.batch(self.pairs(1), epoch=1))
            self.apply(new, self.batch(self.pairs(1), epoch=2))
            with pytest.raises(Fenced):
                old.apply(self.batch(self.pairs(1, start=9), first_lsn=9, epoch=1))
        self.check_content(tmp_path, self.pairs(1))

    def test_two_lanes_share_a_database_and_have_marks_of_their_own(self, tmp_path: Path) -> None:
        first, second = self.make(tmp_path, "pages"), self.make(tmp_path, "pages")
        first.open("put", 1, STORE)
        second.open("other", 1, STORE)
        self.apply(first, self.batch(self.pairs(2)))
        assert second.applied_mark(0) == Mark()
        second.apply(replace(self.batch(self.pairs(1, start=5)), lane="other"))
        first.close()
        second.close()
        self.check_content(tmp_path, [*self.pairs(2), *self.pairs(1, start=5)])

    def test_marks_are_readable_in_sql(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            batch = self.batch(self.pairs(2), epoch=3)
            self.apply(backend, batch)
        found = self.run(tmp_path, "SELECT lane, shard, epoch, mark FROM walbatch_marks WHERE shard = 0")
        assert batch.mark is not None
        assert found == [("put", 0, 3, encode_mark(batch.mark))]

    # --- opening and closing --------------------------------------------------------------------------------------

    MISFITS: ClassVar[dict[str, tuple[Sequence[str], Table, str]]] = {
        "no table": ([], Table("absent", create=False), "'absent' does not exist: make it, with the columns key, payload"),
        "no types": ([], Table("absent", codec="json"), "'absent' does not exist: make it"),
        "no column": (["CREATE TABLE t (key bytea PRIMARY KEY)"], Table("t"), "has no column 'payload': add it"),
        "no key": (["CREATE TABLE t (key bytea, payload bytea)"], Table("t"), r"no primary key or unique index on exactly \(key\)"),
        "another key": (
            ["CREATE TABLE t (key bytea, payload bytea, PRIMARY KEY (key, payload))"], Table("t"), "no primary key or unique index",
        ),
        "part of a key": (
            ["CREATE TABLE t (key bytea, payload bytea)", "CREATE UNIQUE INDEX i ON t (key) WHERE payload IS NOT NULL"],
            Table("t"), "no primary key or unique index",
        ),
        "a column that nobody fills": (
            ["CREATE TABLE t (key bytea PRIMARY KEY, payload bytea, owner text NOT NULL)"], Table("t"),
            "column 'owner' is NOT NULL, has no default, and is not mapped",
        ),
        "marks of somebody else": (
            ["CREATE TABLE walbatch_marks (id integer PRIMARY KEY)"], Table("t"), "'walbatch_marks' has no column 'store'",
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("misfit", MISFITS)
    def test_a_database_that_does_not_fit_is_refused_when_it_is_opened(
        self, tmp_path: Path, misfit: str
    ) -> None:
        statements, table, says = self.MISFITS[misfit]
        self.run(tmp_path, *statements, "SELECT 1")
        backend = self.make(tmp_path, table)
        with pytest.raises(ConfigError, match=says):
            backend.open(self.lane, self.shards, STORE)
        assert "closed" in repr(backend)

    def test_a_unique_index_is_as_good_as_a_primary_key(self, tmp_path: Path) -> None:
        self.run(
            tmp_path,
            "CREATE TABLE t (key bytea, payload bytea)",
            "CREATE UNIQUE INDEX i ON t (key)",
            "SELECT 1",
        )
        with self.with_table(tmp_path, "t") as backend:
            self.apply(backend, self.batch([(b"k", b"1"), (b"k", b"2")]))
            self.apply(backend, self.batch([(b"k", b"3")], first_lsn=3))
        assert self.run(tmp_path, "SELECT key, payload FROM t") == [(b"k", b"3")]

    def test_a_table_that_is_gone_stops_the_shard(self, tmp_path: Path) -> None:
        with self.with_table(tmp_path, "pages") as backend:
            self.run(tmp_path, "DROP TABLE pages", "SELECT 1")
            with pytest.raises(BackendBroken, match="pages"):
                backend.apply(self.batch(self.pairs(2)))
            assert backend.applied_mark(0) == Mark()

    def test_it_belongs_to_one_lane(self, tmp_path: Path) -> None:
        with (
            self.with_table(tmp_path, "pages") as backend,
            pytest.raises(ConfigError, match="one of its own"),
        ):
            backend.open("other", 1, STORE)

    def test_closed_it_applies_nothing_and_can_be_opened_again(self, tmp_path: Path) -> None:
        backend = self.make(tmp_path, "pages")
        with pytest.raises(EngineClosed):
            backend.apply(self.batch(self.pairs(1)))
        for number in range(2):
            backend.open(self.lane, self.shards, STORE)
            self.apply(backend, self.batch(self.pairs(1, start=number), first_lsn=number + 1))
            backend.close()
            with pytest.raises(EngineClosed):
                backend.applied_mark(0)
        self.check_content(tmp_path, self.pairs(2))

    def test_its_url_makes_it_again(self, tmp_path: Path) -> None:
        self.run(tmp_path, self.users)
        url = self.make(tmp_path, USERS).url  # type: ignore[attr-defined]
        assert url is not None
        backend = open_backend(url, allow_python=False)
        assert isinstance(backend, SqlBackend)
        assert backend.table == USERS
        assert backend.url == url  # type: ignore[attr-defined]
        backend.open(self.lane, self.shards, STORE)
        self.apply(backend, self.batch([user(1, "Ann", "a@x")]))
        backend.close()
        assert self.users_of(tmp_path) == [(1, "Ann", "a@x", "guest")]

    def test_exactly_one_of_table_and_write_is_needed(self, tmp_path: Path) -> None:
        for table, options in ((None, {}), ("t", {"write": self.count}), (7, {}), (None, {"write": 7})):
            with pytest.raises(ConfigError):
                self.make(tmp_path, table, **options)

    # --- constraints that speak up at the commit ------------------------------------------------------------------

    def test_a_constraint_that_is_checked_at_the_commit_names_no_row_so_the_batch_is_searched(
        self, tmp_path: Path
    ) -> None:
        self.run(
            tmp_path, "CREATE TABLE parents (id bigint PRIMARY KEY)",
            "CREATE TABLE children (id bigint PRIMARY KEY, "
            "parent bigint REFERENCES parents (id) DEFERRABLE INITIALLY DEFERRED)", "SELECT 1",
        )  # fmt: skip
        table = Table("children", key="id", columns="parent", key_codec="integer", codec="json")
        with self.with_table(tmp_path, table) as backend:
            with pytest.raises(BatchRejected, match=r"(?i)foreign key"):
                backend.apply(self.batch([(b"1", b'{"parent": null}'), (b"2", b'{"parent": 7}')]))
            assert backend.applied_mark(0) == Mark()
            self.apply(backend, self.batch([(b"1", b'{"parent": null}')]))


def user(number: int, name: str, email: str | None) -> Pair:
    return b"%d" % number, json.dumps({"name": name, "email": email}).encode()
