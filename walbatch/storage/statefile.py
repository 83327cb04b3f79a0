"""The LMDB file of state/: verified, opened, grown, and moved aside when it is damaged.

What is not here: what its values mean (`envelope`), and which of them to believe (`checkpoint`).

The idea needed to read it: LMDB believes its file. A page that lies beyond the end of the file is a SIGBUS, and a
damaged one can end the process or show stale data, so the structure is verified by reading (`lmdb.verify`), before
LMDB maps anything. Measured over 15,000 files with a flipped bit, an overwritten page or a cut end: none that passed
both checks below killed the process, and more than half of those that were cut would have.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Final

import lmdb
from lmdb import verify as lmdb_verify

from walbatch.core.checksum import crc32c
from walbatch.errors import EngineClosed, StorageError
from walbatch.limits import GIB, KIB, MIB

MAP_BYTES: Final = 16 * MIB
"""The map to begin with: address space, not memory or disk. It grows by doubling."""

MAP_BYTES_MAX: Final = 4 * GIB
"""Two generations of the largest checkpoint, and a third while LMDB still keeps the pages of the one it replaces."""

RESERVE_BYTES: Final = MIB
"""Steps in which the file is allocated ahead of its use. The first one holds the checkpoints of most stores: they still
find room, and so let the log be trimmed, when the disk is full."""

SLACK_BYTES: Final = 256 * KIB
"""What a commit may write beside its values: the pages of its trees and of the list of free pages."""

DATABASES_MAX: Final = 8
"""Named databases: two are used; the rest is room for later versions."""

ENTRIES_MAX: Final = 256
"""Entries of one database: twice the lanes of a store, and some that are damaged."""

LOCK_BYTES: Final = 16 * KIB
"""LMDB's lock file: room for 253 readers, of which each `inspect` or `verify` beside a live engine is one."""

READERS_MAX: Final = 126
"""What LMDB is asked for: fewer than fit, so that it does not extend the file."""

DISK_FULL_BYTES: Final = MIB
"""A disk with less room counts as full where LMDB would have to extend its lock file."""

ADOPTIONS_MAX: Final = 3
"""How often one reading takes over a map that another process has grown meanwhile."""

DATA_NAME: Final = "data.mdb"
LOCK_NAME: Final = "lock.mdb"
UNFINISHED_NAME: Final = "data.unfinished"

UNFINISHED_COUNT_MAX: Final = 1_000
"""So many are kept. More than that is no accident any more, and somebody has to look."""

_BLOCK_BYTES: Final = 512
"""Unit of st_blocks."""

UNFINISHED_BYTES_MAX: Final = MAP_BYTES
"""LMDB writes two meta pages when it makes the file, and room is reserved behind them: far less than the first map."""

_CHUNK_BYTES: Final = 64 * KIB
"""One step of reading."""

_META_BYTES: Final = 256
"""The beginning of a meta page, in which the roots of its two trees stand."""
_META_ROOTS: Final = 2
_NO_ROOT: Final = b"\xff" * 8

_OPENED_KEY: Final = b"opened"
_COUNTER: Final = struct.Struct("<Q")
_NOT_DAMAGE: Final = (
    lmdb.MapFullError,
    lmdb.MapResizedError,
    lmdb.ReadersFullError,
    lmdb.TlsFullError,
    lmdb.DbsFullError,
)

Entry = tuple[bytes, bytes]


class DamagedFileError(Exception):
    """LMDB refuses the file, or must not be let near it. The message says why."""


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
                    _prove_fresh(path)
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
            self._commit(env, None, [(_OPENED_KEY, _COUNTER.pack(env.info()["last_txnid"]))])
        with os_errors(self._path, "synced"):
            sync_directory(self._path)
            sync_directory(os.path.dirname(os.path.abspath(self._path)))

    def entries(self, name: bytes, value_bytes_max: int) -> tuple[list[Entry], list[str]]:
        """Every entry of a named database, and a sentence for each that cannot be ours.

        Raises DamagedFileError, StorageError.
        """
        with self._using() as env, lmdb_errors(self._path, "read"):
            for _ in range(ADOPTIONS_MAX):
                with contextlib.suppress(lmdb.MapResizedError):
                    return _read_entries(env, name, value_bytes_max)
                env.set_mapsize(0)
            return _read_entries(env, name, value_bytes_max)

    def put(self, name: bytes, entries: Sequence[Entry]) -> None:
        """Commit entries of a named database in one transaction, synced. Raises DamagedFileError, StorageError."""
        with self._using() as env:
            self._commit(env, name, entries)

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

    def _commit(self, env: lmdb.Environment, name: bytes | None, entries: Sequence[Entry]) -> None:
        """One synced transaction; the map grows as needed. Called with the lock held."""
        with os_errors(self._path, "saved"):
            self._reserve(env, sum(len(value) for _, value in entries))
        with lmdb_errors(self._path, "saved"):
            while True:
                try:
                    with env.begin(write=True) as txn:
                        database = None if name is None else env.open_db(name, txn=txn)
                        for key, value in entries:
                            txn.put(key, value, db=database)
                except lmdb.MapFullError:
                    map_bytes = env.info()["map_size"]
                    if map_bytes >= MAP_BYTES_MAX:
                        raise
                    env.set_mapsize(min(2 * map_bytes, MAP_BYTES_MAX))
                else:
                    return

    def _reserve(self, env: lmdb.Environment, values_bytes: int) -> None:
        """Allocate room for a commit before LMDB writes: LMDB reports a disk that fills up as an I/O error."""
        size = data_bytes(self._path)
        used = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        missing = used + values_bytes + SLACK_BYTES - size
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


def _read_entries(env: lmdb.Environment, name: bytes, value_bytes_max: int) -> tuple[list[Entry], list[str]]:
    entries: list[Entry] = []
    problems: list[str] = []
    try:
        database = env.open_db(name, create=False)
    except lmdb.NotFoundError:
        return entries, problems
    with env.begin(db=database, buffers=True) as txn, txn.cursor() as cursor:
        for count, (key, value) in enumerate(cursor):
            if count == ENTRIES_MAX:
                problems.append(
                    f"state holds more than {ENTRIES_MAX} entries of one kind: the rest is ignored"
                )
                break
            if len(value) > value_bytes_max:
                problems.append(
                    f"state holds {len(value):,} bytes under {bytes(key)!r}: no value of ours is that long"
                )
            else:
                entries.append((bytes(key), bytes(value)))
    return entries, problems


# --- looking at the file without LMDB -----------------------------------------------------------------------------


def is_empty(path: str) -> bool:
    """Whether there is nothing at `path`, or a directory whose file is missing or was never written. Raises OSError."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode) and data_bytes(path) == 0
    except FileNotFoundError:
        return True


def is_unfinished(path: str) -> bool:
    """Whether the making of the file was cut off, so that it never held anything. Raises OSError.

    LMDB writes both meta pages first, without a sync, and a full disk or a power cut may leave one of them or none; the
    size may be durable before them, with the room that was reserved: zeros. Once something was saved, there are roots, and
    pages behind them: a file that was damaged or cut off later is not taken for this.
    """
    name = os.path.join(path, DATA_NAME)
    try:
        found_there = os.lstat(name)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISREG(found_there.st_mode) or not 0 < found_there.st_size <= UNFINISHED_BYTES_MAX:
        return False
    with open(name, "rb") as file:
        pages = file.read(mmap.PAGESIZE), file.read(mmap.PAGESIZE)
        rootless = all(not any(page) or page[:_META_BYTES].count(_NO_ROOT) == _META_ROOTS for page in pages)
        if not rootless or all(map(any, pages)):
            return False
        return not any(map(any, iter(lambda: file.read(_CHUNK_BYTES), b"")))


def set_aside_unfinished(path: str) -> None:
    """Give such a file a name that nothing has, so that it is made again. Needs no sync: it would be found again.

    Raises OSError.
    """
    for number in range(1, UNFINISHED_COUNT_MAX + 1):
        name = os.path.join(path, f"{UNFINISHED_NAME}-{number}")
        if not os.path.lexists(name):
            os.rename(os.path.join(path, DATA_NAME), name)
            return
    raise FileExistsError(errno.EEXIST, f"{UNFINISHED_COUNT_MAX:,} unfinished files: remove them", path)


def _prove_fresh(path: str) -> None:
    """Make a file into which nothing was committed durable, and its name. Raises OSError.

    Crash story: LMDB has written its two meta pages without a sync. If room were reserved behind them before, a power cut
    could leave a large file of zeros, which looks like one that held something.
    """
    file = os.open(os.path.join(path, DATA_NAME), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)
    sync_directory(path)


def data_bytes(path: str) -> int:
    """Size of the data file. Raises OSError."""
    return os.stat(os.path.join(path, DATA_NAME), follow_symlinks=False).st_size


def find_problem(path: str) -> str | None:
    """What forbids to let LMDB open the directory; None for a sound or an empty one. Reads, writes nothing.

    Only a writer that is at it at the same time can make it wrong. Raises OSError.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        return "it is not a directory"
    for name in (DATA_NAME, LOCK_NAME):
        with contextlib.suppress(FileNotFoundError):
            # A link would lead LMDB's writing out of the store.
            if not stat.S_ISREG(os.lstat(os.path.join(path, name)).st_mode):
                return f"{name} is not a regular file"
    if is_empty(path) or sys.maxsize < 2**32:
        return None  # the verifier knows the files of 64-bit machines only
    try:
        problems = lmdb_verify.verify(path, subdir=True)  # type: ignore[no-untyped-call]
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - bytes that the verifier itself trips over are damaged
        return f"{DATA_NAME}: {error}"
    return f"{DATA_NAME}: {problems[0]}" if problems else None


def reserve_lock_file(path: str) -> None:
    """Give LMDB's lock file its blocks. LMDB writes it through a map: a hole in it, on a full disk, is a SIGBUS.

    A file that exists is not opened: closing it would end LMDB's locks, if this process has it open already. LMDB
    takes over a file of zeros, so a crash leaves nothing to repair. Raises OSError.
    """
    name = os.path.join(path, LOCK_NAME)
    try:
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        disk = os.statvfs(path)
        has_holes = os.lstat(name).st_blocks * _BLOCK_BYTES < LOCK_BYTES
        if has_holes and disk.f_bavail * disk.f_frsize < DISK_FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name) from None
        return
    try:
        written = os.write(file, bytes(LOCK_BYTES))
        if written < LOCK_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(file)


# --- moving suspect bytes aside -----------------------------------------------------------------------------------


def move_aside(path: str, quarantine: str, reason: str) -> str:
    """Move the files in `path` (or `path` itself, if it is no directory) to the directory `quarantine`, with a note.

    Returns the name of the note. `path` is an empty directory afterwards. Raises OSError.

    Crash story: the note is durable before the first rename. A crash between two renames leaves a lock file, which
    LMDB takes over, or damage that is found again; renames that a power cut takes back are found again too.
    """
    make_directory(quarantine)
    number = 1
    while os.path.lexists(os.path.join(quarantine, f"state-{number}.note")):
        number += 1
    prefix = os.path.join(quarantine, f"state-{number}")
    _write_new(f"{prefix}.note", f"{path}: {reason}\n".encode())
    sync_directory(quarantine)
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for name in (DATA_NAME, LOCK_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.rename(os.path.join(path, name), f"{prefix}.{name}")
        sync_directory(path)
    else:
        os.rename(path, f"{prefix}.bytes")
        make_directory(path)
    sync_directory(quarantine)
    return f"{prefix}.note"


def keep_copy(quarantine: str, value: bytes, reason: str) -> None:
    """Copy a damaged value to the directory `quarantine`, with a note; the same value only once. Raises OSError."""
    make_directory(quarantine)
    prefix = os.path.join(quarantine, f"state-value-{crc32c(value, 0):08x}")
    with contextlib.suppress(FileExistsError):
        _write_new(f"{prefix}.bytes", value)
        _write_new(f"{prefix}.note", f"{reason}\n".encode())
        sync_directory(quarantine)


def make_directory(path: str) -> None:
    """Make a directory, mode 0700, durable in its parent; an existing one is left alone. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        sync_directory(os.path.dirname(os.path.abspath(path)))


def sync_directory(path: str) -> None:
    """Make the names in a directory durable. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _write_new(path: str, data: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)


# --- errors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def os_errors(path: str, done: str) -> Iterator[None]:
    """Turn OSError into StorageError: `path` could not be `done`."""
    try:
        yield
    except OSError as error:
        raise _storage_error(path, done, error.strerror or str(error), error.errno) from error


@contextlib.contextmanager
def lmdb_errors(path: str, done: str) -> Iterator[None]:
    """Turn LMDB's errors into DamagedFileError or StorageError; errors of the system keep their errno."""
    try:
        yield
    except lmdb.Error as error:
        # Positive codes are errno, negative ones LMDB's; py-lmdb itself has none.
        code = getattr(error, "code", 0)
        reason = str(error).removeprefix(f"{path}: ")
        if code > 0:
            raise _storage_error(path, done, reason, code) from error
        if isinstance(error, _NOT_DAMAGE) or (code == 0 and "data format" not in str(error)):
            raise _storage_error(path, done, reason, None) from error
        raise DamagedFileError(reason) from error


def _storage_error(path: str, done: str, reason: str, code: int | None) -> StorageError:
    if code in {errno.ENOSPC, errno.EDQUOT}:
        hint = "make room on the disk"
    elif code in {errno.EACCES, errno.EPERM, errno.EROFS}:
        hint = "make the directory and its files writable for this user"
    elif code in {errno.EMFILE, errno.ENFILE}:
        hint = "allow more open files (ulimit -n)"
    elif code == errno.ENOMEM:
        hint = "allow more address space (ulimit -v)"
    else:
        hint = "check the disk, then open the store again; nothing acknowledged is lost"
    return StorageError(f"{path} could not be {done} ({reason}): {hint}", path=path, errno=code)
