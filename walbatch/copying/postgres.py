"""A PostgreSQL database as the source or the target of a copy.

What is not here: applying rows exactly once (`backends.postgres`).

The idea needed to read it: numbers, texts, bytes and booleans are read as such, and everything else as PostgreSQL writes it, with
settings that make that the same everywhere: so no value is beyond Python, and the same type reads it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias
from uuid import UUID

import psycopg
from psycopg.types.string import TextLoader

from walbatch.backends.postgres import PostgresBackend
from walbatch.backends.postgres.meaning import at_opening
from walbatch.backends.postgres.schema import LOCK_KEY, quoted
from walbatch.backends.sql.applying import MARKS_TABLE
from walbatch.copying.databases import Bookmark, Observer, Page, in_parts
from walbatch.copying.landing import COPIES_TABLE, CopiedTable, Landed
from walbatch.copying.rows import Values
from walbatch.copying.shapes import Column, Dialect, Key, Kind, Route, Shape, key_of
from walbatch.errors import ConfigError

Raw: TypeAlias = "psycopg.Connection[tuple[Any, ...]]"

CONNECT_S: Final = 10
SETTINGS: Final = {
    "DateStyle": "ISO, YMD", "IntervalStyle": "postgres", "TimeZone": "UTC", "extra_float_digits": "1", "bytea_output": "hex",
    "lc_monetary": "C", "xmloption": "content", "client_encoding": "UTF8",
}  # fmt: skip
"""How values are written as text, whatever the server, the database or the user prefer."""

_KINDS: Final = {
    "int2": Kind.INTEGER, "int4": Kind.INTEGER, "int8": Kind.INTEGER, "oid": Kind.INTEGER, "float4": Kind.REAL,
    "float8": Kind.REAL, "numeric": Kind.NUMERIC, "bool": Kind.BOOLEAN, "text": Kind.TEXT, "varchar": Kind.TEXT,
    "bpchar": Kind.TEXT, "name": Kind.TEXT, "bytea": Kind.BYTES, "date": Kind.DATE, "time": Kind.TIME,
    "timestamp": Kind.TIMESTAMP, "timestamptz": Kind.TIMESTAMPTZ, "uuid": Kind.UUID, "json": Kind.JSON, "jsonb": Kind.JSON,
}  # fmt: skip
_READ_AS_THEY_ARE: Final = frozenset({Kind.INTEGER, Kind.REAL, Kind.BOOLEAN, Kind.BYTES})

_TEXT_OIDS: Final = frozenset(
    oid for type_ in psycopg.postgres.types
    for oid in (type_.array_oid, type_.oid if _KINDS.get(type_.name) not in _READ_AS_THEY_ARE else 0) if oid
)  # fmt: skip
"""All that are known to psycopg: a value of a domain says that it is of the type below."""


class PostgresDatabase:
    """See `Database`."""

    dialect = Dialect.POSTGRES

    def __init__(self, conninfo: str, *, shown: str, role: str) -> None:
        self._conninfo = conninfo
        self.shown = shown
        self._role = role
        self._raw: Raw | None = None
        self._as_text: set[int] = set()
        """Types of columns whose values are read as PostgreSQL writes them, beside those that psycopg knows."""
        self._partitioned: set[str] = set()
        self._large: set[str] = set()
        """Tables that may have large rows."""
        try:
            psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.Error:
            # What libpq says of it repeats parts of it, and there may be a password in them.
            raise ConfigError(
                f"the {role} is no URL of a database: postgresql://user@host/database, with % only before two hexadecimal digits "
                "and no blanks"
            ) from None

    def _connected(self) -> Raw:
        if self._raw is None or self._raw.closed:
            given = psycopg.conninfo.conninfo_to_dict(self._conninfo)
            usual: dict[str, Any] = {
                "connect_timeout": CONNECT_S,
                "fallback_application_name": "walbatch copy",
            }
            with self._errors():
                raw = psycopg.connect(
                    self._conninfo, autocommit=True, **{name: value for name, value in usual.items() if name not in given}
                )  # fmt: skip
                for name, value in SETTINGS.items():
                    raw.execute("SELECT set_config(%s, %s, false)", (name, value))
                self._raw = raw
        return self._raw

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            self.close()
            raise at_opening(error, self.shown) from error

    def close(self) -> None:
        """See `Database`."""
        raw, self._raw = self._raw, None
        if raw is not None:
            with contextlib.suppress(psycopg.Error):
                raw.close()

    def _all(self, statement: str, *parameters: object) -> list[Any]:
        raw = self._connected()
        with self._errors():
            return raw.execute(statement.encode(), parameters).fetchall()

    # --- tables ---------------------------------------------------------------------------------------------------

    def tables(self) -> list[str]:
        """See `Database`."""
        rows = self._all(
            "SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END "
            "FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema' "
            "AND c.relname NOT LIKE 'walbatch\\_%%' AND NOT c.relispartition ORDER BY 1"
        )
        return [name for (name,) in rows]

    def shape(self, name: str) -> Shape | None:
        """See `Database`."""
        (found,) = self._all("SELECT to_regclass(%s)::oid", quoted(*name.split(".")))
        if found[0] is None:
            return None
        oid = found[0]
        ((relkind, has_large),) = self._all(
            "SELECT relkind, reltoastrelid <> 0 AND pg_relation_size(reltoastrelid) > 0 "
            "FROM pg_catalog.pg_class WHERE oid = %s", oid
        )  # fmt: skip
        if relkind not in {"r", "p"}:
            raise ConfigError(f"{self.shown}: {name!r} is no table (a view, or something else): name a table")
        if relkind == "p":
            self._partitioned.add(name)
        if relkind == "p" or has_large:
            self._large.add(name)
        rows = self._all(
            "SELECT a.attname, n.nspname, t.typname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attgenerated <> '', "
            "a.attidentity = 'a', base.typmod, a.atttypid, base.oid "
            "FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL (WITH RECURSIVE type AS ("
            "SELECT t.oid, t.typbasetype, CASE WHEN t.typtype = 'd' THEN t.typtypmod ELSE a.atttypmod END AS typmod "
            "FROM pg_catalog.pg_type t WHERE t.oid = a.atttypid "
            "UNION ALL SELECT t.oid, t.typbasetype, CASE WHEN type.typmod >= 0 THEN type.typmod ELSE t.typtypmod END "
            "FROM type JOIN pg_catalog.pg_type t ON t.oid = type.typbasetype) "
            "SELECT oid, typmod FROM type WHERE typbasetype = 0) base "
            "JOIN pg_catalog.pg_type t ON t.oid = base.oid "
            "JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace "
            "WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            oid,
        )
        columns = tuple(_column(row) for row in rows)
        for row, column in zip(rows, columns, strict=True):
            if column.kind not in _READ_AS_THEY_ARE:
                for of_type in row[8:]:  # a column of a domain comes as the type below it
                    self._as_text.add(of_type)
        references = self._all(
            "SELECT c.relname, n.nspname || '.' || c.relname FROM pg_catalog.pg_constraint k "
            "JOIN pg_catalog.pg_class c ON c.oid = k.confrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
            "WHERE k.conrelid = %s AND k.contype = 'f'",
            oid,
        )
        return Shape(
            dialect=self.dialect, name=name, columns=columns, key=self._key(oid, columns),
            references=frozenset(other for pair in references for other in pair), uniques=self._uniques(oid, columns),
        )  # fmt: skip

    def _key(self, oid: int, columns: Sequence[Column]) -> Key | None:
        rows = self._all(
            "SELECT i.indisprimary, i.indnkeyatts, array_agg(a.attname::text ORDER BY k.place), "
            "array_agg(CASE WHEN i.indcollation[k.place - 1] = a.attcollation OR i.indcollation[k.place - 1] = 0 THEN '' "
            "ELSE quote_ident(cn.nspname) || '.' || quote_ident(co.collname) END ORDER BY k.place), "
            "bool_and(a.attnotnull) FROM pg_catalog.pg_index i "
            "CROSS JOIN LATERAL unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(number, place) "
            "LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number AND k.number > 0 "
            "LEFT JOIN pg_catalog.pg_collation co ON co.oid = i.indcollation[k.place - 1] "
            "LEFT JOIN pg_catalog.pg_namespace cn ON cn.oid = co.collnamespace "
            "WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL "
            "GROUP BY i.indexrelid, i.indisprimary, i.indnkeyatts ORDER BY i.indisprimary DESC, i.indnkeyatts",
            oid,
        )
        for _, _, names, collations, is_needed in rows:
            if None in names or not is_needed:
                continue
            ordering = tuple(
                f"{quoted(name)} COLLATE {collation}" if collation else quoted(name)
                for name, collation in zip(names, collations, strict=True)
            )
            return Key(columns=tuple(names), ordering=ordering)
        return None

    def _uniques(self, oid: int, columns: Sequence[Column]) -> tuple[Mapping[str, str], ...]:
        """See `Shape`."""
        rows = self._all(
            "SELECT array_agg(a.attname::text ORDER BY k.place), "
            "array_agg(CASE WHEN to_jsonb(co) ->> 'collisdeterministic' = 'false' "
            "THEN quote_ident(cn.nspname) || '.' || quote_ident(co.collname) ELSE '' END ORDER BY k.place) "
            "FROM pg_catalog.pg_index i "
            "CROSS JOIN LATERAL unnest(i.indkey[0:i.indnkeyatts - 1]) WITH ORDINALITY AS k(number, place) "
            "LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number AND k.number > 0 "
            "LEFT JOIN pg_catalog.pg_collation co ON co.oid = i.indcollation[k.place - 1] "
            "LEFT JOIN pg_catalog.pg_namespace cn ON cn.oid = co.collnamespace "
            "WHERE i.indrelid = %s AND i.indisunique AND i.indpred IS NULL GROUP BY i.indexrelid",
            oid,
        )
        of_type = {column.name: column.likeness for column in columns}
        return tuple(
            {name: collation or of_type[name] for name, collation in zip(names, collations, strict=True)}
            for names, collations in rows if None not in names
        )  # fmt: skip

    def size(self, name: str) -> int:
        """See `Database`. What the planner believes, or where it does not know, counted."""
        (row,) = self._all(
            "SELECT reltuples FROM pg_catalog.pg_class WHERE oid = to_regclass(%s)", quoted(*name.split("."))
        )
        if row[0] > 0:
            return int(row[0])
        return int(self._all(f"SELECT count(*) FROM {self._rows_of(name)}")[0][0])  # noqa: S608 - quoted

    def _rows_of(self, name: str) -> str:
        """A table in FROM, with the rows of its partitions, and without those of tables that inherit from it."""
        return f"{'' if name in self._partitioned else 'ONLY '}{_named(name).replace('%', '%%')}"

    def key_problem(self, shape: Shape) -> str | None:
        """See `Database`. A key that has to be NOT NULL has no problem."""
        del shape
        return None

    # --- rows -----------------------------------------------------------------------------------------------------

    def pages(self, shape: Shape, columns: Sequence[str]) -> Page:
        """See `Database`. Rows come in parts, so that a page of large ones does not fill the memory."""
        key = key_of(shape)
        first, next_ = (
            _select(shape, self._rows_of(shape.name), key, columns, is_first=is_first).encode()
            for is_first in (True, False)
        )
        # libpq holds a whole chunk, which may be long where there are values outside of their rows: one by one then.
        has_chunks = shape.name not in self._large and psycopg.capabilities.has_stream_chunked()

        def page(after: Values, limit: int, size: int) -> Generator[list[Values]]:
            raw = self._connected()
            statement, parameters = (next_, (*after, limit)) if after else (first, (limit,))
            with self._errors(), raw.cursor() as cursor:
                for oid in _TEXT_OIDS | self._as_text:
                    cursor.adapters.register_loader(oid, TextLoader)
                yield from in_parts(
                    cursor.stream(statement, parameters, size=size if has_chunks else 1), size
                )

        return page

    # --- as a target ----------------------------------------------------------------------------------------------

    def create(self, shape: Shape, name: str, types: Mapping[str, str]) -> None:
        """See `Database`."""
        key = key_of(shape).columns
        lines = [
            f"{quoted(column.name)} {types[column.name]}{' NOT NULL' if column.is_needed and column.name not in key else ''}"
            for column in shape.columns
        ]
        lines.append(f"PRIMARY KEY ({', '.join(map(quoted, key))})")
        raw = self._connected()
        with self._errors():
            raw.execute(f"CREATE TABLE {_named(name)} ({', '.join(lines)})".encode())

    def landing(self, route: Route, *, source: str, observe: Observer) -> PostgresLanding:
        """See `Database`."""
        landing = PostgresLanding(self._conninfo, CopiedTable(route))
        landing.arrange(route, source=source, observe=observe)
        return landing

    def forget(self, store: bytes) -> None:
        """See `Database`."""
        raw = self._connected()
        with self._errors(), raw.transaction():
            for table in (COPIES_TABLE, MARKS_TABLE):
                raw.execute(f"DELETE FROM {table} WHERE store = %s".encode(), (UUID(bytes=store),))  # noqa: S608 - a constant


class PostgresLanding(Landed, PostgresBackend):
    """`PostgresBackend` with the bookmark beside the mark."""

    def _open(self, shards: int) -> None:
        super()._open(shards)
        connection = self._connections.take()
        try:
            raw = connection.raw
            with raw.transaction():
                raw.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_KEY,))
                raw.execute(
                    f"CREATE TABLE IF NOT EXISTS {COPIES_TABLE} (store uuid NOT NULL, lane text NOT NULL, begun_for text NOT NULL, "
                    "number bigint NOT NULL, key bytea NOT NULL, PRIMARY KEY (store, lane)) WITH (fillfactor = 50)".encode()
                )
                if self._is_first:
                    raw.execute(
                        f"INSERT INTO {COPIES_TABLE} VALUES (%s, %s, %s, 0, '') ON CONFLICT DO NOTHING".encode(),  # noqa: S608 - a constant
                        (*self._place_of_bookmark(), self._begun_for),
                    )
                row = raw.execute(
                    f"SELECT begun_for, number FROM {COPIES_TABLE} WHERE store = %s AND lane = %s".encode(),  # noqa: S608 - a constant
                    self._place_of_bookmark(),
                ).fetchone()
        except psycopg.Error as error:
            raise at_opening(error, self._place()) from error
        finally:
            self._connections.give(connection)
        self._check_bookmark(row)

    def bookmark(self) -> Bookmark:
        """See `Landing`."""
        row = self._look(
            lambda tx: tx.cursor.execute(
                f"SELECT number, key FROM {COPIES_TABLE} WHERE store = %s AND lane = %s".encode(),  # noqa: S608 - a constant
                self._place_of_bookmark(),
            ).fetchone()
        )
        return Bookmark(int(row[0]), bytes(row[1]))

    def _store_bookmark(self, cursor: Any, number: int, key: bytes) -> None:
        cursor.execute(
            f"UPDATE {COPIES_TABLE} SET number = %s, key = %b WHERE store = %s AND lane = %s AND number < %s".encode(),  # noqa: S608
            (number, key, *self._place_of_bookmark(), number),
        )

    def _place_of_bookmark(self) -> tuple[UUID, str]:
        return UUID(bytes=self._store), self._lane or ""


# --- small things -------------------------------------------------------------------------------------------------


def _named(name: str) -> str:
    return quoted(*name.split("."))


def _select(shape: Shape, rows_of: str, key: Key, columns: Sequence[str], *, is_first: bool) -> str:
    """The rows behind a key. Its values travel as text, and are cast to the types of its columns."""
    order = ", ".join(key.ordering)
    types = [column.cast for name in key.columns for column in shape.columns if column.name == name]
    casts = ", ".join(f"%s::{type_}" for type_ in types)
    where = (
        ""
        if is_first
        else f"WHERE ({order}) > ({casts}) ".replace("%s", "\0").replace("%", "%%").replace("\0", "%s")
    )
    names = ", ".join(map(quoted, columns)).replace("%", "%%")
    return f"SELECT {names} FROM {rows_of} {where}ORDER BY {order.replace('%', '%%')} LIMIT %s"  # noqa: S608 - quoted


_SCALED: Final = {"time", "timestamp", "timestamptz"}


_LENGTHS: Final = {"varchar": None, "bpchar": None, "name": 63}
_LENIENT: Final = frozenset({"citext", "inet", "cidr", "macaddr", "macaddr8", "interval", "timetz", "money"})
"""Types that take different texts for equal."""


def _column(row: Sequence[Any]) -> Column:
    """A column; its kind is that of the type below a domain."""
    name, schema, typname, type_, is_needed, is_computed, is_numbered, typmod, _, _ = row
    kind = _KINDS.get(typname, Kind.OTHER) if schema == "pg_catalog" else Kind.OTHER
    scale = None
    if typmod >= 0 and typname == "numeric":
        scale = ((typmod - 4) & 0x7FF ^ 0x400) - 0x400
    elif typmod >= 0 and typname in _SCALED:
        scale = typmod
    return Column(
        name=name, kind=kind, type=type_, is_needed=is_needed, scale=scale, is_narrow=typname == "float4",
        is_computed=is_computed, is_numbered=is_numbered, cast=quoted(schema, typname),
        length=typmod - 4 if typmod >= 0 and typname in _LENGTHS else _LENGTHS.get(typname),
        likeness="char" if typname == "bpchar" else typname if typname in _LENIENT else "",
    )  # fmt: skip
