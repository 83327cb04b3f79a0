"""Peers that are libraries with a storage engine inside: SQLite, LMDB, RocksDB, LevelDB.

Each is used as a queue: a row or a key for each operation, every commit synced. Where an engine has a group commit of its own,
threads reach it at once.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from walbatch.bench.subject import DRAIN_COUNT, Subject, Take, load

LMDB_MAP_BYTES: Final = 16 * 2**30


class Sqlite(Subject):
    """A table in WAL mode. One connection behind a lock is faster than one for each thread: there is one writer at a time."""

    name: ClassVar[str] = "sqlite"
    title: ClassVar[str] = "SQLite (WAL, synchronous=FULL)"
    workloads: ClassVar[frozenset[str]] = Subject.workloads | {"w9"}

    @classmethod
    def release(cls) -> str:
        """That of the library."""
        return f"SQLite {sqlite3.sqlite_version}"

    def __init__(self) -> None:
        super().__init__()
        self._connection: sqlite3.Connection | None = None
        # Guards the connection.
        self._lock = threading.Lock()

    @property
    def _open_connection(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def open(self, folder: Path) -> None:
        """Make the table."""
        connection = sqlite3.connect(folder / "queue.db", isolation_level=None, check_same_thread=False)
        self._connection = connection
        connection.execute("pragma journal_mode=wal")
        connection.execute("pragma synchronous=full")
        connection.execute("create table queue(id integer primary key, payload blob)")

    def item(self, key: bytes, payload: bytes) -> tuple[int, bytes]:
        """The key as the row's number."""
        return int.from_bytes(key, "big", signed=True), payload

    def group(self, keys: Sequence[bytes], payloads: Sequence[bytes]) -> list[tuple[int, bytes]]:
        """The rows."""
        return [self.item(key, payload) for key, payload in zip(keys, payloads, strict=True)]

    def put(self, item: Any) -> None:
        """A transaction of one row."""
        with self._lock:
            self._open_connection.execute("insert or replace into queue values(?, ?)", item)

    def put_group(self, group: Any) -> None:
        """One transaction."""
        with self._lock:
            self._open_connection.execute("begin")
            self._open_connection.executemany("insert or replace into queue values(?, ?)", group)
            self._open_connection.execute("commit")

    def drain(self, count: int, take: Take) -> int:
        """Read a thousand, delete them, commit."""
        drained = 0
        query = f"select id, payload from queue order by id limit {DRAIN_COUNT}"  # noqa: S608 - a number of ours
        while rows := self._open_connection.execute(query).fetchall():
            take([payload for _, payload in rows])
            drained += len(rows)
            self._open_connection.execute("delete from queue where id <= ?", (rows[-1][0],))
        return drained

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Lmdb(Subject):
    """Keys that ascend, each commit synced (LMDB's default)."""

    name: ClassVar[str] = "lmdb"
    title: ClassVar[str] = "LMDB (sync)"
    modules: ClassVar[tuple[str, ...]] = ("lmdb",)
    package: ClassVar[str] = "lmdb"
    ascending: ClassVar[bool] = True
    """Whether to tell LMDB so, which saves it the search for a key's place."""

    def __init__(self) -> None:
        super().__init__()
        self._environment: Any = None

    def open(self, folder: Path) -> None:
        """Make the environment."""
        self._environment = load("lmdb").open(str(folder / "lmdb"), map_size=LMDB_MAP_BYTES)

    def put(self, item: Any) -> None:
        """A transaction of one key; of several threads, LMDB lets one in at a time."""
        with self._environment.begin(write=True) as transaction:
            transaction.put(*item)

    def put_group(self, group: Any) -> None:
        """One transaction."""
        with self._environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(group, append=self.ascending)

    def drain(self, count: int, take: Take) -> int:
        """Read a thousand, delete them, commit."""
        drained = 0
        while True:
            with self._environment.begin(write=True) as transaction:
                cursor = transaction.cursor()
                payloads: list[bytes] = []
                is_found = cursor.first()
                while is_found and len(payloads) < DRAIN_COUNT:
                    payloads.append(cursor.value())
                    is_found = cursor.delete() and bool(cursor.key())
                take(payloads)
            if not payloads:
                return drained
            drained += len(payloads)

    def close(self) -> None:
        """Close the environment."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None


class RocksDb(Subject):
    """RocksDB with its log synced at each write; it has a group commit of its own."""

    name: ClassVar[str] = "rocksdb"
    title: ClassVar[str] = "RocksDB (rocksdict, sync)"
    modules: ClassVar[tuple[str, ...]] = ("rocksdict",)
    package: ClassVar[str] = "rocksdict"

    def __init__(self) -> None:
        super().__init__()
        self._database: Any = None
        self._library: Any = None
        self._synced: Any = None

    def open(self, folder: Path) -> None:
        """Make the database."""
        self._library = load("rocksdict")
        self._database = self._library.Rdict(str(folder / "rocksdb"), self._library.Options(raw_mode=True))
        self._synced = self._library.WriteOptions()
        self._synced.sync = True

    def put(self, item: Any) -> None:
        """A write of one key."""
        self._database.put(*item, write_opt=self._synced)

    def put_group(self, group: Any) -> None:
        """One write batch."""
        batch = self._library.WriteBatch(raw_mode=True)
        for key, payload in group:
            batch.put(key, payload)
        self._database.write(batch, self._synced)

    def drain(self, count: int, take: Take) -> int:
        """Read a thousand, delete them in one batch."""
        drained = 0
        for rows in _chunks(self._database.items()):
            take([payload for _, payload in rows])
            batch = self._library.WriteBatch(raw_mode=True)
            for key, _ in rows:
                batch.delete(key)
            self._database.write(batch, self._synced)
            drained += len(rows)
        return drained

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()
            self._database = None


class LevelDb(Subject):
    """LevelDB with its log synced at each write."""

    name: ClassVar[str] = "leveldb"
    title: ClassVar[str] = "LevelDB (plyvel, sync)"
    modules: ClassVar[tuple[str, ...]] = ("plyvel",)
    package: ClassVar[str] = "plyvel"

    def __init__(self) -> None:
        super().__init__()
        self._database: Any = None

    def open(self, folder: Path) -> None:
        """Make the database."""
        self._database = load("plyvel").DB(str(folder / "leveldb"), create_if_missing=True)

    def put(self, item: Any) -> None:
        """A write of one key."""
        self._database.put(*item, sync=True)

    def put_group(self, group: Any) -> None:
        """One write batch."""
        with self._database.write_batch(sync=True) as batch:
            for key, payload in group:
                batch.put(key, payload)

    def drain(self, count: int, take: Take) -> int:
        """Read a thousand, delete them in one batch."""
        drained = 0
        with contextlib.closing(self._database.iterator()) as rows_left:
            for rows in _chunks(rows_left):
                take([payload for _, payload in rows])
                with self._database.write_batch(sync=True) as batch:
                    for key, _ in rows:
                        batch.delete(key)
                drained += len(rows)
        return drained

    def close(self) -> None:
        """Close the database."""
        if self._database is not None:
            self._database.close()
            self._database = None


def _chunks(rows: Iterable[tuple[bytes, bytes]]) -> Iterable[list[tuple[bytes, bytes]]]:
    """A thousand rows at a time."""
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, DRAIN_COUNT)):
        yield chunk
