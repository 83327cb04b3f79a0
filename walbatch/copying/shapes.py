"""The shape of a table: its columns, what kind of values they have, and the key that finds a row.

What is not here: how a database tells it (`sqlite`, `postgres`), and what is done with values (`values`).

The idea needed to read it: two databases understand each other by kinds. A type is mapped to its kind, and a kind to the type that
a new table gets; what a kind may become in an existing table stands in one table here.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final


class Dialect(enum.StrEnum):
    """Where tables are."""

    SQLITE = "SQLite"
    POSTGRES = "PostgreSQL"


class Kind(enum.StrEnum):
    """What values of a column are."""

    INTEGER = "integer"
    REAL = "floating-point number"
    NUMERIC = "decimal number"
    BOOLEAN = "boolean"
    TEXT = "text"
    BYTES = "bytes"
    DATE = "date"
    TIME = "time"
    TIMESTAMP = "timestamp"
    TIMESTAMPTZ = "timestamp with time zone"
    UUID = "UUID"
    JSON = "JSON"
    OTHER = "another type"
    """As text, which the same type of the same database reads again: arrays, intervals, ranges, enums."""
    ANY = "any"
    """A column of SQLite that says nothing of its values."""


NOTES: Final[Mapping[Kind, str]] = {
    Kind.NUMERIC: "N", Kind.DATE: "D", Kind.TIME: "T", Kind.TIMESTAMP: "S", Kind.TIMESTAMPTZ: "Z", Kind.UUID: "U",
    Kind.JSON: "J", Kind.OTHER: "O",
}  # fmt: skip
"""The letters of texts that are something else (`rows`)."""

_TIMES: Final = frozenset({Kind.DATE, Kind.TIME, Kind.TIMESTAMP, Kind.TIMESTAMPTZ})
_WRITTEN: Final = _TIMES | {Kind.UUID, Kind.JSON, Kind.OTHER}
"""Kinds whose values travel as text."""

BECOMES: Final[Mapping[Dialect, Mapping[Kind, Collection[Kind]]]] = {
    Dialect.SQLITE: {
        Kind.INTEGER: {Kind.INTEGER, Kind.NUMERIC, Kind.REAL, Kind.ANY},
        Kind.REAL: {Kind.REAL, Kind.NUMERIC, Kind.ANY},
        Kind.NUMERIC: {Kind.NUMERIC, Kind.TEXT, Kind.REAL, Kind.ANY},
        Kind.BOOLEAN: {Kind.BOOLEAN, Kind.INTEGER, Kind.NUMERIC, Kind.ANY},
        Kind.TEXT: {Kind.TEXT, Kind.ANY},
        Kind.BYTES: {Kind.BYTES, Kind.ANY},
        **{kind: {kind, Kind.TEXT, Kind.ANY} for kind in _WRITTEN},
        Kind.ANY: {Kind.ANY},
    },
    Dialect.POSTGRES: {
        Kind.INTEGER: {Kind.INTEGER, Kind.NUMERIC, Kind.REAL, Kind.BOOLEAN},
        Kind.REAL: {Kind.REAL, Kind.NUMERIC},
        Kind.NUMERIC: {Kind.NUMERIC},
        Kind.BOOLEAN: {Kind.BOOLEAN},
        Kind.TEXT: {Kind.TEXT, *_WRITTEN},
        Kind.BYTES: {Kind.BYTES},
        **{kind: {kind, Kind.TEXT} for kind in _WRITTEN},
        Kind.ANY: set(Kind),
    },
}  # fmt: skip
"""For each database that rows come to: what a kind may become there. Values that do not fit are refused one by one."""

_SQLITE_TYPES: Final[Mapping[Kind, str]] = {
    Kind.INTEGER: "INTEGER", Kind.REAL: "REAL", Kind.NUMERIC: "NUMERIC TEXT", Kind.BOOLEAN: "BOOLEAN", Kind.TEXT: "TEXT",
    Kind.BYTES: "BLOB", Kind.DATE: "DATE", Kind.TIME: "TIME", Kind.TIMESTAMP: "TIMESTAMP", Kind.TIMESTAMPTZ: "TIMESTAMPTZ",
    Kind.UUID: "UUID", Kind.JSON: "JSON TEXT", Kind.OTHER: "TEXT", Kind.ANY: "",
}  # fmt: skip
"""Of a new table. NUMERIC TEXT and JSON TEXT keep the text as it is: else SQLite would make a number of it, and lose digits."""

_POSTGRES_TYPES: Final[Mapping[Kind, str]] = {
    Kind.INTEGER: "bigint", Kind.REAL: "double precision", Kind.NUMERIC: "numeric", Kind.BOOLEAN: "boolean", Kind.TEXT: "text",
    Kind.BYTES: "bytea", Kind.DATE: "date", Kind.TIME: "time", Kind.TIMESTAMP: "timestamp", Kind.TIMESTAMPTZ: "timestamptz",
    Kind.UUID: "uuid", Kind.JSON: "json",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    kind: Kind
    type: str
    """As its database writes it."""
    is_needed: bool
    """NOT NULL."""
    scale: int | None = None
    """Digits behind the point that a decimal number or a time keeps; None: all."""
    is_narrow: bool = False
    """A floating-point number of 32 bits."""
    is_computed: bool = False
    """The database makes its values, and takes none."""
    is_numbered: bool = False
    """GENERATED ALWAYS AS IDENTITY: numbers of its own, and no others."""
    length: int | None = None
    """Characters that a text may have; None: any."""
    likeness: str = ""
    """By what PostgreSQL takes different texts for equal: blanks behind them (`char`), or the type; empty: by nothing."""
    cast: str = ""
    """PostgreSQL's type without a length, for casts: with one they would cut texts off."""
    affinity: str = ""
    """What SQLite makes of its values: INTEGER, TEXT, BLOB, REAL or NUMERIC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The columns that find a row, in the order of their index: a primary key, or a unique index without NULL."""

    columns: tuple[str, ...]
    ordering: tuple[str, ...]
    """How each is written where rows are compared and put in order: quoted, with the index's collation where that differs."""
    index: str = ""
    """How SQLite is told to use it; empty where it needs no telling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A table as its database describes it."""

    dialect: Dialect
    name: str
    columns: tuple[Column, ...]
    key: Key | None
    references: frozenset[str] = frozenset()
    """Names of tables whose rows its own refer to."""
    uniques: tuple[Mapping[str, str], ...] = ()
    """The columns of each unique index, and by what it takes different values for equal: a collation or a type, or nothing."""

    def column(self, name: str) -> Column | None:
        """The column with this name; SQLite takes upper and lower case for the same."""
        for column in self.columns:
            if column.name == name:
                return column
        return next((column for column in self.columns if column.name.lower() == name.lower()), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How the rows of one table come to another: pairs of columns, those of the key first."""

    source: Shape
    target: Shape
    pairs: tuple[tuple[Column, Column], ...]
    key_count: int

    @property
    def source_columns(self) -> tuple[str, ...]:
        """In the order of the pairs."""
        return tuple(column.name for column, _ in self.pairs)

    @property
    def digest_text(self) -> str:
        """What must stay as it is while a copy is under way."""
        columns = ", ".join(f"{one.name} {one.type} > {other.name} {other.type}" for one, other in self.pairs)
        return f"{self.source.name} > {self.target.name} by {self.key_count}: {columns}"


def key_of(shape: Shape) -> Key:
    """The key, which `problems_of` has found to be there."""
    assert shape.key is not None
    return shape.key


def problems_of(shape: Shape) -> list[str]:
    """Why a table cannot be read."""
    if shape.key is None:
        why = (
            f"table {shape.name!r} of the source has no primary key, and no unique index on columns that are all NOT NULL: where "
            "a copy went on after an interruption could not be told; give it one"
        )
        return [why]
    return []


def route(source: Shape, target: Shape) -> tuple[Route | None, list[str]]:
    """How rows come from one table to the other, or what is in the way: every problem."""
    key = key_of(source).columns
    where = f"table {target.name!r} of the target"
    problems: list[str] = []
    pairs: list[tuple[Column, Column]] = []
    ordered = [*key, *(column.name for column in source.columns if column.name not in key)]
    for name in ordered:
        column = source.column(name)
        assert column is not None
        other = target.column(name)
        if other is None:
            problems.append(f"{where} has no column {name!r}: add it ({column.type} in the source)")
        elif other.is_computed:
            if not column.is_computed or name in key:
                problems.append(
                    f"{where}: column {other.name!r} takes no values (GENERATED ALWAYS): make it an ordinary column"
                )
        elif other.is_numbered:
            problems.append(
                f"{where}: column {other.name!r} takes no numbers but its own (GENERATED ALWAYS AS IDENTITY): ALTER TABLE "
                f"... ALTER COLUMN ... SET GENERATED BY DEFAULT"
            )
        elif not _fits(source, column, target, other):
            problems.append(
                f"{where}: column {other.name!r} is {other.type or 'without a type'}, which takes no {column.kind} ({column.type} "
                "in the source)"
            )
        else:
            pairs.append((column, other))
    problems += _merging(source, target, pairs[: len(key)]) if not problems else []
    if problems:
        return None, problems
    return Route(source=source, target=target, pairs=tuple(pairs), key_count=len(key)), []


_SAME: Final = {"RTRIM": "char", "char": "RTRIM"}
"""Both take no notice of blanks at the end."""


def _merging(source: Shape, target: Shape, pairs: Sequence[tuple[Column, Column]]) -> list[str]:
    """Where a unique index of the target takes keys for equal that the source tells apart: their rows would become one."""
    names = {one.name: other.name for one, other in pairs}
    problems = []
    for index in target.uniques:
        if index.keys() != set(names.values()):
            continue
        for name, other in names.items():
            by = index[other]
            known = {index.get(name, "") for index in source.uniques if index.keys() == names.keys()}
            if by and not known & {by, _SAME.get(by, by)}:
                problems.append(
                    f"table {target.name!r} of the target: its key compares {other!r} by {by}, which takes texts for equal that "
                    "the source tells apart: rows could be merged; let it compare them exactly"
                )
    return problems


def _fits(source: Shape, column: Column, target: Shape, other: Column) -> bool:
    if source.dialect is target.dialect is Dialect.SQLITE:
        return other.affinity in {column.affinity, "BLOB"}
    if column.kind is other.kind is Kind.OTHER:
        return column.type == other.type
    if source.dialect is Dialect.POSTGRES and target.dialect is Dialect.POSTGRES and column.kind is Kind.TEXT:
        return other.kind is Kind.TEXT
    return other.kind is column.kind or other.kind in BECOMES[target.dialect][column.kind]


def creation_types(source: Shape, dialect: Dialect) -> tuple[dict[str, str], list[str]]:
    """The type of each column of a new table, and those that have none there, a sentence each."""
    types: dict[str, str] = {}
    problems: list[str] = []
    for column in source.columns:
        if source.dialect is dialect:
            # ANY in a STRICT table keeps what it is given; elsewhere only a column without a type does.
            is_any = column.affinity == "BLOB" and column.kind is Kind.ANY
            types[column.name] = "" if is_any else column.type
        elif dialect is Dialect.SQLITE:
            types[column.name] = _SQLITE_TYPES[column.kind]
        elif column.kind in _POSTGRES_TYPES:
            types[column.name] = _POSTGRES_TYPES[column.kind]
        else:
            problems.append(
                f"table {source.name!r}: nothing tells what column {column.name!r} ({column.type or 'no type'}) is in {dialect}: "
                "make the table in the target yourself"
            )
    return types, problems


def in_order(shapes: Mapping[str, Shape]) -> list[str]:
    """Names, so that a table comes behind those that it refers to. Where they go round, as they are given."""
    done: list[str] = []

    def add(name: str, path: Sequence[str]) -> None:
        if name in done or name in path:
            return
        for other in sorted(shapes[name].references):
            if other in shapes and other != name:
                add(other, [*path, name])
        done.append(name)

    for name in shapes:
        add(name, [])
    return done
