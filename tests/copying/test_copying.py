"""Tables from one database to another, with real databases at both ends."""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

psycopg = pytest.importorskip("psycopg", reason="copying from and to PostgreSQL needs psycopg")

from tests.backends.servers import database, shared_server  # noqa: E402 - what needs psycopg
from tools.copy_kills import counting  # noqa: E402
from tools.postgres import Server  # noqa: E402
from walbatch import limits  # noqa: E402
from walbatch.copying import CopyProgress, CopyReport, copy_tables  # noqa: E402
from walbatch.copying.report import Memory  # noqa: E402
from walbatch.errors import ConfigError  # noqa: E402
from walbatch.inspection import dead_letters  # noqa: E402

__all__ = ["shared_server"]

NAMES = ["a", "B", "aa", "Ab", "é", "z-1", "Z 1", "zz", "_", "ä", "", "\U0001f600", "10", "9"]
"""Texts that every language puts in another order."""


class Place:
    """A database of a test: its URL, and how the test itself reads and writes it."""

    def __init__(self, url: str, connect: Callable[[], Any]) -> None:
        self.url = url
        self._connect = connect

    @contextlib.contextmanager
    def connected(self) -> Iterator[Any]:
        with contextlib.closing(self._connect()) as connection, connection:
            yield connection

    def run(self, *statements: str) -> None:
        with self.connected() as connection:
            for statement in statements:
                connection.execute(statement)

    def read(self, query: str) -> list[Any]:
        with self.connected() as connection:
            return list(connection.execute(query).fetchall())


@pytest.fixture
def sqlite(tmp_path: Path) -> Callable[[str], Place]:
    def make(name: str) -> Place:
        path = tmp_path / f"{name}.db"
        return Place(f"sqlite://{path}", lambda: sqlite3.connect(path))

    return make


@pytest.fixture
def postgres(tmp_path: Path, shared_server: Server) -> Callable[[str], Place]:
    def make(name: str) -> Place:
        found = database(shared_server, tmp_path / name)
        return Place(shared_server.url(found), lambda: psycopg.connect(shared_server.conninfo(found)))

    return make


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., CopyReport]:
    def run(source: Place, target: Place, *tables: str, **more: Any) -> CopyReport:
        return copy_tables(
            source.url, target.url, more.pop("names", tables), store=tmp_path / "store", **more
        )

    return run


Make = Callable[[str], Place]
Copy = Callable[..., CopyReport]


def fill(place: Place, table: str, rows: list[tuple[Any, ...]], mark: str = "?") -> None:
    with place.connected() as connection:
        cursor = connection.cursor()
        cursor.executemany(f"INSERT INTO {table} VALUES ({', '.join([mark] * len(rows[0]))})", rows)


# --- there and back -------------------------------------------------------------------------------------------------

TYPED = """CREATE TABLE typed (
    id int, part text, small smallint, big bigint, single real, double double precision, exact numeric, money_ numeric(12,2),
    yes boolean, name varchar(20), fixed char(5), data bytea, day date, hour time(3), moment timestamp, zoned timestamptz,
    ident uuid, doc json, docb jsonb, many int[], span interval, net inet, PRIMARY KEY (part, id))"""
VALUES = (
    """(1, 'é', -32768, 9223372036854775807, 0.1, 0.1, 123456789012345678901234567890.123456789, 1.50, true, 'x', 'ab',
    '\\x00ff', '2009-01-31', '12:30:01.5', '2009-01-31 12:00:00.123456', '2009-01-31 12:00:00+02',
    '6f9619ff-8b86-d011-b42d-00c04fc964ff', '{"b": 1,  "a": 2}', '{"b": 1, "a": 2.50}', '{1,NULL,3}', '1 year 2 days',
    '10.0.0.1/8')""",
    """(2, '', NULL, 0, 'Infinity', '-Infinity', 'NaN', 0, false, '', '', '', '4713-01-01 BC', '24:00', 'infinity', '-infinity',
    NULL, '12', '12', '{}', '-00:00:01', '::1')""",
    f"(3, 'z', {', '.join(['NULL'] * 20)})",
)


def test_types_of_postgresql_come_back_from_sqlite_as_they_were(
    postgres: Make, sqlite: Make, copy: Copy
) -> None:
    first, middle, last = postgres("first"), sqlite("middle"), postgres("last")
    first.run(TYPED, *(f"INSERT INTO typed VALUES {row}" for row in VALUES))
    last.run(TYPED)
    for source, target in ((first, middle), (middle, last)):
        report = copy(source, target, "typed", create=True, verify=True)
        assert report.is_complete, report.error
        assert (report.failed, report.is_equal, report.tables[0].copied) == (0, True, 3)
    query = "SELECT typed::text FROM typed ORDER BY id"
    assert first.read(query) == last.read(query)
    assert middle.read("SELECT exact, money_, yes FROM typed WHERE id = 1") == [
        ("123456789012345678901234567890.123456789", "1.50", 1)
    ]


def test_nan_is_refused_where_sqlite_would_keep_null(postgres: Make, sqlite: Make, copy: Copy) -> None:
    source, target = postgres("source"), sqlite("target")
    source.run(
        "CREATE TABLE t (id int PRIMARY KEY, x double precision)", "INSERT INTO t VALUES (1, 'NaN'), (2, 2)"
    )
    report = copy(source, target, "t", create=True)
    assert (report.failed, report.tables[0].copied) == (1, 1)
    assert target.read("SELECT * FROM t") == [(2, 2.0)]
    (letter,), _ = dead_letters(report.store)
    assert "column 'x': SQLite keeps no NaN" in letter.error


def test_columns_of_sqlite_may_hold_anything_and_each_value_is_looked_at(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, at DATETIME, ok BOOLEAN, price DECIMAL(10,2), note VARCHAR(5), raw BLOB)"
    )
    fill(source, "t", [
        (1, "2009-01-31T12:00", 1, 1.98, "longer than five", b"\0"), (2, "yesterday", 1, 1, "a", None), (3, None, 7, 1, "a", None),
        (4, None, None, 1, "nul \0", None), (5, None, None, "dear", "a", None), (6, None, None, None, None, "text"),
    ])  # fmt: skip
    report = copy(source, target, "t", create=True)
    assert report.failed == 5
    assert [str(row) for row in target.read("SELECT at, ok, price, note FROM t")] == [
        "(datetime.datetime(2009, 1, 31, 12, 0), True, Decimal('1.98'), 'longer than five')"
    ]
    words = ["yesterday", "neither true", "NUL", "no number", "no bytes"]
    assert all(
        word in letter.error for word, letter in zip(words, dead_letters(report.store)[0], strict=True)
    )


# --- the order of keys ----------------------------------------------------------------------------------------------

SQLITE_KEYS = {
    "binary": "CREATE TABLE t (a TEXT, b INTEGER, PRIMARY KEY (a, b))",
    "nocase": "CREATE TABLE t (a TEXT COLLATE NOCASE, b INTEGER, PRIMARY KEY (a, b))",
    "index of another collation": (
        "CREATE TABLE t (a TEXT COLLATE NOCASE NOT NULL, b INTEGER NOT NULL); "
        "CREATE UNIQUE INDEX i ON t (a COLLATE BINARY, b); CREATE INDEX j ON t (a, b)"
    ),
    "descending": "CREATE TABLE t (a TEXT NOT NULL, b INTEGER NOT NULL); CREATE UNIQUE INDEX i ON t (a, b DESC)",
    "without rowid": "CREATE TABLE t (a TEXT, b INTEGER, PRIMARY KEY (b, a)) WITHOUT ROWID",
    "any type": "CREATE TABLE t (a, b, PRIMARY KEY (a, b))",
}


@pytest.mark.parametrize("schema", SQLITE_KEYS.values(), ids=SQLITE_KEYS.keys())
def test_every_row_of_sqlite_is_read_once_whatever_orders_its_key(
    schema: str, sqlite: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run(*schema.split("; "))
    awkward: list[Any] = [1, 1.5, -3, b"x", b""] if "(a, b, " in schema else []
    rows = [(name, number) for number in range(60) for name in [*NAMES, *awkward]]
    if "a TEXT COLLATE NOCASE" in schema and "BINARY" in schema:
        rows += [(name.swapcase(), number) for name, number in rows if name.isascii() and name.isalpha()]
        rows = list(dict.fromkeys(rows))
    fill(source, "t", rows)
    target.run("CREATE TABLE t (a, b, PRIMARY KEY (a, b))", "CREATE TABLE effects (name, count)")
    target.run(
        "CREATE TRIGGER counted AFTER INSERT ON t BEGIN INSERT INTO effects VALUES (new.a, new.b); END"
    )
    report = copy(source, target, "t", verify=True)
    assert report.is_equal
    assert sorted(target.read("SELECT * FROM t"), key=repr) == sorted(rows, key=repr)
    assert target.read("SELECT count(*) FROM effects") == [(len(rows),)]


@pytest.mark.parametrize(
    "collation", ["", 'COLLATE "C"', 'COLLATE "und-x-icu"', 'COLLATE "en-US-x-icu"', "COLLATE blind"]
)
def test_every_row_of_postgresql_is_read_once_whatever_orders_its_key(
    collation: str, postgres: Make, sqlite: Make, copy: Copy
) -> None:
    source, target = postgres("source"), sqlite("target")
    try:
        source.run(
            "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
    except psycopg.Error as error:
        pytest.skip(f"no ICU here: {error}")
    source.run(f"CREATE TABLE t (a text {collation}, b numeric, c bigint, PRIMARY KEY (a, b))")
    rows = [(name, number, number) for number in range(80) for name in NAMES]
    fill(source, "t", rows, "%s")
    report = copy(source, target, "t", create=True, verify=True)
    assert report.is_equal
    assert report.tables[0].copied == len(rows)
    assert target.read("SELECT count(*), sum(c) FROM t") == [(len(rows), sum(row[2] for row in rows))]


def test_a_unique_index_of_another_collation_than_its_column_orders_the_rows(
    postgres: Make, sqlite: Make, copy: Copy
) -> None:
    source, target = postgres("source"), sqlite("target")
    try:
        source.run(
            "CREATE COLLATION blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
        )
    except psycopg.Error as error:
        pytest.skip(f"no ICU here: {error}")
    source.run("CREATE TABLE t (a text COLLATE blind NOT NULL)", 'CREATE UNIQUE INDEX i ON t (a COLLATE "C")')
    rows = [(f"{name}{number}",) for number in range(300) for name in "aAbB"]
    fill(source, "t", rows, "%s")
    assert copy(source, target, "t", create=True).tables[0].copied == len(rows)


def test_rows_with_null_in_their_key_are_refused_before_the_first_row(sqlite: Make, copy: Copy) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (a TEXT PRIMARY KEY)", "INSERT INTO t VALUES (NULL), ('x')")
    with pytest.raises(ConfigError, match="NULL in its key"):
        copy(source, target, "t", create=True)


# --- rows that fail -------------------------------------------------------------------------------------------------


def test_a_refused_row_is_kept_with_the_databases_words_and_tried_again_by_the_next_run(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER)")
    fill(source, "t", [(n, n) for n in range(3_000)])
    target.run(
        "CREATE TABLE t (id bigint PRIMARY KEY, x bigint, CONSTRAINT odd CHECK (x <> 1234))",
        *counting("postgres", {"t": "new.id::text"}),
    )
    report = copy(source, target, "t")
    assert (report.is_complete, report.failed, report.is_store_kept, report.tables[0].copied) == (
        True,
        1,
        True,
        2_999,
    )
    (letter,), _ = dead_letters(report.store)
    assert 'violates check constraint "odd"' in letter.error
    target.run("ALTER TABLE t DROP CONSTRAINT odd")
    report = copy(source, target, "t", verify=True)
    assert (report.failed, report.tables[0].copied, report.tables[0].read) == (0, 1, 0)
    assert report.is_equal
    assert not Path(report.store).exists()
    assert target.read("SELECT count(*), max(count) FROM effects") == [(3_000, 1)]


def test_rows_that_refer_to_later_ones_arrive_in_the_end(sqlite: Make, postgres: Make, copy: Copy) -> None:
    source, target = sqlite("source"), postgres("target")
    for place in (source, target):
        place.run("CREATE TABLE b (id bigint PRIMARY KEY, above bigint REFERENCES b)",
                  "CREATE TABLE a (id bigint PRIMARY KEY, b bigint REFERENCES b)")  # fmt: skip
    fill(source, "b", [(n, n + 1 if n % 50 == 0 else None) for n in range(2_000)])
    fill(source, "a", [(n, n) for n in range(2_000)])
    report = copy(source, target, "a", "b", verify=True)
    assert [table.table for table in report.tables] == ["b", "a"]
    assert (report.failed, report.is_equal) == (0, True)


def test_rows_of_tables_that_refer_to_each_other_arrive_in_the_end(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    for place in (source, target):
        place.run(
            "CREATE TABLE a (id bigint PRIMARY KEY, b bigint)",
            "CREATE TABLE b (id bigint PRIMARY KEY, a bigint REFERENCES a)",
        )
    target.run("ALTER TABLE a ADD FOREIGN KEY (b) REFERENCES b")
    fill(source, "a", [(n, n if n % 50 == 1 else None) for n in range(300)])
    fill(source, "b", [(n, n if n % 50 != 1 else None) for n in range(300)])
    report = copy(source, target, "a", "b", verify=True)
    assert (report.failed, report.is_equal, report.is_store_kept) == (0, True, False)


def test_rows_of_tables_that_inherit_are_not_those_of_their_parent_and_those_of_partitions_are(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = postgres("source"), sqlite("target")
    source.run(
        "CREATE TABLE parent (id int PRIMARY KEY)", "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)",
        "INSERT INTO parent VALUES (1)", "INSERT INTO child VALUES (1), (2)",
        "CREATE TABLE whole (id int PRIMARY KEY) PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF whole FOR VALUES FROM (0) TO (10)",
        "CREATE TABLE high PARTITION OF whole FOR VALUES FROM (10) TO (20)", "INSERT INTO whole VALUES (1), (11)",
    )  # fmt: skip
    report = copy(source, target, "parent", "whole", create=True, verify=True)
    assert (report.is_equal, [table.copied for table in report.tables]) == (True, [1, 2])
    assert target.read("SELECT * FROM parent") == [(1,)]


def test_names_with_a_percent_sign_are_names(sqlite: Make, postgres: Make, copy: Copy) -> None:
    source, target = postgres("source"), sqlite("target")
    source.run(
        'CREATE TABLE "a%b" (id int PRIMARY KEY, "x%s" text)', """INSERT INTO "a%b" VALUES (1, '%s')"""
    )
    assert copy(source, target, "a%b", create=True, verify=True).is_equal
    assert target.read('SELECT * FROM "a%b"') == [(1, "%s")]


def test_values_of_domains_are_those_of_their_type_and_lists_of_texts_confuse_no_later_table(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = postgres("source"), sqlite("target")
    source.run(
        "CREATE DOMAIN price AS numeric", "CREATE DOMAIN words AS text[]", "CREATE DOMAIN moment AS timestamptz",
        "CREATE TABLE a (id int PRIMARY KEY, x price, y words, z moment, plain text[])", "CREATE TABLE b (id int PRIMARY KEY)",
        "INSERT INTO a VALUES (1, 1.50, '{a,b}', '2020-01-01 00:00:00+00', '{c}')",
    )  # fmt: skip
    target.run("CREATE TABLE a (id INTEGER PRIMARY KEY, x TEXT, y TEXT, z TEXT, plain TEXT)")
    report = copy(source, target, "a", "b", create=True)
    assert (report.failed, target.read("SELECT x, y, z, plain FROM a")) == (
        0,
        [("1.50", "{a,b}", "2020-01-01 00:00:00+00", "{c}")],
    )


def test_a_text_that_is_none_fails_alone_and_reading_goes_on_behind_it(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)")
    fill(source, "t", [(n, f"x{n}") for n in range(2_000)])
    source.run("UPDATE t SET x = CAST(x'ff41' AS TEXT) WHERE id IN (5, 777, 1999)")
    report = copy(source, target, "t", create=True)
    assert (report.failed, report.tables[0].copied) == (3, 1_997)
    assert all("not UTF-8" in letter.error for letter in dead_letters(report.store)[0])


def test_a_row_too_large_for_an_operation_fails_alone(sqlite: Make, copy: Copy) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (k TEXT PRIMARY KEY, x BLOB)")
    fill(source, "t", [("a", b"1"), ("b", bytes(limits.PAYLOAD_BYTES_MAX)), ("c" * 5_000, b"2"), ("d", b"3")])
    report = copy(source, target, "t", create=True)
    assert (report.failed, target.read("SELECT k FROM t ORDER BY k")) == (2, [("a",), ("d",)])


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_said_at_once_and_nothing_is_made(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run(
        "CREATE TABLE loose (x INTEGER)", "CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT, y BLOB)",
        "CREATE TABLE new (id INTEGER PRIMARY KEY, what, ever)", "CREATE VIEW v AS SELECT 1",
        "CREATE TABLE fine (id INTEGER PRIMARY KEY)",
    )  # fmt: skip
    target.run("CREATE TABLE t (id bigint PRIMARY KEY, x bytea)")
    with pytest.raises(ConfigError) as caught:
        copy(source, target, "loose", "t", "new", "none", "fine", create=True)
    text = str(caught.value)
    for words in (
        "'loose' of the source has no primary key", "'x' is bytea, which takes no text", "has no column 'y'",
        "nothing tells what column 'what' (no type) is", "no table 'none'; it has fine, loose, new, t",
    ):  # fmt: skip
        assert words in text
    assert target.read("SELECT to_regclass('fine')") == [(None,)]
    with pytest.raises(ConfigError, match="is a view"):
        copy(source, target, "v")


def test_a_target_without_the_table_is_made_only_when_asked_for(sqlite: Make, copy: Copy) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    with pytest.raises(ConfigError, match="--create"):
        copy(source, target, "t")


def test_a_store_goes_on_only_with_what_it_was_begun_for(sqlite: Make, copy: Copy) -> None:
    source, other, target = sqlite("source"), sqlite("other"), sqlite("target")
    for place in (source, other):
        place.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER)", "INSERT INTO t VALUES (1, 1), (2, 2)")
    target.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER CHECK (x <> 2))")
    assert copy(source, target, "t").is_store_kept
    with pytest.raises(ConfigError, match="begun for something else"):
        copy(other, target, "t")


def test_memory_that_is_taken_before_the_first_row_is_refused(sqlite: Make, copy: Copy) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    with pytest.raises(ConfigError, match="too few"):
        copy(source, target, "t", create=True, memory_bytes=limits.MIB)


# --- memory, progress, verification ---------------------------------------------------------------------------------


def test_memory_stays_below_its_ceiling_while_a_table_larger_than_it_is_copied(
    sqlite: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x BLOB)")
    for first in range(0, 2_000, 100):
        fill(source, "t", [(n, os.urandom(150_000)) for n in range(first, first + 100)])
    ceiling = int(1.25 * Memory(0).look()) + 70 * limits.MIB
    seen: list[CopyProgress] = []
    report = copy(source, target, "t", create=True, memory_bytes=ceiling, progress=seen.append)
    assert report.tables[0].copied == 2_000
    assert 0 < report.peak_memory_bytes < ceiling < 2_000 * 150_000 + Memory(0).look()
    assert max(one.peak_memory_bytes for one in seen) <= report.peak_memory_bytes


def test_rows_of_postgresql_larger_than_a_group_are_read_in_parts(
    postgres: Make, sqlite: Make, copy: Copy
) -> None:
    source, target = postgres("source"), sqlite("target")
    source.run(
        "CREATE TABLE t (id int PRIMARY KEY, x text)",
        "INSERT INTO t SELECT n, repeat(md5(n::text), CASE WHEN n < 300 THEN 1 ELSE 6000 END) FROM generate_series(1, 500) AS n",
    )
    report = copy(
        source,
        target,
        "t",
        create=True,
        verify=True,
        memory_bytes=int(1.25 * Memory(0).look()) + 70 * limits.MIB,
    )
    assert (report.tables[0].copied, report.is_equal) == (500, True)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_rows_of_many_megabytes_behind_small_ones_are_copied_within_the_ceiling(
    kind: str, sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = (sqlite if kind == "sqlite" else postgres)("source"), sqlite("target")
    source.run(f"CREATE TABLE t (id INTEGER PRIMARY KEY, x {'BLOB' if kind == 'sqlite' else 'bytea'})")
    mark = "?" if kind == "sqlite" else "%s"
    fill(source, "t", [(n, b"x") for n in range(3_000)], mark)
    for n in range(8):
        fill(source, "t", [(3_000 + n, os.urandom(10 * limits.MIB))], mark)
    fill(source, "t", [(4_000, bytes(limits.PAYLOAD_BYTES_MAX)), (4_001, b"end")], mark)
    ceiling = int(1.25 * Memory(0).look()) + 150 * limits.MIB
    report = copy(source, target, "t", create=True, verify=True, memory_bytes=ceiling)
    assert (report.error, report.failed, report.tables[0].copied) == (None, 1, 3_009)
    assert report.peak_memory_bytes < ceiling


def test_progress_tells_of_batches_and_one_that_raises_stops_nothing(sqlite: Make, copy: Copy) -> None:
    source, target = sqlite("source"), sqlite("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)")
    fill(source, "t", [(n, "x") for n in range(5_000)])
    seen: list[CopyProgress] = []

    def tell(now: CopyProgress) -> None:
        seen.append(now)
        if now.copied > 2_000:
            raise RuntimeError("the terminal is gone")

    report = copy(source, target, "t", create=True, progress=tell)
    assert report.tables[0].copied == 5_000
    assert any(one.batches and one.last_batch_rows and one.batch_s_average for one in seen)
    assert (report.tables[0].batches, report.tables[0].failed_batches) >= (2, 0)


def test_verification_finds_a_row_that_differs_and_one_that_is_too_many(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)")
    fill(source, "t", [(n, f"x{n}") for n in range(2_000)])
    assert copy(source, target, "t", create=True, verify=True).is_equal
    target.run(
        "CREATE FUNCTION other() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF new.id = 77 THEN new.x := 'y'; END IF; RETURN new; END $$",
        "CREATE TRIGGER other BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION other()",
    )
    report = copy(source, target, "t", verify=True)
    assert (report.is_equal, report.is_complete) == (False, True)
    target.run("DROP TRIGGER other ON t", "INSERT INTO t VALUES (9999, 'more')")
    (table,) = copy(source, target, "t", verify=True).tables
    assert table.verification is not None
    assert (table.verification.source_rows, table.verification.target_rows, table.verification.is_equal) == (
        2_000,
        2_001,
        False,
    )


def test_a_connection_that_died_while_rows_arrived_does_not_spoil_the_end(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x TEXT)")
    fill(source, "t", [(n, f"x{n}") for n in range(12_000)])

    def tell(now: CopyProgress) -> None:
        if now.copied == 12_000:
            target.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walbatch copy'"
            )

    report = copy(source, target, "t", create=True, verify=True, progress=tell)
    assert (report.error, report.is_equal, report.is_store_kept) == (None, True, False)
    assert target.read("SELECT count(*) FROM walbatch_copies") == [(0,)]


def test_nothing_of_a_complete_copy_is_left_beside_the_rows(
    sqlite: Make, postgres: Make, copy: Copy, tmp_path: Path
) -> None:
    for number, (source, target) in enumerate(
        [(sqlite("source"), postgres("target")), (postgres("target"), sqlite("back"))]
    ):
        if not number:
            source.run("CREATE TABLE t (id INTEGER PRIMARY KEY)", "INSERT INTO t VALUES (1)")
        assert not copy(source, target, "t", create=True).is_store_kept
        assert not (tmp_path / "store").exists()
        assert not (tmp_path / "store.done").exists()
        for table in ("walbatch_copies", "walbatch_marks"):
            assert target.read(f"SELECT count(*) FROM {table}") == [(0,)]


def test_a_copy_that_finds_its_target_gone_gives_up_and_goes_on_later(
    sqlite: Make, postgres: Make, copy: Copy
) -> None:
    source, target = sqlite("source"), postgres("target")
    source.run("CREATE TABLE t (id INTEGER PRIMARY KEY)")
    fill(source, "t", [(n,) for n in range(500)])
    target.run("CREATE TABLE t (id bigint PRIMARY KEY)")
    with target.connected() as connection:
        connection.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        connection.execute("SELECT 1")
        report = copy(source, target, "t", stall_s=2.0, batch_s=1.0)
    assert not report.is_complete
    assert report.error is not None
    assert "nothing has arrived in table 't'" in report.error
    assert report.remaining == 500
    report = copy(source, target, "t", verify=True)
    assert (report.is_complete, report.is_equal, report.tables[0].read_before) == (True, True, 500)
