"""PostgreSQL as a source: what a lost connection must not change."""

from collections.abc import Callable
from pathlib import Path

import pytest

psycopg = pytest.importorskip("psycopg", reason="copying from and to PostgreSQL needs psycopg")

from tests.backends.servers import database, shared_server  # noqa: E402 - what needs psycopg
from tools.postgres import Server  # noqa: E402
from walbatch.copying import copy_tables  # noqa: E402
from walbatch.copying.databases import Bookmark, Database  # noqa: E402
from walbatch.copying.itinerary import make_itinerary  # noqa: E402
from walbatch.copying.opening import open_database  # noqa: E402
from walbatch.copying.reading import Reader  # noqa: E402
from walbatch.copying.rows import Decoder  # noqa: E402
from walbatch.copying.shapes import Kind  # noqa: E402
from walbatch.copying.verifying import verify  # noqa: E402
from walbatch.errors import StorageError  # noqa: E402

__all__ = ["shared_server"]


def test_verification_goes_on_behind_the_last_row_where_its_connection_is_lost(
    tmp_path: Path, shared_server: Server
) -> None:
    name = database(shared_server, tmp_path)
    with psycopg.connect(shared_server.conninfo(name), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, price numeric)")
        connection.execute("INSERT INTO t SELECT n, n + 0.50 FROM generate_series(1, 12000) AS n")
        here = open_database(shared_server.url(name), role="source")
        (way,) = make_itinerary(here, here, {"t": "t2"}, create=True).routes
        connection.execute("INSERT INTO t2 SELECT * FROM t")
        lost = 0

        def tell(count: int) -> None:
            if count in {5_000, 17_000}:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walbatch copy'"
                )

        def reach(place: Database, what: str, ask: Callable[[], bool]) -> bool:
            nonlocal lost
            try:
                return ask()
            except StorageError:
                lost += 1
                place.close()
                return reach(place, what, ask)

        found = verify(here, here, way, tell=tell, reach=reach)
        here.close()
    assert (found.source_rows, found.target_rows, found.is_equal, lost) == (12_000, 12_000, True, 2)


def test_a_value_of_a_type_that_nobody_expects_stops_the_copy_and_buries_no_row(
    tmp_path: Path, shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = database(shared_server, tmp_path)
    with psycopg.connect(shared_server.conninfo(name), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, price numeric)")
        connection.execute("INSERT INTO t VALUES (1, 1.5)")
    monkeypatch.setattr("walbatch.copying.postgres._TEXT_OIDS", frozenset())
    monkeypatch.setattr("walbatch.copying.postgres._READ_AS_THEY_ARE", frozenset(Kind))
    with pytest.raises(TypeError, match="values of Decimal"):
        copy_tables(
            shared_server.url(name), f"sqlite://{tmp_path}/target.db", ["t"], store=tmp_path / "store", create=True
        )  # fmt: skip


def test_after_a_lost_connection_reading_goes_on_where_it_was_with_values_as_they_were(
    tmp_path: Path,
    shared_server: Server,
) -> None:
    name = database(shared_server, tmp_path)
    with psycopg.connect(shared_server.conninfo(name), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (day date PRIMARY KEY, price numeric, many int[])")
        connection.execute(
            "INSERT INTO t SELECT date '2020-01-01' + n, n + 0.50, ARRAY[n] FROM generate_series(0, 499) AS n"
        )
        here = open_database(shared_server.url(name), role="source")
        there = open_database(f"sqlite://{tmp_path}/target.db", role="target")
        (way,) = make_itinerary(here, there, {"t": ""}, create=True).routes
        reader = Reader(here, way, Bookmark(0, b""))
        operations = list(reader.read(is_short=True).operations)
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'walbatch copy'"
        )
        with pytest.raises(StorageError):
            reader.read(is_short=True)
        while not (group := reader.read(is_short=True)).is_last:
            operations += group.operations
        operations += group.operations
        here.close()
        there.close()
    keys = [Decoder(1).decode(key) for key, _ in operations]
    assert keys == sorted(set(keys))
    assert (len(keys), keys[0], keys[-1]) == (500, ("2020-01-01",), ("2021-05-14",))
    assert [payload[9:13] for _, payload in operations] == [b"\x02\x00NO"] * 500
