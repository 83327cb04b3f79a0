"""The LMDB file of state/, open: its tables, read in pages and changed in synced transactions; its map and its room.

What is not here: whether LMDB may open it (`statefolder`), what its values mean (`envelope` and the modules of the tables).

The idea needed to read it: growing the map ends every transaction of this process, so one lock stands before all of them,
and nobody holds it for longer than a page of entries or a commit takes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import lmdb

from walbatch.errors import EngineClosed
from walbatch.limits import GIB, KIB, MIB
from walbatch.storage.statefolder import (
    DATA_NAME,
    LOCK_NAME,
    UNFINISHED_BYTES_MAX,
    DamagedFileError,
    data_bytes,
    find_problem,
    lmdb_errors,
    os_errors,
    prove_fresh,
    reserve_lock_file,
    sync_directory,
)

MAP_BYTES: Final = 16 * MIB
"""The map to begin with: address space, not memory or disk. It grows by doubling."""

MAP_BYTES_MAX: Final = 8 * GIB
"""Two generations of the largest checkpoint, and a third while LMDB still keeps the pages of the one it replaces; and twice
all that the other tables may hold."""

RESERVE_BYTES: Final = MIB
"""Steps in which the file is allocated ahead of its use. The first one holds the checkpoints of most stores: they still
find room, and so let the log be trimmed, when the disk is full."""

SLACK_BYTES: Final = 256 * KIB
"""What a commit may write beside its values: the pages of its trees and of the list of free pages."""

SPARE_BYTES: Final = MIB
"""What commits other than a checkpoint leave free in the file, so that a full disk does not keep the checkpoint from trimming the
log."""

DATABASES_MAX: Final = 8
"""Named databases: six are used; the rest is room for later versions."""

PAGE_BYTES: Final = 4 * MIB
PAGE_COUNT: Final = 4_096
"""What is read at once: others wait that long, and a reader of a whole table needs no more memory."""

READERS_MAX: Final = 126
"""What LMDB is asked for: fewer than fit, so that it does not extend the file."""

ADOPTIONS_MAX: Final = 3
"""How often one reading takes over a map that another process has grown meanwhile."""

_OPENED_KEY: Final = b"opened"
_COUNTER: Final = struct.Struct("<Q")

assert MAP_BYTES <= UNFINISHED_BYTES_MAX

Entry = tuple[bytes, bytes]
Change = tuple[bytes | None, bytes, bytes | None]
"""Name of a table (None: the root), key, value; without a value the entry is removed."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A named database of the file, and what may stand in it."""

    name: bytes
    value_bytes_max: int
    entries_max: int


class StateFile:
    """An open LMDB environment. Safe from any thread of the process that opened it.

    `_lock` guards the map: growing it ends every transaction of this process, so nobody may be in one then.
    """

    def __init__(self, env: lmdb.Environment, path: str, *, readonly: bool) -> None:
        """Not for users: see `open`."""
        self._env: lmdb.Environment | None = env
        self._path = path
        self._readonly = readonly
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        env = self._env
        if env is None:
            return f"<StateFile {self._path} closed>"
        access = "read-only" if self._readonly else "writable"
        return f"<StateFile {self._path} {access}, transaction {env.info()['last_txnid']}>"

    @classmethod
    def open(
        cls, path: str, *, readonly: bool, shared: bool = False, map_bytes: int = MAP_BYTES
    ) -> StateFile:
        """Open the file in the directory `path`, unless `find_problem` or LMDB finds it damaged.

        With `readonly` nothing is written; with `shared` too, a reader's slot is taken in LMDB's lock file if there is
        one. Raises DamagedFileError, StorageError.
        """
        with os_errors(path, "opened"):
            problem = find_problem(path)
            if problem is not None:
                raise DamagedFileError(problem)
            # A lock file that is not there means that nobody writes; making it would be writing.
            lock = not readonly or (shared and os.path.lexists(os.path.join(path, LOCK_NAME)))
            if lock:
                reserve_lock_file(path)
            if readonly:
                map_bytes = max(map_bytes, 2 * data_bytes(path))
        with os_errors(path, "opened"), lmdb_errors(path, "opened"):
            env = lmdb.open(
                path,
                map_size=map_bytes,
                max_dbs=DATABASES_MAX,
                max_readers=READERS_MAX,
                mode=0o600,
                create=False,
                readonly=readonly,
                lock=lock,
            )
        # Nothing but the two first pages has been read through the map so far.
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        size = data_bytes(path)
        if size < needed:
            env.close()
            raise DamagedFileError(f"{DATA_NAME} has {size:,} bytes, but its pages take {needed:,}")
        if not readonly and not env.info()["last_txnid"]:
            try:
                with os_errors(path, "made"):
                    prove_fresh(path)
            except BaseException:
                env.close()
                raise
        file = cls(env, path, readonly=readonly)
        if not readonly:
            _open_for_writing[os.path.realpath(path)] = file
        return file

    @staticmethod
    def of_this_process(path: str) -> StateFile | None:
        """What this process has open for writing at `path`: LMDB forbids to open it a second time."""
        file = _open_for_writing.get(os.path.realpath(path))
        return None if file is None or file._env is None or file._pid != os.getpid() else file  # noqa: SLF001 - own class

    def prove(self) -> None:
        """Make the file's name, and everything that can be read from it, durable. Raises DamagedFileError, StorageError.

        Crash story: after a commit whose last write failed, that commit can be visible in the page cache and yet not
        be on disk. An engine that believed it would trim the log by a checkpoint that a power cut takes back. A commit
        of our own has all before it on disk when it returns, or says that it cannot.
        """
        with self._using() as env:
            self._commit(env, [(None, _OPENED_KEY, _COUNTER.pack(env.info()["last_txnid"]))], 0)
        with os_errors(self._path, "synced"):
            sync_directory(self._path)
            sync_directory(os.path.dirname(os.path.abspath(self._path)))

    def entries(self, table: Table, problems: list[str]) -> Iterator[Entry]:
        """Every entry of a table, by key; and into `problems` a sentence for each that cannot be ours.

        Whoever saves meanwhile is not held up: an entry that changes is read as it was or as it is. Raises
        DamagedFileError, StorageError.
        """
        count = 0
        after = b""
        while page := self._read(partial(_page, table=table, after=after)):
            for key, value in page:
                if count == table.entries_max:
                    problems.append(
                        f"state holds more than {table.entries_max:,} entries in its table {table.name.decode()}: "
                        "the rest is ignored"
                    )
                    return
                count += 1
                if isinstance(value, int):
                    problems.append(
                        f"state holds {value:,} bytes under {key!r}: no value of ours is that long"
                    )
                else:
                    yield key, value
            after = page[-1][0]

    def get(self, table: Table, keys: Collection[bytes]) -> dict[bytes, bytes]:
        """The values that there are under `keys`. Raises as `entries`."""
        return self._read(partial(_get, table=table, keys=keys)) if keys else {}

    def put(self, changes: Sequence[Change], *, spare_bytes: int = SPARE_BYTES) -> None:
        """Commit changes in one transaction, synced, if `spare_bytes` are left in the file then.

        Raises DamagedFileError, StorageError.
        """
        with self._using() as env:
            self._commit(env, changes, spare_bytes)

    def close(self) -> None:
        """Close it. Idempotent. In a forked child the file is left alone: it is the parent's."""
        if self._pid != os.getpid():
            return
        with self._lock:
            env, self._env = self._env, None
        if env is not None:
            env.close()

    @contextlib.contextmanager
    def _using(self) -> Iterator[lmdb.Environment]:
        """The environment, with the lock held. The lock is not even tried in a child: its holder was not forked."""
        if self._pid != os.getpid():
            raise EngineClosed(
                f"{self._path} was opened by the process that this one was forked from: open it again"
            )
        with self._lock:
            if self._env is None:
                raise EngineClosed(f"{self._path} is closed")
            yield self._env

    def _read(self, read: Callable[[lmdb.Environment], _T]) -> _T:
        """What `read` makes of the environment, also when another process has grown the map."""
        with self._using() as env, lmdb_errors(self._path, "read"):
            for _ in range(ADOPTIONS_MAX):
                with contextlib.suppress(lmdb.MapResizedError):
                    return read(env)
                env.set_mapsize(0)
            return read(env)

    def _commit(self, env: lmdb.Environment, changes: Sequence[Change], spare_bytes: int) -> None:
        """One synced transaction; the map grows as needed. Called with the lock held."""
        with os_errors(self._path, "saved"):
            self._reserve(env, changes, spare_bytes)
        names = {name for name, _, _ in changes}
        with lmdb_errors(self._path, "saved"):
            while True:
                try:
                    with env.begin(write=True) as txn:
                        tables = {
                            name: None if name is None else env.open_db(name, txn=txn) for name in names
                        }
                        for name, key, value in changes:
                            if value is None:
                                txn.delete(key, db=tables[name])
                            else:
                                txn.put(key, value, db=tables[name])
                except lmdb.MapFullError:
                    map_bytes = env.info()["map_size"]
                    if map_bytes >= MAP_BYTES_MAX:
                        raise
                    env.set_mapsize(min(2 * map_bytes, MAP_BYTES_MAX))
                else:
                    return

    def _reserve(self, env: lmdb.Environment, changes: Sequence[Change], spare_bytes: int) -> None:
        """Allocate room for a commit before LMDB writes: LMDB reports a disk that fills up as an I/O error.

        Each change may copy a page of its tree; a large value takes pages of its own, small ones may fill new pages by half.
        """
        size = data_bytes(self._path)
        psize = env.stat()["psize"]
        used = (env.info()["last_pgno"] + 1) * psize
        lengths = [len(value or b"") for _, _, value in changes]
        needed = psize * len(lengths) + sum(n + psize if 2 * n > psize else 2 * n for n in lengths)
        missing = used + needed + SLACK_BYTES + spare_bytes - size
        if missing <= 0:
            return
        file = os.open(os.path.join(self._path, DATA_NAME), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            try:
                os.posix_fallocate(file, size, -(-missing // RESERVE_BYTES) * RESERVE_BYTES)
            except OSError as error:
                if error.errno in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                    return
                os.posix_fallocate(file, size, missing)
        finally:
            os.close(file)


_open_for_writing: weakref.WeakValueDictionary[str, StateFile] = weakref.WeakValueDictionary()
"""By real path."""


def _page(env: lmdb.Environment, *, table: Table, after: bytes) -> list[tuple[bytes, bytes | int]]:
    """Some entries behind the key `after`; of a value that is too long, its length."""
    found: list[tuple[bytes, bytes | int]] = []
    try:
        database = env.open_db(table.name, create=False)
    except lmdb.NotFoundError:
        return found
    size = 0
    with env.begin(db=database, buffers=True) as txn, txn.cursor() as cursor:
        there = cursor.set_range(after) if after else cursor.first()
        while there and size < PAGE_BYTES and len(found) < PAGE_COUNT:
            key, value = bytes(cursor.key()), cursor.value()
            if key == after:
                pass
            elif len(value) > table.value_bytes_max:
                found.append((key, len(value)))
            else:
                found.append((key, bytes(value)))
                size += len(value)
            there = cursor.next()
    return found


def _get(env: lmdb.Environment, *, table: Table, keys: Collection[bytes]) -> dict[bytes, bytes]:
    try:
        database = env.open_db(table.name, create=False)
    except lmdb.NotFoundError:
        return {}
    with env.begin(db=database) as txn:
        found = ((key, txn.get(key)) for key in keys)
        return {key: bytes(value) for key, value in found if value is not None}
