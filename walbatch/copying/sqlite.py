"""A SQLite file as the source or the target of a copy.

What is not here: applying rows exactly once (`backends.sqlite`).

The idea needed to read it: a column may hold values of any type, and the key's order is that of the index which makes it unique,
with that index's collation. So the order and the comparison name it, unless the plan shows that the index is used as it is.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from walbatch.backends.sql.applying import MARKS_TABLE
from walbatch.backends.sqlite import SqliteBackend, quote_path, quoted, said
from walbatch.copying.databases import Bookmark, Observer, Page, in_parts
from walbatch.copying.landing import COPIES_TABLE, CopiedTable, Landed
from walbatch.copying.rows import Values
from walbatch.copying.shapes import Column, Dialect, Key, Kind, Route, Shape, key_of
from walbatch.errors import ConfigError, StorageError

BUSY_S: Final = 10.0
"""How long to wait for a process that locks the source."""

STRICT_SINCE: Final = (3, 37)
"""The version of SQLite that has STRICT tables; older ones cannot read them."""

_UNDECODABLE: Final = "Could not decode to UTF-8"


class Undecodable(bytes):
    """A text that is none."""

    def __repr__(self) -> str:
        return f"a text that is not UTF-8 ({bytes(self[:20])!r})"


class SqliteDatabase:
    """See `Database`."""

    dialect = Dialect.SQLITE

    def __init__(self, path: Path, *, shown: str, role: str) -> None:
        self.path = path
        self.shown = shown
        self._role = role
        self._db: sqlite3.Connection | None = None

    def _connected(self) -> sqlite3.Connection:
        if self._db is None:
            if not self.path.exists():
                if self._role == "source":
                    raise ConfigError(f"{self.path} does not exist: check the path of the source")
                return sqlite3.connect(":memory:")  # a target without tables: the landing makes the file
            try:
                self._db = sqlite3.connect(
                    f"file:{quote_path(self.path)}?mode=ro", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
                )  # fmt: skip
                self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            except sqlite3.Error as error:
                self.close()
                raise self._ours(error) from error
        return self._db

    def _ours(self, error: sqlite3.Error) -> Exception:
        text = f"{self.path}: {said(error)}"
        if isinstance(error, sqlite3.OperationalError):
            return StorageError(f"{text}: it must be there, and readable", path=str(self.path))
        return ConfigError(f"{text}: name another file")

    def close(self) -> None:
        """See `Database`."""
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    # --- tables ---------------------------------------------------------------------------------------------------

    def tables(self) -> list[str]:
        """See `Database`."""
        rows = self._all("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
        return [name for (name,) in rows if not name.startswith(("sqlite_", "walbatch_"))]

    def shape(self, name: str) -> Shape | None:
        """See `Database`."""
        found = self._all("SELECT name, type, sql FROM sqlite_schema WHERE lower(name) = lower(?)", name)
        kinds = {kind for _, kind, _ in found} & {"table", "view"}
        if not kinds:
            return None
        if kinds == {"view"}:
            raise ConfigError(f"{self.shown}: {name!r} is a view: name a table")
        real, _, sql = next(row for row in found if row[1] == "table")
        rows = self._all(f"PRAGMA table_xinfo({quoted(real)})")
        is_strict = sqlite3.sqlite_version_info >= STRICT_SINCE and bool(
            self._all("SELECT 1 FROM pragma_table_list(?) WHERE strict", real)
        )
        columns = tuple(_column(row, is_strict=is_strict) for row in rows if row[6] != 1)
        references = {str(row[2]).lower() for row in self._all(f"PRAGMA foreign_key_list({quoted(real)})")}
        return Shape(
            dialect=self.dialect, name=real, columns=columns, key=self._key(real, rows, sql or ""),
            references=frozenset(other for other in self.tables() if other.lower() in references), uniques=self._uniques(real),
        )  # fmt: skip

    def _key(self, name: str, rows: Sequence[Any], sql: str) -> Key | None:
        """The primary key, else the unique index with the fewest columns."""
        primary = [row[1] for row in sorted((row for row in rows if row[5]), key=lambda row: int(row[5]))]
        needed = {row[1] for row in rows if row[3]}
        indexes = [row for row in self._all(f"PRAGMA index_list({quoted(name)})") if row[2] and not row[4]]
        of_key = [row for row in indexes if row[3] == "pk"]
        if primary and not of_key:  # the row's own number
            return Key(columns=tuple(primary), ordering=tuple(map(quoted, primary)))
        candidates = []
        for row in of_key or indexes:
            parts = [part for part in self._all(f"PRAGMA index_xinfo({quoted(row[1])})") if part[5]]
            names = [part[2] for part in parts]
            if None in names or (not of_key and not needed.issuperset(names)):
                continue
            candidates.append((len(names), row[1], names, [part[4] for part in parts]))
        if not candidates:
            return None
        _, index, names, collations = min(candidates)
        plain = Key(
            columns=tuple(names), ordering=tuple(map(quoted, names)), index=f" INDEXED BY {quoted(index)}"
        )
        if self._uses_index(name, plain):
            return plain
        return Key(
            columns=tuple(names),
            ordering=tuple(
                f"{quoted(column)} COLLATE {collation}" for column, collation in zip(names, collations, strict=True)
            ),
        )  # fmt: skip

    def _uniques(self, name: str) -> tuple[Mapping[str, str], ...]:
        """See `Shape`. The row's own number has no index, and compares exactly."""
        found = []
        for row in self._all(f"PRAGMA index_list({quoted(name)})"):
            parts = [part for part in self._all(f"PRAGMA index_xinfo({quoted(row[1])})") if part[5]]
            if row[2] and not row[4] and all(part[2] is not None for part in parts):
                found.append(
                    {part[2]: "" if part[4].upper() == "BINARY" else part[4].upper() for part in parts}
                )
        return tuple(found)

    def _uses_index(self, name: str, key: Key) -> bool:
        """Whether comparing the key as it is goes by its index: then both have the same collations, and the same order."""
        try:
            plan = self._all(
                f"EXPLAIN QUERY PLAN {_select(name, key, key.columns, is_first=False)}",
                *[0] * len(key.columns),
                1,
            )
        except StorageError:
            return False
        text = " ".join(str(row[3]) for row in plan)
        return "SEARCH" in text and "TEMP B-TREE" not in text

    def size(self, name: str) -> int:
        """See `Database`."""
        return int(self._all(f"SELECT count(*) FROM {quoted(name)}")[0][0])  # noqa: S608 - quoted

    def key_problem(self, shape: Shape) -> str | None:
        """See `Database`."""
        names = key_of(shape).columns
        any_null = " OR ".join(f"{quoted(name)} IS NULL" for name in names)
        if self._all(f"SELECT 1 FROM {quoted(shape.name)} WHERE {any_null} LIMIT 1"):  # noqa: S608 - quoted
            return (
                f"table {shape.name!r} of the source has rows with NULL in its key ({', '.join(names)}), which SQLite allows: "
                "nothing tells them apart; give them a value"
            )
        return None

    # --- rows -----------------------------------------------------------------------------------------------------

    def pages(self, shape: Shape, columns: Sequence[str]) -> Page:
        """See `Database`. A page is a transaction of its own."""
        key = key_of(shape)
        first, next_ = (_select(shape.name, key, columns, is_first=is_first) for is_first in (True, False))

        def parts(after: Values, limit: int, size: int) -> Generator[list[Values]]:
            db = self._connected()
            statement, parameters = (next_, (*after, limit)) if after else (first, (limit,))
            try:
                with contextlib.closing(db.execute(statement, parameters)) as cursor:
                    yield from in_parts(cursor, size)
            except sqlite3.Error as error:
                if _UNDECODABLE in str(error):
                    raise _UndecodableError from error
                self.close()
                raise self._ours(error) from error

        def page(after: Values, limit: int, size: int) -> Generator[list[Values]]:
            """Where a text is not UTF-8, its part is read again, with care."""
            while limit > 0:
                try:
                    for rows in parts(after, limit, size):
                        yield rows
                        after, limit = rows[-1][: len(key.columns)], limit - len(rows)
                except _UndecodableError:
                    with self._careful(), contextlib.closing(parts(after, limit, size)) as again:
                        rows = next(again)
                    self._check_keys(shape.name, (row[: len(key.columns)] for row in rows))
                    yield rows
                    after, limit = rows[-1][: len(key.columns)], limit - len(rows)
                else:
                    return

        return page

    @staticmethod
    def _check_keys(name: str, keys: Iterable[Values]) -> None:
        if any(type(value) is Undecodable for key in keys for value in key):
            raise ConfigError(
                f"table {name!r} of the source has keys with texts that are not UTF-8: repair them"
            )

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        """Texts that are not UTF-8 are read as `Undecodable`."""
        db = self._connected()
        db.text_factory = _text
        try:
            yield
        finally:
            db.text_factory = str

    def _all(self, statement: str, *parameters: object) -> list[Any]:
        try:
            return self._connected().execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise self._ours(error) from error

    # --- as a target ----------------------------------------------------------------------------------------------

    def create(self, shape: Shape, name: str, types: Mapping[str, str]) -> None:
        """See `Database`."""
        key = key_of(shape).columns
        lines = [
            f"{quoted(column.name)} {types[column.name]}{' NOT NULL' if column.is_needed or column.name in key else ''}".rstrip()
            for column in shape.columns
        ]
        lines.append(f"PRIMARY KEY ({', '.join(map(quoted, key))})")
        self.close()
        with contextlib.suppress(FileExistsError):
            self.path.touch(mode=0o600, exist_ok=False)
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_S)) as db, db:
                db.execute(f"CREATE TABLE {quoted(name)} ({', '.join(lines)})")
        except sqlite3.Error as error:
            raise self._ours(error) from error

    def landing(self, route: Route, *, source: str, observe: Observer) -> SqliteLanding:
        """See `Database`."""
        landing = SqliteLanding(self.path, CopiedTable(route))
        landing.arrange(route, source=source, observe=observe)
        return landing

    def forget(self, store: bytes) -> None:
        """See `Database`."""
        self.close()
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_S)) as db, db:
                for table in (COPIES_TABLE, MARKS_TABLE):
                    db.execute(f"DELETE FROM {table} WHERE store = ?", (store,))  # noqa: S608 - a constant
        except sqlite3.Error as error:
            raise self._ours(error) from error


class _UndecodableError(Exception):
    """A part has a text that is not UTF-8."""


class SqliteLanding(Landed, SqliteBackend):
    """`SqliteBackend` with the bookmark beside the mark."""

    def _open(self, shards: int) -> None:
        super()._open(shards)
        db = self._db
        assert db is not None
        try:
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {COPIES_TABLE} (store BLOB NOT NULL, lane TEXT NOT NULL, begun_for TEXT NOT NULL, "
                "number INTEGER NOT NULL, key BLOB NOT NULL, PRIMARY KEY (store, lane))"
            )
            if self._is_first:
                db.execute(
                    f"INSERT INTO {COPIES_TABLE} VALUES (?, ?, ?, 0, x'') ON CONFLICT DO NOTHING",  # noqa: S608 - a constant
                    (self._store, self._lane, self._begun_for),
                )
            row = db.execute(
                f"SELECT begun_for, number FROM {COPIES_TABLE} WHERE store = ? AND lane = ?",  # noqa: S608 - a constant
                (self._store, self._lane),
            ).fetchone()
        except sqlite3.Error as error:
            raise self._at_opening(error) from error
        self._check_bookmark(row)

    def bookmark(self) -> Bookmark:
        """See `Landing`."""
        row = self._look(
            lambda tx: tx.cursor.execute(
                f"SELECT number, key FROM {COPIES_TABLE} WHERE store = ? AND lane = ?", (self._store, self._lane)  # noqa: S608
            ).fetchone()
        )  # fmt: skip
        return Bookmark(int(row[0]), bytes(row[1]))

    def _store_bookmark(self, cursor: Any, number: int, key: bytes) -> None:
        cursor.execute(
            f"UPDATE {COPIES_TABLE} SET number = ?, key = ? WHERE store = ? AND lane = ? AND number < ?",  # noqa: S608 - a constant
            (number, key, self._store, self._lane, number),
        )


# --- small things -------------------------------------------------------------------------------------------------


def _select(name: str, key: Key, columns: Sequence[str], *, is_first: bool) -> str:
    """The rows behind a key. The first page leaves out NULL, which stands before everything."""
    order = ", ".join(key.ordering)
    if is_first:
        where = " AND ".join(f"{quoted(column)} IS NOT NULL" for column in key.columns)
    elif len(key.columns) == 1:
        where = f"{order} > ?"
    else:
        where = f"({order}) > ({', '.join('?' * len(key.columns))})"
    index = "" if is_first else key.index
    return f"SELECT {', '.join(map(quoted, columns))} FROM {quoted(name)}{index} WHERE {where} ORDER BY {order} LIMIT ?"  # noqa: S608 - quoted


def _text(data: bytes) -> str | Undecodable:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return Undecodable(data)


def _column(row: Sequence[Any], *, is_strict: bool) -> Column:
    """A column, of a row of `table_xinfo`: its number, name, type, NOT NULL, default, place in the key, hidden."""
    declared = str(row[2] or "")
    affinity = "BLOB" if is_strict and declared.upper() == "ANY" else affinity_of(declared)
    return Column(
        name=str(row[1]), kind=kind_of(declared), type=declared, is_needed=bool(row[3]), is_computed=row[6] in {2, 3},
        affinity=affinity,
    )  # fmt: skip


def affinity_of(declared: str) -> str:
    """What SQLite makes of values. Source: its documentation, "Datatypes In SQLite", section 3.1."""
    text = declared.upper()
    if "INT" in text:
        return "INTEGER"
    if any(part in text for part in ("CHAR", "CLOB", "TEXT")):
        return "TEXT"
    if not text or "BLOB" in text:
        return "BLOB"
    return "REAL" if any(part in text for part in ("REAL", "FLOA", "DOUB")) else "NUMERIC"


_KINDS: Final = (
    (r"NUMERIC|DECIMAL|NUMBER|MONEY", Kind.NUMERIC), (r"JSONB?", Kind.JSON), (r"BOOL(EAN)?", Kind.BOOLEAN),
    (r"TIMESTAMPTZ|TIMESTAMP WITH TIME ZONE", Kind.TIMESTAMPTZ), (r"DATETIME|TIMESTAMP", Kind.TIMESTAMP), (r"DATE", Kind.DATE),
    (r"TIME", Kind.TIME), (r"UUID|GUID", Kind.UUID),
)  # fmt: skip
_OF_AFFINITY: Final = {"INTEGER": Kind.INTEGER, "TEXT": Kind.TEXT, "REAL": Kind.REAL}


def kind_of(declared: str) -> Kind:
    """What values of a column with this type are meant to be."""
    text = declared.upper()
    affinity = affinity_of(declared)
    if affinity == "BLOB":
        return Kind.BYTES if text else Kind.ANY
    for pattern, kind in _KINDS:
        if re.fullmatch(rf"({pattern})( TEXT)?(\s*\(.*\))?", text):
            return kind
    return _OF_AFFINITY.get(affinity, Kind.ANY)
