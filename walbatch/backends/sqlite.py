"""SQLite as a backend: a batch and its mark in one transaction of a database file, exactly once.

What is not here: how operations become rows (`sql.table`), and what is done with those that are refused (`sql.applying`).

The idea needed to read it: SQLite has one writer at a time. So there is one connection, and a lock that hands it from shard to
shard at once; connections of their own would find each other by polling, up to a tenth of a second late. Shards help nothing
here but keep working: the log takes operations in meanwhile, and larger batches make up for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from walbatch.backends.sql.applying import ENDED, MARKS_TABLE, Transaction, Work, Write
from walbatch.backends.sql.backend import SqlBackend
from walbatch.backends.sql.fields import url_query
from walbatch.backends.sql.table import Apart, Columns, Row, Table, Types
from walbatch.core.mark import encode_mark
from walbatch.errors import (
    BackendBroken,
    BatchRejected,
    ConfigError,
    CorruptionError,
    EngineClosed,
    RetryBatch,
    StorageError,
)
from walbatch.types import Batch, Mark

_logger = logging.getLogger("walbatch")
_T = TypeVar("_T")

VERSION_MIN: Final = (3, 35, 0)
"""The first whose upserts need not name what they conflict with."""

WAIT_PART: Final = 0.5
"""The part of a call's time limit that it waits for others who write. The rest is for its own work."""

CLOSE_WAIT_S: Final = 5.0
"""How long `close` waits for a write that does not end. Then the connection stays open until the write ends."""

MARKS_COLUMNS: Final = ("store", "lane", "shard", "epoch", "mark", "opened")
_SQL_TYPES: Final = {"bytes": "BLOB", "text": "TEXT", "integer": "INTEGER"}
_PRIMARY_CODE: Final = 0xFF

_LATER: Final = frozenset({
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_PROTOCOL,
})  # fmt: skip
"""What passes: a lock, a full disk, a disk that fails."""

_ROW: Final = frozenset({sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG})
"""What speaks of a row."""

_UNBINDABLE: Final = ("is not supported", "unsupported type", "too big", "larger than")
"""What Python says of a value that it cannot hand to SQLite."""

_ADVICE: Final = {
    sqlite3.SQLITE_FULL: "make room on the disk", sqlite3.SQLITE_READONLY: "make it writable for this user",
    sqlite3.SQLITE_CANTOPEN: "the folder must exist, and file and folder be writable for this user",
    sqlite3.SQLITE_BUSY: "another process has locked it: end its transaction",
    sqlite3.SQLITE_NOTADB: "the file is no SQLite database: name another one",
}  # fmt: skip


class SqliteBackend(SqlBackend):
    """A transactional backend on the database file `path`.

    See `SqlBackend` for `table` and `write`, which is given a `sqlite3.Cursor`. The file is made if it is missing, its folder is
    not. It is put into WAL mode, and every commit is synced. Foreign keys are kept. Other processes may read and write it
    meanwhile; who locks it for longer than half of the lane's time limit makes batches wait.
    """

    def __init__(
        self, path: str | os.PathLike[str], table: Table | str | None = None, *, write: Write | None = None
    ) -> None:
        super().__init__(table, write)
        self.path = Path(os.path.abspath(os.fspath(path)))  # noqa: PTH100 - resolve() would follow links
        # Held by the thread that uses the connection.
        self._using = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._waits_s = 0.0
        # Device and inode of the file that is open.
        self._file = (0, 0)
        self._statements = _Statements(self.table) if self.table is not None else None
        self._apart: Apart | None = None

    def _place(self) -> str:
        return str(self.path)

    @property
    def url(self) -> str | None:
        """`sqlite:///path?table=...`, from which the command line makes it again; None with functions, which no URL can name."""
        if self.table is None or not self.table.is_nameable:
            return None
        return f"sqlite://{quote_path(self.path)}?{url_query(self.table)}"

    # --- opening and closing --------------------------------------------------------------------------------------

    def _open(self, shards: int) -> None:
        if sqlite3.sqlite_version_info < VERSION_MIN:
            wanted = ".".join(map(str, VERSION_MIN))
            raise ConfigError(f"SQLite {wanted} is needed, this Python has {sqlite3.sqlite_version}")
        try:
            # A database holds what the store holds: nobody else's business. SQLite gives its log the same mode.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            db = sqlite3.connect(
                self.path, timeout=self._wait_s(), isolation_level=None, check_same_thread=False, cached_statements=64
            )  # fmt: skip
        except (OSError, sqlite3.Error) as error:
            raise self._at_opening(error) from error
        self._db, self._waits_s = db, self._wait_s()
        try:
            found = self.path.stat()
            self._file = (found.st_dev, found.st_ino)
            db.execute("PRAGMA journal_mode = WAL").fetchone()
            # In WAL mode the same as FULL. Where there is no WAL (a network file system) it also syncs the removal of the journal.
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("PRAGMA foreign_keys = ON")
            self._prepare(db, shards)
        except (OSError, sqlite3.Error) as error:
            raise self._at_opening(error) from error

    def _prepare(self, db: sqlite3.Connection, shards: int) -> None:
        """Make the tables that are missing, check those that are there, and prove that what they show is durable.

        Crash story: after a kill in the middle of a commit, that commit may be visible in the page cache and yet not be on disk;
        an engine that believed its mark would forget operations that a power cut takes back. A commit of our own, which changes
        something every time, syncs all before it.
        """
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {MARKS_TABLE} (store BLOB NOT NULL, lane TEXT NOT NULL, shard INTEGER NOT NULL, "
                "epoch INTEGER NOT NULL, mark BLOB NOT NULL, opened INTEGER NOT NULL, PRIMARY KEY (store, lane, shard))"
            )
            self._check_columns(db, (MARKS_TABLE,), MARKS_COLUMNS, MARKS_COLUMNS[:3])
            if self.table is not None:
                if self.table.create and self.table.types is not None:
                    db.execute(self._creation(self.table))
                self._check_columns(db, self.table.path, self.table.all_columns, self.table.key)
                self._apart = _apart(db, self.table)
            db.executemany(
                f"INSERT INTO {MARKS_TABLE} VALUES (?, ?, ?, 0, ?, 1) "  # noqa: S608 - a constant
                "ON CONFLICT DO UPDATE SET opened = opened + 1",
                [(self._store, self._lane, shard, EMPTY_MARK) for shard in range(shards)],
            )
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise

    def _creation(self, table: Table) -> str:
        types = table.types
        assert types is not None
        (key,), (column,) = table.key, table.columns
        return (
            f"CREATE TABLE IF NOT EXISTS {quoted(*table.path)} ({quoted(key)} {_SQL_TYPES[types[0]]} NOT NULL PRIMARY KEY, "
            f"{quoted(column)} {_SQL_TYPES[types[1]]})"
        )

    def _check_columns(
        self, db: sqlite3.Connection, path: Sequence[str], columns: Sequence[str], key: Sequence[str]
    ) -> None:
        """Raise ConfigError for a table that does not take what its operations become."""
        name = path[-1]
        schema = f"{quoted(path[0])}." if len(path) > 1 else ""
        if len(path) > 1 and path[0].lower() == "temp":
            raise ConfigError(
                f"{self.path}: table {'.'.join(path)!r} would be temporary: its rows would be gone when the engine closes, while "
                f"the mark says that they were applied: name it {name!r}"
            )
        found = {row[1]: row for row in db.execute(f"PRAGMA {schema}table_xinfo({quoted(name)})")}
        where = f"{self.path}: table {'.'.join(path)!r}"
        if not found:
            raise ConfigError(
                f"{where} does not exist: make it, with the columns {', '.join(columns)}, and {_unique_on(key)}"
            )
        names = {column.lower() for column in found}
        problems = [
            f"{where} has no column {column!r}: add it, or map the table otherwise"
            for column in columns
            if column.lower() not in names
        ]
        mapped = {column.lower() for column in columns}
        problems += [
            f"{where}: column {column!r} is NOT NULL, has no default, and is not mapped: give it a default, or map it"
            for column, row in found.items()
            if row[3] and row[4] is None and not row[5] and not row[6] and column.lower() not in mapped
        ]
        wanted = {column.lower() for column in key}
        if not problems and wanted not in [*_unique_sets(db, schema, name), _primary_key(found)]:
            problems.append(f"{where} has {_unique_on(key, missing=True)}")
        if problems:
            raise ConfigError(*problems)

    def _close(self) -> None:
        if not self._using.acquire(timeout=CLOSE_WAIT_S):
            return  # whoever uses it finds that nobody has it open any more, and closes it
        try:
            self._release()
        finally:
            self._using.release()

    def _release(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with contextlib.suppress(sqlite3.Error):
                db.close()

    # --- transactions ---------------------------------------------------------------------------------------------

    def _wait_s(self) -> float:
        """How long to wait for others who write."""
        return 86_400.0 if self._limit_s is None else WAIT_PART * self._limit_s

    def _transaction(self, batch: Batch, work: Callable[[Transaction], Work]) -> Work:
        """Bold first. Where a row is refused, again with savepoints."""
        done = self._run(work, "BEGIN IMMEDIATE", is_bold=True)
        if done is None:
            done = self._run(work, "BEGIN IMMEDIATE", is_bold=False)
        assert done is not None
        return done

    def _look(self, look: Callable[[Transaction], _T]) -> _T:
        try:
            seen = self._run(look, "BEGIN", is_bold=False)
        except (RetryBatch, BackendBroken) as error:
            raise StorageError(str(error), path=str(self.path)) from error
        assert seen is not None
        return seen

    def _run(self, work: Callable[[Transaction], _T], begin: str, *, is_bold: bool) -> _T | None:
        """A transaction, committed; None where it was bold, and a row is refused."""
        if not self._using.acquire(timeout=self._wait_s()):
            raise RetryBatch(f"{self.path}: other shards have written for {self._wait_s():g} s")
        try:
            db = self._db
            if db is None:
                raise EngineClosed(f"{self!r} is closed")
            self._check_file()
            is_done = False
            try:
                self._wait_for_locks(db)
                db.execute(begin)
                done = work(
                    SqliteTransaction(
                        db, self._statements, self._apart, (self._store, self._lane), is_bold=is_bold
                    )
                )
                is_done = True
                db.execute("COMMIT")
                self._check_file()
            except BaseException as error:
                self._roll_back(db)
                if is_bold and not is_done and refusal(error) is not None:
                    return None
                if isinstance(error, sqlite3.Error):
                    raise self._ours(error) from error
                raise
            return done
        finally:
            if self._lane is None:
                self._release()
            self._using.release()

    def _check_file(self) -> None:
        """Raise BackendBroken where another file has taken the place of the one that is open: nobody would see its rows again."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            what = "is gone"
        except OSError as error:
            raise RetryBatch(f"{self.path}: {error.strerror}") from error
        else:
            if (found.st_dev, found.st_ino) == self._file:
                return
            what = "was replaced"
        raise BackendBroken(
            f"{self.path}: the file {what} while the engine had it open: close the engine, put the right file there (without the "
            "-wal and -shm of another one), and open it again: the mark in it says what is applied"
        )

    def _wait_for_locks(self, db: sqlite3.Connection) -> None:
        """Take over a time limit that has changed."""
        wait_s = self._wait_s()
        if wait_s != self._waits_s:
            db.execute(f"PRAGMA busy_timeout = {int(1000 * wait_s)}")
            self._waits_s = wait_s

    def _roll_back(self, db: sqlite3.Connection) -> None:
        """End the transaction. Where even that fails, the connection goes, and with it the transaction."""
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            _logger.exception("%s: a transaction could not be rolled back", self.path)

    # --- errors ---------------------------------------------------------------------------------------------------

    def _ours(self, error: sqlite3.Error) -> Exception:
        """What the engine is to do about an error that speaks for the whole batch."""
        code = code_of(error)
        text = f"{self.path}: {said(error)}"
        if code in _ROW:  # at the commit: a deferred constraint, which names no row
            return BatchRejected(text)
        if code in _LATER:
            return RetryBatch(text)
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            return BackendBroken(f"{text}: restore the database from a backup")
        if code:
            return BackendBroken(text)
        return error

    def _at_opening(self, error: Exception) -> Exception:
        if isinstance(error, OSError):
            return StorageError(
                f"{self.path}: {error.strerror}: the folder must exist and be writable", path=str(self.path), errno=error.errno
            )  # fmt: skip
        code = code_of(error)
        advice = _ADVICE.get(code, "repair what failed, and open again")
        text = f"{self.path}: {said(error)}: {advice}"
        if code == sqlite3.SQLITE_CORRUPT:
            return CorruptionError(text, path=str(self.path), expected="a sound SQLite database")
        if code in {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_NOTADB}:
            return ConfigError(text)
        return StorageError(text, path=str(self.path))


class SqliteTransaction:
    """A `Transaction` that has begun.

    A bold one makes no savepoints: SQLite would keep all that it changes, and hardly any batch needs that. Where a row is refused,
    its error passes through, and the batch is tried again in one that is not bold.
    """

    def __init__(
        self,
        db: sqlite3.Connection,
        statements: _Statements | None,
        apart: Apart | None,
        scope: tuple[bytes, str | None],
        *,
        is_bold: bool,
    ) -> None:
        self._db = db
        self._statements = statements
        self.apart = apart
        self._scope = scope
        self._is_bold = is_bold
        self.cursor = db.cursor()

    def save(self) -> None:
        """See `Transaction`."""
        if not self._is_bold:
            self._db.execute("SAVEPOINT walbatch")

    def keep(self) -> None:
        """See `Transaction`."""
        if not self._is_bold:
            self._db.execute("RELEASE walbatch")

    @property
    def harm(self) -> str | None:
        """See `Transaction`."""
        return None if self._db.in_transaction else ENDED

    def undo(self) -> None:
        """See `Transaction`."""
        if not self._db.in_transaction:
            # A trigger or a constraint said ROLLBACK: all is undone, the mark's lock too.
            raise BatchRejected("the database has rolled back the whole transaction because of one row")
        self._db.execute("ROLLBACK TO walbatch")
        self._db.execute("RELEASE walbatch")

    def delete(self, keys: Sequence[Row]) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        self._db.executemany(self._statements.delete, keys)

    def put(self, columns: Columns) -> None:
        """See `Transaction`."""
        assert self._statements is not None
        self._db.executemany(self._statements.put, zip(*columns, strict=True))

    def refusal(self, error: BaseException) -> str | None:
        """See `Transaction`."""
        return None if self._is_bold else refusal(error)

    def stored_mark(self, shard: int) -> tuple[int, bytes] | None:
        """See `Transaction`."""
        row = self._db.execute(
            f"SELECT epoch, mark FROM {MARKS_TABLE} WHERE store = ? AND lane = ? AND shard = ?",  # noqa: S608 - a constant
            (*self._scope, shard),
        ).fetchone()
        return None if row is None else (int(row[0]), bytes(row[1]))

    def store_mark(self, shard: int, epoch: int, mark: bytes) -> None:
        """See `Transaction`."""
        self._db.execute(
            f"INSERT INTO {MARKS_TABLE} VALUES (?, ?, ?, ?, ?, 1) "  # noqa: S608 - a constant
            "ON CONFLICT DO UPDATE SET epoch = excluded.epoch, mark = excluded.mark",
            (*self._scope, shard, epoch, mark),
        )


class _Statements:
    """The statements of a table: of one row each, run for many.

    Measured (docs/backends.md): several rows in one statement are slower. SQLite keeps what such a statement changes, in case that
    it fails in its middle.
    """

    def __init__(self, table: Table) -> None:
        name, columns = quoted(*table.path), [quoted(column) for column in table.all_columns]
        key, others = columns[: len(table.key)], columns[len(table.key) :]
        self.delete = f"DELETE FROM {name} WHERE {' AND '.join(f'{column} = ?' for column in key)}"  # noqa: S608 - quoted
        update = (
            f"UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in others)}"
            if others
            else "NOTHING"
        )
        self.put = (
            f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "  # noqa: S608 - quoted
            f"ON CONFLICT ({', '.join(key)}) DO {update}"
        )


# --- small things -------------------------------------------------------------------------------------------------


EMPTY_MARK: Final = encode_mark(Mark())


def quoted(*names: str) -> str:
    """A name, or the parts of one, as SQL takes it whatever is in it."""
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


def code_of(error: Exception) -> int:
    """SQLite's primary code; 0 where the error is Python's."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE


def said(error: Exception) -> str:
    """What SQLite says of it, with the name of its code."""
    name = getattr(error, "sqlite_errorname", "")
    return f"{error} ({name})" if name else str(error)


def quote_path(path: Path) -> str:
    """A path as it stands in a URL."""
    return quote(os.fsencode(path))


def refusal(error: BaseException) -> str | None:
    """What SQLite says of a row that it refuses, or Python of a value that it cannot hand over; None for anything else."""
    if isinstance(error, sqlite3.Error):
        code = code_of(error)
        is_of_row = code in _ROW or (not code and any(words in str(error) for words in _UNBINDABLE))
        return said(error) if is_of_row else None
    return (
        f"{type(error).__name__}: {error}" if isinstance(error, (OverflowError, UnicodeEncodeError)) else None
    )


def _apart(db: sqlite3.Connection, table: Table) -> Apart | None:
    """See `Apart`; None where a delete may reach other rows: foreign keys that point here, and triggers, may do anything."""
    name = table.path[-1]
    master = f"{quoted(table.path[0])}.sqlite_master" if len(table.path) > 1 else "sqlite_master"
    # Foreign keys never point into another schema.
    tables = [row[0] for row in db.execute(f"SELECT name FROM {master} WHERE type = 'table'")]  # noqa: S608 - quoted
    points_here = any(
        row[2].lower() == name.lower() for other in tables for row in db.execute(f"PRAGMA foreign_key_list({quoted(other)})")
    )  # fmt: skip
    triggers = db.execute(
        f"SELECT count(*) FROM {master} WHERE type = 'trigger' AND lower(tbl_name) = lower(?)",  # noqa: S608 - quoted
        (name,),
    ).fetchone()[0]
    if points_here or triggers:
        return None
    schema = f"{quoted(table.path[0])}." if len(table.path) > 1 else ""
    types = {
        row[1].lower(): str(row[2]).upper()
        for row in db.execute(f"PRAGMA {schema}table_xinfo({quoted(name)})")
    }
    collating = {
        str(column[2]).lower()
        for index in db.execute(f"PRAGMA {schema}index_list({quoted(name)})")
        for column in db.execute(f"PRAGMA {schema}index_xinfo({quoted(index[1])})")
        if column[5] and column[2] is not None and str(column[4]).upper() != "BINARY"
    }
    collating |= {column.lower() for column in table.key if _is_collating(db, table, column)}
    return [
        _kept_apart(types.get(column.lower(), ""), is_collating=column.lower() in collating)
        for column in table.key
    ]


def _is_collating(db: sqlite3.Connection, table: Table, column: str) -> bool:
    """Whether a column takes `A` or `a ` for `a`: its collation may be another one than its index has, and no PRAGMA tells it."""
    name = quoted(column)
    row = db.execute(
        f"SELECT v = 'A' OR v = 'a ' FROM (SELECT {name} AS v FROM {quoted(*table.path)} "  # noqa: S608 - quoted
        "WHERE 0 UNION ALL SELECT 'a')"
    ).fetchone()
    return bool(row[0])


def _kept_apart(type_: str, *, is_collating: bool) -> Types:
    """Of values of one type. Section 3.1 of SQLite's "Datatypes" has the rules for names of types."""
    if "INT" in type_:
        return frozenset({bytes, int})
    texts: Types = frozenset() if is_collating else frozenset({str})
    if any(part in type_ for part in ("CHAR", "CLOB", "TEXT")):
        return texts | {bytes} | (frozenset() if is_collating else {int})
    if not type_ or "BLOB" in type_:
        return texts | {bytes, int}
    return frozenset({bytes})


def _unique_on(key: Sequence[str], *, missing: bool = False) -> str:
    columns = ", ".join(key)
    if missing:
        return f"no primary key or unique index on exactly ({columns}): make one, or map the key otherwise"
    return f"a primary key or unique index on ({columns})"


def _primary_key(columns: Mapping[str, Sequence[Any]]) -> set[str]:
    return {name.lower() for name, row in columns.items() if row[5]}


def _unique_sets(db: sqlite3.Connection, schema: str, table: str) -> list[set[str]]:
    """The columns of each unique index that holds for all rows."""
    indexes = [
        row for row in db.execute(f"PRAGMA {schema}index_list({quoted(table)})") if row[2] and not row[4]
    ]
    return [
        {str(row[2]).lower() for row in db.execute(f"PRAGMA {schema}index_info({quoted(index[1])})")}
        for index in indexes
    ]
