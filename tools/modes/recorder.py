"""The file-system port on the real disk, telling the parent every call that changes anything, before and after it.

What is not here: what the parent makes of it (`modelcheck`). State in LMDB does not pass through the port, and is not told.

The idea needed to read it: a call is told before it begins, so that whatever it may have done when the power failed is
known; and told again when it has returned, because only then what it promises holds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from tools.modes.forks import Channel
from walbatch.ports import File, FileLock, FileSystem
from walbatch.storage.filesystem import RealFile, RealFileSystem

T = TypeVar("T")

DATASYNC: Final = "datasync"
SYNC_DIRECTORY: Final = "sync_directory"


class RecordingFileSystem:
    """Tells `channel` of the calls below `mount`: ("call", number, name, arguments...), then ("done", number, succeeded, when)."""

    def __init__(self, fs: FileSystem, mount: str, channel: Channel) -> None:
        self._fs = fs
        self._mount = mount
        self._channel = channel
        self._numbers = itertools.count(1)

    def told(self, act: Callable[[], T], name: str, *arguments: object, raw: bytes = b"") -> T:
        """Do a call, and tell of it."""
        number = next(self._numbers)
        self._channel.say("call", number, name, *arguments, raw=raw)
        succeeded = False
        try:
            answer = act()
            succeeded = True
        finally:
            self._channel.say("done", number, succeeded, time.monotonic())
        return answer

    def _told_of(self, path: str, act: Callable[[], T], name: str, *arguments: object) -> T:
        place = self._place(path)
        return act() if place is None else self.told(act, name, place, *arguments)

    def _place(self, path: str) -> str | None:
        """The path below the mount point; None outside of it."""
        inside = path == self._mount or path.startswith(self._mount + "/")
        return path[len(self._mount) :] or "/" if inside else None

    def make_directory(self, path: str) -> None:
        """Told."""
        self._told_of(path, lambda: self._fs.make_directory(path), "make_directory")

    def list_directory(self, path: str) -> list[str]:
        """Not told: it changes nothing."""
        return self._fs.list_directory(path)

    def is_directory(self, path: str) -> bool:
        """Not told."""
        return self._fs.is_directory(path)

    def exists(self, path: str) -> bool:
        """Not told."""
        return self._fs.exists(path)

    def create(self, path: str) -> File:
        """Told; the calls of the file name it by the number of this one."""
        place = self._place(path)
        if place is None:
            return self._fs.create(path)
        handle = next(self._numbers)
        file = self.told(lambda: self._fs.create(path), "create", place, handle)
        return RecordingFile(file, handle, self)

    def open_read(self, path: str) -> File:
        """Not told."""
        return self._fs.open_read(path)

    def truncate(self, path: str, size: int) -> None:
        """Told."""
        self._told_of(path, lambda: self._fs.truncate(path, size), "truncate", size)

    def rename(self, source: str, target: str) -> None:
        """Told."""
        self._told_of(source, lambda: self._fs.rename(source, target), "rename", self._place(target))

    def unlink(self, path: str) -> None:
        """Told."""
        self._told_of(path, lambda: self._fs.unlink(path), "unlink")

    def sync_directory(self, path: str) -> None:
        """Told."""
        self._told_of(path, lambda: self._fs.sync_directory(path), SYNC_DIRECTORY)

    def lock(self, path: str, note: bytes) -> FileLock | bytes:
        """Told: it may create the file."""
        return self._told_of(path, lambda: self._fs.lock(path, note), "lock")


class RecordingFile:
    """A file of it, made by this process."""

    def __init__(self, file: File, handle: int, fs: RecordingFileSystem) -> None:
        self._file = file
        self._handle = handle
        self._fs = fs

    def write(self, buffers: Sequence[bytes], offset: int) -> None:
        """Told with its bytes."""
        data = b"".join(buffers)
        self._fs.told(lambda: self._file.write(buffers, offset), "write", self._handle, offset, raw=data)

    def read(self, size: int, offset: int) -> bytes:
        """Not told."""
        return self._file.read(size, offset)

    def datasync(self) -> None:
        """Told."""
        self._fs.told(self._file.datasync, DATASYNC, self._handle)

    def preallocate(self, size: int) -> None:
        """Told."""
        self._fs.told(lambda: self._file.preallocate(size), "preallocate", self._handle, size)

    def truncate(self, size: int) -> None:
        """Told."""
        self._fs.told(lambda: self._file.truncate(size), "resize", self._handle, size)

    def size(self) -> int:
        """Not told."""
        return self._file.size()

    def close(self) -> None:
        """Not told."""
        self._file.close()


class SkippingFileSystem(RealFileSystem):
    """A control: `skips` names a call that does nothing and reports success, as a mistaken engine would leave it out."""

    def __init__(self, skips: str) -> None:
        assert skips in {DATASYNC, SYNC_DIRECTORY}, skips
        self._skips = skips

    def create(self, path: str) -> RealFile:
        """A file without its sync, if that is what is skipped."""
        file = super().create(path)
        return UnsyncedFile(file) if self._skips == DATASYNC else file

    def sync_directory(self, path: str) -> None:
        """Or not."""
        if self._skips != SYNC_DIRECTORY:
            super().sync_directory(path)


class UnsyncedFile(RealFile):
    """A file whose sync does nothing."""

    def __init__(self, file: RealFile) -> None:
        super().__init__(file._fd, file._path)  # noqa: SLF001 - takes it over
        file._fd = -1  # noqa: SLF001

    def datasync(self) -> None:
        """What should have been a sync."""
