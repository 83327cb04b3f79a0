"""What values become in the other database: exactly what they were, or a refusal."""

from typing import Any

import pytest

from walbatch.copying.rows import RowError
from walbatch.copying.shapes import Column, Dialect, Key, Kind, Route, Shape
from walbatch.copying.sqlite import affinity_of, kind_of
from walbatch.copying.values import canonical, convert, converters


def column(database: Dialect, type_: str, kind: Kind | None = None, **more: Any) -> Column:
    if database is Dialect.SQLITE:
        return Column(
            name="c", kind=kind or kind_of(type_), type=type_, is_needed=False, affinity=affinity_of(type_)
        )
    assert kind is not None
    return Column(name="c", kind=kind, type=type_, is_needed=False, **more)


def route(one: Column, other: Column, source: Dialect, target: Dialect) -> Route:
    key = Key(columns=("c",), ordering=("c",))
    shapes = [
        Shape(dialect=place, name="t", columns=(it,), key=key)
        for place, it in ((source, one), (target, other))
    ]
    return Route(source=shapes[0], target=shapes[1], pairs=((one, other),), key_count=0)


def arrives(value: Any, way: Route) -> Any:
    return convert((value,), converters(way), ["c"])[0]


TO_POSTGRES = [
    ("bigint", Kind.INTEGER, {}, [(5, 5)], ["5", 5.0, b"5"]),
    ("double precision", Kind.REAL, {}, [(1.5, 1.5), (3, 3.0)], ["1.5", 2**60 + 1]),
    (
        "real", Kind.REAL, {"is_narrow": True},
        [(0.1, 0.1), (0.10000000149011612, 0.1), (1e30, 1e30), (16777216, 16777216.0), (-0.0, -0.0), (float("inf"), float("inf"))],
        [0.123456789012, 0.123456789, 16777217.0, 16777217, 1e300, 3.4028235677973366e38, 1e-50],
    ),
    ("numeric", Kind.NUMERIC, {}, [(1.25, 1.25), ("1.50", "1.50"), ("NaN", "NaN")], ["1,5", "x", b"1"]),
    ("numeric(5,2)", Kind.NUMERIC, {"scale": 2}, [("1.50", "1.50"), ("1.500", "1.500"), (7, 7)], ["1.555", 0.001]),
    ("boolean", Kind.BOOLEAN, {}, [(1, True), (0, False)], [2, "true", 1.0]),
    ("text", Kind.TEXT, {}, [("a", "a")], [1, b"a"]),
    ("character varying(3)", Kind.TEXT, {"length": 3}, [("äöü", "äöü"), ("a  ", "a  ")], ["abc   ", "abcd"]),
    ("name", Kind.TEXT, {"length": 63}, [("a" * 63, "a" * 63)], ["a" * 64, "ä" * 32]),
    ("bytea", Kind.BYTES, {}, [(b"a", b"a")], ["a", 1]),
    ("date", Kind.DATE, {}, [("2009-01-31", "2009-01-31")], ["2009-01-31 12:00:00", "31.1.2009", 20090131]),
    ("time", Kind.TIME, {}, [("12:30", "12:30:00"), ("12:30:01.50", "12:30:01.5")], ["12:30:01.1234567", "noon"]),
    (
        "timestamp", Kind.TIMESTAMP, {},
        [("2009-01-31T12:00:01.500", "2009-01-31 12:00:01.5"), ("2009-01-31", "2009-01-31 00:00:00"), ("infinity", "infinity")],
        ["2009-01-31 12:00:00+02", "today", 1234],
    ),
    ("timestamp(0)", Kind.TIMESTAMP, {"scale": 0}, [("2009-01-31 12:00:01", "2009-01-31 12:00:01")], ["2009-01-31 12:00:01.5"]),
    (
        "timestamptz", Kind.TIMESTAMPTZ, {},
        [("2009-01-31 12:00:00+02:00", "2009-01-31 10:00:00+00"), ("2009-01-31T12:00:00Z", "2009-01-31 12:00:00+00"),
         ("0044-03-15 12:00:00+01:00", "0044-03-15 11:00:00+00"), ("0044-03-15 00:00:00+00:00 BC", "0044-03-15 00:00:00+00 BC"),
         ("0044-03-15 00:00:00+00 BC", "0044-03-15 00:00:00+00 BC")],
        ["2009-01-31 12:00:00", "0001-01-01 00:00:00+02:00", "0044-03-15 00:00:00+01 BC"],
    ),
    (
        "uuid", Kind.UUID, {},
        [("6F9619FF8B86D011B42D00C04FC964FF", "6f9619ff-8b86-d011-b42d-00c04fc964ff")], ["6f96", b"x" * 16],
    ),
    ("json", Kind.JSON, {}, [('{"a": 1}', '{"a": 1}')], [1]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("type_", "kind", "more", "good", "bad"), TO_POSTGRES, ids=[row[0] for row in TO_POSTGRES]
)
def test_a_value_of_sqlite_arrives_in_postgresql_as_it_is_or_is_refused(
    type_: str, kind: Kind, more: dict[str, Any], good: list[tuple[Any, Any]], bad: list[Any]
) -> None:
    one, other = column(Dialect.SQLITE, ""), column(Dialect.POSTGRES, type_, kind, **more)
    way = route(one, other, Dialect.SQLITE, Dialect.POSTGRES)
    assert [arrives(value, way) for value, _ in good] == [value for _, value in good]
    assert arrives(None, way) is None
    for value in bad:
        with pytest.raises(RowError, match="column 'c'"):
            arrives(value, way)


TO_SQLITE = [
    (Kind.REAL, "REAL", [(1.5, 1.5), (float("inf"), float("inf"))], [float("nan")]),
    (Kind.INTEGER, "REAL", [(3, 3.0)], [2**60 + 1]),
    (Kind.NUMERIC, "NUMERIC TEXT", [("1.50", "1.50"), ("NaN", "NaN")], []),
    (
        Kind.NUMERIC,
        "NUMERIC(10,2)",
        [("1.50", 1.5), ("3", 3), ("0.1", 0.1)],
        ["1.23456789012345678901", "NaN", "1" * 400],
    ),
    (Kind.JSON, "JSON TEXT", [("12", "12")], []),
    (Kind.JSON, "JSON", [('{"a": 12}', '{"a": 12}')], ["12", " 1e5 "]),
    (Kind.TEXT, "STRING", [("7a", "7a"), ("", "")], ["007", "1e5", " 5 "]),
    (Kind.TEXT, "TEXT", [("007", "007")], []),
    (Kind.TEXT, "", [("007", "007")], []),
    (Kind.OTHER, "STRING", [("{1}", "{1}")], ["1.00"]),
    (Kind.TIMESTAMP, "TIMESTAMP", [("2009-01-31 00:00:00", "2009-01-31 00:00:00")], []),
]


@pytest.mark.parametrize(("kind", "type_", "good", "bad"), TO_SQLITE)
def test_a_value_of_postgresql_arrives_in_sqlite_as_it_is_or_is_refused(
    kind: Kind, type_: str, good: list[tuple[Any, Any]], bad: list[Any]
) -> None:
    one, other = column(Dialect.POSTGRES, "t", kind), column(Dialect.SQLITE, type_)
    way = route(one, other, Dialect.POSTGRES, Dialect.SQLITE)
    assert [arrives(value, way) for value, _ in good] == [value for _, value in good]
    for value in bad:
        with pytest.raises(RowError):
            arrives(value, way)


@pytest.mark.parametrize(
    ("kinds", "equal", "different"),
    [
        ((Kind.NUMERIC, Kind.NUMERIC), [("1.50", 1.5), ("100", 100), ("0.0", -0.0)], [("1.5", 1.51)]),
        ((Kind.BOOLEAN, Kind.INTEGER), [(True, 1), (False, 0)], [(True, 0)]),
        ((Kind.TEXT, Kind.TEXT), [("1", "1")], [("1", "1.0"), ("1", 1), ("", None), ("n", None)]),
        ((Kind.BYTES, Kind.BYTES), [(b"a", b"a")], [(b"a", "a")]),
    ],
)
def test_equal_values_of_two_databases_have_one_canonical_form(
    kinds: tuple[Kind, Kind], equal: list[tuple[Any, Any]], different: list[tuple[Any, Any]]
) -> None:
    pair = column(Dialect.POSTGRES, "t", kinds[0]), column(Dialect.POSTGRES, "t", kinds[1])
    (form,) = canonical([pair])
    for one, other in equal:
        assert form(one) == form(other)
    for one, other in different:
        assert form(one) != form(other)


def test_numbers_in_jsonb_are_equal_by_value_and_no_texts() -> None:
    pair = column(Dialect.SQLITE, "JSON TEXT"), column(Dialect.POSTGRES, "jsonb", Kind.JSON)
    (form,) = canonical([pair])
    for one, other in (
        ('{"a": 1e2}', '{"a":100}'),
        ("[1.50]", "[1.5]"),
        ('{"a": 1, "b": -0}', '{"b": 0.0, "a": 1}'),
    ):
        assert form(one) == form(other)
    for one, other in (
        ("[1.5]", '["1.5"]'),
        ("[1]", '["1"]'),
        ("[1]", "[true]"),
        ("[1]", "[1.0000000000000000001]"),
    ):
        assert form(one) != form(other)
