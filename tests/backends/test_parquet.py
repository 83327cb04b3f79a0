"""Parquet files as a backend: typed columns, and rows that do not fit them."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("pyarrow", reason="needs walbatch[parquet]")

import pyarrow as pa
from pyarrow import parquet as pq

import walbatch as wb
from tests.backends.test_files import FilesContract, shown
from walbatch.backends import open_backend, url_of
from walbatch.backends.files.parquet import ParquetBackend, take_columns
from walbatch.errors import BatchTooLarge, ConfigError
from walbatch.testing.contracts import STORE, Pair
from walbatch.types import Failures, Mark


class TestParquet(FilesContract):
    kills: ClassVar[int] = 5

    def make_backend(self, path: Path) -> Any:
        return ParquetBackend(path / "out")

    def content(self, path: Path) -> Iterable[Pair]:
        for file in shown(path / "out"):
            for row in pq.read_table(file).to_pylist():
                yield row["key"], row["payload"]

    def test_key_and_payload_are_binary_and_lsns_are_numbers(self, tmp_path: Path) -> None:
        backend = self.opened_now(tmp_path)
        self.apply(backend, self.batch([(b"\xff", b"\0"), (b"b", b"")], lsns=(7, 9)))
        self.apply(backend, self.batch([(b"c", b"x")], logged=False))
        backend.close()
        first, second = (pq.read_table(file) for file in shown(tmp_path / "out"))
        assert first.schema.types == [pa.int64(), pa.binary(), pa.binary(), pa.int8()]
        assert first.to_pydict() == {
            "lsn": [7, 9], "key": [b"\xff", b"b"], "payload": [b"\0", b""], "priority": [5, 5],
        }  # fmt: skip
        assert second["lsn"].to_pylist() == [None]


# --- columns ------------------------------------------------------------------------------------------------------


def applied(
    tmp_path: Path, columns: Any, payloads: list[Any]
) -> tuple[list[dict[str, Any]], dict[int, str], Mark]:
    """Rows, what was rejected, and the mark."""
    backend = ParquetBackend(tmp_path / "out", columns)
    backend.open("put", 1, STORE)
    pairs = [
        (b"k%d" % number, payload if isinstance(payload, bytes) else json.dumps(payload).encode())
        for number, payload in enumerate(payloads)
    ]
    answer = backend.apply(FilesContract().batch(pairs))
    mark = backend.applied_mark(0)
    backend.close()
    rejected = answer.outcomes if isinstance(answer, Failures) else {}
    rows = [row for file in shown(tmp_path / "out") for row in pq.read_table(file).to_pylist()]
    return rows, {index: getattr(outcome, "error", "") for index, outcome in rejected.items()}, mark


def test_fields_of_json_objects_become_typed_columns(tmp_path: Path) -> None:
    columns = {
        "id": "int64", "name": "string", "ok": "bool", "at": "timestamp[us, tz=UTC]", "price": pa.decimal128(9, 2),
        "tags": "string",
    }  # fmt: skip
    full = {
        "id": 1,
        "name": "Ann",
        "ok": True,
        "at": "2024-05-06T07:08:09Z",
        "price": 1.5,
        "tags": ["a", {"b": 1}],
    }
    rows, rejected, _ = applied(tmp_path, columns, [full, {}, {"at": 1_000_000, "price": "2.25"}])
    assert not rejected
    assert [row.pop("lsn") for row in rows] == [1, 2, 3]
    assert [row.pop("key") for row in rows] == [b"k0", b"k1", b"k2"]
    utc = dt.UTC
    assert rows[0] == {
        "id": 1, "name": "Ann", "ok": True, "at": dt.datetime(2024, 5, 6, 7, 8, 9, tzinfo=utc), "price": Decimal("1.50"),
        "tags": '["a",{"b":1}]',
    }  # fmt: skip
    assert set(rows[1].values()) == {None}
    assert rows[2]["at"] == dt.datetime(1970, 1, 1, 0, 0, 1, tzinfo=utc)
    assert rows[2]["price"] == Decimal("2.25")


def test_rows_that_do_not_fit_are_rejected_alone(tmp_path: Path) -> None:
    payloads = [
        {"id": 1}, b"{", [1], {"id": "x"}, {"id": 2**70}, {"id": 1.5}, {"id": True}, {"unknown": 1}, {"at": "soon"},
        {"name": 5}, {"name": "\ud800"}, b"\xff", {"id": 2, "at": "2024-01-01T00:00:00"},
    ]  # fmt: skip
    columns = {"id": "int64", "name": "string", "at": "timestamp[s]"}
    rows, rejected, mark = applied(tmp_path, columns, payloads)
    assert [row["id"] for row in rows] == [1, 2]
    assert sorted(rejected) == list(range(1, 12))
    assert "no JSON" in rejected[1]
    assert "no object" in rejected[2]
    assert "field 'id' does not fit its column (int64)" in rejected[3]
    assert "fields that no column has: unknown" in rejected[7]
    assert mark == Mark(epoch=1, ranges=((1, 1), (13, 13)))


def test_a_schema_may_forbid_nulls_and_a_batch_of_misfits_makes_no_file(tmp_path: Path) -> None:
    schema = pa.schema(
        [pa.field("id", pa.int32(), nullable=False), pa.field("points", pa.list_(pa.float64()))]
    )
    rows, rejected, mark = applied(tmp_path, schema, [{}, {"id": None}])
    assert rows == []
    assert sorted(rejected) == [0, 1]
    assert mark == Mark(epoch=1)
    rows, rejected, _ = applied(tmp_path, schema, [{"id": 1, "points": [1, 2.5]}])
    assert rows[0]["points"] == [1.0, 2.5]


def test_rows_that_fit_one_by_one_but_not_together_come_again_in_smaller_batches(tmp_path: Path) -> None:
    schema = pa.schema([("s", pa.dictionary(pa.int8(), pa.string()))])
    values = [{"s": f"v{number}"} for number in range(300)]
    with pytest.raises(BatchTooLarge, match="300 rows fit their columns one by one") as failure:
        applied(tmp_path / "large", schema, values)
    assert failure.value.count == 150
    rows, rejected, _ = applied(tmp_path, schema, [*values[:100], {"s": 5}])
    assert [row["s"] for row in rows] == [value["s"] for value in values[:100]]
    assert sorted(rejected) == [100]


def test_an_engine_cuts_them_until_they_fit(tmp_path: Path) -> None:
    backend = ParquetBackend(tmp_path / "out", pa.schema([("s", pa.dictionary(pa.int8(), pa.string()))]))
    with wb.Engine.open(
        tmp_path / "store", {"put": wb.Lane(backend, trigger=wb.Trigger(count=300))}
    ) as engine:
        engine.submit_many("put", [(b"%d" % n, b'{"s": "v%d"}' % n) for n in range(300)])
        engine.flush(timeout=30)
        assert engine.dead_letters() == []
    found = [row["s"] for file in shown(tmp_path / "out") for row in pq.read_table(file).to_pylist()]
    assert sorted(found) == sorted(f"v{n}" for n in range(300))


@pytest.mark.parametrize(
    "columns",
    [{}, {"id": "int65"}, {"id": 5}, {"lsn": "int64"}, 7, pa.schema([("a", pa.int8()), ("a", pa.int8())])],
    ids=str,
)
def test_columns_that_make_no_sense_are_refused(columns: Any) -> None:
    with pytest.raises(ConfigError):
        ParquetBackend("/x", columns)


def test_compressions_are_those_that_parquet_has() -> None:
    with pytest.raises(ConfigError, match="zstd"):
        ParquetBackend("/x", compression="lzma")


# --- urls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "query"),
    [
        (None, ""),
        (
            {"id": "int64", "a b": "timestamp[us, tz=UTC]"},
            "?columns=id:int64,a%20b:timestamp%5Bus,%20tz%3DUTC%5D",
        ),
    ],
    ids=["plain", "columns"],
)
def test_a_url_makes_it_again(columns: Any, query: str) -> None:
    backend = ParquetBackend("/var/out", columns)
    url = url_of(backend)
    assert url == f"parquet:///var/out{query}"
    again = open_backend(url, allow_python=False)
    assert isinstance(again, ParquetBackend)
    assert again.schema == backend.schema
    assert url_of(again) == url


def test_the_compression_is_in_the_url() -> None:
    assert url_of(ParquetBackend("/x", compression="none")) == "parquet:///x?compression=none"


def test_what_no_url_can_say_has_none() -> None:
    assert url_of(ParquetBackend("/x", {"a": pa.list_(pa.int8())})) is None
    assert url_of(ParquetBackend("/x", pa.schema([pa.field("a", pa.int8(), nullable=False)]))) is None


@pytest.mark.parametrize("text", ["a", "a:", ":int8", "a:int8,a:int8", "a:int8,,b:int8"])
def test_columns_in_a_url_are_names_and_types(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME:TYPE"):
        take_columns(text)


def test_commas_in_brackets_belong_to_a_type() -> None:
    assert take_columns("a:timestamp[us, tz=UTC],b:int8") == {"a": "timestamp[us, tz=UTC]", "b": "int8"}
