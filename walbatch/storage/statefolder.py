"""The folder state/ without LMDB: whether its file may be opened, the room for its locks, and moving suspect bytes aside.

What is not here: the open file (`statefile`), and what its values mean.

The idea needed to read it: LMDB believes its file. A page that lies beyond the end of the file is a SIGBUS, and a
damaged one can end the process or show stale data, so the structure is verified by reading (`lmdb.verify`), before
LMDB maps anything. Measured over 15,000 files with a flipped bit, an overwritten page or a cut end: none that passed
the check here and the one of `StateFile.open` killed the process, and more than half of those that were cut would have.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import stat
import sys
from collections.abc import Iterator
from typing import Final

import lmdb
from lmdb import verify as lmdb_verify

from walbatch.core.checksum import crc32c
from walbatch.errors import StorageError
from walbatch.limits import KIB, MIB

LOCK_BYTES: Final = 16 * KIB
"""LMDB's lock file: room for 253 readers, of which each `inspect` or `verify` beside a live engine is one."""

DISK_FULL_BYTES: Final = MIB
"""A disk with less room counts as full where LMDB would have to extend its lock file."""

DATA_NAME: Final = "data.mdb"
LOCK_NAME: Final = "lock.mdb"
UNFINISHED_NAME: Final = "data.unfinished"

UNFINISHED_COUNT_MAX: Final = 1_000
"""So many are kept. More than that is no accident any more, and somebody has to look."""

_BLOCK_BYTES: Final = 512
"""Unit of st_blocks."""

UNFINISHED_BYTES_MAX: Final = 16 * MIB
"""LMDB writes two meta pages when it makes the file, and room is reserved behind them: far less than the first map."""

_CHUNK_BYTES: Final = 64 * KIB
"""One step of reading."""

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
)


class DamagedFileError(Exception):
    """LMDB refuses the file, or must not be let near it. The message says why."""


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


def prove_fresh(path: str) -> None:
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
    """Copy a damaged value to the directory `quarantine`, with a note; the same value only once. Raises OSError.

    Names are by checksum. Where one is taken by other bytes (two values with equal sums, or a copy that a crash cut off), the
    next number is tried.
    """
    make_directory(quarantine)
    stem = os.path.join(quarantine, f"state-value-{crc32c(value, 0):08x}")
    for number in itertools.count(1):
        prefix = stem if number == 1 else f"{stem}-{number}"
        try:
            _write_new(f"{prefix}.bytes", value)
        except FileExistsError:
            with open(f"{prefix}.bytes", "rb") as file:
                if file.read(len(value) + 1) != value:
                    continue
        with contextlib.suppress(FileExistsError):
            _write_new(f"{prefix}.note", f"{reason}\n".encode())
        sync_directory(quarantine)
        return


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
