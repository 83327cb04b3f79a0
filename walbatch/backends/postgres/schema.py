"""The tables in PostgreSQL: made where they are missing, and checked before anything is written.

What is not here: statements that write rows (`transaction`).

The idea needed to read it: `ON CONFLICT` needs a unique index on exactly the key columns, and rows are sent as arrays, which
have to be cast to the types that the columns have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbatch.backends.postgres.connections import Raw
from walbatch.backends.sql.applying import MARKS_TABLE
from walbatch.backends.sql.table import Table
from walbatch.errors import ConfigError

LOCK_KEY: Final = 0x57424D4B
"""Of the advisory lock that keeps two processes from making the same table at once: `WBMK`."""

MARKS_COLUMNS: Final = ("store", "lane", "shard", "epoch", "mark")
_SQL_TYPES: Final = {"bytes": "bytea", "text": "text", "integer": "bigint"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column as the catalogue has it. `type` can stand in a cast, without a length: what does not fit is refused, not cut off."""

    name: str
    type: str
    is_needed: bool
    """A row without a value for it is refused."""

    @property
    def is_bytes(self) -> bool:
        """Whether its values are sent as bytes."""
        return self.type == '"pg_catalog"."bytea"'


def quoted(*names: str) -> str:
    """A name, or the parts of one, as SQL takes it whatever is in it."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def make_marks(raw: Raw) -> None:
    """Make the table of marks. Its rows change with every batch: pages keep room for that. With LOCK_KEY held."""
    raw.execute(
        f"CREATE TABLE IF NOT EXISTS {MARKS_TABLE} (store uuid NOT NULL, lane text NOT NULL, shard integer NOT NULL, "
        "epoch bigint NOT NULL, mark bytea NOT NULL, PRIMARY KEY (store, lane, shard)) WITH (fillfactor = 50)".encode()
    )


def make_table(raw: Raw, table: Table) -> None:
    """Make the table that operations go to, if it may be made and its types are known."""
    if not table.create or table.types is None or _oid(raw, table.path) is not None:
        return
    (key,), (column,) = table.key, table.columns
    raw.execute(
        f"CREATE TABLE {quoted(*table.path)} ({quoted(key)} {_SQL_TYPES[table.types[0]]} PRIMARY KEY, "
        f"{quoted(column)} {_SQL_TYPES[table.types[1]]})".encode()
    )


def check_columns(
    raw: Raw, place: str, path: Sequence[str], columns: Sequence[str], key: Sequence[str]
) -> tuple[Column, ...]:
    """The columns of a table, in this order. Raises ConfigError for a table that does not take what its operations become."""
    where = f"{place}: table {'.'.join(path)!r}"
    oid = _oid(raw, path)
    if oid is None:
        raise ConfigError(
            f"{where} does not exist: make it, with the columns {', '.join(columns)}, and a primary key on ({', '.join(key)})"
        )
    found = {column.name: column for column in _columns(raw, oid)}
    problems = [
        f"{where} has no column {name!r}: add it, or map the table otherwise"
        for name in columns
        if name not in found
    ]
    problems += [
        f"{where}: column {name!r} is NOT NULL, has no default, and is not mapped: give it a default, or map it"
        for name, column in found.items()
        if column.is_needed and name not in columns
    ]
    if not problems and set(key) not in _unique_sets(raw, oid):
        problems.append(
            f"{where} has no primary key or unique index on exactly ({', '.join(key)}) that is checked at once and holds "
            "for all rows: make one, or map the key otherwise"
        )
    if problems:
        raise ConfigError(*problems)
    return tuple(found[name] for name in columns)


def _oid(raw: Raw, path: Sequence[str]) -> int | None:
    row = raw.execute("SELECT to_regclass(%s)::oid", (quoted(*path),)).fetchone()
    return None if row is None else row[0]


def _columns(raw: Raw, oid: int) -> list[Column]:
    rows = raw.execute(
        "SELECT a.attname, n.nspname, t.typname, a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' "
        "FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid "
        "JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace "
        "WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped",
        (oid,),
    ).fetchall()
    return [
        Column(name=name, type=quoted(schema, type_), is_needed=needed)
        for name, schema, type_, needed in rows
    ]


def _unique_sets(raw: Raw, oid: int) -> list[set[str | None]]:
    """The columns of each unique index that is checked at once and holds for all rows; None for an expression."""
    rows = raw.execute(
        "SELECT array_agg(a.attname::text) FROM pg_catalog.pg_index i "
        "CROSS JOIN LATERAL unnest(i.indkey[0:i.indnkeyatts - 1]) AS k(number) "
        "LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number AND k.number > 0 "
        "WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL GROUP BY i.indexrelid",
        (oid,),
    ).fetchall()
    return [set(names) for (names,) in rows]
