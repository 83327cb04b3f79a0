"""The real file system behind the ports: POSIX calls, nothing else.

What is not here: what the bytes mean, and when to sync. Errors pass through as OSError.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import weakref
from collections.abc import Sequence
from typing import Final

IOV_MAX: Final = 1024
LOCK_NOTE_BYTES_MAX: Final = 4096


class RealFile:
    """An open file descriptor."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path

    def __repr__(self) -> str:
        return f"<RealFile {self._path} fd {self._fd}>"

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        """Write all buffers at `offset`. A short write is continued; the kernel says why at the next call."""
        written = os.pwritev(self._fd, buffers[:IOV_MAX], offset)
        if written == sum(map(len, buffers)):
            return
        pending = [memoryview(buffer) for buffer in buffers if buffer]
        while True:
            if written == 0:
                raise OSError(errno.EIO, "write made no progress", self._path)
            offset += written
            while pending and written >= len(pending[0]):
                written -= len(pending.pop(0))
            if not pending:
                return
            pending[0] = pending[0][written:]
            written = os.pwritev(self._fd, pending[:IOV_MAX], offset)

    def read(self, size: int, offset: int) -> bytes:
        """Read until `size` bytes or the end of the file."""
        data = os.pread(self._fd, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        got = len(data)
        while got < size and (data := os.pread(self._fd, size - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def datasync(self) -> None:
        """fdatasync(2): bytes, size and extents."""
        os.fdatasync(self._fd)

    def preallocate(self, size: int) -> None:
        """posix_fallocate(3); where the file system has none, only the size is set."""
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}:
                raise
            os.ftruncate(self._fd, size)

    def truncate(self, size: int) -> None:
        """ftruncate(2)."""
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        """fstat(2)."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """close(2), once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RealLock:
    """An flock(2) on an open lock file.

    The lock belongs to the open file: a second open conflicts, also in this process.

    A forked child shares the open file and would keep the lock alive, so the child closes it at the fork
    (closing does not unlock while the parent has it open).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.held = True
        _live_locks.add(self)

    def release(self) -> None:
        """Close the file, which unlocks it. The name stays: unlinking would let two openers lock two files."""
        self._close()

    def _close(self) -> None:
        self.held = False
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_live_locks: weakref.WeakSet[RealLock] = weakref.WeakSet()


def _drop_locks_in_child() -> None:
    for lock in list(_live_locks):
        lock._close()  # noqa: SLF001 - the module's own class


os.register_at_fork(after_in_child=_drop_locks_in_child)


class RealFileSystem:
    """The process's file system."""

    def make_directory(self, path: str) -> None:
        """mkdir(2), mode 0700."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not self.is_directory(path):
                raise

    def list_directory(self, path: str) -> list[str]:
        """Names, sorted."""
        return sorted(os.listdir(path))

    def is_directory(self, path: str) -> bool:
        """stat(2), following links. What cannot be looked at is not called missing: that would be made anew."""
        try:
            return stat.S_ISDIR(os.stat(path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def exists(self, path: str) -> bool:
        """lstat(2). What cannot be looked at is not called missing."""
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def create(self, path: str) -> RealFile:
        """open(2) with O_CREAT | O_EXCL, mode 0600."""
        return RealFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path)

    def open_read(self, path: str) -> RealFile:
        """open(2), read-only; a symbolic link is refused, since names in a store never lead outside it."""
        return RealFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), path)

    def truncate(self, path: str, size: int) -> None:
        """truncate(2)."""
        os.truncate(path, size)

    def rename(self, source: str, target: str) -> None:
        """rename(2)."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """unlink(2)."""
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        """fsync(2) on the directory."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str, note: bytes) -> RealLock | bytes:
        """flock(2), exclusive, without waiting."""
        flags = os.O_RDWR | os.O_CREAT if note else os.O_RDONLY
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            try:
                if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                    raise
                return os.pread(fd, LOCK_NOTE_BYTES_MAX, 0)
            finally:
                os.close(fd)
        # The note is for people who meet the lock; it is never trusted, so it needs no sync.
        if note:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
                os.pwrite(fd, note[:LOCK_NOTE_BYTES_MAX], 0)
        return RealLock(fd)
