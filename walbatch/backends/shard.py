"""One shard of `LmdbBackend`: an LMDB environment, its transactions, and its map.

What is not here: what a batch does (`lmdb`), and which shard a key belongs to.

The idea needed to read it: a map that is full is replaced by one of twice the size, which ends every transaction of
this process in this environment. So readers pass a gate: the map is replaced when nobody is inside.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import lmdb

from walbatch.core.mark import decode_mark, encode_mark
from walbatch.errors import ConfigError, CorruptionError, EngineClosed, StorageError, WalbatchError
from walbatch.limits import KIB, MIB
from walbatch.types import Mark

KEY_BYTES_MAX: Final = 511
"""LMDB's limit, in the format that py-lmdb gives to new files."""

DATABASES_MAX: Final = 8
"""`data` and `marks`, and room for later versions."""

LOCK_BYTES: Final = 32 * KIB
READERS_MAX: Final = 500
"""Reading transactions at once, over all processes. Each has 64 bytes in LMDB's lock file: these fit in LOCK_BYTES."""

DISK_FULL_BYTES: Final = MIB
"""A disk with less room counts as full."""

CHUNK_COUNT: Final = 1_000
CHUNK_BYTES: Final = MIB
"""One step of iteration: no transaction stays open while the caller works, and memory is bounded."""

ADOPTIONS_MAX: Final = 3
"""How often one transaction is tried again because another process has grown the file."""

CLOSE_WAIT_S: Final = 5.0
"""How long `close` waits for a write that does not end. Then the file stays open until the process ends."""

_OPENED_KEY: Final = b"opened"
"""In `marks`. The keys of marks are longer: they begin with a UUID."""

_DATA_NAME: Final = "data.mdb"
_LOCK_NAME: Final = "lock.mdb"
_BLOCK_BYTES: Final = 512
"""Unit of st_blocks."""

UNFINISHED_BYTES_MAX: Final = 16 * mmap.PAGESIZE
"""More than a shard takes before anything is applied to it."""

UNFINISHED_COUNT_MAX: Final = 1_000
"""So many are kept. More than that is no accident any more, and somebody has to look."""

_META_BYTES: Final = 256
"""The beginning of a meta page, in which the roots of its two trees stand."""
_META_ROOTS: Final = 2
_NO_ROOT: Final = b"\xff" * 8

_NOT_DAMAGE: Final = (
    lmdb.MapFullError,
    lmdb.MapResizedError,
    lmdb.ReadersFullError,
    lmdb.TlsFullError,
    lmdb.DbsFullError,
    lmdb.TxnFullError,
    lmdb.BadTxnError,
)

Transaction: TypeAlias = "lmdb.Transaction[bytes]"
_T = TypeVar("_T")


class Shard:
    """An open environment. `view` is safe from any thread, `update` runs one at a time.

    `_writing` is held by the thread that writes or replaces the map; `_gate` keeps readers out while it is replaced.
    """

    def __init__(self, env: lmdb.Environment, path: Path, *, map_bytes_max: int) -> None:
        """Not for users: see `open`."""
        self._env: lmdb.Environment | None = env
        self._path = path
        self._map_bytes_max = map_bytes_max
        self._data: lmdb._Database | None = None
        self._marks: lmdb._Database | None = None
        self._writing = threading.RLock()
        self._gate = _Gate()

    def __repr__(self) -> str:
        return f"<Shard {self._path} {'closed' if self._env is None else 'open'}>"

    @classmethod
    def open(cls, path: Path, *, readonly: bool, map_bytes: int, map_bytes_max: int) -> Shard:
        """Open the environment in the directory `path`; unless `readonly`, make what is missing.

        Raises CorruptionError, StorageError, ConfigError if this process has it open already.
        """
        with shard_errors(path):
            try:
                _reserve_lock_file(path)
            except OSError as error:
                # A reader that may not write there leaves it to LMDB, which can do without on a read-only disk.
                if not readonly or error.errno not in {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT}:
                    raise
            env = lmdb.open(
                os.fspath(path),
                map_size=max(map_bytes, 2 * _data_bytes(path)) if readonly else map_bytes,
                max_dbs=DATABASES_MAX,
                max_readers=READERS_MAX,
                mode=0o600,
                create=False,
                readonly=readonly,
            )
        shard = cls(env, path, map_bytes_max=map_bytes_max)
        try:
            with shard_errors(path):
                shard._check_size(env)
                if not readonly and not env.info()["last_txnid"]:
                    _prove_fresh(path)
                shard._open_databases(env, readonly=readonly)
        except BaseException:
            env.close()
            raise
        return shard

    def _check_size(self, env: lmdb.Environment) -> None:
        """LMDB reads through a map: a page beyond the end of the file would end the process."""
        size, needed = _data_bytes(self._path), _used_bytes(env)
        if size < needed:
            raise CorruptionError(
                f"{self._path / _DATA_NAME} has {size:,} bytes, but its pages take {needed:,}: it was cut off; restore "
                "it from a backup",
                path=str(self._path / _DATA_NAME),
                offset=size,
                expected=f"{needed:,} bytes",
            )

    def _open_databases(self, env: lmdb.Environment, *, readonly: bool) -> None:
        """Open `data` and `marks`, and prove that what they show is durable.

        Crash story: after a commit whose last write failed, that commit can be visible in the page cache and yet not
        be on disk; an engine that believed its mark would forget operations that a power cut takes back. A commit of
        our own has all before it on disk when it returns.
        """
        if readonly:
            with contextlib.suppress(lmdb.NotFoundError):
                self._data = env.open_db(b"data", create=False)
                self._marks = env.open_db(b"marks", create=False)
            return
        env.reader_check()

        def open_all() -> None:
            self._data = env.open_db(b"data")
            self._marks = env.open_db(b"marks")
            with env.begin(write=True) as txn:
                txn.put(_OPENED_KEY, b"%d" % env.info()["last_txnid"], db=self._marks)

        self._growing(env, open_all)

    # --- transactions ---------------------------------------------------------------------------------------------

    def update(self, change: Callable[[Transaction], _T]) -> _T:
        """Run `change` in a writing transaction (default database: `data`), committed and synced when it returns.

        It runs again if the map had to grow. Raises what it raises (nothing is changed then), StorageError,
        CorruptionError, ConfigError for a key that LMDB does not take.
        """
        with self._writing:
            env = self._opened()

            def run() -> _T:
                with env.begin(db=self._data, write=True) as txn:
                    return change(txn)

            with shard_errors(self._path):
                result = self._growing(env, run)
            self._pad(env)
            return result

    def view(self, look: Callable[[Transaction], _T]) -> _T:
        """Run `look` in a reading transaction: it sees the last commit, whole. Raises StorageError, CorruptionError."""
        for _ in range(ADOPTIONS_MAX):
            with self._gate.inside(), shard_errors(self._path):
                env = self._opened()
                with contextlib.suppress(lmdb.MapResizedError), env.begin(db=self._data) as txn:
                    return look(txn)
            self._resize(0)
        raise StorageError(f"{self._path} grows faster than it can be read: try again", path=str(self._path))

    def _growing(self, env: lmdb.Environment, run: Callable[[], _T]) -> _T:
        """`run()`, again with a larger map where it does not fit, up to the ceiling."""
        adoptions = 0
        while True:
            try:
                return run()
            except lmdb.MapFullError as error:
                map_bytes = env.info()["map_size"]
                if map_bytes >= self._map_bytes_max:
                    raise StorageError(
                        f"{self._path} is full: its map has {map_bytes:,} bytes and may not grow beyond map_bytes_max "
                        f"({self._map_bytes_max:,}); make LmdbBackend with a larger one, or delete data",
                        path=str(self._path),
                        errno=errno.ENOSPC,
                    ) from error
                self._resize(min(2 * map_bytes, self._map_bytes_max))
            except lmdb.MapResizedError:
                adoptions += 1
                if adoptions > ADOPTIONS_MAX:
                    raise
                self._resize(0)

    def _resize(self, map_bytes: int) -> None:
        """Replace the map (0: by one as large as another process has made it)."""
        with self._writing, self._gate.alone(), shard_errors(self._path):
            self._opened().set_mapsize(map_bytes)

    def _pad(self, env: lmdb.Environment) -> None:
        """Let the file reach to its last page. LMDB leaves out pages at its end that a transaction took and gave back."""
        with contextlib.suppress(OSError):
            if _data_bytes(self._path) < (needed := _used_bytes(env)):
                os.truncate(self._path / _DATA_NAME, needed)

    def _opened(self) -> lmdb.Environment:
        if self._env is None:
            raise EngineClosed(f"{self._path} is closed")
        return self._env

    def close(self) -> None:
        """Close it when nobody is inside. Idempotent."""
        if not self._writing.acquire(timeout=CLOSE_WAIT_S):
            return
        try:
            with self._gate.alone():
                env, self._env = self._env, None
                if env is not None:
                    env.close()
        finally:
            self._writing.release()

    # --- what transactions do -------------------------------------------------------------------------------------

    def mark(self, txn: Transaction, key: bytes) -> Mark:
        """The mark under `key`, or `Mark()`. Raises CorruptionError: to take it for empty would apply everything again."""
        data = txn.get(key, db=self._marks) if self._marks is not None else None
        if data is None:
            return Mark()
        try:
            return decode_mark(data)
        except ValueError as error:
            raise CorruptionError(
                f"{self._path}: the mark of lane {key[16:]!r} is damaged ({error}); which operations took effect cannot "
                "be told any more: restore the directory from a backup, or give the lane a new one",
                path=str(self._path),
                expected="a mark",
            ) from error

    def put_mark(self, txn: Transaction, key: bytes, mark: Mark) -> None:
        """Store a mark."""
        txn.put(key, encode_mark(mark), db=self._marks)

    def get(self, txn: Transaction, key: bytes) -> bytes | None:
        """The payload under `key`."""
        return txn.get(key) if self._data is not None else None

    def count(self, txn: Transaction) -> int:
        """The number of keys."""
        return txn.stat(self._data)["entries"] if self._data is not None else 0

    def chunk(self, txn: Transaction, after: bytes | None) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """The pairs behind the key `after` (None: from the first), up to one step; and the last key if there may be more."""
        pairs: list[tuple[bytes, bytes]] = []
        if self._data is None:
            return pairs, None
        size = 0
        with txn.cursor() as cursor:
            found = cursor.first() if after is None else cursor.set_range(after)
            if found and cursor.key() == after:
                found = cursor.next()
            while found:
                if len(pairs) == CHUNK_COUNT or size >= CHUNK_BYTES:
                    return pairs, pairs[-1][0]
                key, value = cursor.item()
                pairs.append((key, value))
                size += len(key) + len(value)
                found = cursor.next()
        return pairs, None

    def has_history(self) -> bool:
        """Whether anything was ever applied here."""
        return self.view(lambda txn: self.count(txn) + txn.stat(self._marks)["entries"] > 1)

    def disk_bytes(self) -> int:
        """Size of the data file."""
        return _data_bytes(self._path)

    def map_bytes(self) -> int:
        """Size of the map."""
        with self._gate.inside():
            return self._opened().info()["map_size"]


class _Gate:
    """Many inside, or one alone. `_cond` guards both fields. Everybody inside leaves soon: they only read one step."""

    def __init__(self) -> None:
        self._cond = threading.Condition()
        self._inside = 0
        self._taken = False

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self._cond:
            while self._taken:
                self._cond.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._cond:
                self._inside -= 1
                if not self._inside:
                    self._cond.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._cond:
            while self._taken:
                self._cond.wait()
            self._taken = True
            while self._inside:
                self._cond.wait()
        try:
            yield
        finally:
            with self._cond:
                self._taken = False
                self._cond.notify_all()


def _reserve_lock_file(path: Path) -> None:
    """Give LMDB's lock file its blocks. LMDB writes it through a map: a hole in it, on a full disk, is a SIGBUS.

    A file that exists is not opened: closing it would end LMDB's locks, if this process has it open already. LMDB
    takes over a file of zeros, so a crash leaves nothing to repair. Raises OSError.
    """
    name = path / _LOCK_NAME
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(name))
    try:
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        if name.stat().st_blocks * _BLOCK_BYTES < LOCK_BYTES and _is_disk_full(path):
            raise full from None
        return
    try:
        if os.write(file, bytes(LOCK_BYTES)) < LOCK_BYTES:
            raise full
    except OSError:
        name.unlink()
        raise
    finally:
        os.close(file)


def set_aside_unfinished(path: Path) -> None:
    """Rename a data file whose making was cut off, so that it is made again: LMDB refuses it. Raises OSError.

    Crash story: LMDB writes both meta pages first, without a sync, and a full disk or a power cut may leave one of them
    or none. A file with a root, or with anything but zeros behind those pages, was applied to and lost its layout: it is
    left as it is, to be refused.
    """
    data = path / _DATA_NAME
    try:
        found_there = data.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found_there.st_mode) or not 0 < found_there.st_size <= UNFINISHED_BYTES_MAX:
        return
    with data.open("rb") as file:
        pages = file.read(mmap.PAGESIZE), file.read(mmap.PAGESIZE)
        behind = file.read(UNFINISHED_BYTES_MAX)
    rootless = all(not any(page) or page[:_META_BYTES].count(_NO_ROOT) == _META_ROOTS for page in pages)
    if not rootless or all(map(any, pages)) or any(behind):
        return
    for number in range(1, UNFINISHED_COUNT_MAX + 1):
        name = path / f"data.unfinished-{number}"
        if not os.path.lexists(name):
            data.rename(name)
            return
    raise FileExistsError(errno.EEXIST, f"{UNFINISHED_COUNT_MAX:,} unfinished files: remove them", str(path))


def _prove_fresh(path: Path) -> None:
    """Make the two meta pages durable, before the first commit writes anything behind them. Raises OSError.

    Crash story: LMDB has written them without a sync. A power cut in the first commit could otherwise leave its pages and
    not these two, which looks like a file that was applied to.
    """
    file = os.open(path / _DATA_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


def _data_bytes(path: Path) -> int:
    try:
        return (path / _DATA_NAME).stat().st_size
    except FileNotFoundError:
        return 0


def _used_bytes(env: lmdb.Environment) -> int:
    return (env.info()["last_pgno"] + 1) * env.stat()["psize"]


# --- errors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shard_errors(path: Path) -> Iterator[None]:
    """Turn LMDB's and the system's errors into ours; those of the system keep their errno."""
    try:
        yield
    except lmdb.Error as error:
        raise _ours(path, error) from error
    except OSError as error:
        raise _storage_error(path, error.strerror or str(error), error.errno) from error


def _ours(path: Path, error: lmdb.Error) -> WalbatchError:
    if isinstance(error, lmdb.BadValsizeError):
        return ConfigError(f"{path}: LMDB takes keys of 1 to {KEY_BYTES_MAX} bytes only: {error}")
    if "already open" in str(error):
        return ConfigError(f"{path} is already open in this process: use the LmdbBackend that has it open")
    # Positive codes are errno, negative ones LMDB's; py-lmdb itself has none.
    code = getattr(error, "code", 0)
    reason = str(error).removeprefix(f"{path}: ")
    if code > 0:
        return _storage_error(path, reason, code)
    if isinstance(error, _NOT_DAMAGE) or (code == 0 and "data format" not in str(error)):
        return _storage_error(path, reason, None)
    return CorruptionError(
        f"{path / _DATA_NAME} is damaged ({reason}): restore it from a backup",
        path=str(path / _DATA_NAME),
        expected="a sound LMDB file",
    )


def _storage_error(path: Path, reason: str, code: int | None) -> StorageError:
    if code == errno.EIO and _is_disk_full(path):
        # A write that is cut short by a full disk is an I/O error to LMDB.
        code = errno.ENOSPC
    if code in {errno.ENOSPC, errno.EDQUOT}:
        hint = "make room on the disk"
    elif code in {errno.EACCES, errno.EPERM, errno.EROFS}:
        hint = "make it writable for this user, or choose another directory"
    elif code in {errno.EEXIST, errno.ENOTDIR}:
        hint = "the path must be a directory"
    elif code in {errno.EMFILE, errno.ENFILE}:
        hint = "allow more open files (ulimit -n); each shard takes three"
    elif code == errno.ENOMEM:
        hint = "allow more address space (ulimit -v), or use a smaller map_bytes"
    elif code == errno.ENOENT:
        hint = "it cannot be made there, or is gone: check the path, or restore it from a backup"
    else:
        hint = "check the disk"
    return StorageError(f"{path}: {reason}: {hint}", path=str(path), errno=code)


def _is_disk_full(path: Path) -> bool:
    with contextlib.suppress(OSError):
        disk = os.statvfs(path)
        return disk.f_bavail * disk.f_frsize < DISK_FULL_BYTES
    return False
