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
from walbatch.backends.sql.table import Apart, Table, Types
from walbatch.errors import ConfigError

LOCK_KEY: Final = 0x57424D4B
"""Of the advisory lock that keeps two processes from making the same table at once: `WBMK`."""

MARKS_COLUMNS: Final = ("store", "lane", "shard", "epoch", "mark")
_SQL_TYPES: Final = {"bytes": "bytea", "text": "text", "integer": "bigint"}
_NUMBERS: Final = frozenset({int})
_TEXTS: Final = frozenset({bytes, str, int})
_APART: Final = {
    f'"pg_catalog"."{name}"': types
    for name, types in {
        "bytea": frozenset({bytes, str}), "text": _TEXTS, "varchar": _TEXTS,
        "int2": _NUMBERS, "int4": _NUMBERS, "int8": _NUMBERS, "numeric": _NUMBERS,
    }.items()
}  # fmt: skip
"""Others may write one value in many ways, as a uuid is the same in capitals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column as the catalogue has it. `type` can stand in a cast, without a length: what does not fit is refused, not cut off."""

    name: str
    type: str
    base: str
    """The type itself, or the one that a domain, or a domain over a domain, is made of."""
    is_needed: bool
    """A row without a value for it is refused."""
    is_deterministic: bool = True
    """Its collation tells any two texts apart."""

    @property
    def is_bytes(self) -> bool:
        """Whether its values are sent as bytes."""
        return self.base == '"pg_catalog"."bytea"'

    @property
    def apart(self) -> Types:
        """See `Apart`."""
        return _APART.get(self.base, frozenset()) if self.is_deterministic else frozenset()


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
        f"{where} {f'has a partition, {name}, which ' if name else ''}is {kind}: the server forgets its rows when it crashes, or "
        "the session ends, while the mark says that they were applied: ALTER TABLE ... SET LOGGED, or name another one"
        for name, kind in _passing(raw, oid)
    ]
    problems += [
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


_PARTS: Final = (
    "WITH parts AS (SELECT %(oid)s::oid AS oid UNION "
    "SELECT relid::oid FROM pg_catalog.pg_partition_tree(%(oid)s::oid::regclass))"
)
"""A table and its partitions."""


def _passing(raw: Raw, oid: int) -> list[tuple[str, str]]:
    """Which of a table and its partitions do not survive: the name of a partition, and what it is."""
    rows = raw.execute(
        f"{_PARTS} SELECT CASE WHEN c.oid = %(oid)s THEN '' ELSE c.oid::regclass::text END, "  # noqa: S608 - a constant
        "CASE c.relpersistence WHEN 'u' THEN 'UNLOGGED' ELSE 'TEMPORARY' END FROM pg_catalog.pg_class c "
        "WHERE c.relpersistence <> 'p' AND c.relkind <> 'p' "
        "AND c.oid IN (SELECT oid FROM parts)".encode(),
        {"oid": oid},
    ).fetchall()
    return [(name, kind) for name, kind in rows]


def apart(raw: Raw, table: Table, columns: Sequence[Column]) -> Apart | None:
    """See `Apart`; None where a delete may reach other rows: foreign keys that point here, and triggers, may do anything."""
    row = raw.execute(
        f"{_PARTS} SELECT EXISTS (SELECT FROM pg_catalog.pg_constraint "  # noqa: S608 - a constant
        "JOIN parts ON confrelid = parts.oid WHERE contype = 'f') "
        "OR EXISTS (SELECT FROM pg_catalog.pg_trigger JOIN parts ON tgrelid = parts.oid WHERE NOT tgisinternal)".encode(),
        {"oid": _oid(raw, table.path)},
    ).fetchone()
    assert row is not None
    return None if row[0] else [column.apart for column in columns[: len(table.key)]]


def _columns(raw: Raw, oid: int) -> list[Column]:
    rows = raw.execute(
        "WITH RECURSIVE types AS (SELECT oid AS of, oid, typtype, typbasetype, typname, typnamespace FROM pg_catalog.pg_type "
        "WHERE oid IN (SELECT atttypid FROM pg_catalog.pg_attribute WHERE attrelid = %(oid)s) "
        "UNION ALL SELECT d.of, t.oid, t.typtype, t.typbasetype, t.typname, t.typnamespace "
        "FROM types d JOIN pg_catalog.pg_type t ON d.typtype = 'd' AND t.oid = d.typbasetype) "
        "SELECT a.attname, n.nspname, t.typname, m.nspname, b.typname, "
        "a.attnotnull AND NOT a.atthasdef AND a.attidentity = '', coalesce(c.collisdeterministic, true) "
        "FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid "
        "JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace "
        "JOIN types b ON b.of = t.oid AND b.typtype <> 'd' JOIN pg_catalog.pg_namespace m ON m.oid = b.typnamespace "
        "LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation "
        "WHERE a.attrelid = %(oid)s AND a.attnum > 0 AND NOT a.attisdropped",
        {"oid": oid},
    ).fetchall()
    return [
        Column(
            name=name, type=quoted(schema, type_), base=quoted(base_schema, base), is_needed=needed,
            is_deterministic=is_deterministic,
        )
        for name, schema, type_, base_schema, base, needed, is_deterministic in rows
    ]  # fmt: skip


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
